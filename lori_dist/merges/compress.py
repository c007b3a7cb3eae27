"""Tasks projected on a few directions that they have in common, and merged there: the rank is that of one task."""

from collections.abc import Sequence
from typing import Annotated, Literal

import torch
from torch import Tensor

from lori_dist.adapter.update import Part, Update
from lori_dist.merges._cores import from_core_space, in_core_space
from lori_dist.merges._entries import Draw, combination
from lori_dist.merges._factors import noise, singular, without_noise
from lori_dist.merges._spaces import rank_of_one

UNIT_WEIGHTS: dict[str, tuple[object, ...]] = {"inner": ("ties", "dare_ties")}
"""Options -> values for which each adapter has weight 1 where no weights are given: the paper's scale."""


def merge(
    updates: Sequence[Update],
    *,
    weights: Sequence[float],
    inner: Literal["task_arithmetic", "ties", "dare", "dare_ties"] = "task_arithmetic",
    rank: Annotated[int, "[1, inf)"] | None = None,
    density: Annotated[float, "(0, 1]"] = 1.0,
    seed: Annotated[int, "[0, inf)"] = 0,
    elect: Literal["total", "frequency"] = "total",
    sweeps: Annotated[int, "[0, inf)"] = 10,
) -> list[Part]:
    """The tasks in the `rank` directions that hold most of all of them, merged there (Compress-then-Merge).

    U, (out_features, rank), and V, (in_features, rank), are orthonormal and make sum_t |U^T D_t V|^2 large. They start
    as the largest left and right singular vectors of the D_t side by side and one above the other; each of `sweeps`
    then takes the best U for this V and the best V for this U. The C_t = U^T D_t V, rank x rank, are merged by `inner`,
    and the result is U C V^T: a computed A and B of that rank, or a dense B on the A that the tasks share.
    updates: of one module, one per adapter. weights: one per adapter; by default 1 for `ties` and `dare_ties`, else
    equal ones that sum to one; they do not move U and V. rank: by default the largest of the tasks' ranks. density,
    seed, elect: as of `core_space`.
    Raises ConfigError for a rank above what the shape allows.
    Source: "Compress then Merge" (arXiv 2606.03723), of which the abstract alone could be read: shared subspaces from
    the weights, r x r coordinates, standard merges, all in the core space. How it finds the subspaces was not
    established; what is maximised here, and the sweeps, are ours.
    """
    rank = rank_of_one(updates, rank)
    u, v, cores = in_core_space(updates)
    left, right = _subspaces(cores, rank, sweeps)
    coordinates = [left.t() @ core @ right for core in cores]
    cut = noise(torch.stack(coordinates))
    names, draw = [update.name for update in updates], Draw(seed=seed, module=updates[0].module)
    combine = combination(inner, weights=weights, names=names, density=density, draw=draw, elect=elect)
    merged = combine([without_noise(x, cut) for x in coordinates])
    return [from_core_space(updates, u @ left, merged, v @ right)]


def _subspaces(cores: Sequence[Tensor], rank: int, sweeps: int) -> tuple[Tensor, Tensor]:
    """Orthonormal columns, (p, at most rank) and (q, at most rank), of the cores' common subspaces."""
    left, right = _leading(cores, rank), _leading([core.t() for core in cores], rank)
    for _ in range(sweeps):
        left = _leading([core @ right for core in cores], rank)
        right = _leading([core.t() @ left for core in cores], rank)
    return left, right


def _leading(matrices: Sequence[Tensor], rank: int) -> Tensor:
    """The largest left singular vectors of the matrices side by side, (rows, at most rank)."""
    return singular(torch.cat(list(matrices), dim=1))[0][:, :rank]
