"""Tensors in safetensors files, read and written piece by piece: what is on disk is never in memory as a whole.

The safetensors library reads whole tensors, or slices of them through memory that counts as the process's own, and
writes what is in memory complete. A model of 140 GB shared by 16 processes needs neither.
"""

import json
import math
import struct
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lori_dist.atomic import replacing
from lori_dist.files import open_regular, parse_json

DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
"""Names of the data types in safetensors headers."""

PIECE_BYTES = 16 * 2**20
"""Read at once where a tensor cannot be read to where it belongs: another device, another dtype."""

_COPY_BYTES = 2**20
_NAMES = {dtype: name for name, dtype in DTYPES.items()}
_MAX_HEADER = 100 * 2**20  # as the library has it


@dataclass(frozen=True, kw_only=True, slots=True)
class Stored:
    """The place of a tensor in a file."""

    path: Path
    dtype: torch.dtype
    shape: tuple[int, ...]
    offset: int
    """Offset of the tensor's first byte in the file."""

    @property
    def numel(self) -> int:
        """Number of elements."""
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        """Bytes in the file."""
        return self.numel * self.dtype.itemsize

    def load(self) -> Tensor:
        """The tensor, on the CPU. Raises OSError as `read`."""
        # As bytes first: deepspeed.zero.Init silently casts every new floating-point tensor.
        flat = torch.empty(self.nbytes, dtype=torch.uint8, device="cpu").view(self.dtype)
        self.read(flat)
        return flat.view(self.shape)

    def mapped(self) -> Tensor:
        """The tensor, on the CPU, as a map of the file: an entry takes memory once it is read, and the processes of a
        machine share that memory. Changes stay in this process. Raises OSError if the file is shorter."""
        if not self.numel:
            return self.load()
        pages = np.memmap(self.path, dtype=np.uint8, mode="c", offset=self.offset, shape=(self.nbytes,))
        return torch.from_numpy(pages).view(self.dtype).view(self.shape)

    def read(self, into: Tensor, start: int = 0) -> None:
        """Fills a contiguous tensor with the stored entries from the flat position `start` on, in its own dtype.

        Nothing else is held in memory where device and dtype are those of a CPU tensor and of the file; elsewhere at
        most PIECE_BYTES. Raises OSError if the file ends before.
        """
        flat = into.detach().view(-1)
        assert start + flat.numel() <= self.numel
        with self.path.open("rb", buffering=0) as file:
            file.seek(self.offset + start * self.dtype.itemsize)
            if flat.device.type == "cpu" and flat.dtype == self.dtype:
                _fill(file, flat)
                return
            size = min(flat.numel(), PIECE_BYTES // self.dtype.itemsize)
            piece = torch.empty(size, dtype=self.dtype, pin_memory=flat.device.type == "cuda")
            for first in range(0, flat.numel(), max(size, 1)):
                part = piece[: min(size, flat.numel() - first)]
                _fill(file, part)
                flat[first : first + part.numel()].copy_(part)

    def pieces(self) -> Iterator[Tensor]:
        """All entries, flat, at most PIECE_BYTES at a time, in memory that the next piece takes. Raises as `read`."""
        piece = torch.empty(min(self.numel, PIECE_BYTES // self.dtype.itemsize), dtype=self.dtype)
        for first in range(0, self.numel, max(piece.numel(), 1)):
            part = piece[: self.numel - first]
            self.read(part, first)
            yield part

    def equals(self, other: "Stored") -> bool:
        """Whether another tensor is the same, compared piece by piece."""
        if (self.dtype, self.shape) != (other.dtype, other.shape):
            return False
        return all(torch.equal(*pair) for pair in zip(self.pieces(), other.pieces(), strict=True))


def stored(path: Path) -> dict[str, Stored]:
    """Tensor name -> where it lies in a file. Reads the header alone. Raises ValueError if it is none of the format."""
    header, start = _read_header(path)
    size = path.stat().st_size
    found = {}
    for name, entry in header.items():
        if name == "__metadata__":
            continue
        if not _is_entry(entry):
            raise ValueError(f"{path.name}: its header is wrong about {name}")
        dtype = DTYPES.get(entry["dtype"])
        if dtype is None:
            raise ValueError(f"{path.name}: {name} is of dtype {entry['dtype']}, which is not supported")
        begin, end = entry["data_offsets"]
        where = Stored(path=path, dtype=dtype, shape=tuple(entry["shape"]), offset=start + begin)
        if begin < 0 or end - begin != where.numel * dtype.itemsize or start + end > size:
            raise ValueError(f"{path.name} is cut off, or its header is wrong about {name}")
        found[name] = where
    return found


def _is_entry(entry: Any) -> bool:
    """Whether a header says where a tensor lies in the way it must."""

    def are_counts(numbers: Any) -> bool:
        return isinstance(numbers, list) and all(type(number) is int and number >= 0 for number in numbers)

    return (
        isinstance(entry, dict)
        and isinstance(entry.get("dtype"), str)
        and are_counts(entry.get("shape"))
        and are_counts(entry.get("data_offsets"))
        and len(entry["data_offsets"]) == 2
    )


def metadata(path: Path) -> dict[str, str]:
    """The metadata of a safetensors file. Raises ValueError if the file has another format."""
    found = _read_header(path)[0].get("__metadata__") or {}
    if not isinstance(found, dict) or not all(isinstance(value, str) for value in found.values()):
        raise ValueError(f"{path.name}: its metadata is not an object of texts")
    return found


def _read_header(path: Path) -> tuple[dict[str, Any], int]:
    """The header, and where the tensors begin."""
    with open_regular(path) as file:
        length = int.from_bytes(file.read(8), "little")
        if not 2 <= length <= min(path.stat().st_size - 8, _MAX_HEADER):
            raise ValueError(f"{path.name} is not a safetensors file, or is cut off")
        try:
            header = parse_json(file.read(length))
        except ValueError as error:
            raise ValueError(f"{path.name} is not a safetensors file: its header is not JSON ({error})") from error
    if not isinstance(header, dict):
        raise ValueError(f"{path.name} is not a safetensors file: its header is not an object")
    return header, 8 + length


def write(
    path: Path,
    layout: Mapping[str, tuple[torch.dtype, tuple[int, ...]]],
    pieces: Iterable[Tensor | Stored],
    metadata: Mapping[str, str],
) -> None:
    """Writes a file of the tensors of `layout`, one after the other, from pieces of any size that come in that order.

    Only one piece need be in memory at a time, and nothing of those that lie in a file, whose bytes are copied. The
    file appears by a rename when all of it is on disk: a kill at any byte leaves what was there before. Raises OSError
    if it cannot be written.
    """
    with replacing(path) as file:
        file.write(_header(layout, metadata))
        for piece in pieces:
            if isinstance(piece, Stored):
                _copy(piece, file)
            else:
                file.write(_bytes(piece))


def save(path: Path, tensors: Mapping[str, Tensor | Stored], metadata: Mapping[str, str]) -> None:
    """Writes tensors as `write`, the wider dtypes first, so that all are aligned.

    The library's own `save_file` makes files that only their owner may read, whatever the umask.
    """
    names = sorted(tensors, key=lambda name: (-tensors[name].dtype.itemsize, name))
    layout = {name: (tensors[name].dtype, tuple(tensors[name].shape)) for name in names}
    pieces = (tensor if isinstance(tensor := tensors[name], Stored) else tensor.contiguous() for name in names)
    write(path, layout, pieces, metadata)


def _copy(piece: Stored, file: Any) -> None:
    with piece.path.open("rb", buffering=0) as source:
        source.seek(piece.offset)
        left = piece.nbytes
        while left:
            data = source.read(min(left, _COPY_BYTES))
            if not data:
                raise OSError(f"{piece.path} ends too early; it has changed or is cut off")
            file.write(data)
            left -= len(data)


def _header(layout: Mapping[str, tuple[torch.dtype, tuple[int, ...]]], metadata: Mapping[str, str]) -> bytes:
    header: dict[str, Any] = {"__metadata__": dict(metadata)}
    end = 0
    for name, (dtype, shape) in layout.items():
        begin, end = end, end + math.prod(shape) * dtype.itemsize
        header[name] = {"dtype": _NAMES[dtype], "shape": list(shape), "data_offsets": [begin, end]}
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)  # so that the tensors are aligned
    return struct.pack("<Q", len(text)) + text


def _fill(file: Any, flat: Tensor) -> None:
    view = _bytes(flat)
    while len(view):
        count = file.readinto(view)
        if not count:
            raise OSError(f"{file.name} ends too early; it has changed or is cut off")
        view = view[count:]


def _bytes(tensor: Tensor) -> memoryview:
    """A contiguous CPU tensor's own memory."""
    return tensor.detach().view(-1).view(torch.uint8).numpy().data
