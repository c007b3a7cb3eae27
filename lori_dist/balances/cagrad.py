"""The step near the mean gradient that helps the task it helps least as much as it can."""

import math
from typing import Annotated

import numpy as np
from torch import Tensor

from lori_dist.balances import Matrix, State, Vector, by_unit
from lori_dist.balances._simplex import minimum

GRANULARITY = ("global", "matrix", "layer", "type")
NOTHING = 1e-12
"""Length, relative to the tasks' gradients, below which a mixture of them has no direction."""


def balance(
    gram: Tensor, losses: Tensor, state: State, *, seed: int, step: int, c: Annotated[float, "[0, inf)"] = 0.5
) -> tuple[Tensor, State]:
    """Takes the step d with |d - g_0| <= c |g_0| that makes min_t <g_t, d> largest, g_0 the mean gradient (CAGrad).

    d = g_0 + c |g_0| g_w / |g_w|, where g_w = sum_t w_t g_t, w >= 0 with sum 1, minimises <g_w, g_0> + c |g_0| |g_w|.
    Gives T d. c: 0 for the mean gradient; large ones come near MGDA.
    Source: Liu et al., "Conflict-averse gradient descent" (arXiv 2110.14048), algorithm 1; Cranial-XIX/CAGrad, which
    divides d by 1 + c^2 by default and so by a constant; w is found by Newton steps here, by SLSQP there.
    """
    return by_unit(gram, lambda unit: _weights(unit, c)), {}


def _weights(gram: Matrix, c: float) -> Vector:
    num = len(gram)
    scaled = gram / (np.trace(gram) or 1.0)
    with_mean = scaled.mean(axis=1)
    radius = c * math.sqrt(max(float(with_mean.mean()), 0.0))

    def function(w: Vector) -> tuple[float, Vector, Matrix]:
        image = scaled @ w
        length = max(math.sqrt(max(float(w @ image), 0.0)), NOTHING)
        hessian = radius * (scaled / length - np.outer(image, image) / length**3)
        return float(w @ with_mean) + radius * length, with_mean + radius * image / length, hessian

    if radius <= NOTHING:
        return np.ones(num)
    w = minimum(function, num)
    length = math.sqrt(max(float(w @ scaled @ w), 0.0))
    found: Vector = np.ones(num) + (num * radius / length * w if length > NOTHING else 0.0)
    return found
