"""Files of rows: JSON lines, JSON, CSV, Parquet, and data sets by their name on the hub, which are streamed."""

import codecs
import csv
import importlib.util
import io
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from lori_dist.errors import ConfigError
from lori_dist.files import require_regular

HUB = "hub:"
"""Begins `hub:NAME:SPLIT`, a data set of the hub, or a folder of data files, as `datasets` loads it."""
Row = dict[str, Any]
BLANKS = re.compile(r"[ \t\n\r]*")
UNDECODED = re.compile("[\udc80-\udcff]")
"""Bytes that are not UTF-8, as `surrogateescape` keeps them."""


def is_hub(path: str) -> bool:
    return path.startswith(HUB)


def problem_of(path: str) -> str | None:
    """What is wrong with a name before anything is read."""
    if is_hub(path) and len(path.split(":")) != 3:
        return f"{path!r} was given; wanted hub:NAME:SPLIT, such as hub:openai/gsm8k:train"
    if (is_hub(path) or path.endswith(".parquet")) and importlib.util.find_spec("datasets") is None:
        return f"{path!r} needs the package datasets, which is not installed; pip install 'lori_dist[data]'"
    return None


def read(path: str) -> Iterator[tuple[int, Row | ConfigError]]:
    """The rows, numbered as their lines are where they have lines, from 1; for one that is none, what is wrong with it.

    Blank lines are skipped. The ending tells the kind of file: .csv, .parquet, .json with an array in it; anything else
    is JSON lines. Values of a CSV file are text. Raises OSError for a file that cannot be read, ConfigError for a data
    set that cannot be.
    """
    if problem := problem_of(path):
        raise ConfigError(problem)
    if not is_hub(path):
        require_regular(path)
    if is_hub(path):
        _, name, split = path.split(":")
        yield from _streamed(name, split=split)
    elif path.endswith(".parquet"):
        Path(path).open("rb").close()  # or the error would be of another class
        yield from _streamed("parquet", split="train", data_files=path)
    elif path.endswith(".csv"):
        yield from _csv(path)
    elif path.endswith(".json") and _begins(path, b"["):
        yield from _array(path)
    else:
        yield from _lines(path)


def _lines(path: str) -> Iterator[tuple[int, Row | ConfigError]]:
    with open(path, "rb") as file:  # as bytes: lines end at \n only, not at the separators inside a JSON string
        for number, raw in enumerate(file, start=1):
            line = raw.removeprefix(codecs.BOM_UTF8).strip()
            if line:
                yield number, _parsed(line)


def _parsed(line: bytes) -> Row | ConfigError:
    try:
        # Numbers with a point stay as they are written: 1.50 is not 1.5 in a text.
        row = json.loads(line.decode(), parse_float=str, parse_constant=_refuse_constant)
    except UnicodeDecodeError as error:
        return ConfigError(f"byte {error.start + 1} is not UTF-8; save the file as UTF-8")
    except (ValueError, RecursionError) as error:
        return ConfigError(f"is not JSON ({error}); wanted one JSON object on each line")
    return _object(row)


def _object(row: Any) -> Row | ConfigError:
    if isinstance(row, dict):
        return row
    return ConfigError(f"holds {kind(row)}; wanted a JSON object such as {{'prompt': ..., 'response': ...}}")


def _array(path: str) -> Iterator[tuple[int, Row | ConfigError]]:
    """Each row with the line it begins in. After what is not JSON nothing can be told from anything."""
    raw = Path(path).read_bytes()
    try:
        text = raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = raw.count(b"\n", 0, error.start) + 1
        yield line, ConfigError(f"byte {error.start + 1} is not UTF-8; save the file as UTF-8")
        return
    constants: list[str] = []
    decoder = json.JSONDecoder(parse_float=str, parse_constant=constants.append)
    place, line, counted = _after_blanks(text, text.index("[") + 1), 1, 0
    more = not text.startswith("]", place)
    while more:
        line, counted = line + text.count("\n", counted, place), place
        try:
            row, place = decoder.raw_decode(text, place)
        except (ValueError, RecursionError) as error:
            yield line, ConfigError(f"is not JSON ({error}); wanted an array of objects, or one object on each line")
            return
        yield line, ConfigError(_no_value(constants.pop())) if constants else _object(row)
        constants.clear()
        place = _after_blanks(text, place)
        more = text.startswith(",", place)
        place = _after_blanks(text, place + more)
    if text[place:].rstrip() != "]":
        yield line, ConfigError("is followed by no comma, or the array by more; wanted an array of objects")


def _after_blanks(text: str, place: int) -> int:
    match = BLANKS.match(text, place)
    assert match is not None  # of no blanks too
    return match.end()


def _csv(path: str) -> Iterator[tuple[int, Row | ConfigError]]:
    # What is not UTF-8 is let through, to be told with the line of its row.
    text = Path(path).read_bytes().decode("utf-8-sig", errors="surrogateescape")
    csv.field_size_limit(max(csv.field_size_limit(), len(text)))
    reader = csv.reader(io.StringIO(text, newline=""), strict=True)
    header: list[str] | None = None
    number = 1
    while True:
        try:
            values = next(reader)
        except StopIteration:
            return
        except csv.Error as error:
            yield number, ConfigError(f"is not CSV ({error}); put a text with quotes or commas in quotes")
        else:
            if any(UNDECODED.search(value) for value in values):
                yield number, ConfigError("is not UTF-8; save the file as UTF-8")
            elif header is None:
                header = values
            elif len(values) == len(header):
                yield number, dict(zip(header, values, strict=True))
            elif values:
                yield number, ConfigError(f"has {len(values)} values; the header, in line 1, has {len(header)}")
        number = reader.line_num + 1


def _streamed(name: str, **options: Any) -> Iterator[tuple[int, Row | ConfigError]]:
    """One row after the other, without a copy of the data set on the disk."""
    import datasets

    try:
        yield from enumerate(datasets.load_dataset(name, streaming=True, **options), start=1)
    except Exception as error:  # of nearly any class
        reason = str(error).strip().partition("\n")[0]
        where = options.get("data_files", name)
        raise ConfigError(f"{where} cannot be read ({type(error).__name__}: {reason}); check name and split") from error


def _begins(path: str, sign: bytes) -> bool:
    with open(path, "rb") as file:
        return file.read(64).removeprefix(codecs.BOM_UTF8).lstrip().startswith(sign)


def _refuse_constant(name: str) -> Any:
    raise ValueError(_no_value(name))


def _no_value(name: str) -> str:
    return f"{name} is no JSON value; a missing value is often written so"


def kind(value: Any) -> str:
    return (
        "null"
        if value is None
        else {"dict": "an object", "list": "a list", "str": "text"}.get(type(value).__name__, "a number")
    )
