"""Trim, elect a sign, and average the entries that have it."""

from collections.abc import Iterable, Sequence
from typing import Annotated, Literal

from torch import Tensor

from lori_dist.adapter.update import Part, Update
from lori_dist.merges._entries import vote
from lori_dist.merges._spaces import Cuts, Space, Trim, merge_entries, model_cuts

UNIT_WEIGHTS: dict[str, tuple[object, ...]] = {}
"""Each adapter has weight 1 where no weights are given: the paper's mean of those that agree."""


def merge(
    updates: Sequence[Update],
    *,
    weights: Sequence[float],
    density: Annotated[float, "(0, 1]"] = 0.2,
    trim: Literal["module", "model"] = "module",
    scale: float = 1.0,
    elect: Literal["total", "frequency"] = "total",
    divide: Literal["number", "weight"] = "number",
    space: Literal["auto", "b", "dense"] = "auto",
    rank: Annotated[int, "[1, inf)"] | None = None,
) -> list[Part]:
    """The mean, entry by entry, of those tasks' largest entries that have the elected sign.

    Y_t = w_t trim(X_t); e = sign(sum_t Y_t), + where that is zero; scale * sum of the Y_t with sign e / their number.
    Zeros have no sign, so an entry that one task alone has keeps its value.
    updates: of one module, one per adapter. weights: one per adapter; 1, the default, for the paper's mean: T equal
    adapters give one of them. Weights that sum to one give a T-th of it, unless `divide` is `weight`.
    density: of each task's entries that are not zero, the share that takes part; 0.2 in the paper. trim: the largest of
    each module, or those of the whole model, as in the paper, for which all adapters are read twice more. scale: its
    lambda.
    elect: the sign of the sum, or that of most tasks (`frequency`). divide: by the number of tasks that agree, or by
    the sum of their |w_t|. space, rank: as of `magnitude`; `b` needs a shared A.
    Raises AdapterError for `b` without a shared A, ConfigError for a rank above what the shape allows.
    Source: Yadav et al., "TIES-Merging" (arXiv 2306.01708), section 4. Elects on weighted entries, as mergekit does;
    PEFT elects on unweighted ones.
    """

    def combine(matrices: Iterable[Tensor]) -> Tensor:
        weighted = [x * weight for x, weight in zip(matrices, weights, strict=True)]
        shares = [abs(weight) for weight in weights] if divide == "weight" else None
        return vote(weighted, elect=elect, divide=shares) * scale

    return merge_entries(updates, combine, space=space, rank=rank, votes=True, density=density)


def survey(
    modules: Iterable[Sequence[Update]],
    *,
    density: float = 0.2,
    trim: Trim = "module",
    space: Space = "auto",
    **others: object,
) -> dict[str, list[Cuts]] | None:
    """The result of looking at all modules, which `merge` needs. Raises AdapterError where they have no common
    measure."""
    return model_cuts(modules, trim=trim, density=density, space=space, votes=True)
