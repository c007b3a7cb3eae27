"""Gradients made orthogonal and equally long, by as little as that needs."""

from typing import Literal

import numpy as np
from torch import Tensor

from lori_dist.balances import Matrix, State, Vector, by_unit

GRANULARITY = ("global", "matrix", "layer", "type")


def balance(
    gram: Tensor,
    losses: Tensor,
    state: State,
    *,
    seed: int,
    step: int,
    scale: Literal["min", "median", "rmse"] = "min",
) -> tuple[Tensor, State]:
    """Sums gradients that were made orthogonal and equally long in their principal directions (Aligned-MTL).

    With G = V diag(s^2) V^T, the weights are the row sums of B = s_k V diag(1 / s) V^T, over the directions with a
    singular value. s_k: the smallest of these (`min`), their median, or the root of their mean square (`rmse`).
    Source: Senushkin et al., "Independent component alignment" (arXiv 2305.19000), section 4.2;
    SamsungLabs/MTL, which has these scales. The tasks' weights, the paper's w, are inside the gradients.
    """
    return by_unit(gram, lambda unit: _weights(unit, scale)), {}


def _weights(gram: Matrix, scale: Literal["min", "median", "rmse"]) -> Vector:
    values, vectors = np.linalg.eigh(gram)
    kept = values > values.max(initial=0.0) * len(values) * np.finfo(values.dtype).eps
    if not kept.any():
        return np.ones(len(gram))
    values, vectors = values[kept], vectors[:, kept]
    of_all = {"min": values.min(), "median": np.median(values), "rmse": values.mean()}[scale]
    found: Vector = vectors @ (np.sqrt(of_all / values) * vectors.sum(axis=0))
    return found
