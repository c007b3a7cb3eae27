"""The products with A where A is not kept: it is made on the way, a piece at a time."""

from collections.abc import Iterator
from types import ModuleType

import torch
from torch import Tensor

from lori_dist.adapter.projection import Recipe
from lori_dist.errors import AdapterError

_CHUNK = 1 << 20  # entries of A that are there at once, where no kernel makes them in registers


def down(x: Tensor, a: Recipe) -> Tensor:
    """x A^T, (tokens, rank), for x, (tokens, in_features): computed in the dtype of x, to which A is cast.

    On CUDA one kernel makes A and multiplies with it; elsewhere 2^20 entries of A, or one row, are there at a time.
    No gradient passes through it. Raises AdapterError for cuda where Triton is missing.
    """
    return _down(x, str(a.seed), a.module, a.rank, a.in_features, a.dtype)  # type: ignore[no-any-return]


def up(u: Tensor, a: Recipe) -> Tensor:
    """u A, (tokens, in_features), for u, (tokens, rank); the rest is as for `down`."""
    return _up(u, str(a.seed), a.module, a.rank, a.in_features, a.dtype)  # type: ignore[no-any-return]


# Operators, since torch.compile cannot look into what makes A. The seed is text, as their integers end at 2^63. To type
# checkers, what they return is Any.
@torch.library.custom_op("lori_dist::down", mutates_args=())
def _down(x: Tensor, seed: str, module: str, rank: int, in_features: int, dtype: torch.dtype) -> Tensor:
    a = Recipe(seed=int(seed), module=module, rank=rank, in_features=in_features, dtype=dtype)
    if x.is_cuda and x.numel():  # no tokens are no grid
        return _kernels().down(x, a.key, rank, a.scale, dtype)  # type: ignore[no-any-return]
    out = x.new_empty(x.shape[0], rank)
    for rows in _slices(rank, in_features):
        torch.mm(x, a.make(rows=rows, device=x.device).to(x.dtype).t(), out=out[:, rows])
    return out


@torch.library.custom_op("lori_dist::up", mutates_args=())
def _up(u: Tensor, seed: str, module: str, rank: int, in_features: int, dtype: torch.dtype) -> Tensor:
    a = Recipe(seed=int(seed), module=module, rank=rank, in_features=in_features, dtype=dtype)
    if u.is_cuda and u.numel():
        return _kernels().up(u, a.key, in_features, a.scale, dtype)  # type: ignore[no-any-return]
    out = u.new_empty(u.shape[0], in_features)
    for columns in _slices(in_features, rank):
        torch.mm(u, a.make(columns=columns, device=u.device).to(u.dtype), out=out[:, columns])
    return out


@_down.register_fake
def _(x: Tensor, seed: str, module: str, rank: int, in_features: int, dtype: torch.dtype) -> Tensor:
    return x.new_empty(x.shape[0], rank)


@_up.register_fake
def _(u: Tensor, seed: str, module: str, rank: int, in_features: int, dtype: torch.dtype) -> Tensor:
    return u.new_empty(u.shape[0], in_features)


def _slices(size: int, entries_each: int) -> Iterator[slice]:
    """All of `size` rows or columns, in pieces of at most _CHUNK entries, or of one row or column."""
    width = max(1, _CHUNK // entries_each)
    return (slice(start, min(start + width, size)) for start in range(0, size, width))


def _kernels() -> ModuleType:
    try:
        from lori_dist.adapter import product_cuda
    except ImportError as error:
        raise AdapterError(
            "projection: got recomputed, and Triton, which makes A inside of the products on cuda, cannot be "
            "imported; install triton, or choose cached"
        ) from error
    return product_cuda
