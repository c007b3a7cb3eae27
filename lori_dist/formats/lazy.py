"""Kept entries of B, and an A that no seed makes, as they lie in a file: packed, digested, read when asked for."""

import hashlib
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol, Self

import numpy as np
import torch
from torch import Tensor, nn

from lori_dist.adapter.adapter import Entries
from lori_dist.errors import AdapterError
from lori_dist.tensors import Stored

DAMAGED = "the file is damaged, write it again"

_STRATEGIES = (zlib.Z_HUFFMAN_ONLY, zlib.Z_RLE, zlib.Z_DEFAULT_STRATEGY)  # scattered, whole rows, whole columns
_SAMPLE = 1 << 12  # bytes; matching costs 20 ms for 115 kB of a random mask, where it gains nothing
_CHUNK = 1 << 16  # bytes of a mask at a time


@dataclass(frozen=True, kw_only=True, slots=True)
class Place:
    """The place of the kept entries of one B, with its description in the header."""

    about: str
    """Name of the B, for messages."""
    values: Stored
    mask: Stored | None
    """None: all entries are kept."""
    kept: int
    num_entries: int
    dtype: torch.dtype
    """Data type of the values."""
    digest: str

    def read(self) -> Entries:
        """Raises AdapterError for anything but what was written."""
        with naming(self.values.path, "read"):
            values, mask = self._load()
            if self.mask is None:
                return Entries(index=None, values=values)
            return Entries(index=_unpack(self.about, mask, self.num_entries, self.kept), values=values)

    def verify(self) -> None:
        """Raises AdapterError as `read`, without finding the positions."""
        with naming(self.values.path, "read"):
            mask = self._load()[1]
            if self.mask is not None:
                _count(self.about, mask, self.num_entries, self.kept)

    def _load(self) -> tuple[Tensor, memoryview]:
        """Values, and the mask's stream."""
        if self.values.numel != self.kept:
            raise AdapterError(f"{self.about} has {self.values.numel} values, its header says {self.kept}; {DAMAGED}")
        mask = torch.empty(0, dtype=torch.uint8, device="cpu")
        if self.mask is not None:
            mask = self.mask.load()
        values = self.values.load()
        if digest(as_bytes(values), as_bytes(mask)) != self.digest:
            raise AdapterError(f"{self.about} does not match its digest; {DAMAGED}")
        if not all_finite(values):
            raise AdapterError(f"{self.about} has values that are not finite; {DAMAGED}")
        return values, as_bytes(mask)


class Readable(Protocol):
    """A source of entries that can be read repeatedly."""

    @property
    def kept(self) -> int: ...

    def read(self) -> Entries: ...


class UnreadEntries(Entries):
    """Entries that lie in a file. They are read and checked when they are first asked for; a copy reads for itself."""

    __slots__ = ("_found", "place")
    place: Readable
    _found: Entries | None

    def __init__(self, place: Readable) -> None:
        object.__setattr__(self, "place", place)  # the class it stands in for is frozen
        object.__setattr__(self, "_found", None)

    def __reduce__(self) -> tuple[type[Self], tuple[Readable]]:
        return type(self), (self.place,)  # to pickle it reads nothing

    def __copy__(self) -> Self:
        return type(self)(self.place)

    @property
    def kept(self) -> int:
        return self.place.kept

    @property
    def index(self) -> Tensor | None:
        return self._read().index

    @property
    def values(self) -> Tensor:
        return self._read().values

    def _read(self) -> Entries:
        if self._found is None:
            object.__setattr__(self, "_found", self.place.read())
        assert self._found is not None
        return self._found


class StoredEntries(UnreadEntries):
    """Entries of an adapter file, as they would be written again."""

    __slots__ = ()
    place: Place


@dataclass(frozen=True, kw_only=True, slots=True)
class StoredProjection:
    """A that lies in a file. It is read and checked whenever it is asked for."""

    about: str
    where: Stored
    shape: tuple[int, ...]
    """(rank, in_features)."""
    dtype: torch.dtype
    checksum: str

    def read(self) -> Tensor:
        """Raises AdapterError for anything but what was written."""
        with naming(self.where.path, "read"):
            if self.where.shape != self.shape:
                raise AdapterError(
                    f"{self.about} has the shape {self.where.shape}, its header has {self.shape}; {DAMAGED}"
                )
            a = self.where.load()
            if digest(as_bytes(a.flatten())) != self.checksum:
                raise AdapterError(f"{self.about} does not match its checksum; {DAMAGED}")
            if not all_finite(a):
                raise AdapterError(f"{self.about} has values that are not finite; {DAMAGED}")
            return a


@contextmanager
def naming(path: Path, verb: str) -> Iterator[None]:
    """Adds this file's path to errors that occur inside."""
    try:
        yield
    except AdapterError as error:
        raise AdapterError(f"{path}: {error}") from error
    except OSError as error:
        raise AdapterError(f"{path}: it cannot be {verb}: {error.strerror or error}; check the path") from error


def encode(about: str, entries: Entries, num_entries: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Values and mask, on the CPU, as they are written. A mask without elements: all entries are kept, or none.

    Raises AdapterError for entries that do not fit, or whose values are not finite in dtype.
    """
    for what, tensor in (("values", entries.values), ("index", entries.index)):
        if tensor is None:
            continue
        if type(tensor) not in (Tensor, nn.Parameter) or tensor.ndim != 1 or tensor.is_meta:
            found = f"a {type(tensor).__name__} of shape {tuple(tensor.shape)} on {tensor.device}"
            raise AdapterError(f"{about}: {what} is {found}; give a plain tensor of one dimension that has data")
    values = entries.values.detach().to("cpu", dtype).contiguous()
    if not all_finite(values):
        raise AdapterError(f"{about} has values that are not finite as {dtype}; write it as float32, or train it again")
    mask = torch.empty(0, dtype=torch.uint8, device="cpu")
    if entries.index is None:
        if values.numel() != num_entries:
            raise AdapterError(f"{about} has {values.numel()} values for {num_entries} entries; give their index")
        return values, mask
    index = entries.index.detach().cpu()
    _check_index(about, index, values.numel(), num_entries)
    if 0 < values.numel() < num_entries:
        mask = _pack(index, num_entries)
    return values, mask


def encode_projection(about: str, a: Tensor | None, rank: int, in_features: int, dtype: torch.dtype) -> Tensor:
    """A of a block without a seed, on the CPU, as it is written. rank: of the block, the most rows that A may have.

    Raises AdapterError for what is no such A.
    """
    if type(a) is not Tensor or a.dtype != dtype or a.ndim != 2 or a.is_meta:
        found = "missing" if a is None else f"a {type(a).__name__}, {a.dtype} {tuple(a.shape)} on {a.device}"
        raise AdapterError(f"{about} is {found}; without a seed, give it as a plain {dtype} matrix")
    if not 0 < a.shape[0] <= rank or a.shape[1] != in_features:
        raise AdapterError(
            f"{about} has the shape {tuple(a.shape)}; wanted at most {rank} rows, and {in_features} columns"
        )
    if not all_finite(a):
        raise AdapterError(f"{about} has values that are not finite; merge again")
    return a.detach().to("cpu", copy=True).contiguous()


def digest(*parts: bytes | memoryview) -> str:
    """16 hex digits: BLAKE2b over the parts, one after the other."""
    hashed = hashlib.blake2b(digest_size=8)
    for part in parts:
        hashed.update(part)
    return hashed.hexdigest()


def all_finite(tensor: Tensor) -> bool:
    """Whether no entry is infinite or NaN: as torch's `isfinite`, in a fraction of its time."""
    # Whatever is not finite stays so in a sum; a sum of what is finite rarely overflows, and then all are looked at.
    return bool(torch.isfinite(tensor.sum())) or bool(torch.isfinite(tensor).all())


def as_bytes(tensor: Tensor) -> memoryview:
    """The memory of a tensor of one dimension."""
    return tensor.view(torch.uint8).numpy().data


def _check_index(about: str, index: Tensor, num_values: int, num_entries: int) -> None:
    if index.dtype != torch.int32:
        raise AdapterError(f"{about}: index is {index.dtype}; give int32")
    if index.numel() != num_values:
        raise AdapterError(f"{about} has {num_values} values, but {index.numel()} positions; give one position a value")
    if num_values and (index[0] < 0 or index[-1] >= num_entries or not bool((index[1:] > index[:-1]).all())):
        raise AdapterError(f"{about}: index is not ascending within [0, {num_entries}); sort it")


def _pack(index: Tensor, num_entries: int) -> Tensor:
    kept = np.zeros(num_entries, dtype=bool)
    kept[index.numpy()] = True
    bits = np.packbits(kept, bitorder="little").tobytes()
    middle = max(0, len(bits) - _SAMPLE) // 2
    sample = bits[middle : middle + _SAMPLE]
    best = min(_STRATEGIES, key=lambda strategy: len(_deflate(sample, strategy)))
    return torch.frombuffer(bytearray(_deflate(bits, best)), dtype=torch.uint8)


def _deflate(data: bytes, strategy: int) -> bytes:
    stream = zlib.compressobj(level=6, memLevel=9, strategy=strategy)
    return stream.compress(data) + stream.flush()


def _unpack(about: str, stream: memoryview, num_entries: int, kept: int) -> Tensor:
    """The positions of the bits that are set. Memory follows `kept`, whatever the stream unfolds to."""
    index = np.empty(kept, dtype=np.int32)
    num_read = num_found = 0
    for chunk in _bits(about, stream, num_entries):
        found = np.flatnonzero(np.unpackbits(np.frombuffer(chunk, dtype=np.uint8), bitorder="little").view(bool))
        if num_found + found.size > kept:
            raise _keeps(about, kept, "more")
        np.add(found, 8 * num_read, out=index[num_found : num_found + found.size], casting="unsafe")
        num_read += len(chunk)
        num_found += found.size
    if num_found < kept:
        raise _keeps(about, kept, num_found)
    return torch.from_numpy(index)


def _count(about: str, stream: memoryview, num_entries: int, kept: int) -> None:
    num_found = sum(int.from_bytes(chunk, "little").bit_count() for chunk in _bits(about, stream, num_entries))
    if num_found != kept:
        raise _keeps(about, kept, "more" if num_found > kept else num_found)


def _keeps(about: str, kept: int, found: int | str) -> AdapterError:
    return AdapterError(f"{about} has {kept} values, its mask keeps {found}; {DAMAGED}")


def _bits(about: str, stream: memoryview, num_entries: int) -> Iterator[bytes]:
    """Chunks of a mask, eight entries a byte. Raises AdapterError unless it has as many as there are entries."""
    num_bytes, num_read = -(-num_entries // 8), 0
    try:
        for chunk in _inflate(stream):
            num_read += len(chunk)
            if num_read > num_bytes or (num_read == num_bytes and num_entries % 8 and chunk[-1] >> num_entries % 8):
                raise AdapterError(f"the mask of {about} is longer than its {num_entries} entries; {DAMAGED}")
            yield chunk
    except zlib.error as error:
        raise AdapterError(f"the mask of {about} cannot be unpacked ({error}); {DAMAGED}") from error
    if num_read < num_bytes:
        raise AdapterError(f"the mask of {about} is shorter than its {num_entries} entries; {DAMAGED}")


def _inflate(stream: memoryview) -> Iterator[bytes]:
    """Chunks of what a zlib stream unfolds to. Raises zlib.error unless it is whole and nothing follows it."""
    inflater = zlib.decompressobj()
    for start in range(0, len(stream), _CHUNK):
        chunk = inflater.decompress(stream[start : start + _CHUNK], _CHUNK)
        while chunk:
            yield chunk
            chunk = inflater.decompress(inflater.unconsumed_tail, _CHUNK)
    if not inflater.eof:
        raise zlib.error("the stream ends early")
    if inflater.unused_data:
        raise zlib.error("bytes follow the stream")
