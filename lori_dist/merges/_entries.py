"""Merging matrices entry by entry: sparsifying those of the tasks, then summing them or voting on their signs.

Matrices are float64 and of one shape; they are the tasks' s_t B_t on one A, their updates, or their blocks in a basis.
"""

import hashlib
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from lori_dist.merges._cuts import largest

Combine = Callable[[Iterable[Tensor]], Tensor]
"""One matrix per task -> the merged one. They are taken one after the other, so that each can be made when needed."""

Inner = Literal["task_arithmetic", "ties", "dare", "dare_ties"]
Elect = Literal["total", "frequency"]

_DRAW = b"lori_dist.merges.dare.v1"
_CHUNK = 1 << 20  # words drawn at a time
_ROWS = 256  # ranked at a time
_BELOW_ONE = 1 - 2.0**-53  # 2^64 is not a 64-bit word


@dataclass(frozen=True, kw_only=True, slots=True)
class Draw:
    """All that a random mask depends on, besides the task; the order of tasks, modules or processes is no part of
    it."""

    seed: int
    module: str


def combination(
    inner: Inner, *, weights: Sequence[float], names: Sequence[str], density: float, draw: Draw, elect: Elect = "total"
) -> Combine:
    """The merge of that name, for matrices of the tasks `names`. At density 1 nothing is dropped."""
    sparsify: dict[Inner, Callable[[Tensor, str], Tensor]] = {
        "task_arithmetic": lambda x, name: trim(x, density),
        "ties": lambda x, name: trim(x, density),
        "dare": lambda x, name: thin(x, density, draw, name),
        "dare_ties": lambda x, name: thin(x, density, draw, name),
    }
    join: dict[Inner, Callable[[list[Tensor]], Tensor]] = {
        "task_arithmetic": total,
        "ties": partial(vote, elect=elect),
        "dare": total,
        "dare_ties": partial(vote, elect=elect),
    }

    def combine(matrices: Iterable[Tensor]) -> Tensor:
        named = zip(matrices, names, weights, strict=True)
        return join[inner]([sparsify[inner](x, name) * weight for x, name, weight in named])

    return combine


def trim(x: Tensor, density: float) -> Tensor:
    """x with its `largest` entries, the rest zero."""
    return x * largest(x, density)


def thin(x: Tensor, density: float | Tensor, draw: Draw, name: str) -> Tensor:
    """x with every entry kept with probability `density` and divided by it, or zero: the expectation is x.

    density: one for all entries, or one for each, in x's shape, above zero. Whether entry number f is kept follows from
    (seed, module, name, f) alone: 64-bit word f of the Philox4x64-10 stream whose key is the hash of the first three,
    compared with density * 2^64.
    """
    if isinstance(density, float | int) and density == 1:
        return x
    kept = torch.from_numpy(_kept(x.numel(), density, draw, name)).view_as(x)
    return x * kept / density


def by_rank(x: Tensor, density: float, epsilon: float) -> Tensor:
    """How probably each entry is kept, as x: from density - epsilon for the smallest entry of a row to density +
    epsilon for its largest, in equal steps from one size to the next. Zeros have no rank; alone, an entry has
    `density`."""
    return torch.cat([_by_rank(rows, density, epsilon) for rows in torch.split(x, _ROWS)])


def _by_rank(x: Tensor, density: float, epsilon: float) -> Tensor:
    sizes = torch.where(x == 0, torch.inf, x.abs())  # behind all others
    ranks = sizes.argsort(dim=1, stable=True).argsort(dim=1).double()
    steps = (torch.count_nonzero(x, dim=1) - 1).unsqueeze(1).double()
    share = torch.where(steps > 0, ranks / steps.clamp(min=1), 0.5)
    return torch.where(x == 0, density, density + epsilon * (2 * share - 1))


def total(matrices: Sequence[Tensor]) -> Tensor:
    """The sum."""
    result = torch.zeros_like(matrices[0])
    for x in matrices:
        result += x
    return result


def vote(
    matrices: Sequence[Tensor],
    *,
    elect: Elect = "total",
    multiply: Sequence[float] | None = None,
    divide: Sequence[float] | None = None,
) -> Tensor:
    """The mean, entry by entry, of those matrices that have the elected sign there; zeros have none.

    elect: the sign of the sum (`total`), or that of most matrices (`frequency`); + where that is a draw. multiply,
    divide: what each matrix counts in the mean's numerator and denominator, zero or more; 1 by default.
    """
    ballots = [x.sign() if elect == "frequency" else x for x in matrices]
    elected = torch.where(total(ballots) >= 0, 1.0, -1.0).to(matrices[0].dtype)
    result, count = torch.zeros_like(matrices[0]), torch.zeros_like(matrices[0])
    agreeing = torch.empty_like(matrices[0])  # its memory is used again: new memory takes longer than the arithmetic
    ones = [1.0] * len(matrices)
    for x, factor, share in zip(matrices, multiply or ones, divide or ones, strict=True):
        torch.mul(x, elected, out=agreeing).clamp_(min=0)  # sizes, so that the sign comes back exactly
        result.add_(agreeing, alpha=factor)
        count.add_(agreeing > 0, alpha=share)
    return result.mul_(elected).div_(count.masked_fill_(count == 0, 1.0))


def _kept(num_entries: int, density: float | Tensor, draw: Draw, name: str) -> np.ndarray:
    text = b"\0".join((_DRAW, b"%d" % draw.seed, draw.module.encode(), name.encode()))
    key = int.from_bytes(hashlib.blake2b(text, digest_size=16).digest(), "little")
    words = np.random.Philox(key=key)
    each = (
        density.flatten().numpy() if isinstance(density, Tensor) else np.broadcast_to(np.float64(density), num_entries)
    )
    kept = np.empty(num_entries, dtype=bool)
    for start in range(0, num_entries, _CHUNK):
        piece = kept[start : start + _CHUNK]
        limits = (np.minimum(each[start : start + _CHUNK], _BELOW_ONE) * 2.0**64).astype(np.uint64)
        np.less(words.random_raw(piece.size), limits, out=piece)
    return kept
