"""Entries in which the tasks differ, weighted by each task's squares, without those of the minority's sign."""

from collections.abc import Iterable, Sequence
from typing import Annotated, Literal

import torch
from torch import Tensor

from lori_dist.adapter.update import Part, Update
from lori_dist.merges._cuts import largest
from lori_dist.merges._entries import vote
from lori_dist.merges._spaces import merge_entries

UNIT_WEIGHTS: dict[str, tuple[object, ...]] = {}
"""Each adapter has weight 1 where no weights are given: the paper's mean of those that agree."""


def merge(
    updates: Sequence[Update],
    *,
    weights: Sequence[float],
    density: Annotated[float, "(0, 1]"] = 0.1,
    space: Literal["auto", "b", "dense"] = "auto",
    rank: Annotated[int, "[1, inf)"] | None = None,
) -> list[Part]:
    """The mean, weighted by the tasks' squares, of entries that differ most and have the elected sign (SCE).

    Y_t = w_t X_t. Select: of the entries whose variance over the tasks is not zero, those with the largest stay in all
    Y_t, max(1, round(density n)) of n; where the tasks differ nowhere, as one alone, all stay. Calculate: a task's
    coefficient is the sum of the squares of its Y_t, over that of all tasks. Erase: entries that do not have the sign
    of sum_t Y_t, + where that is zero, go; the rest are averaged with the coefficients of those that have it.
    updates: of one module, one per adapter. weights: one per adapter; 1, the default, for the paper's mean: T equal
    adapters give one of them. density: the paper's tau, of entries; counted over the module's matrix, as in mergekit.
    space, rank: as of `magnitude`; `b` needs a shared A.
    Raises AdapterError for `b` without a shared A, ConfigError for a rank above what the shape allows.
    Source: Wan et al., "FuseChat" (arXiv 2408.07990), section 3.3; its authors' `sce` in mergekit, which also
    divides by the coefficients of those that agree. The weights are ours: the paper has none.
    """

    def combine(matrices: Iterable[Tensor]) -> Tensor:
        weighted = [x * weight for x, weight in zip(matrices, weights, strict=True)]
        variance = _variance(weighted)
        if density < 1 and bool(variance.any()):
            selected = largest(variance, density)
            weighted = [x * selected for x in weighted]
        squares = [float(x.square().sum()) for x in weighted]
        shares = [square / (sum(squares) or 1.0) for square in squares]
        return vote(weighted, multiply=shares, divide=shares)

    return merge_entries(updates, combine, space=space, rank=rank, votes=True)


def _variance(matrices: Sequence[Tensor]) -> Tensor:
    """T^2 times the variance over the tasks, entry by entry: exactly zero where all are equal."""
    result = torch.zeros_like(matrices[0])
    for place, x in enumerate(matrices):
        for other in matrices[:place]:
            result += (x - other).square()
    return result
