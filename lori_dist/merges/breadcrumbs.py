"""The sum of updates that have lost their smallest entries and their very largest."""

from collections.abc import Iterable, Sequence
from typing import Annotated, Literal

from torch import Tensor

from lori_dist.adapter.update import Part, Update
from lori_dist.merges._cuts import without_outliers
from lori_dist.merges._entries import total, vote
from lori_dist.merges._spaces import merge_entries

UNIT_WEIGHTS: dict[str, tuple[object, ...]] = {"inner": ("ties",)}
"""Each adapter has weight 1 where no weights are given: the mean of those that agree."""

EXACT: dict[str, tuple[object, ...]] = {"inner": ("task_arithmetic",), "density": (1.0,), "rank": (None,)}
"""Options -> values for which the result is the weighted sum of the updates, exactly."""


def merge(
    updates: Sequence[Update],
    *,
    weights: Sequence[float],
    inner: Literal["task_arithmetic", "ties"] = "task_arithmetic",
    density: Annotated[float, "(0, 1]"] = 0.15,
    gamma: Annotated[float, "[0, 1)"] = 0.01,
    space: Literal["auto", "b", "dense"] = "auto",
    rank: Annotated[int, "[1, inf)"] | None = None,
) -> list[Part]:
    """The weighted sum of the tasks' entries without the smallest and without outliers (Model Breadcrumbs).

    Of the n entries of X_t that are not zero, the round(gamma n) largest go, then all but the max(1, round(density n))
    largest of the rest. `ties` takes the mean of those with the elected sign (`breadcrumbs_ties` of mergekit) instead
    of the sum.
    updates: of one module, one per adapter. weights: one per adapter, of any sign; by default equal ones that sum to
    one, with `ties` 1. With weights of 1, a common factor is the paper's alpha. density: the share of the entries that
    stays, the paper's gamma - beta. gamma: the share that goes as outliers, the paper's 1 - gamma; less where density
    leaves no room for it, so that at density 1 nothing goes. space, rank: as of `magnitude`; `b` needs a shared A with
    `ties`.
    Raises AdapterError and ConfigError as `ties`.
    Source: Davari and Belilovsky, "Model Breadcrumbs" (arXiv 2312.06795), section 3. Masks over each weight matrix, as
    the paper and mergekit, whose names these options have; rezazzr/breadcrumbs masks every row by itself.
    """

    def combine(matrices: Iterable[Tensor]) -> Tensor:
        kept = [x * without_outliers(x, density, gamma) * weight for x, weight in zip(matrices, weights, strict=True)]
        return vote(kept) if inner == "ties" else total(kept)

    return merge_entries(updates, combine, space=space, rank=rank, votes=inner == "ties")
