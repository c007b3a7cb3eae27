"""Losses divided by variances that are learned, from losses alone."""

from typing import Annotated

import numpy as np
from torch import Tensor

from lori_dist.balances import State, for_all

GRANULARITY = ("global",)
LOSSES = True


def balance(
    gram: Tensor, losses: Tensor, state: State, *, seed: int, step: int, lr: Annotated[float, "(0, inf)"] = 0.025
) -> tuple[Tensor, State]:
    """Weights tasks by exp(-s_t), where s_t = log sigma_t^2 is learned (uncertainty weighting).

    The s_t descend sum_t exp(-s_t) l_t + s_t / 2, from 0, after they gave the step's weights. lr: of that descent.
    Source: Kendall, Gal and Cipolla (arXiv 1705.07115), equation 10, the form for classification, as losses are cross
    entropies. The paper trains s with the model's optimiser; plain gradient steps at a rate of their own are ours.
    """
    s = np.asarray(state.get("s", np.zeros(len(losses))))
    weights = np.exp(-s)
    return for_all(gram, weights), {"s": (s - lr * (0.5 - weights * losses.numpy())).tolist()}
