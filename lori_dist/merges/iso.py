"""The sum of updates with all its singular values made equal, and directions of single tasks for its smallest."""

from collections.abc import Sequence
from typing import Annotated

import torch
from torch import Tensor

from lori_dist.adapter.update import Part, Update
from lori_dist.merges import concat
from lori_dist.merges._directions import nearest_orthogonal
from lori_dist.merges._factors import Singular, factors, singular_of_product, stacked
from lori_dist.merges._forms import in_row_space

UNIT_WEIGHTS: dict[str, tuple[object, ...]] = {}
"""Each adapter has weight 1 where no weights are given: the paper's sum."""


def merge(
    updates: Sequence[Update],
    *,
    weights: Sequence[float],
    common: Annotated[float, "(0, 1]"] = 0.8,
    flatten: Annotated[float, "[0, 1]"] = 1.0,
) -> list[Part]:
    """The sum with all singular values at their mean, in common and task-specific directions (Iso-CTS, Iso-C).

    sum_t w_t D_t = U S V^T, of rank R. Its `common` R largest directions stay; of what they leave of each task,
    w_t D_t - U U^T w_t D_t, the largest directions follow, equally many of each of the T tasks, R in all: `common` is
    changed by as little as that needs. U' and V' are the polar factors of all of them, and the result is s U' V'^T,
    where s is the mean of their singular values. At common=1 it is Iso-C, s U V^T. A computed A and B of rank R, or a
    dense B on the A that the tasks share.
    updates: of one module, one per adapter; T counts those that keep entries in it. weights: one per adapter; 1, the
    default, for the paper's sum, whose alpha is a common factor. common: 0.8 in the paper. flatten: how far singular
    values go to their mean, 0: not at all. A merge of a single adapter, too, is changed unless it is 0.
    Source: Marczak et al., "No Task Left Behind" (arXiv 2502.04959), sections 4 and 5; danielm1405/iso-merging. Their R
    is the smaller side of the weight, as full matrices have that rank; for adapters, directions without a singular
    value would be arbitrary, so R is the rank of the sum. Values between 0 and 1 for `flatten` are ours.
    """
    tasks = [(update, weight) for update, weight in zip(updates, weights, strict=True) if update.kept and weight]
    whole = [part for part in concat.merge(updates, weights=weights) if part.entries is not None]
    u, s, vh = singular_of_product(*stacked(updates[0].shape, whole))
    num_each = round((s.numel() - int(s.numel() * common)) / len(tasks)) if tasks else 0
    num_common = s.numel() - num_each * len(tasks)
    if num_common < 0:
        num_each, num_common = num_each - 1, num_common + len(tasks)
    u, s, vh = u[:, :num_common], s[:num_common], vh[:num_common]
    if num_each:
        own = [_left_over(update, weight, u, num_each) for update, weight in tasks]
        u = nearest_orthogonal(torch.cat([u, *(one[0] for one in own)], dim=1))
        s = torch.cat([s, *(one[1] for one in own)])
        vh = nearest_orthogonal(torch.cat([vh, *(one[2] for one in own)]))
    flat = s + flatten * (s.mean() - s) if s.numel() else s
    return [in_row_space(updates, u * flat, vh)]


def _left_over(update: Update, weight: float, common: Tensor, num: int) -> Singular:
    """The `num` largest directions of what the common ones leave of the weighted update."""
    b, a = factors(update)
    norm = float((b.t() @ b * (a @ a.t())).sum().clamp(min=0).sqrt())
    u, s, vh = singular_of_product(weight * (b - common @ (common.t() @ b)), a)
    # Where nothing is left but rounding, its directions would be made as large as all others.
    num = min(num, int((s > abs(weight) * norm * 1e-9).sum()))
    return u[:, :num], s[:num], vh[:num]
