"""The `linear` merge of PEFT: A and B averaged apart."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from lori_dist.adapter.update import Part, Update
from lori_dist.errors import AdapterError
from lori_dist.merges._factors import stacked
from lori_dist.merges._forms import computed, joined_name, on_projection, shared


def merge(updates: Sequence[Update], *, weights: Sequence[float]) -> list[Part]:
    """Computes what PEFT's `linear` computes, to compare with the paper's tables; not the sum of updates, which
    `linear` is.

    (sum_t sqrt|w_t s_t| B_t)(sum_t sign(w_t s_t) sqrt|w_t s_t| A_t): the sum of updates and T (T - 1) cross terms. With
    a shared A and equal weights it is T times the exact sum; with an A each, the error is some sqrt(T - 1) times as
    large as the sum. The result has a computed A and a sparse B, or, where the tasks share A, a sparse B on that A.
    updates: of one module, one per adapter. weights: one per adapter, of any sign; s_t is alpha / rank.
    Raises AdapterError for adapters of different ranks, which have no such sum.
    Source: `add_weighted_adapter(combination_type="linear")` of PEFT 0.21, as used by LoRI (arXiv 2504.07448).
    """
    tasks = [(update, weight) for update, weight in zip(updates, weights, strict=True) if update.kept]
    ranks = {update.name: sum(part.rank for part in update.kept) for update, _ in tasks}
    if len(set(ranks.values())) > 1:
        found = ", ".join(f"{name} {rank}" for name, rank in ranks.items())
        raise AdapterError(f"{updates[0].module}: the ranks differ ({found}), and so A has no sum; merge with linear")
    out_features, in_features = updates[0].shape
    rank = max(ranks.values(), default=0)
    b, a = torch.zeros(out_features, rank).double(), torch.zeros(rank, in_features).double()
    factor = 0.0
    for update, weight in tasks:
        task_b, task_a, scale = _factors(update)
        share = math.sqrt(abs(weight * scale))
        b += share * task_b
        a += math.copysign(share, weight * scale) * task_a
        factor += math.copysign(share, weight * scale)
    one = shared(updates)
    if one is not None and all(len(update.kept) == 1 for update, _ in tasks):
        return [on_projection(one, factor * b if tasks else one[0].b(), joined_name(updates))]
    return [computed(updates, b, a)]


def _factors(update: Update) -> tuple[Tensor, Tensor, float]:
    """B, A and scale; several blocks are one adapter of the sum of their ranks, as in an export to PEFT."""
    if len(update.kept) == 1:
        (part,) = update.kept
        return part.b(), part.a(), part.scale
    return *stacked(update.shape, update.kept), 1.0
