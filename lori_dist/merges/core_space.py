"""Tasks as small matrices in a basis common to all, merged there."""

from collections.abc import Sequence
from typing import Annotated, Literal

from torch import Tensor

from lori_dist.adapter.update import Part, Update
from lori_dist.errors import ConfigError
from lori_dist.merges._cores import from_core_space, in_core_space
from lori_dist.merges._directions import kept_per_task, orthogonalized
from lori_dist.merges._entries import Draw, combination, trim
from lori_dist.merges._factors import singular

UNIT_WEIGHTS: dict[str, tuple[object, ...]] = {"inner": ("ties", "dare_ties", "tsv")}
"""Options -> values for which each adapter has weight 1 where no weights are given: the paper's scale."""

EXACT: dict[str, tuple[object, ...]] = {"inner": ("task_arithmetic", "dare"), "density": (1.0,), "equalize": (False,)}
"""Options -> values for which the result is the weighted sum of the updates, exactly."""


def merge(
    updates: Sequence[Update],
    *,
    weights: Sequence[float],
    inner: Literal["task_arithmetic", "ties", "dare", "dare_ties", "tsv"] = "task_arithmetic",
    density: Annotated[float, "(0, 1]"] = 1.0,
    seed: Annotated[int, "[0, inf)"] = 0,
    elect: Literal["total", "frequency"] = "total",
    keep: Annotated[int, "[1, inf)"] | None = None,
    equalize: bool = False,
) -> list[Part]:
    """The tasks as small matrices in a common basis, merged there (Core Space).

    U_B: the left singular vectors of [B_1 | .. | B_T], V_A: the right ones of [A_1 ; .. ; A_T], both at their numerical
    rank. M_t = U_B^T s_t B_t A_t V_A loses nothing; the M_t are merged by `inner`, and the result is U_B M V_A^T: a
    computed A and B, or, where the tasks share A, a dense B on that A. `task_arithmetic` at density 1 is the exact sum.
    updates: of one module, one per adapter. weights: one per adapter; by default 1 for `ties`, `dare_ties` and `tsv`,
    else equal ones that sum to one. density: of the
    entries of M_t, what stays: the largest, or random ones for `dare` and `dare_ties`, whose masks follow from `seed`,
    module and adapter's name. elect: as of `ties`. keep: as of `tsv`. equalize: sets all singular values of M to their
    mean, which changes even a single task.
    Raises ConfigError for more directions than there is room for, and for `keep` without `tsv`.
    Source: Panariello et al., "Accurate and efficient low-rank model merging in Core Space" (arXiv 2509.17786),
    section 4; apanariello4/core-space-merging.
    """
    if keep is not None and inner != "tsv":
        raise ConfigError(f"merge.method.keep: got {keep}, and only inner=tsv keeps directions; remove it")
    u, v, cores = in_core_space(updates)
    if inner == "tsv":
        merged = _orthogonalized(updates, [trim(core, density) for core in cores], weights, keep)
    else:
        names, draw = [update.name for update in updates], Draw(seed=seed, module=updates[0].module)
        merged = combination(inner, weights=weights, names=names, density=density, draw=draw, elect=elect)(cores)
    if equalize:
        left, s, right = singular(merged)
        merged = left @ right * s.sum() / max(1, s.numel())
    return [from_core_space(updates, u, merged, v)]


def _orthogonalized(
    updates: Sequence[Update], cores: Sequence[Tensor], weights: Sequence[float], keep: int | None
) -> Tensor:
    tasks = [number for number, update in enumerate(updates) if update.kept]
    if not tasks:
        return cores[0]
    directions = [singular(cores[number]) for number in tasks]
    left, right = orthogonalized(directions, kept_per_task(updates, keep), [weights[number] for number in tasks])
    return left @ right
