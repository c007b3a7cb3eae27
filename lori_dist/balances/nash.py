"""The step on which tasks that bargain would agree."""

import numpy as np
from torch import Tensor

from lori_dist.balances import Matrix, State, Vector, by_unit

GRANULARITY = ("global", "matrix", "layer", "type")
STEPS, STILL = 100, 1e-14


def balance(gram: Tensor, losses: Tensor, state: State, *, seed: int, step: int) -> tuple[Tensor, State]:
    """Takes the Nash bargaining solution, sum_t a_t g_t with G a = 1 / a, a > 0 (Nash-MTL).

    G: the inner products over their Frobenius norm, so the step does not depend on how large gradients are. It is the
    one minimum of a^T G a / 2 - sum_t log a_t. Where gradients are linearly dependent so that there is none (a
    Pareto-stationary point), the weights of the step before serve again, and 1 in the first. A task without a gradient
    has 1.
    Source: Navon et al., "Multi-task learning as a bargaining game" (arXiv 2202.01017), section 3; AvivNavon/nash-mtl,
    which divides by that norm as well, and approximates a in at most 20 convex programs, where Newton steps here are
    exact.
    """
    shape = gram.shape[:2]
    before = np.asarray(state.get("weights", np.ones(shape.numel()))).reshape(shape)
    given = iter(before)

    def weights(unit: Matrix) -> Vector:
        earlier, found = next(given), solution(unit)
        return earlier if found is None else found

    found = by_unit(gram, weights)
    return found, {"weights": found.flatten().tolist()}


def solution(gram: Matrix) -> Vector | None:
    """a, or None where there is none."""
    g = gram / (np.linalg.norm(gram) or 1.0)
    g = g + np.diag(np.where(np.diagonal(g) > 0, 0.0, 1.0))
    a: Vector = 1 / np.sqrt(np.diagonal(g))
    for _ in range(STEPS):
        gradient = g @ a - 1 / a
        try:
            direction = np.linalg.solve(g + np.diag(1 / a**2), -gradient)
        except np.linalg.LinAlgError:
            return None
        decrement = float(np.sqrt(max(-gradient @ direction, 0.0)))
        a = a + direction * (1.0 if decrement < 0.25 else 1 / (1 + decrement))  # self-concordant: a stays above zero
        if decrement < STILL:
            return a
    return a if decrement < 1e-9 else None
