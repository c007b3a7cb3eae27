"""Tasks as small matrices in a basis that they all have, which loses nothing (Core Space)."""

from collections.abc import Sequence

import torch
from torch import Tensor

from lori_dist.adapter.update import Part, Update
from lori_dist.merges._factors import factors, noise, singular, without_noise
from lori_dist.merges._forms import in_row_space


def in_core_space(updates: Sequence[Update]) -> tuple[Tensor, Tensor, list[Tensor]]:
    """U_B, (out_features, p), V_A, (in_features, q), and for each update its M_t, (p, q), with D_t = U_B M_t V_A^T.

    U_B: the left singular vectors of [B_1 | .. | B_T]; V_A: the right ones of [A_1 ; .. ; A_T]; p and q are their
    numerical ranks, at most the sum of the tasks' ranks.
    """
    u, v = _bases(updates)
    cores = [_core(update, u, v) for update in updates]
    cut = noise(torch.stack(cores))
    return u, v, [without_noise(core, cut) for core in cores]


def from_core_space(updates: Sequence[Update], u: Tensor, core: Tensor, v: Tensor) -> Part:
    """The part with the update U_B core V_A^T."""
    if u.shape[1] < v.shape[1]:
        return in_row_space(updates, u, core @ v.t())
    return in_row_space(updates, u @ core, v.t())


def _bases(updates: Sequence[Update]) -> tuple[Tensor, Tensor]:
    out_features, in_features = updates[0].shape
    b, a = torch.zeros(out_features, 0, dtype=torch.float64), torch.zeros(0, in_features, dtype=torch.float64)
    parts = [part for update in updates for part in update.kept]
    return (
        singular(torch.cat([b, *(part.b() for part in parts)], dim=1))[0],
        singular(torch.cat([a, *(part.a() for part in parts)]))[2].t(),
    )


def _core(update: Update, u: Tensor, v: Tensor) -> Tensor:
    b, a = factors(update)
    return (u.t() @ b) @ (a @ v)
