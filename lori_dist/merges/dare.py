"""Random entries of each task, rescaled, and summed."""

from collections.abc import Sequence
from typing import Annotated, Literal

from lori_dist.adapter.update import Part, Update
from lori_dist.merges._entries import Draw, combination
from lori_dist.merges._spaces import merge_entries

EXACT: dict[str, tuple[object, ...]] = {"density": (1.0,), "rank": (None,)}
"""Options -> values for which the result is the weighted sum of the updates, exactly."""


def merge(
    updates: Sequence[Update],
    *,
    weights: Sequence[float],
    density: Annotated[float, "(0, 1]"] = 0.5,
    seed: Annotated[int, "[0, inf)"] = 0,
    space: Literal["auto", "b", "dense"] = "auto",
    rank: Annotated[int, "[1, inf)"] | None = None,
) -> list[Part]:
    """The weighted sum of random entries, sum_t w_t (Z_t o X_t) / density: `linear` in expectation, sparser.

    Z_t keeps an entry with probability `density`. It follows from (seed, module, adapter's name) alone, so neither the
    order of tasks nor that of modules matters; adapters of one name draw one mask.
    updates: of one module, one per adapter. weights: one per adapter, of any sign. density: what is kept, the paper's
    1 - p. space, rank: as of `magnitude`.
    Raises ConfigError for a rank above what the shape allows.
    Source: Yu et al., "Language models are super Mario" (arXiv 2311.03099), section 3.2; DARE-linear of mergekit.
    """
    combine = combination(
        "dare",
        weights=weights,
        names=[update.name for update in updates],
        density=density,
        draw=Draw(seed=seed, module=updates[0].module),
    )
    return merge_entries(updates, combine, space=space, rank=rank, votes=False, draws=True)
