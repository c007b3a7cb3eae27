"""Files of rows: JSON lines, JSON, CSV, TSV, Parquet, and data sets by their name on the hub, which are streamed."""

import bz2
import codecs
import csv
import gzip
import importlib.util
import io
import itertools
import json
import lzma
import math
import os
import re
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from decimal import Decimal
from typing import IO, Any

from lori_dist.errors import ConfigError
from lori_dist.files import require_regular

HUB = "hub:"
"""Prefix of `hub:NAME:SPLIT`, a data set of the hub, or a folder of data files, as `datasets` loads it."""
Row = dict[str, Any]
BLANKS = re.compile(r"[ \t\n\r]*")
UNDECODED = re.compile("[\udc80-\udcff]")
"""Matches bytes that are not UTF-8, as `surrogateescape` keeps them."""
COMPRESSED = (".gz", ".bz2", ".xz", ".zst")
"""Endings that may follow the one of the file's kind. How a file is compressed is found from its content."""
HOLDERS = ("data", "rows", "examples", "instances", "items", "records")
"""Keys under which a JSON object may have its rows if it has other keys as well."""
DELIMITERS = {".csv": ",", ".tsv": "\t"}
SEPARATORS = {",": "commas", "\t": "tabs"}
MISSING = ("", "NaN", "nan", "<NA>", "NULL", "null")
"""Cells of a CSV file that stand for no value, where JSON has null and Parquet an empty cell."""


@dataclass(frozen=True, slots=True)
class Missing:
    """A missing value, as a CSV file writes it."""

    written: str


def _zstandard(path: str) -> IO[bytes]:
    if importlib.util.find_spec("pyarrow") is None:
        raise ConfigError(
            f"{path}: is compressed by zstd, and the package pyarrow, which reads it, is not installed; decompress the "
            "file, or pip install 'lori_dist[data]'"
        )
    import pyarrow  # type: ignore[import-untyped]

    opened: IO[bytes] = io.BufferedReader(pyarrow.input_stream(path, compression="zstd"))
    return opened


OPENERS: Mapping[bytes, Callable[[str], Any]] = {
    b"\x1f\x8b": gzip.open,
    b"BZh": bz2.open,
    b"\xfd7zXZ\x00": lzma.open,
    b"\x28\xb5\x2f\xfd": _zstandard,
}
"""The first bytes of a compressed file -> the function that opens it."""
OTHERS: Mapping[bytes, str] = {
    b"PK\x03\x04": "is a ZIP archive, as an Excel file is one; save its rows as JSON lines, CSV or Parquet",
    b"PAR1": "is a Parquet file; give it a name that ends in .parquet",
    b"ARROW1": "is an Arrow file; save its rows as Parquet",
    codecs.BOM_UTF16_LE: "is UTF-16; save the file as UTF-8",
    codecs.BOM_UTF16_BE: "is UTF-16; save the file as UTF-8",
}
"""The first bytes of files that are not read -> the end of the message for them."""


def is_hub(path: str) -> bool:
    """Whether a path names a data set of the hub."""
    return path.startswith(HUB)


def problem_of(path: str) -> str | None:
    """The mistake in a file's name, found before anything is read; None if there is none."""
    if is_hub(path) and len(path.split(":")) != 3:
        return f"got {path!r}; wanted hub:NAME:SPLIT, such as hub:openai/gsm8k:train"
    if (is_hub(path) or ending(path) == ".parquet") and importlib.util.find_spec("datasets") is None:
        return f"{path!r} needs the package datasets, which is not installed; pip install 'lori_dist[data]'"
    return None


def ending(path: str) -> str:
    """The ending of a file's name in lower case, without that of its compression: `.csv` for `ROWS.CSV.gz`."""
    name = os.path.basename(path.rstrip("/")).lower()
    while name.endswith(COMPRESSED):
        name = name.rpartition(".")[0]
    return os.path.splitext(name)[1]


def read(path: str) -> Iterator[tuple[int, Row | ConfigError]]:
    """Yields the rows, numbered from 1, or as their lines are if they have lines; for a row that is not one, the error.

    Blank lines are skipped. The ending, in small letters or capitals, tells the kind of file: .csv, .tsv, .parquet,
    .json with an array or with an object that holds one under a key; anything else is JSON lines. Files may be
    compressed by gzip, bzip2, xz or zstd. Values of a CSV file are text, or `Missing`. Raises OSError for a file that
    cannot be read, ConfigError for one of another kind or a damaged one, and for a data set that cannot be read.
    """
    if problem := problem_of(path):
        raise ConfigError(problem)
    if not is_hub(path):
        require_regular(path)
    if is_hub(path):
        _, name, split = path.split(":")
        yield from _streamed(name, split=split)
        return
    kind_of_file = ending(path)
    if kind_of_file == ".parquet":
        with open(path, "rb") as file:  # or the error of a missing file would be of another class
            if any(file.read(6).startswith(sign) for sign in OPENERS):
                raise ConfigError(
                    f"{path}: is a compressed Parquet file; decompress it, as Parquet compresses by itself"
                )
        yield from _streamed("parquet", split="train", data_files=path)
        return
    try:
        with _opened(path) as file:
            if kind_of_file in DELIMITERS:
                yield from _csv(file.read(), DELIMITERS[kind_of_file])
            elif kind_of_file == ".json":
                yield from _json(file)
            else:
                yield from _lines(file)
    except (EOFError, zlib.error, lzma.LZMAError) as error:
        raise ConfigError(f"{path}: is a damaged compressed file ({error}); make it again") from error
    except OSError as error:
        if error.strerror is not None:
            raise
        raise ConfigError(f"{path}: is a damaged compressed file ({error}); make it again") from error


def _opened(path: str) -> IO[bytes]:
    file = open(path, "rb")  # noqa: SIM115  # the caller closes it
    try:
        head = file.read(6)
        for sign, problem in OTHERS.items():
            if head.startswith(sign):
                raise ConfigError(f"{path}: {problem}")
        opener = next((opener for sign, opener in OPENERS.items() if head.startswith(sign)), None)
        file.seek(0)
    except BaseException:
        file.close()
        raise
    if opener is None:
        return file
    file.close()
    opened: IO[bytes] = opener(path)
    return opened


def text(row: Mapping[str, Any], name: str) -> str:
    """A field as it reads in a prompt. Raises ConfigError if it is missing, or neither text nor a number."""
    if name not in row:
        raise ConfigError(f"has no field {name!r}; there are {', '.join(sorted(row)) or 'none'}")
    value = row[name]
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, float | Decimal) and not math.isfinite(value):
        raise ConfigError(f"field {name!r} is {value}, as a missing value is often written; wanted text or a number")
    if isinstance(value, int | float | Decimal):  # a file without text, as Parquet, has numbers with a point
        return str(value)
    if not isinstance(value, str):
        raise ConfigError(f"field {name!r} is {kind(value)}; wanted text or a number")
    check_encodable(value, f"field {name!r}")
    return value


def check_encodable(value: str, what: str) -> None:
    """Raises ConfigError for text that no file could hold."""
    try:
        value.encode()
    except UnicodeEncodeError:
        raise ConfigError(f"{what} has half of a surrogate pair; wanted Unicode text") from None


def _lines(file: Iterable[bytes]) -> Iterator[tuple[int, Row | ConfigError]]:
    decoder = _Decoder()
    for number, raw in enumerate(file, start=1):  # as bytes: lines end at \n only, not at separators in a JSON string
        line = raw.removeprefix(codecs.BOM_UTF8).strip()
        if line:
            yield number, _parsed(line, decoder)


def _parsed(line: bytes, decoder: "_Decoder") -> Row | ConfigError:
    decoder.problem()  # forgets what a line that was not read to its end had
    try:
        row = decoder.decode(line.decode())
    except UnicodeDecodeError as error:
        return ConfigError(f"byte {error.start + 1} is not UTF-8; save the file as UTF-8")
    except (ValueError, RecursionError) as error:
        return ConfigError(f"is not JSON ({error}); wanted one JSON object on each line")
    return decoder.problem() or _object(row)


class _Decoder(json.JSONDecoder):
    """Notes what is not JSON though Python reads it. Numbers with a point stay as they are written: 1.50 is not 1.5 in
    a text."""

    def __init__(self) -> None:
        self.constants: list[str] = []
        self.repeated: list[str] = []
        super().__init__(parse_float=str, parse_constant=self.constants.append, object_pairs_hook=self._pairs)

    def _pairs(self, pairs: list[tuple[str, Any]]) -> Row:
        found = dict(pairs)
        if len(found) < len(pairs):
            self.repeated += _repeated([key for key, _ in pairs])
        return found

    def problem(self) -> ConfigError | None:
        """The mistake found by reading since the last call; None if there was none."""
        found = None
        if self.constants:
            found = ConfigError(
                f"is not JSON ({self.constants[0]} is not a JSON value; a missing value is often written so)"
            )
        elif self.repeated:
            found = ConfigError(f"has the field {self.repeated[0]!r} more than once; keep one")
        self.constants.clear()
        self.repeated.clear()
        return found


def _repeated(names: list[str]) -> list[str]:
    return [name for name in dict.fromkeys(names) if names.count(name) > 1]


def _object(row: Any) -> Row | ConfigError:
    if isinstance(row, dict):
        return row
    return ConfigError(f"holds {kind(row)}; wanted a JSON object such as {{'prompt': ..., 'response': ...}}")


def _json(file: IO[bytes]) -> Iterator[tuple[int, Row | ConfigError]]:
    """An array of rows, an object that has one under a key, or rows as in a file of JSON lines, which are streamed."""
    first = _through_text(file)
    if _whole(b"".join(first).decode("utf-8-sig", errors="replace")) is not None:
        second = _through_text(file)
        if any(line.strip() for line in second):
            yield from _lines(itertools.chain(first, second, file))
            return
    raw = b"".join(first) + file.read()
    try:
        text = raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        if raw.removeprefix(codecs.BOM_UTF8).lstrip().startswith(b"["):
            line = raw.count(b"\n", 0, error.start) + 1
            yield line, ConfigError(f"byte {error.start + 1} is not UTF-8; save the file as UTF-8")
        else:
            yield from _lines(io.BytesIO(raw))
        return
    start = _after_blanks(text, 0)
    if text.startswith("[", start):
        yield from _array(text, start)
    elif (rows := _rows_within(text)) is not None:
        yield from rows
    elif (row := _only_row(text)) is not None:
        yield 1 + text.count("\n", 0, start), row
    else:
        yield from _lines(io.BytesIO(raw))


def _through_text(file: IO[bytes]) -> list[bytes]:
    """The next lines, up to one that is not blank."""
    lines = []
    for line in file:
        lines.append(line)
        if line.strip():
            break
    return lines


def _rows_within(text: str) -> Iterator[tuple[int, Row | ConfigError]] | None:
    """The rows of a text that is one JSON object with the list of rows under its only key, or under a usual one.

    Messages are one row.
    """
    whole = _whole(text) or {}
    lists = [
        key
        for key, rows in whole.items()
        if (key in HOLDERS or len(whole) == 1)
        and isinstance(rows, list)
        and all(isinstance(row, dict) and "role" not in row for row in rows)
    ]
    if len(lists) != 1:
        return None
    decoder, place = json.JSONDecoder(), _after_blanks(text, 0)
    while True:
        key, place = decoder.raw_decode(text, _after_blanks(text, place + 1))
        place = _after_blanks(text, text.index(":", place) + 1)
        if key == lists[0]:
            return _array(text, place, is_whole=True)
        _, place = decoder.raw_decode(text, place)
        place = _after_blanks(text, place)


def _only_row(text: str) -> Row | ConfigError | None:
    """The row of a file that holds one JSON object on several lines."""
    if _whole(text) is None or "\n" not in text.strip():
        return None
    decoder = _Decoder()
    row: Row = decoder.decode(text)
    return decoder.problem() or row


def _whole(text: str) -> Row | None:
    """The JSON object that a text consists of; None if it is anything else."""
    try:
        found = json.loads(text)
    except (ValueError, RecursionError):
        return None
    return found if isinstance(found, dict) else None


def _array(text: str, start: int, *, is_whole: bool = False) -> Iterator[tuple[int, Row | ConfigError]]:
    """Yields each row with the line it begins in. Nothing can be read after what is not JSON. is_whole: whether the
    text is known to be JSON; otherwise nothing may follow the array."""
    decoder = _Decoder()
    place, line, counted = _after_blanks(text, start + 1), 1, 0
    more = not text.startswith("]", place)
    while more:
        line, counted = line + text.count("\n", counted, place), place
        try:
            row, place = decoder.raw_decode(text, place)
        except (ValueError, RecursionError) as error:
            yield line, ConfigError(f"is not JSON ({error}); wanted an array of objects, or one object on each line")
            return
        yield line, decoder.problem() or _object(row)
        place = _after_blanks(text, place)
        more = text.startswith(",", place)
        place = _after_blanks(text, place + more)
    if not is_whole and text[place:].rstrip() != "]":
        yield line, ConfigError("is not followed by a comma, or text follows the array; wanted an array of objects")


def _after_blanks(text: str, place: int) -> int:
    match = BLANKS.match(text, place)
    assert match is not None  # of no blanks too
    return match.end()


def _csv(raw: bytes, delimiter: str) -> Iterator[tuple[int, Row | ConfigError]]:
    # What is not UTF-8 is let through, to be reported with the line of its row.
    text = raw.decode("utf-8-sig", errors="surrogateescape")
    csv.field_size_limit(max(csv.field_size_limit(), len(text)))
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, strict=True)
    header: list[str] | None = None
    number = 1
    while True:
        try:
            values = next(reader)
        except StopIteration:
            return
        except csv.Error as error:
            yield (
                number,
                ConfigError(f"is not CSV ({error}); put a text with quotes or {SEPARATORS[delimiter]} in quotes"),
            )
        else:
            if any(UNDECODED.search(value) for value in values):
                yield number, ConfigError("is not UTF-8; save the file as UTF-8")
            elif header is None:
                if not text.strip():
                    return
                if not any(name.strip() for name in values):
                    yield number, ConfigError("is empty; wanted the names of the columns in the first line")
                    return
                if repeated := _repeated([name for name in values if name]):
                    yield number, ConfigError(f"has the column {repeated[0]!r} more than once; keep one")
                    return
                header = values
            elif len(values) == len(header):
                cells = (Missing(value) if value in MISSING else value for value in values)
                yield number, dict(zip(header, cells, strict=True))
            elif values:
                yield number, ConfigError(f"has {len(values)} values; the header, in line 1, has {len(header)}")
        number = reader.line_num + 1


def _streamed(name: str, **options: Any) -> Iterator[tuple[int, Row | ConfigError]]:
    """Yields one row after the other, without a copy of the data set on the disk."""
    import datasets

    try:
        yield from enumerate(datasets.load_dataset(name, streaming=True, **options), start=1)
    except Exception as error:  # of nearly any class
        reason = str(error).strip().partition("\n")[0]
        where = options.get("data_files", name)
        remedy = "make the file again" if "data_files" in options else "check name and split"
        raise ConfigError(f"{where} cannot be read ({type(error).__name__}: {reason}); {remedy}") from error


def kind(value: Any) -> str:
    """The type of a value, as errors name it."""
    if isinstance(value, Missing):
        return f"{value.written or 'empty'}, which in CSV is a missing value (JSON lines can have an empty text)"
    if value is None:
        return "null"
    if isinstance(value, bool):
        return "true or false"
    if isinstance(value, int | float):
        return "a number"
    name = type(value).__name__
    return {"dict": "an object", "list": "a list", "str": "text"}.get(name, f"a {name}")
