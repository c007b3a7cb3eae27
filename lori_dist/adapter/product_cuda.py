"""The products with A for CUDA: tiles of A are made in registers, multiplied there, and never written to memory."""

from typing import Any

import torch
import triton  # type: ignore[import-not-found, import-untyped, unused-ignore]  # optional, and without stubs
import triton.language as tl  # type: ignore[import-not-found, import-untyped, unused-ignore]
from torch import Tensor

from lori_dist.adapter.projection_cuda import entries, entry, words

_TOKENS = 128  # in a tile, at most. They share a tile of A: the more there are, the less often it is made
_BYTES = 128  # of a row of a tile of A, which has as many rows as columns at most: compiled for an H100, nothing spills
_PROGRAMS = 256  # about two for each multiprocessor of an H100


def down(x: Tensor, key: int, rank: int, scale: float, dtype: torch.dtype) -> Tensor:
    """x A^T, (tokens, rank), in the dtype of x, (tokens, in_features), to which A in its own dtype is cast.

    Sums are in fp32, or in fp64 for such an x, and in an order that follows from the shapes alone.
    """
    tokens, in_features = x.shape
    tile = _tile(tokens, rank, in_features, dtype, x.dtype)
    grid = triton.cdiv(tokens, tile["TOKENS"]), triton.cdiv(rank, tile["ROWS"])
    # Few tokens leave most of the device idle. Then the columns are shared out as well, and the parts added at the end.
    num_parts = max(1, min(_PROGRAMS // (grid[0] * grid[1]), triton.cdiv(in_features, tile["COLUMNS"])))
    parts = torch.empty(num_parts, tokens, rank, dtype=x.dtype if num_parts == 1 else _sum(x.dtype), device=x.device)
    with torch.cuda.device(x.get_device()):
        _down[(*grid, num_parts)](
            x.contiguous(), parts, *words(key), tokens, rank, in_features, num_parts, scale, **tile
        )
    return parts[0] if num_parts == 1 else parts.sum(0).to(x.dtype)


def up(u: Tensor, key: int, in_features: int, scale: float, dtype: torch.dtype) -> Tensor:
    """u A, (tokens, in_features), in the dtype of u, (tokens, rank); the rest is as for `down`."""
    tokens, rank = u.shape
    tile = _tile(tokens, rank, in_features, dtype, u.dtype)
    out = torch.empty(tokens, in_features, dtype=u.dtype, device=u.device)
    grid = triton.cdiv(tokens, tile["TOKENS"]), triton.cdiv(in_features, tile["COLUMNS"])
    with torch.cuda.device(u.get_device()):
        _up[grid](u.contiguous(), out, *words(key), tokens, rank, in_features, scale, **tile)
    return out


def _tile(tokens: int, rank: int, in_features: int, a_dtype: torch.dtype, dtype: torch.dtype) -> dict[str, Any]:
    """Constants that the kernels are compiled for. Sides are powers of two from 16 on, as tensor cores need."""
    side = _BYTES // dtype.itemsize
    return {
        "TOKENS": min(_TOKENS, max(16, triton.next_power_of_2(tokens))),
        "ROWS": min(side, max(16, triton.next_power_of_2(rank))),
        "COLUMNS": side,
        "A": _named(a_dtype),
        "SUM": _named(_sum(dtype)),
        "WHOLE_BLOCKS": in_features % 8 == 0,  # each row of A begins with a Philox block
        "num_warps": 8,
    }


def _sum(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def _named(dtype: torch.dtype) -> Any:
    return getattr(tl, str(dtype).removeprefix("torch."))


# What differs from module to module, or from batch to batch, is not specialized: it would be compiled again and again.
@triton.jit(do_not_specialize=["low", "high", "tokens", "num_parts"])  # type: ignore[untyped-decorator]
def _down(  # type: ignore[no-untyped-def]
    x,
    parts,
    low,
    high,
    tokens,
    rank,
    in_features,
    num_parts,
    scale,
    TOKENS: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    A: tl.constexpr,
    SUM: tl.constexpr,
    WHOLE_BLOCKS: tl.constexpr,
):
    token = tl.program_id(0).to(tl.int64) * TOKENS + tl.arange(0, TOKENS)[:, None]
    first_row = tl.program_id(1) * ROWS
    part = tl.program_id(2)
    total = tl.zeros((TOKENS, ROWS), SUM)
    for first_column in range(part * COLUMNS, in_features, num_parts * COLUMNS):
        column = first_column + tl.arange(0, COLUMNS)[None, :]
        # Outside of A, where its tile holds other entries, x is zero.
        x_tile = tl.load(x + token * in_features + column, mask=(token < tokens) & (column < in_features), other=0.0)
        a = _a(first_row, first_column, low, high, in_features, scale, ROWS, COLUMNS, A, WHOLE_BLOCKS)
        total = tl.dot(x_tile, tl.trans(a.to(x_tile.dtype)), total, input_precision="ieee", out_dtype=SUM)
    row = first_row + tl.arange(0, ROWS)[None, :]
    place = parts + (part.to(tl.int64) * tokens + token) * rank + row
    tl.store(place, total.to(parts.dtype.element_ty), mask=(token < tokens) & (row < rank))


@triton.jit(do_not_specialize=["low", "high", "tokens"])  # type: ignore[untyped-decorator]
def _up(  # type: ignore[no-untyped-def]
    u,
    out,
    low,
    high,
    tokens,
    rank,
    in_features,
    scale,
    TOKENS: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    A: tl.constexpr,
    SUM: tl.constexpr,
    WHOLE_BLOCKS: tl.constexpr,
):
    token = tl.program_id(0).to(tl.int64) * TOKENS + tl.arange(0, TOKENS)[:, None]
    first_column = tl.program_id(1) * COLUMNS
    total = tl.zeros((TOKENS, COLUMNS), SUM)
    for first_row in range(0, rank, ROWS):
        row = first_row + tl.arange(0, ROWS)[None, :]
        u_tile = tl.load(u + token * rank + row, mask=(token < tokens) & (row < rank), other=0.0)
        a = _a(first_row, first_column, low, high, in_features, scale, ROWS, COLUMNS, A, WHOLE_BLOCKS)
        total = tl.dot(u_tile, a.to(u_tile.dtype), total, input_precision="ieee", out_dtype=SUM)
    column = first_column + tl.arange(0, COLUMNS)[None, :]
    place = out + token * in_features + column
    tl.store(place, total.to(out.dtype.element_ty), mask=(token < tokens) & (column < in_features))


@triton.jit  # type: ignore[untyped-decorator]
def _a(  # type: ignore[no-untyped-def]
    first_row,
    first_column,
    low,
    high,
    in_features,
    scale,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    A: tl.constexpr,
    WHOLE_BLOCKS: tl.constexpr,
):
    """A tile of A, in its own dtype. What lies beyond its last row or column are other entries, not zeros."""
    row = tl.cast(first_row, tl.int64) + tl.arange(0, ROWS)[:, None]
    position = row * in_features + first_column
    if WHOLE_BLOCKS:
        values = entries(position // 8 + tl.arange(0, COLUMNS // 8)[None, :], low, high, scale)
    else:
        values = entry(position + tl.arange(0, COLUMNS)[None, :], low, high, scale)
    return values.to(A)
