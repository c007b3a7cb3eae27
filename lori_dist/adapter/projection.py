"""LoRI's frozen random A: any slice of it from a seed and a module path, the same bits everywhere."""

import hashlib
import math
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
from torch import Tensor

from lori_dist.errors import AdapterError

GENERATOR = "philox4x64-10"
"""Names the definition of A below in adapter files. Other bits need another name."""

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)

_DOMAIN = b"lori_dist.projection.v1"
_ENTRIES_PER_BLOCK = 8  # four 64-bit words, two entries each
_FRACTION_BITS = 23
_CHUNK = 1 << 17  # entries: words and values stay in the cache, and the cost of a new generator (10 us) does not show
_ENTRIES_PER_THREAD = 1 << 18  # less work than this is done sooner than another thread is started
_TORCH_GRAIN = 1 << 15  # entries: up to here a torch operation stays on the thread that calls it


def projection(
    seed: int,
    module: str,
    rank: int,
    in_features: int,
    *,
    rows: slice | None = None,
    columns: slice | None = None,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
    num_threads: int | None = None,
) -> Tensor:
    """A, (rank, in_features), or `A[rows, columns]` without making the rest: iid uniform on +-1/sqrt(in_features).

    Entry (i, j) follows from seed, module, i, j and in_features alone: a larger rank keeps the earlier rows, and
    device, slice, number of threads and the state of any generator change nothing. This is the definition:

    - key = the first 16 bytes of BLAKE2b over the domain, the seed in decimal and the module path, separated by NUL;
      two little-endian 64-bit words;
    - entry f = i * in_features + j is one half of the 64-bit word f // 2 (f even: the low half), and word w is lane
      w % 4 of the Philox4x64-10 block with counter (w // 4, 0, 0, 0);
    - the half, read as int32 and shifted right by 8, is an integer in [-2^23, 2^23). Its product with
      float32(1 / (sqrt(in_features) * 2^23)) is rounded to fp32, and that is cast once to dtype.

    |A| <= 1/sqrt(in_features) holds up to the rounding of that bound to fp32 and to dtype.

    seed: in [0, 2^64). rows, columns: as in indexing, with step 1. dtype: one of DTYPES. num_threads: on CPU; as many
    as torch uses if None. Devices other than cpu, cuda and meta get a copy of what the CPU made.
    Raises AdapterError for arguments outside of these, and for cuda where Triton is missing.
    Source: Salmon et al., "Parallel random numbers: as easy as 1, 2, 3" (SC'11).
    """
    _check(seed, module, rank, in_features, dtype, num_threads)
    row_range = _range("rows", rows, rank)
    column_range = _range("columns", columns, in_features)
    shape = (len(row_range), len(column_range))
    device = torch.device(device)
    maker = device if device.type in ("cpu", "cuda", "meta") else torch.device("cpu")
    fill = _cuda_fill() if maker.type == "cuda" else partial(_fill, num_threads=num_threads or torch.get_num_threads())
    a = _empty(shape, dtype, maker)
    if a.numel() and not a.is_meta:
        runs = a.view(1, -1) if shape[1] == in_features else a  # whole rows follow each other: a single run
        first = row_range.start * in_features + column_range.start
        fill(runs, _key(seed, module), first, in_features, _scale(in_features))
    return a.to(device)


@dataclass(frozen=True, kw_only=True, slots=True)
class Recipe:
    """The recipe of A, which is all of A that is stored. Raises AdapterError as `projection` does."""

    seed: int
    module: str
    rank: int
    in_features: int
    dtype: torch.dtype = torch.float32

    def __post_init__(self) -> None:
        _check(self.seed, self.module, self.rank, self.in_features, self.dtype, None)

    @property
    def key(self) -> int:
        """Key of the generator: two 64-bit words, the low one first."""
        return _key(self.seed, self.module)

    @property
    def scale(self) -> float:
        """Factor of the generator's integers."""
        return _scale(self.in_features)

    def make(
        self, *, rows: slice | None = None, columns: slice | None = None, device: torch.device | str = "cpu"
    ) -> Tensor:
        """A, (rank, in_features), or a slice of it."""
        return projection(
            self.seed,
            self.module,
            self.rank,
            self.in_features,
            rows=rows,
            columns=columns,
            dtype=self.dtype,
            device=device,
        )


def philox(counter: tuple[int, int, int, int], key: tuple[int, int]) -> tuple[int, int, int, int]:
    """The block of four 64-bit words at a counter, low words first: what Random123 calls philox4x64, ten rounds."""
    first, second, third, fourth = _generator(_join(counter), _join(key)).random_raw(4).tolist()
    return first, second, third, fourth


def checksum(a: Tensor) -> str:
    """16 hex digits that tell one A from another: BLAKE2b over its bytes, row after row, in its own dtype."""
    data = a.detach().cpu().contiguous().flatten().view(torch.uint8)
    return hashlib.blake2b(data.numpy().data, digest_size=8).hexdigest()


def _check(seed: int, module: str, rank: int, in_features: int, dtype: torch.dtype, num_threads: int | None) -> None:
    if not isinstance(seed, int) or not 0 <= seed < 2**64:
        raise AdapterError(f"projection: seed is {seed!r}; give an integer from 0 to 2^64 - 1")
    if not isinstance(module, str) or not module:
        raise AdapterError(f"projection: module is {module!r}; give the module's path, such as 'layers.0.q_proj'")
    for name, count in (("rank", rank), ("in_features", in_features), ("num_threads", num_threads)):
        if count is not None and (not isinstance(count, int) or count < 1):
            raise AdapterError(f"projection: {name} is {count!r}; give an integer of at least 1")
    if dtype not in DTYPES:
        raise AdapterError(f"projection: dtype is {dtype}; give one of {', '.join(map(str, DTYPES))}")


def _range(name: str, part: slice | None, size: int) -> range:
    if part is None:
        return range(size)
    if not isinstance(part, slice):
        raise AdapterError(f"projection: {name} is {part!r}; give a slice, such as slice(0, {size})")
    if part.step not in (None, 1):
        raise AdapterError(
            f"projection: {name} has step {part.step}; only step 1 can be made, index the result instead"
        )
    return range(size)[part]


def _empty(shape: tuple[int, int], dtype: torch.dtype, device: torch.device) -> Tensor:
    # As bytes first: deepspeed.zero.Init silently casts every new floating-point tensor.
    return torch.empty(math.prod(shape) * dtype.itemsize, dtype=torch.uint8, device=device).view(dtype).view(shape)


def _key(seed: int, module: str) -> int:
    text = b"\0".join((_DOMAIN, b"%d" % seed, module.encode()))
    return int.from_bytes(hashlib.blake2b(text, digest_size=16).digest(), "little")


def _scale(in_features: int) -> float:
    return float(np.float32(1 / (math.sqrt(in_features) * 2**_FRACTION_BITS)))


def _join(words: tuple[int, ...]) -> int:
    return sum(word << 64 * lane for lane, word in enumerate(words))


def _generator(counter: int, key: int) -> np.random.Philox:
    # NumPy steps the counter before it makes a block.
    return np.random.Philox(counter=(counter - 1) % 2**256, key=key)


def _fill(runs: Tensor, key: int, first: int, stride: int, scale: float, num_threads: int) -> None:
    """Run i of `runs`, (num_runs, width), gets the entries from first + i * stride on."""
    chunks = iter(list(_chunks(runs, first, stride)))  # shared: each thread takes the next one

    def fill_chunks() -> None:
        for chunk, start in chunks:
            _fill_chunk(chunk, key, start, scale)

    num_helpers = min(num_threads, max(1, runs.numel() // _ENTRIES_PER_THREAD)) - 1
    if num_helpers == 0:
        fill_chunks()
        return
    with ThreadPoolExecutor(num_helpers) as pool:
        helpers = [pool.submit(fill_chunks) for _ in range(num_helpers)]
        fill_chunks()
    for helper in helpers:
        helper.result()


def _chunks(runs: Tensor, first: int, stride: int) -> Iterator[tuple[Tensor, int]]:
    for i, run in enumerate(runs.unbind()):
        for j, chunk in enumerate(torch.split(run, _CHUNK)):
            yield chunk, first + i * stride + j * _CHUNK


def _fill_chunk(chunk: Tensor, key: int, first: int, scale: float) -> None:
    block, skip = divmod(first, _ENTRIES_PER_BLOCK)
    stop = skip + chunk.numel()
    words = _generator(block, key).random_raw(-(-stop // 2))
    integers = words.astype("<u8", copy=False).view("<i4")[skip:stop]
    integers >>= 8
    values = chunk.numpy() if chunk.dtype == torch.float32 else integers.view(np.float32)
    np.multiply(integers, scale, out=values, dtype=np.float32, casting="unsafe")
    if chunk.dtype != torch.float32:
        targets, sources = (torch.split(part, _TORCH_GRAIN) for part in (chunk, torch.from_numpy(values)))
        for target, source in zip(targets, sources, strict=True):
            target.copy_(source)


def _cuda_fill() -> Callable[[Tensor, int, int, int, float], None]:
    try:
        from lori_dist.adapter import projection_cuda
    except ImportError as error:
        raise AdapterError(
            "projection: device is cuda, and Triton, which makes A there, cannot be imported; "
            "install triton, or make A with device='cpu' and move it"
        ) from error
    return projection_cuda.fill
