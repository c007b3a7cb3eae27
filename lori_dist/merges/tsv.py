"""Every task's largest singular directions, made orthogonal to those of the others."""

from collections.abc import Sequence
from typing import Annotated

from lori_dist.adapter.update import Part, Update
from lori_dist.merges._directions import kept_per_task, orthogonalized
from lori_dist.merges._factors import factors, singular_of_product
from lori_dist.merges._forms import in_row_space

UNIT_WEIGHTS: dict[str, tuple[object, ...]] = {}
"""Each adapter has weight 1 where no weights are given: the paper's sum."""


def merge(
    updates: Sequence[Update], *, weights: Sequence[float], keep: Annotated[int, "[1, inf)"] | None = None
) -> list[Part]:
    """The tasks' largest singular directions, made orthogonal: U' diag(w S) V'^T (TSV-Merge).

    D_t = U_t S_t V_t^T, of which the `keep` largest directions are taken; U' and V' are the polar factors of all U_t
    and of all V_t side by side. The result has a computed A and B of rank T keep, or a dense B on the A that the tasks
    share.
    updates: of one module, one per adapter. weights: one per adapter; 1, the default, for the paper's sum: T equal
    adapters give one of them, as far as their directions are kept. keep: by default as many
    as there is room for: all r, at most a T-th of the smaller side of the weight, and floor(r / T) of tasks that share
    A. Raises ConfigError for more than that: directions that do not fit would be invented, outside of all updates.
    Source: Gargiulo et al., "Task singular vectors" (arXiv 2412.00081), section 4.2; AntoAndGar/task_singular_vectors.
    """
    keep = kept_per_task(updates, keep)
    tasks = [(update, weight) for update, weight in zip(updates, weights, strict=True) if update.kept]
    directions = [singular_of_product(*factors(update)) for update, _ in tasks]
    if not directions:
        directions = [singular_of_product(*factors(updates[0]))]
    left, right = orthogonalized(directions, keep, [weight for _, weight in tasks] or [0.0])
    return [in_row_space(updates, left, right)]
