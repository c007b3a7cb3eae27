"""The shortest mixture of the gradients."""

from typing import Literal

import numpy as np
from torch import Tensor

from lori_dist.balances import Matrix, State, Vector, by_unit
from lori_dist.balances._simplex import minimum

GRANULARITY = ("global", "matrix", "layer", "type")
LOSSES = True


def balance(
    gram: Tensor,
    losses: Tensor,
    state: State,
    *,
    seed: int,
    step: int,
    normalize: Literal["none", "l2", "loss", "loss+"] = "none",
) -> tuple[Tensor, State]:
    """Takes the shortest mixture of the gradients, sum_t w_t g_t with w_t >= 0 and sum_t w_t = 1 (MGDA).

    It opposes no task, and is zero where no direction improves all. Gives T w. normalize: what gradients are divided by
    while w is sought: nothing, their norms (`l2`), the losses, or both (`loss+`).
    Source: Sener and Koltun, "Multi-task learning as multi-objective optimization" (arXiv 1810.04650), section 3;
    isl-org/MultiObjectiveOptimization, which has these normalisations and seeks w by Frank-Wolfe steps; ours are exact.
    """
    sizes = losses.abs().clamp(min=1e-30).numpy() if normalize in ("loss", "loss+") else np.ones(gram.shape[-1])

    def weights(unit: Matrix) -> Vector:
        by = sizes * (_norms(unit) if normalize in ("l2", "loss+") else 1.0)
        return len(unit) * shortest(unit / np.outer(by, by))

    return by_unit(gram, weights), {}


def shortest(gram: Matrix) -> Vector:
    """w >= 0 with sum 1 that makes w^T gram w smallest."""
    scaled = gram / (np.trace(gram) or 1.0)
    return minimum(lambda w: (float(w @ scaled @ w) / 2, scaled @ w, scaled), len(gram))


def _norms(gram: Matrix) -> Vector:
    norms = np.sqrt(np.diagonal(gram).clip(min=0))
    return np.where(norms > 0, norms, 1.0)
