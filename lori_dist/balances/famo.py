"""Losses that fall at equal rates, from losses alone."""

from typing import Annotated

import numpy as np
from torch import Tensor

from lori_dist.balances import State, Vector, for_all

GRANULARITY = ("global",)
LOSSES = True


def balance(
    gram: Tensor,
    losses: Tensor,
    state: State,
    *,
    seed: int,
    step: int,
    lr: Annotated[float, "(0, inf)"] = 0.025,
    decay: Annotated[float, "[0, inf)"] = 0.001,
) -> tuple[Tensor, State]:
    """Weights tasks so that their losses fall at equal rates (FAMO).

    z = softmax(x), x = 0 at the start; the weights are T c z_t / l_t with c = 1 / sum_t z_t / l_t. From how the
    logarithms of the losses fell since the step before, d, x moves by -lr (J d + decay x), J = diag(z) - z z^T.
    lr, decay: beta and gamma of the paper.
    Source: Liu et al., "FAMO" (arXiv 2306.03792), algorithm 1; Cranial-XIX/FAMO, which lets Adam move x and measures
    the step's batch again after the step. Here the next step's batch is that measurement: no further forward pass.
    """
    now = losses.clamp(min=1e-8).numpy()
    x = np.asarray(state.get("x", np.zeros(len(now))))
    if "losses" in state:
        z, fell = _softmax(x), np.log(np.asarray(state["losses"])) - np.log(now)
        x = x - lr * (z * fell - z * float(z @ fell) + decay * x)
    rates = _softmax(x) / now
    return for_all(gram, len(now) * rates / rates.sum()), {"x": x.tolist(), "losses": now.tolist()}


def _softmax(x: Vector) -> Vector:
    raised = np.exp(x - x.max())
    found: Vector = raised / raised.sum()
    return found
