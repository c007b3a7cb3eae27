"""Ortho-LoRA's projection: the conflicting component is removed where two gradients oppose each other."""

from collections.abc import Sequence
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from lori_dist.balances import State

GRANULARITY = ("matrix", "layer", "type", "global")

VANISHED = 1e-10
"""Share of a gradient's squared norm that counts as nothing, if no more is left of it: rounding of fp32 gradients."""

Against = Literal["original", "in_place"]


def balance(
    gram: Tensor,
    losses: Tensor,
    state: State,
    *,
    seed: int,
    step: int,
    against: Literal["original", "in_place"] = "original",
) -> tuple[Tensor, State]:
    """Projects every gradient that opposes another one onto the plane orthogonal to it (Ortho-LoRA).

    against: the others' own gradients, or (`in_place`, as the paper's listing has it) what these have become. Tasks
    take turns in an order that follows from seed and step.
    Source: Yang et al., Ortho-LoRA (arXiv 2601.09684), algorithm 1; the form with inner products is ours.
    """
    return coefficients(gram, order(gram.shape[-1], seed, step), against).sum(1), {}


def order(num_tasks: int, seed: int, step: int) -> list[int]:
    """The order in which tasks give way, and to whom first; it follows from seed and step alone."""
    words = np.random.Philox(key=np.array([seed, step], dtype=np.uint64)).random_raw(num_tasks)
    return [int(task) for task in np.argsort(words, kind="stable")]


def coefficients(gram: Tensor, order: Sequence[int], against: Against) -> Tensor:
    """Coefficients of the projected gradients, (units, T, T): task i's is the sum over j of [i, j] times task j's own.

    gram: (units, T, T), float64, inner products of the tasks' gradients. The identity where no two oppose each other.
    A gradient of which (nearly) nothing is left is nothing to give way to.
    """
    num_tasks = gram.shape[-1]
    made = torch.eye(num_tasks, dtype=gram.dtype, device=gram.device).repeat(len(gram), 1, 1)
    for i in order:
        for j in order:
            if i == j:
                continue
            other = made[:, j] if against == "in_place" else _unit(j, made)
            images = torch.einsum("ujk,uk->uj", gram, other)  # inner products with every task's own gradient
            inner, squared = (made[:, i] * images).sum(1), (other * images).sum(1)
            opposes = (inner < 0) & (squared > VANISHED * gram[:, j, j])
            factor = torch.where(opposes, inner / torch.where(opposes, squared, 1.0), 0.0)
            made[:, i] -= factor.unsqueeze(1) * other
    return made


def _unit(task: int, like: Tensor) -> Tensor:
    own = torch.zeros_like(like[:, task])
    own[:, task] = 1
    return own
