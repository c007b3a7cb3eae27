"""The sum of updates that have lost their smallest entries."""

from collections.abc import Iterable, Sequence
from typing import Annotated, Literal

from torch import Tensor

from lori_dist.adapter.update import Part, Update
from lori_dist.merges._entries import total
from lori_dist.merges._spaces import Cuts, Space, Trim, merge_entries, model_cuts

EXACT: dict[str, tuple[object, ...]] = {"density": (1.0,), "rank": (None,)}
"""Options -> values for which the result is the weighted sum of the updates, exactly."""


def merge(
    updates: Sequence[Update],
    *,
    weights: Sequence[float],
    density: Annotated[float, "(0, 1]"] = 0.5,
    trim: Literal["module", "model"] = "module",
    space: Literal["auto", "b", "dense"] = "auto",
    rank: Annotated[int, "[1, inf)"] | None = None,
) -> list[Part]:
    """The weighted sum of the tasks' largest entries, sum_t w_t trim(X_t), without rescaling.

    updates: of one module, one per adapter. weights: one per adapter, of any sign. density: of each task's entries that
    are not zero, the share that stays: a B at 10% density loses half of its tenth at 0.5. trim: the largest of each
    module, or of the whole model, for which all adapters are read twice more.
    space: X_t is `b`, the task's s_t B_t, so that the result is sparse on the tasks' seeds, one block for each A; or
    `dense`, its update D_t, so that the result has a computed A and B. `auto`: `b` if the tasks share A, else `dense`.
    rank: of a dense result, exact if it has no more; by default the sum of the tasks' ranks, as the shape allows.
    Raises ConfigError for a rank above what the shape allows.
    Source: magnitude pruning of task vectors as in TIES (arXiv 2306.01708), section 4, step 1, then summed;
    `magnitude_prune` of PEFT, which prunes A and B apart instead.
    """

    def combine(matrices: Iterable[Tensor]) -> Tensor:
        return total([x * weight for x, weight in zip(matrices, weights, strict=True)])

    return merge_entries(updates, combine, space=space, rank=rank, votes=False, density=density)


def survey(
    modules: Iterable[Sequence[Update]],
    *,
    density: float = 0.5,
    trim: Trim = "module",
    space: Space = "auto",
    **others: object,
) -> dict[str, list[Cuts]] | None:
    """The result of looking at all modules, which `merge` needs. Raises AdapterError where they have no common
    measure."""
    return model_cuts(modules, trim=trim, density=density, space=space, votes=False)
