"""Tasks aligned by one SVD of all of them, then merged entry by entry in its basis."""

from collections.abc import Sequence
from typing import Annotated, Literal

import torch
from torch import Tensor

from lori_dist.adapter.update import Part, Update
from lori_dist.errors import AdapterError
from lori_dist.merges._entries import Draw, combination
from lori_dist.merges._factors import factors, noise, singular, without_noise
from lori_dist.merges._forms import computed, dense_on_projection, in_row_space, joined_name, scaled_b, shared

UNIT_WEIGHTS: dict[str, tuple[object, ...]] = {"inner": ("ties", "dare_ties")}
"""Options -> values for which each adapter has weight 1 where no weights are given: the paper's scale."""

EXACT: dict[str, tuple[object, ...]] = {"inner": ("task_arithmetic", "dare"), "density": (1.0,), "tolerance": (0.0,)}
"""Options -> values for which the result is the weighted sum of the updates, exactly."""


def merge(
    updates: Sequence[Update],
    *,
    weights: Sequence[float],
    inner: Literal["task_arithmetic", "ties", "dare", "dare_ties"] = "ties",
    density: Annotated[float, "(0, 1]"] = 0.2,
    seed: Annotated[int, "[0, inf)"] = 0,
    elect: Literal["total", "frequency"] = "total",
    space: Literal["auto", "b", "dense"] = "auto",
    tolerance: Annotated[float, "[0, inf)"] = 1e-5,
) -> list[Part]:
    """The tasks' updates in the basis of one SVD of all of them, merged there entry by entry (KnOTS).

    [D_1 | .. | D_T] = U S [V_1^T | .. | V_T^T] without singular values up to `tolerance`; the blocks S V_t^T are merged
    by `inner`, and the result is U times what that gives: a computed A and B, of a rank of at most the sum of the
    tasks'. `task_arithmetic` at density 1 is the exact sum.
    updates: of one module, one per adapter. weights: one per adapter; by default 1 for `ties` and `dare_ties`, else
    equal ones that sum to one. density: of the blocks'
    entries, what stays: the largest, or random ones for `dare` and `dare_ties`, whose masks follow from `seed`, module
    and adapter's name. elect: as of `ties`.
    space: `b` takes the SVD of [s_1 B_1 | .. | s_T B_T] instead, a different method with the same column space, whose
    result is a dense B on the shared A. `auto`: `b` if the tasks share A, else `dense`.
    Raises AdapterError for `b` without a shared A.
    Source: Stoica et al., "Model merging with SVD to tie the Knots" (arXiv 2410.19735), section 4; gstoica27/KnOTS.
    """
    combine = combination(
        inner,
        weights=weights,
        names=[update.name for update in updates],
        density=density,
        draw=Draw(seed=seed, module=updates[0].module),
        elect=elect,
    )
    one = shared(updates)
    if space == "b" and one is None:
        raise AdapterError(
            f"{updates[0].module}: the tasks do not share A, so their B are not in one space; train them with "
            "adapter.share_projection, or merge with space=dense"
        )
    if one is not None and space != "dense":
        matrices = [scaled_b(update, one) for update in updates]
        u, cut = _basis(matrices, tolerance)
        merged = combine([without_noise(u.t() @ x, cut) for x in matrices])
        return [dense_on_projection(one, u @ merged, joined_name(updates))]
    pairs = [factors(update) for update in updates]
    # A_t^T = Q_t R_t, so D_t = (B_t R_t^T) Q_t^T, and Q_t changes no singular value or left direction.
    u, cut = _basis([b @ torch.linalg.qr(a.t()).R.t() for b, a in pairs], tolerance)
    merged = combine([without_noise((u.t() @ b) @ a, cut) for b, a in pairs])
    if inner == "task_arithmetic" and density == 1:
        return [in_row_space(updates, u, merged)]
    return [computed(updates, u, merged)]


def _basis(matrices: Sequence[Tensor], tolerance: float) -> tuple[Tensor, float]:
    """The left singular directions of the matrices side by side, and what is noise in the blocks U^T X_t = S V_t^T."""
    u, s, _ = singular(torch.cat(list(matrices), dim=1))
    return u[:, s > tolerance], noise(s)
