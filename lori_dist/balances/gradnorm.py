"""Gradients whose norms follow how fast their losses fall."""

from typing import Annotated

import numpy as np
from torch import Tensor

from lori_dist.balances import State, for_all

GRANULARITY = ("global",)
LOSSES = True
SMALLEST = 1e-3
"""Smallest weight, before all weights are scaled to their sum."""


def balance(
    gram: Tensor,
    losses: Tensor,
    state: State,
    *,
    seed: int,
    step: int,
    alpha: Annotated[float, "[0, inf)"] = 1.5,
    lr: Annotated[float, "(0, inf)"] = 0.025,
) -> tuple[Tensor, State]:
    """Weights tasks so that those whose losses fall slowly have larger gradients (GradNorm).

    The weights w, which sum to T and start at 1, descend sum_t |w_t |g_t| - m r_t^alpha| after they gave the step's: m
    is the mean of the w_t |g_t|, r_t the loss over that of the first step, over the mean of these ratios.
    alpha: 0 for equal norms. lr: of the descent.
    Source: Chen et al., "GradNorm" (arXiv 1711.02257), algorithm 1. Norms are over all that is trained, not over the
    last shared layer; the descent's gradient is divided by m, so that it does not depend on how large gradients are,
    and weights stay above 0.001: these are ours.
    """
    now, norms = losses.numpy(), gram.sum(0).diagonal().clamp(min=0).sqrt().numpy()
    num = len(now)
    w = np.asarray(state.get("weights", np.ones(num)))
    first = np.asarray(state.get("first", now))
    ratios = np.where(first > 0, now / np.where(first > 0, first, 1.0), 1.0)
    rates = ratios / (ratios.mean() or 1.0)
    mean = float((w * norms).mean())
    moved = w
    if mean > 0:
        moved = w - lr * norms / mean * np.sign(w * norms - mean * rates**alpha)
        moved = moved.clip(min=SMALLEST)
        moved = num * moved / moved.sum()
    return for_all(gram, w), {"weights": moved.tolist(), "first": first.tolist()}
