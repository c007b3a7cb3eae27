"""Rows as tokens, made once: files in a cache folder of bounded size, which all processes of a machine map.

A file holds the rows of one file as one template, tokenizer and train.max_length make tokens of them, whatever run they
are for. It is a safetensors file, written aside by one process and renamed when it is complete. Whoever wants the same
tokens meanwhile waits for it; a writer that is killed leaves its place to the next, as its lock ends with it. A file
that is in use is locked too, and is not deleted.
"""

import contextlib
import dataclasses
import errno
import fcntl
import hashlib
import importlib.metadata
import inspect
import json
import logging
import mmap
import os
import re
import sys
import tempfile
import time
import zlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, overload

import numpy as np
import numpy.typing as npt
from transformers import PreTrainedTokenizerBase

from lori_dist import atomic, config, jobs, rows, tables
from lori_dist.errors import ConfigError, JobError
from lori_dist.training import examples, tokenising, tokens
from lori_dist.training.examples import Example, warn_of_cuts, warn_of_opening
from lori_dist.training.tokenising import Made, Work

FOLDER, SIZE = "LORI_CACHE", "LORI_CACHE_SIZE"
"""Variables of the environment: the cache folder, and the bytes that it may hold."""
MOST_BYTES = 64 * 10**9
"""Bytes that the folder may hold where SIZE is not set."""
UNITS = {"": 1, "K": 10**3, "M": 10**6, "G": 10**9, "T": 10**12}
WITHOUT_HOME = ("/var/tmp", "/tmp")
"""Places for the folder where the home folder cannot be written. TMPDIR is not among them: that of a run's processes
ends with the run."""

ENDING = ".tokens"
HEADER = 2**14
"""Bytes of the header, padded with blanks."""
CHUNK = 2**20
MOST_OPENINGS, LONGEST_OPENING = 4, 200
"""Openings of answers that are kept for warnings, and characters of each."""
READ_BEFORE_RELEASE = 512
"""Rows that are read before their pages leave this process's memory, though not the machine's."""
SECONDS_BETWEEN_LINES = 30.0
NO_LOCKS = (errno.ENOLCK, errno.ENOTSUP, errno.ENOSYS)
"""Errors of file systems without locks."""
PATHS = ("_file", "name_or_path")
"""Ends of the names of a tokenizer's settings that say where it is from."""
DTYPES: dict[str, np.dtype[Any]] = {"I32": np.dtype("<i4"), "I64": np.dtype("<i8"), "U8": np.dtype("u1")}

Show = Callable[[str, int, float | None], None]
"""Gets what is being made, the number of rows that are done, and, if it is known, their share of all."""

log = logging.getLogger(__name__)


# --- one file --------------------------------------------------------------------------------------------------------


class Damaged(Exception):
    """A file is not what was written."""


class TokenFile(Sequence[Example]):
    """The examples of a file. Only what is being read of it is in this process's memory."""

    def __init__(self, path: Path) -> None:
        """Raises FileNotFoundError if there is no such file or it is being deleted, and Damaged."""
        with path.open("rb") as file:
            if not _locked(file.fileno(), fcntl.LOCK_SH):
                raise FileNotFoundError(errno.ENOENT, "is being deleted", str(path))
            self.notes, arrays = _checked(file)
            self._map = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)  # which holds the lock from here on
        self.path = path
        self._num_read = 0
        self._arrays = {
            name: np.frombuffer(self._map, DTYPES[dtype], count, HEADER + offset)
            for name, (dtype, count, offset) in arrays.items()
        }
        self._tokens, self._starts, self._prompts, self._targets, self._whole, self._read_only = (
            self._arrays[name] for name in ("tokens", "starts", "prompts", "targets", "whole", "read_only")
        )
        with contextlib.suppress(OSError):  # it may be another user's
            os.utime(path)

    def __len__(self) -> int:
        return len(self._prompts)

    @overload
    def __getitem__(self, row: int) -> Example: ...
    @overload
    def __getitem__(self, row: slice) -> list[Example]: ...
    def __getitem__(self, row: int | slice) -> Example | list[Example]:
        if isinstance(row, slice):
            return [self[one] for one in range(*row.indices(len(self)))]
        if not 0 <= row < len(self):
            raise IndexError(row)
        self._released()
        start, end = int(self._starts[row]), int(self._starts[row + 1])
        ids, before = tuple(self._tokens[start:end].tolist()), int(self._prompts[row])
        prompt, response = self._texts(row)
        return Example(
            prompt=prompt,
            response=response,
            prompt_ids=ids[:before],
            response_ids=ids[before:],
            read_only=self._ranges(row),
        )

    def num_tokens(self, row: int) -> int:
        return int(self._starts[row + 1] - self._starts[row])

    def num_targets(self, row: int) -> int:
        return int(self._targets[row])

    def sums(self, count: int) -> tuple[int, int]:
        """Tokens and targets of the first rows."""
        found = int(self._starts[count]), int(self._targets[:count].sum(dtype=np.int64))
        self._release()
        return found

    @property
    def lengths(self) -> npt.NDArray[np.int64]:
        """Tokens of each row."""
        return np.diff(self._starts)

    @property
    def whole(self) -> npt.NDArray[np.int32]:
        """Tokens of each row before it was cut."""
        return self._whole

    def warn(self, where: str) -> None:
        """Says what is remarkable in the rows. where: their place in the configuration."""
        for opening in self.notes["openings"]:
            warn_of_opening(f"{where}: " if where else "", opening)
        tokens.warn_of_blank(self.notes["blank"], where)
        cuts = self.notes["cut_prompts"], self.notes["cut_responses"]
        warn_of_cuts(where, self.notes["made"], *cuts, self.notes["max_length"])

    def _texts(self, row: int) -> tuple[str, str]:
        if "texts" not in self._arrays:
            return "", ""
        first, middle, last = self._arrays["text_ends"][2 * row : 2 * row + 3].tolist()
        text = self._arrays["texts"]
        return text[first:middle].tobytes().decode(), text[middle:last].tobytes().decode()

    def _ranges(self, row: int) -> tuple[tuple[int, int], ...]:
        if not len(self._read_only):
            return ()
        of_all = self._read_only.reshape(-1, 3)
        first, last = np.searchsorted(of_all[:, 0], [row, row + 1])
        return tuple((int(start), int(end)) for _, start, end in of_all[first:last])

    def _released(self) -> None:
        self._num_read += 1
        if self._num_read % READ_BEFORE_RELEASE == 0:
            self._release()

    def _release(self) -> None:
        if hasattr(mmap, "MADV_DONTNEED"):
            self._map.madvise(mmap.MADV_DONTNEED)


class Some(Sequence[Example]):
    """Some rows of a file, in an order of their own."""

    def __init__(self, file: TokenFile, rows: npt.NDArray[np.int64]) -> None:
        self._file, self._rows = file, rows
        lengths = file.lengths[rows]
        self.notes = {
            "tokens": int(lengths.sum()),
            "made": len(rows),
            "longest": int(lengths.max(initial=0)),
            "largest": file.notes["largest"],
        }

    def __len__(self) -> int:
        return len(self._rows)

    @overload
    def __getitem__(self, row: int) -> Example: ...
    @overload
    def __getitem__(self, row: slice) -> list[Example]: ...
    def __getitem__(self, row: int | slice) -> Example | list[Example]:
        if isinstance(row, slice):
            return [self[one] for one in range(*row.indices(len(self)))]
        return self._file[int(self._rows[row])]

    def num_tokens(self, row: int) -> int:
        return self._file.num_tokens(int(self._rows[row]))

    def num_targets(self, row: int) -> int:
        return self._file.num_targets(int(self._rows[row]))

    def sums(self, count: int) -> tuple[int, int]:
        """Tokens and targets of the first rows."""
        found = range(count)
        return sum(map(self.num_tokens, found)), sum(map(self.num_targets, found))


class Rows(Sequence[Example]):
    """The first rows of one file or several, one file after the other."""

    def __init__(self, *parts: tuple[TokenFile | Some, int]) -> None:
        """parts: each file, and how many of its rows."""
        self.parts = parts
        self._starts = np.cumsum([0, *(count for _, count in parts)]).tolist()

    def __len__(self) -> int:
        return int(self._starts[-1])

    @overload
    def __getitem__(self, row: int) -> Example: ...
    @overload
    def __getitem__(self, row: slice) -> list[Example]: ...
    def __getitem__(self, row: int | slice) -> Example | list[Example]:
        if isinstance(row, slice):
            return [self[one] for one in range(*row.indices(len(self)))]
        file, place = self._place(row)
        return file[place]

    def num_tokens(self, row: int) -> int:
        file, place = self._place(row)
        return file.num_tokens(place)

    def num_targets(self, row: int) -> int:
        file, place = self._place(row)
        return file.num_targets(place)

    def sums(self) -> tuple[int, int]:
        """Tokens and targets of all rows."""
        found = [file.sums(count) for file, count in self.parts]
        return sum(tokens for tokens, _ in found), sum(targets for _, targets in found)

    @property
    def mean_tokens(self) -> float:
        """Mean tokens of a row, of those that have any."""
        return sum(file.notes["tokens"] for file, _ in self.parts) / sum(file.notes["made"] for file, _ in self.parts)

    @property
    def longest(self) -> int:
        """Tokens of the longest row of the files."""
        return max(file.notes["longest"] for file, _ in self.parts)

    @property
    def largest(self) -> int:
        """The largest token in the files."""
        return max(file.notes["largest"] for file, _ in self.parts)

    def _place(self, row: int) -> tuple[TokenFile | Some, int]:
        if not 0 <= row < len(self):
            raise IndexError(row)
        part = int(np.searchsorted(self._starts, row, side="right")) - 1
        return self.parts[part][0], row - self._starts[part]


def _checked(file: BinaryIO) -> tuple[dict[str, Any], dict[str, tuple[str, int, int]]]:
    """The notes of a file, and name -> dtype, entries and offset of each array. Reads it once. Raises Damaged."""
    head, digest = file.read(HEADER), 0
    while raw := file.read(CHUNK):
        digest = zlib.crc32(raw, digest)
    try:
        if int.from_bytes(head[:8], "little") != HEADER - 8:
            raise ValueError("its length")
        header = json.loads(head[8:])
        notes = json.loads(header.pop("__metadata__")["notes"])
        wanted = notes.pop("digest")
        arrays = {
            name: (array["dtype"], int(np.prod(array["shape"])), array["data_offsets"][0])
            for name, array in header.items()
        }
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise Damaged("its header cannot be read") from error
    if wanted != zlib.crc32(_described(notes, header), digest):
        raise Damaged("its checksum is another one")
    return notes, arrays


def _described(notes: dict[str, Any], arrays: dict[str, Any]) -> bytes:
    return json.dumps([notes, arrays], sort_keys=True).encode()


class _Writer:
    """Writes the tokens of a file, piece by piece."""

    def __init__(self, file: BinaryIO, texts: BinaryIO | None) -> None:
        """texts: a file for texts on their way; None: there are none."""
        self.file, self.texts = file, texts
        self.arrays: dict[str, Any] = {}
        self.digest = self.place = 0
        self.columns: dict[str, list[npt.NDArray[Any]]] = {}
        self.num_rows = self.num_made = self.num_tokens = self.longest = self.largest = 0
        self.notes: dict[str, Any] = {"cut_prompts": 0, "cut_responses": 0, "openings": [], "blank": None}
        file.seek(HEADER)

    def add(self, made: Made) -> None:
        self._put(made.tokens.tobytes())
        ranges = made.read_only.copy()
        ranges[:, 0] += self.num_rows
        columns = {"lengths": made.lengths, "prompts": made.prompts, "targets": made.targets, "whole": made.whole}
        for name, column in (*columns.items(), ("read_only", ranges.reshape(-1))):
            self.columns.setdefault(name, []).append(column)
        if self.texts is not None:
            lengths = np.array([len(text) for pair in made.texts for text in pair], dtype=np.int64)
            self.columns.setdefault("texts", []).append(lengths)
            self.texts.write(b"".join(text for pair in made.texts for text in pair))
        self.num_rows += len(made.lengths)
        self.num_made += int(np.count_nonzero(made.lengths))
        self.num_tokens += len(made.tokens)
        self.longest = max(self.longest, int(made.lengths.max(initial=0)))
        self.largest = max(self.largest, int(made.tokens.max(initial=0)))
        self.notes["cut_prompts"] += made.num_cut_prompts
        self.notes["cut_responses"] += made.num_cut_responses
        openings = dict.fromkeys([*self.notes["openings"], *(opening[:LONGEST_OPENING] for opening in made.openings)])
        self.notes["openings"] = [*openings][:MOST_OPENINGS]
        self.notes["blank"] = self.notes["blank"] or made.blank

    def finish(self, **notes: Any) -> None:
        if self.num_tokens % 2:  # arrays of 8 bytes begin at a multiple of 8
            self._put(bytes(4))
        self.arrays["tokens"] = _array("I32", 0, self.place)
        joined = {name: np.concatenate(column) for name, column in self.columns.items()}
        self._array("starts", "I64", np.concatenate([[0], np.cumsum(joined["lengths"], dtype=np.int64)]))
        if self.texts is not None:
            self._array("text_ends", "I64", np.concatenate([[0], np.cumsum(joined["texts"])]))
        for name in ("prompts", "targets", "whole", "read_only"):
            self._array(name, "I32", joined[name])
        if self.texts is not None:
            start = self.place
            self.texts.seek(0)
            while raw := self.texts.read(CHUNK):
                self._put(raw)
            self.arrays["texts"] = _array("U8", start, self.place)
        self.notes |= notes | {"rows": self.num_rows, "made": self.num_made, "tokens": self.num_tokens}
        self.notes |= {"longest": self.longest, "largest": self.largest}
        digest = zlib.crc32(_described(self.notes, self.arrays), self.digest)
        metadata = {"notes": json.dumps({**self.notes, "digest": digest})}
        header = json.dumps({"__metadata__": metadata, **self.arrays}).encode().ljust(HEADER - 8)
        assert len(header) == HEADER - 8
        self.file.seek(0)
        self.file.write(len(header).to_bytes(8, "little") + header)

    def _array(self, name: str, dtype: str, column: npt.NDArray[Any]) -> None:
        start = self.place
        self._put(column.astype(DTYPES[dtype]).tobytes())
        self.arrays[name] = _array(dtype, start, self.place)

    def _put(self, raw: bytes) -> None:
        self.file.write(raw)
        self.digest = zlib.crc32(raw, self.digest)
        self.place += len(raw)


def _array(dtype: str, start: int, end: int) -> dict[str, Any]:
    return {"dtype": dtype, "shape": [(end - start) // DTYPES[dtype].itemsize], "data_offsets": [start, end]}


# --- the folder ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True, slots=True)
class Entry:
    """A file in the cache folder."""

    path: Path
    num_bytes: int
    used: float
    """When it was opened last, as `time.time` says it."""
    notes: dict[str, Any]
    """What it is of; empty where that cannot be read."""


def cache_folder() -> Path:
    """The folder of token files, which need not be there: LORI_CACHE, or one in the user's cache folder."""
    if own := os.environ.get(FOLDER):
        return Path(own).expanduser().absolute()
    home = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    wanted = Path(home).expanduser() / "lori_dist"
    if _problem(wanted) is None:
        return wanted
    others = [Path(place) / f"lori-{os.getuid()}-cache" for place in WITHOUT_HOME]
    return next((place for place in others if _problem(place, is_own=True) is None), wanted)


def most_bytes() -> int:
    """Bytes that the folder may hold. Raises ConfigError for a LORI_CACHE_SIZE that is not a size."""
    given = os.environ.get(SIZE)
    if given is None:
        return MOST_BYTES
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([KMGT]?)(?:i?B)?\s*", given, re.IGNORECASE)
    if match is None:
        raise ConfigError(f"{SIZE}: got {given!r}; wanted a number of bytes, such as 20GB")
    return int(float(match[1]) * UNITS[match[2].upper()])


def entries() -> list[Entry]:
    """The files in the cache folder, the one that was used last first."""
    found = []
    for path in _files(cache_folder()):
        with contextlib.suppress(OSError):  # another process has just deleted it
            state = path.stat()
            found.append(Entry(path=path, num_bytes=state.st_size, used=state.st_mtime, notes=_notes(path)))
    return sorted(found, key=lambda entry: -entry.used)


def clear(most: int = 0, keep: Path | None = None) -> list[Path]:
    """Deletes the files that were not used for longest until at most so many bytes are left, and what killed processes
    have left. Those in use stay, and so does `keep`. Returns what it deleted. Raises OSError."""
    folder, deleted = cache_folder(), list[Path]()
    if folder.exists() and _has_locks(folder):
        for left in folder.glob(f".*{ENDING}*"):
            _delete(left)
    found = entries()
    total = sum(entry.num_bytes for entry in found)
    for entry in reversed(found):
        if total > most and entry.path != keep and _delete(entry.path):
            deleted.append(entry.path)
            total -= entry.num_bytes
    return deleted


def _files(folder: Path) -> list[Path]:
    return [path for path in folder.glob(f"*{ENDING}") if not path.name.startswith(".")]


def _notes(path: Path) -> dict[str, Any]:
    try:
        with path.open("rb") as file:
            head = file.read(HEADER)
        notes: dict[str, Any] = json.loads(json.loads(head[8:])["__metadata__"]["notes"])
    except (OSError, ValueError, KeyError, TypeError):
        return {}
    return notes


def _delete(path: Path) -> bool:
    """Whether a file was deleted: nobody uses or writes it."""
    try:
        descriptor = os.open(path, os.O_RDWR | os.O_NOFOLLOW | os.O_NONBLOCK)  # NFS locks no others
    except FileNotFoundError:
        return False
    try:
        if not _locked(descriptor, fcntl.LOCK_EX):
            return False
        path.unlink(missing_ok=True)
        return True
    finally:
        os.close(descriptor)


def _locked(descriptor: int, how: int, *, waits: bool = False) -> bool:
    """Whether a file is locked now. True where the file system has no locks."""
    try:
        fcntl.flock(descriptor, how if waits else how | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError as error:
        if error.errno not in NO_LOCKS:
            raise
    return True


def _problem(folder: Path, *, is_own: bool = False) -> str | None:
    """Why nothing can be written into a folder, which is made; None if it can. is_own: whether it must be ours."""
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        if is_own and folder.stat().st_uid != os.getuid():
            return "is another user's"
        tempfile.TemporaryFile(dir=folder).close()
    except OSError as error:
        return f"cannot be written ({error.strerror})"
    return None


# --- what is made ----------------------------------------------------------------------------------------------------


def token_file(
    work: Work,
    *,
    chosen: npt.NDArray[np.int64] | None = None,
    show: Show | None = None,
    num_processes: int | None = None,
) -> TokenFile:
    """The tokens of a source's rows, from the cache folder if they are there, else made by all cores.

    chosen: the rows, ascending, that need tokens, of which the others have none; None: all do. show: called now and
    then while tokens are made; by default lines of the log say it. num_processes: by default one for each core.
    Raises ConfigError that names every row that cannot be used by its line, and JobError where the tokens cannot be
    kept, as on a full disk.
    """
    source, path = work.source, _path(work)
    found = _opened(path)
    if found is None and chosen is not None:
        work = dataclasses.replace(work, chosen=chosen)
        path = _path(work)
        found = _opened(path)
    if found is None:
        folder = path.parent
        if (problem := _problem(folder)) is not None:
            raise JobError(
                f"{folder}: {problem}, and does not have the tokens of {source.path}; set {FOLDER} to a folder that "
                "can be written"
            )
        with _claimed(path, source) as (file, partial):
            found = _opened(path, says=False)  # another process has just made it
            if found is None:
                _write(work, file, partial, path, show or _lines(), num_processes or tokenising.cores())
                found = _opened(path)
        if found is None:
            raise JobError(f"{path}: was deleted or damaged just after it was written; start again")
        with contextlib.suppress(OSError):  # of a file that is another user's
            clear(most_bytes(), keep=path)
    found.warn(source.where)
    return found


def _opened(path: Path, *, says: bool = True) -> TokenFile | None:
    """None if there is no such file, or one that has to be made again. says: whether a damaged one is logged."""
    try:
        return TokenFile(path)
    except OSError:
        return None
    except Damaged as error:
        if says:
            log.warning("%s is damaged (%s); its tokens are made again", path, error)
        return None


@contextlib.contextmanager
def _claimed(path: Path, source: rows.Source) -> Iterator[tuple[BinaryIO, Path]]:
    """A file on the way to `path`, and its name, that no other process writes at the same time."""
    partial = path.with_name(f".{path.name}.partial")
    if not _has_locks(path.parent):
        with atomic.aside(path) as own, own.open("x+b") as file:
            yield file, own
        return
    with contextlib.ExitStack() as stack:
        while True:
            descriptor = os.open(partial, os.O_CREAT | os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW, 0o666)
            file = stack.enter_context(os.fdopen(descriptor, "r+b"))
            if not _locked(descriptor, fcntl.LOCK_EX):
                log.info("%sanother process makes tokens of %s; waiting for it", source.prefix, source.path)
                _locked(descriptor, fcntl.LOCK_SH, waits=True)  # which whoever reads what it wrote has too
            elif _is_at(state := os.fstat(descriptor), partial):
                break
            file.close()  # it may have got its name, or was deleted
        try:
            yield file, partial
        finally:
            if _is_at(state, partial):
                partial.unlink()


def _has_locks(folder: Path) -> bool:
    with tempfile.TemporaryFile(dir=folder) as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            return False
    return True


def _is_at(state: os.stat_result, path: Path) -> bool:
    try:
        return os.path.samestat(state, path.stat())
    except FileNotFoundError:
        return False


def _write(work: Work, file: BinaryIO, partial: Path, path: Path, show: Show, num_processes: int) -> None:
    source, before = work.source, _state(work.source.path)
    tally, num_bytes = rows.Tally(source), 0
    size = before[0] if before is not None and tables.ending(source.path) == Path(source.path).suffix.lower() else None
    try:
        with contextlib.ExitStack() as stack:
            file.truncate()
            texts = stack.enter_context(tempfile.TemporaryFile(dir=path.parent)) if work.keeps_texts else None
            writer = _Writer(file, texts)
            for piece, made in tokenising.made_of(work, rows.pieces(source), num_processes):
                tally.add(len(made.lengths), made.problems, has_tools=made.has_tools)
                writer.add(made)
                lines = sum(len(item) + 1 for _, item in piece if isinstance(item, bytes))
                num_bytes += lines
                show(source.where or source.path, tally.num_rows, num_bytes / size if size and lines else None)
            tally.check()
            if before != _state(source.path):
                raise ConfigError(f"{source.prefix}{source.path}: has changed while it was read; start again")
            name = getattr(work.tokenizer, "name_or_path", "")
            writer.finish(path=source.path, tokenizer=str(name), max_length=work.max_length)
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)
        atomic.flush_folder(path.parent)
        _locked(file.fileno(), fcntl.LOCK_SH)  # others may read it
    except OSError as error:
        partial.unlink(missing_ok=True)
        with contextlib.suppress(OSError):  # what is still to be written fails again
            file.close()
        raise JobError(
            f"{path.parent}: cannot hold the tokens of {source.path} ({error.strerror}); free space there, as "
            f"`lori cache --clear` does, or set {FOLDER} to a folder with more room"
        ) from error


def _state(path: str) -> tuple[int, int] | None:
    if tables.is_hub(path):
        return None
    try:
        state = os.stat(path)
    except OSError:  # for whoever reads it to say
        return None
    return state.st_size, state.st_mtime_ns


def _lines() -> Show:
    """Lines of the log, for work that takes long."""
    last = time.monotonic()

    def show(what: str, num_rows: int, share: float | None) -> None:
        nonlocal last
        if time.monotonic() - last >= SECONDS_BETWEEN_LINES:
            last = time.monotonic()
            log.info("%s: %s rows are tokens%s", what, f"{num_rows:,}", "" if share is None else f" ({share:.0%})")

    return show


# --- what tokens depend on -------------------------------------------------------------------------------------------


def _path(work: Work) -> Path:
    """The file for tokens, named by a digest of all that they depend on. Raises ConfigError for a source that cannot be
    read."""
    source = work.source
    with source.naming():
        content = tables.version(source.path) if tables.is_hub(source.path) else jobs.sha256(source.path)
    tree = {
        "content": content,
        "ending": None if tables.is_hub(source.path) else tables.ending(source.path),
        "template": dataclasses.asdict(source.template),
        "labels": source.labels,
        "max_length": work.max_length,
        "texts": work.keeps_texts,
        "chosen": None if work.chosen is None else hashlib.sha256(work.chosen.tobytes()).hexdigest(),
        "tokenizer": _of_tokenizer(work.tokenizer),
        "versions": [importlib.metadata.version(name) for name in ("transformers", "tokenizers")],
        "code": _code(),
    }
    text = json.dumps(tree, sort_keys=True, default=str)
    name = hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()[:32]
    return cache_folder() / f"{name}{ENDING}"


def _of_tokenizer(tokenizer: PreTrainedTokenizerBase) -> list[Any]:
    """What the tokens of a text depend on, whatever folder the tokenizer is from."""
    backend: Any = getattr(tokenizer, "backend_tokenizer", None)
    if backend is not None and hasattr(backend, "to_str"):
        own = hashlib.sha256(backend.to_str().encode("utf-8", "surrogatepass")).hexdigest()
    else:
        files = [Path(file) for file in vars(tokenizer).values() if isinstance(file, str) and os.path.isfile(file)]
        source = inspect.getsourcefile(type(tokenizer))
        digests = [jobs.sha256(file) for file in (*files, *([Path(source)] if source else []))]
        own = json.dumps([sorted(tokenizer.get_vocab().items()), digests])
    special = {name: str(token) for name, token in tokenizer.special_tokens_map.items()}
    added = {token: str(content) for token, content in tokenizer.added_tokens_decoder.items()}
    settings = {name: value for name, value in tokenizer.init_kwargs.items() if not name.endswith(PATHS)}
    return [type(tokenizer).__name__, own, special, added, tokenizer.chat_template, settings]


def _code() -> str:
    """Tokens of another version of this program are not taken for today's."""
    digest = hashlib.sha256()
    for module in (tables, rows, examples, tokens, tokenising, sys.modules[__name__]):
        digest.update(inspect.getsource(module).encode())
    return digest.hexdigest()


# --- the files of a run ----------------------------------------------------------------------------------------------


def source_of(run: config.Run, task: str, part: str, path: str) -> rows.Source:
    """The source of one file of a task. part: its place in the task's section, as `config.files` gives it."""
    settings = run.tasks[task]
    template = settings.test_template if part == "test" else settings.template
    return rows.Source(path=path, template=template, where=f"tasks.{task}.{part}", labels=settings.labels)


def of_part(
    run: config.Run,
    task: str,
    part: str,
    path: str,
    tokenizer: PreTrainedTokenizerBase,
    *,
    chosen: npt.NDArray[np.int64] | None = None,
    show: Show | None = None,
) -> TokenFile:
    """The tokens of one file of a task, with texts if it is its test file. Arguments and errors as of `token_file`."""
    return token_file(_work(run, task, part, path, tokenizer), chosen=chosen, show=show)


def is_there(run: config.Run, task: str, part: str, path: str, tokenizer: PreTrainedTokenizerBase) -> bool:
    """Whether the tokens of all rows of a file of a task are in the cache folder. Raises ConfigError for a file that
    cannot be read."""
    return _path(_work(run, task, part, path, tokenizer)).exists()


def _work(run: config.Run, task: str, part: str, path: str, tokenizer: PreTrainedTokenizerBase) -> Work:
    return Work(
        source=source_of(run, task, part, path),
        tokenizer=tokenizer,
        max_length=run.train.max_length,
        keeps_texts=part == "test",
    )
