"""Files of rows as tokens, which all processes of a machine map.

A file holds the rows of one file as one template, tokenizer and train.max_length make tokens of them, whatever run they
are for. It is a safetensors file with a checksum, and is locked while it is in use.
"""

import contextlib
import errno
import fcntl
import json
import mmap
import os
import zlib
from abc import abstractmethod
from collections.abc import Sequence
from pathlib import Path
from typing import Any, BinaryIO, overload

import numpy as np
import numpy.typing as npt

from lori_dist.training import tokens
from lori_dist.training.examples import Example, warn_of_cuts, warn_of_opening
from lori_dist.training.tokenising import Made

HEADER = 2**14
"""Bytes of the header, padded with blanks."""
CHUNK = 2**20
MOST_OPENINGS, LONGEST_OPENING = 4, 200
"""Openings of answers that are kept for warnings, and characters of each."""
READ_BEFORE_RELEASE = 512
"""Rows that are read before their pages leave this process's memory, though not the machine's."""
NO_LOCKS = (errno.ENOLCK, errno.ENOTSUP, errno.ENOSYS)
"""Errors of file systems without locks."""
DTYPES: dict[str, np.dtype[Any]] = {"I32": np.dtype("<i4"), "I64": np.dtype("<i8"), "U8": np.dtype("u1")}


class Damaged(Exception):
    """A file is not what was written."""


class _Examples(Sequence[Example]):
    """Examples of which `_at` reads one."""

    @overload
    def __getitem__(self, row: int) -> Example: ...
    @overload
    def __getitem__(self, row: slice) -> list[Example]: ...
    def __getitem__(self, row: int | slice) -> Example | list[Example]:
        if isinstance(row, slice):
            return [self[one] for one in range(*row.indices(len(self)))]
        return self._at(row)

    @abstractmethod
    def _at(self, row: int) -> Example: ...


class TokenFile(_Examples):
    """The examples of a file. Only what is being read of it is in this process's memory."""

    def __init__(self, path: Path) -> None:
        """Raises FileNotFoundError if there is no such file or it is being deleted, and Damaged."""
        with path.open("rb") as file:
            if not locked(file.fileno(), fcntl.LOCK_SH):
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

    def _at(self, row: int) -> Example:
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


class Some(_Examples):
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

    def _at(self, row: int) -> Example:
        return self._file[int(self._rows[row])]

    def num_tokens(self, row: int) -> int:
        return self._file.num_tokens(int(self._rows[row]))

    def num_targets(self, row: int) -> int:
        return self._file.num_targets(int(self._rows[row]))

    def sums(self, count: int) -> tuple[int, int]:
        """Tokens and targets of the first rows."""
        found = range(count)
        return sum(map(self.num_tokens, found)), sum(map(self.num_targets, found))


class Rows(_Examples):
    """The first rows of one file or several, one file after the other."""

    def __init__(self, *parts: tuple[TokenFile | Some, int]) -> None:
        """parts: each file, and how many of its rows."""
        self.parts = parts
        self._starts = np.cumsum([0, *(count for _, count in parts)]).tolist()

    def __len__(self) -> int:
        return int(self._starts[-1])

    def _at(self, row: int) -> Example:
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


class Writer:
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


def locked(descriptor: int, how: int, *, waits: bool = False) -> bool:
    """Whether a file is locked now. True where the file system has no locks."""
    try:
        fcntl.flock(descriptor, how if waits else how | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError as error:
        if error.errno not in NO_LOCKS:
            raise
    return True
