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
from contextlib import contextmanager
from dataclasses import dataclass
from decimal import Decimal
from typing import IO, Any, cast

from lori_dist.errors import ConfigError
from lori_dist.files import MAX_TEXT_BYTES, require_regular

HUB = "hub:"
"""Prefix of `hub:NAME:SPLIT`, a data set of the hub, or a folder of data files, as `datasets` loads it."""
Row = dict[str, Any]
Item = tuple[int, bytes | Row | ConfigError]
"""Number of a row, and the row; a line of JSON as bytes that are not parsed yet; or what is wrong with it."""
Piece = list[Item]
"""Rows that follow each other, which another process may parse."""
AT_ONCE = 1000
"""Rows of a piece."""
LONGEST = MAX_TEXT_BYTES
"""Bytes of a line, or of a row of another file: what is longer is an error, so that no file is in memory whole."""
CHUNK = 2**20
"""Bytes that are read of a JSON text at a time."""
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
    compressed by gzip, bzip2, xz or zstd. Values of a CSV file are text, or `Missing`. A file is read as its rows are
    asked for, and no more than a row of it is held. Raises OSError for a file that cannot be read, ConfigError for one
    of another kind or a damaged one, and for a data set that cannot be read.
    """
    return parsed(_items(path))


def pieces(path: str) -> Iterator[Piece]:
    """Yields the rows of a file in pieces of `AT_ONCE`, for `parsed`. Lines of JSON are not parsed before. Raises what
    `read` raises."""
    items = _items(path)
    while piece := list(itertools.islice(items, AT_ONCE)):
        yield piece


def parsed(piece: Iterable[Item]) -> Iterator[tuple[int, Row | ConfigError]]:
    """Yields the rows of a piece as `read` does."""
    decoder = _Decoder()
    for number, item in piece:
        yield number, _parsed(item, decoder) if isinstance(item, bytes) else item


def count(path: str) -> int:
    """The number of rows of a file, without a look at what they hold. Raises what `read` raises."""
    if ending(path) == ".parquet" and problem_of(path) is None:
        import pyarrow.parquet  # type: ignore[import-untyped]

        return int(pyarrow.parquet.read_metadata(path).num_rows)
    return sum(1 for _ in _items(path))


def version(path: str) -> str:
    """What changes whenever the content of a data set of the hub does: the commit, or the times of its files.

    Raises ConfigError as `read`.
    """
    if problem := problem_of(path):
        raise ConfigError(problem)
    import datasets

    _, name, split = path.split(":")
    with _naming_data_set(name, "check name and split"):
        builder = datasets.load_dataset_builder(name)
        files = (builder.config.data_files or {}).get(split)
        state = [builder.hash] if files is None else [list(files), files.origin_metadata]
        return json.dumps([path, state], default=str)


def _items(path: str) -> Iterator[Item]:
    if problem := problem_of(path):
        raise ConfigError(problem)
    if is_hub(path):
        _, name, split = path.split(":")
        yield from _streamed(name, split=split)
        return
    require_regular(path)
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
                yield from _csv(file, DELIMITERS[kind_of_file])
            elif kind_of_file == ".json":
                yield from _json(path, file)
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


def _lines(file: IO[bytes]) -> Iterator[Item]:
    number = 0
    while raw := file.readline(LONGEST + 1):  # as bytes: lines end at \n only, not at separators in a JSON string
        number += 1
        if len(raw) > LONGEST:
            while raw and not raw.endswith(b"\n"):
                raw = file.readline(LONGEST)
            yield number, ConfigError(f"has more than {LONGEST:,} bytes; wanted one JSON object on each line")
            continue
        line = raw.removeprefix(codecs.BOM_UTF8).strip()
        if line:
            yield number, line


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


# --- JSON ------------------------------------------------------------------------------------------------------------


class _Text:
    """A text of JSON in UTF-8 of which only the part that is being parsed is in memory."""

    def __init__(self, file: IO[bytes]) -> None:
        self.file = file
        self.problem: tuple[int, ConfigError] | None = None
        """Why nothing can be read any more, and the line of it."""
        self._decoder = codecs.getincrementaldecoder("utf-8")()
        self._text, self._place = "", 0
        self._line, self._counted = 1, 0
        self._num_bytes = 0
        self._is_done = False

    @property
    def line(self) -> int:
        """Number of the line that is read next."""
        self._line += self._text.count("\n", self._counted, self._place)
        self._counted = self._place
        return self._line

    def peek(self) -> str:
        """The next sign that is not a blank; empty at the end of the text."""
        while True:
            match = BLANKS.match(self._text, self._place)
            assert match is not None  # of no blanks too
            self._place = match.end()
            if self._place < len(self._text):
                return self._text[self._place]
            if self._is_done:
                return ""
            self._more()

    def take(self, sign: str) -> bool:
        """Whether a sign comes next, which is then passed."""
        comes = self.peek() == sign
        self._place += comes
        return comes

    def value(self, decoder: json.JSONDecoder) -> Any:
        """The value that comes next. Raises ValueError where there is none, or one of more than LONGEST signs."""
        self.peek()
        while True:
            try:
                found, end = decoder.raw_decode(self._text, self._place)
            except ValueError:
                if self._is_done or len(self._text) - self._place > LONGEST:
                    raise
            else:
                if end < len(self._text) or self._is_done:  # or a number may go on
                    self._place = end
                    return found
            if isinstance(decoder, _Decoder):
                decoder.problem()
            self._more()

    def _more(self) -> None:
        _ = self.line
        left = self._text[self._place :]
        raw = self.file.read(max(CHUNK, len(left)))
        if self._num_bytes == 0:
            raw = raw.removeprefix(codecs.BOM_UTF8)
        held = len(self._decoder.getstate()[0])
        try:
            new = self._decoder.decode(raw, final=not raw)
            self._is_done = not raw
        except UnicodeDecodeError as error:
            new = error.object[: error.start].decode()
            place, line = self._num_bytes - held + error.start + 1, self._line + (left + new).count("\n")
            self.problem = line, ConfigError(f"byte {place} is not UTF-8; save the file as UTF-8")
            self._is_done = True
        self._num_bytes += len(raw)
        self._text, self._place, self._counted = left + new, 0, 0


def _json(path: str, file: IO[bytes]) -> Iterator[Item]:
    """An array of rows, an object that has one under a key, or rows as in a file of JSON lines."""
    text = _Text(file)
    first = text.peek()
    if first == "[":
        yield from _array(text)
        return
    layout = _layout(text) if first == "{" else None
    with _opened(path) as again:
        if layout is None:
            yield from _lines(again)
        elif layout.key is None:
            yield from _only_row(_Text(again))
        else:
            yield from _rows_within(_Text(again), layout.key)


@dataclass(frozen=True, slots=True)
class _Layout:
    """What a text is that consists of one JSON object."""

    key: str | None
    """The key under which it has rows; None: it is a row."""


def _layout(text: _Text) -> _Layout | None:
    """The layout of a text that is one JSON object; None if it is anything else.

    Rows are a list under the only key, or under a usual one. Messages are one row.
    """
    decoder, keys, holders = json.JSONDecoder(), set[str](), list[str]()
    try:
        more = text.take("{") and text.peek() != "}"
        while more:
            key = text.value(decoder)
            if not isinstance(key, str) or not text.take(":"):
                return None
            keys.add(key)
            if text.peek() != "[":
                text.value(decoder)
            elif _holds_rows(text, decoder):
                holders.append(key)
            more = text.take(",")
        if not text.take("}") or text.peek():
            return None
    except (ValueError, RecursionError):
        return None
    if text.problem is not None:
        return None
    found = [key for key in holders if key in HOLDERS or len(keys) == 1]
    return _Layout(found[0] if len(found) == 1 else None)


def _holds_rows(text: _Text, decoder: json.JSONDecoder) -> bool:
    """Passes a list. Returns whether it holds rows alone. Raises ValueError for what is not a list."""
    holds = True
    more = text.take("[") and text.peek() != "]"
    while more:
        row = text.value(decoder)
        holds = holds and isinstance(row, dict) and "role" not in row
        more = text.take(",")
    if not text.take("]"):
        raise ValueError("a list without an end")
    return holds


def _rows_within(text: _Text, wanted: str) -> Iterator[Item]:
    """The rows under a key of a text that is one JSON object."""
    decoder = json.JSONDecoder()
    text.take("{")
    while True:
        key = text.value(decoder)
        text.take(":")
        if key == wanted:
            yield from _array(text, is_whole=True)
            return
        if text.peek() == "[":
            _holds_rows(text, decoder)
        else:
            text.value(decoder)
        text.take(",")


def _only_row(text: _Text) -> Iterator[Item]:
    decoder = _Decoder()
    text.peek()
    line = text.line
    try:
        row: Row = text.value(decoder)
    except ValueError:
        yield line, ConfigError(f"has more than {LONGEST:,} signs; wanted an array of objects, or one on each line")
    else:
        yield line, decoder.problem() or row


def _array(text: _Text, *, is_whole: bool = False) -> Iterator[Item]:
    """Yields each row with the line it begins in. Nothing can be read after what is not JSON. is_whole: whether the
    text is known to be JSON; otherwise nothing may follow the array."""
    decoder, line = _Decoder(), 1
    text.take("[")
    more = text.peek() != "]"
    while more:
        text.peek()
        line = text.line
        try:
            row = text.value(decoder)
        except (ValueError, RecursionError) as error:
            reason = error.msg if isinstance(error, json.JSONDecodeError) else error
            problem = ConfigError(f"is not JSON ({reason}); wanted an array of objects, or one on each line")
            yield text.problem or (line, problem)
            return
        yield line, decoder.problem() or _object(row)
        more = text.take(",")
    if not is_whole and (not text.take("]") or text.peek()):
        problem = ConfigError("is not followed by a comma, or text follows the array; wanted an array of objects")
        yield text.problem or (line, problem)


# --- CSV and data sets -----------------------------------------------------------------------------------------------


def _csv(file: IO[bytes], delimiter: str) -> Iterator[Item]:
    # What is not UTF-8 is let through, to be reported with the line of its row.
    text = io.TextIOWrapper(cast(Any, file), encoding="utf-8-sig", errors="surrogateescape", newline="")
    try:
        yield from _cells(text, delimiter)
    finally:
        text.detach()  # or it would close the file


def _cells(text: io.TextIOWrapper, delimiter: str) -> Iterator[Item]:
    csv.field_size_limit(max(csv.field_size_limit(), LONGEST))
    lines = iter(lambda: text.readline(LONGEST), "")
    reader = csv.reader(lines, delimiter=delimiter, strict=True)
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
                if not any(name.strip() for name in values):
                    if len(values) > 1 or any(line.strip() for line in lines):
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


def _streamed(name: str, **options: Any) -> Iterator[Item]:
    """Yields one row after the other, without a copy of the data set on the disk."""
    import datasets

    remedy = "make the file again" if "data_files" in options else "check name and split"
    with _naming_data_set(options.get("data_files", name), remedy):
        yield from enumerate(datasets.load_dataset(name, streaming=True, **options), start=1)


@contextmanager
def _naming_data_set(name: str, remedy: str) -> Iterator[None]:
    try:
        yield
    except Exception as error:  # of nearly any class
        reason = str(error).strip().partition("\n")[0]
        raise ConfigError(f"{name} cannot be read ({type(error).__name__}: {reason}); {remedy}") from error


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
