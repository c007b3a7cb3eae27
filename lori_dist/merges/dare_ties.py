"""Random entries of each task, rescaled, then the vote of TIES."""

from collections.abc import Sequence
from typing import Annotated, Literal

from lori_dist.adapter.update import Part, Update
from lori_dist.merges._entries import Draw, combination
from lori_dist.merges._spaces import merge_entries

UNIT_WEIGHTS: dict[str, tuple[object, ...]] = {}
"""Each adapter has weight 1 where no weights are given: the mean of those that agree."""


def merge(
    updates: Sequence[Update],
    *,
    weights: Sequence[float],
    density: Annotated[float, "(0, 1]"] = 0.5,
    seed: Annotated[int, "[0, inf)"] = 0,
    elect: Literal["total", "frequency"] = "total",
    space: Literal["auto", "b", "dense"] = "auto",
    rank: Annotated[int, "[1, inf)"] | None = None,
) -> list[Part]:
    """The mean, entry by entry, of those tasks' random, rescaled entries that have the elected sign.

    DARE's sparsification in place of the trimming of `ties`: Y_t = w_t (Z_t o X_t) / density, with the masks of `dare`.
    updates: of one module, one per adapter. weights, elect: as of `ties`, so 1 by default. density, seed: as of
    `dare`. space, rank: as of `magnitude`; `b` needs a shared A.
    Raises AdapterError for `b` without a shared A, ConfigError for a rank above what the shape allows.
    Source: Yu et al. (arXiv 2311.03099), section 4, with TIES (arXiv 2306.01708); `dare_ties` of mergekit and PEFT.
    """
    combine = combination(
        "dare_ties",
        weights=weights,
        names=[update.name for update in updates],
        density=density,
        draw=Draw(seed=seed, module=updates[0].module),
        elect=elect,
    )
    return merge_entries(updates, combine, space=space, rank=rank, votes=True, draws=True)
