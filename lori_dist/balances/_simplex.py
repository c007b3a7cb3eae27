"""The minimum of a convex function of weights that are zero or more and sum to one."""

from collections.abc import Callable

import numpy as np

from lori_dist.balances import Matrix, Vector

Function = Callable[[Vector], tuple[float, Vector, Matrix]]
"""Weights -> value, gradient, Hessian; of a size about one."""

STEPS = 200
STILL, LOWER = 1e-15, 1e-12
"""A Newton step below which weights are at rest, and how much lower the gradient of a weight at zero must be than that
of the others for it to leave."""


def minimum(function: Function, num: int) -> Vector:
    """The weights, (num,), by Newton steps on those that are not at zero."""
    weights, free = np.full(num, 1 / num), np.ones(num, dtype=bool)
    for _ in range(STEPS):
        value, gradient, hessian = function(weights)
        direction = _newton(gradient, hessian, free)
        if np.abs(direction).max() <= STILL or float(-gradient @ direction) <= STILL**2:
            outside = np.where(free, np.inf, gradient)
            if free.all() or outside.min() >= gradient[free].mean() - LOWER:
                break
            free[outside.argmin()] = True
            continue
        falling = free & (direction < 0)
        room = np.where(falling, -weights / np.where(falling, direction, -1.0), np.inf)
        step, slope = min(1.0, float(room.min())), float(gradient @ direction)
        while step > STILL and function(weights + step * direction)[0] > value + 1e-4 * step * slope:
            step /= 2
        if step <= STILL and room.min() > STILL:  # rounding is all that is left to gain
            break
        weights = weights + step * direction
        reached = falling & (room <= step)
        weights[reached], free[reached] = 0.0, False
        weights = weights / weights.sum()
    return weights


def _newton(gradient: Vector, hessian: Matrix, free: Vector) -> Vector:
    """The step to the minimum of the quadratic model, with weights that keep their sum."""
    num = int(free.sum())
    system = np.ones((num + 1, num + 1))
    system[:num, :num], system[num, num] = hessian[np.ix_(free, free)], 0.0
    found = np.linalg.lstsq(system, np.append(-gradient[free], 0.0), rcond=1e-13)[0]
    direction = np.zeros(len(gradient))
    direction[free] = found[:num] - found[:num].mean()
    return direction
