"""PCGrad: the conflicting component is removed where two gradients of the whole model oppose each other."""

from torch import Tensor

from lori_dist.balances import State
from lori_dist.balances.ortho import coefficients, order

GRANULARITY = ("global", "matrix", "layer", "type")


def balance(gram: Tensor, losses: Tensor, state: State, *, seed: int, step: int) -> tuple[Tensor, State]:
    """Projects every gradient of the whole model that opposes another one onto the plane orthogonal to it (PCGrad).

    `ortho` against the others' own gradients, over all that is trained at once.
    Source: Yu et al., "Gradient surgery for multi-task learning" (arXiv 2001.06782), algorithm 1. One order of the
    tasks serves both loops of a step; the paper draws the inner one for every task.
    """
    return coefficients(gram, order(gram.shape[-1], seed, step), "original").sum(1), {}
