"""The projection's kernel for CUDA: Philox4x64-10 and the rounding to values in one pass, the bits of the CPU."""

import torch
import triton  # type: ignore[import-not-found, import-untyped, unused-ignore]  # optional, and without stubs
import triton.language as tl  # type: ignore[import-not-found, import-untyped, unused-ignore]
from torch import Tensor

_BLOCKS = 128  # Philox blocks in a tile, one for each thread of four warps
_MULTIPLIER_0 = tl.constexpr(0xD2E7470EE14C6C93)
_MULTIPLIER_1 = tl.constexpr(0xCA5A826395121157)
_WEYL_0 = tl.constexpr(0x9E3779B97F4A7C15)
_WEYL_1 = tl.constexpr(0xBB67AE8584CAA73B)


def fill(runs: Tensor, key: int, first: int, stride: int, scale: float) -> None:
    """Run i of `runs`, (num_runs, width), gets the entries from first + i * stride on."""
    num_runs, width = runs.shape
    num_tiles = triton.cdiv(width + 7, 8 * _BLOCKS)  # of one run, which may start inside of a block of 8 entries
    low, high = words(key)
    with torch.cuda.device(runs.get_device()):
        _fill[(num_runs * num_tiles,)](runs, low, high, first, stride, width, num_tiles, scale, BLOCKS=_BLOCKS)


def words(key: int) -> tuple[int, int]:
    """The two words of a key as a kernel takes them, low one first.

    Signed: Triton types an integer by its value, and signed ones all widen to the same 64 bits.
    """
    low, high = (key >> shift & 0xFFFFFFFFFFFFFFFF for shift in (0, 64))
    return low - (low >> 63 << 64), high - (high >> 63 << 64)


# Not specialized, since these differ from module to module and each combination would be compiled separately.
@triton.jit(do_not_specialize=["low", "high", "first", "stride", "width", "num_tiles"])  # type: ignore[untyped-decorator]
def _fill(out, low, high, first, stride, width, num_tiles, scale, BLOCKS: tl.constexpr):  # type: ignore[no-untyped-def]
    program = tl.program_id(0)
    run = tl.cast(program // num_tiles, tl.int64)
    start = first + run * stride
    first_block = start // 8 + program % num_tiles * BLOCKS
    values = entries(first_block + tl.arange(0, BLOCKS), low, high, scale)
    column = first_block * 8 + tl.arange(0, 8 * BLOCKS) - start
    tl.store(out + run * width + column, values.to(out.dtype.element_ty), mask=(column >= 0) & (column < width))


@triton.jit
def entries(block, low, high, scale):  # type: ignore[no-untyped-def]
    """The entries of whole blocks in their order, fp32: (..., 8 n) for the numbers of n blocks, (..., n)."""
    c0, c1, c2, c3 = _philox(block, low, high)
    both = tl.interleave(tl.interleave(c0, c2), tl.interleave(c1, c3))
    return _value(tl.interleave(both.to(tl.uint32), (both >> 32).to(tl.uint32)), scale)


@triton.jit
def entry(position, low, high, scale):  # type: ignore[no-untyped-def]
    """The entry at each position, fp32. A block for each of them: eight times the work of `entries`."""
    c0, c1, c2, c3 = _philox(position // 8, low, high)
    lane = position // 2 % 4
    word = tl.where(lane < 2, tl.where(lane == 0, c0, c1), tl.where(lane == 2, c2, c3))
    return _value((word >> (position % 2 * 32).to(tl.uint64)).to(tl.uint32), scale)


@triton.jit
def _philox(block, low, high):  # type: ignore[no-untyped-def]
    c0 = block.to(tl.uint64)
    c1 = tl.zeros_like(c0)
    c2 = tl.zeros_like(c0)
    c3 = tl.zeros_like(c0)
    k0 = tl.cast(low, tl.int64).to(tl.uint64)
    k1 = tl.cast(high, tl.int64).to(tl.uint64)
    for _ in tl.static_range(10):
        high_0 = tl.umulhi(c0, _MULTIPLIER_0)
        high_1 = tl.umulhi(c2, _MULTIPLIER_1)
        low_0 = c0 * _MULTIPLIER_0
        low_1 = c2 * _MULTIPLIER_1
        c0 = high_1 ^ c1 ^ k0
        c1 = low_1
        c2 = high_0 ^ c3 ^ k1
        c3 = low_0
        k0 += _WEYL_0
        k1 += _WEYL_1
    return c0, c1, c2, c3


@triton.jit
def _value(half, scale):  # type: ignore[no-untyped-def]
    return (half.to(tl.int32, bitcast=True) >> 8).to(tl.float32) * scale
