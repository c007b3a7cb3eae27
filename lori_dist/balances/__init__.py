"""Balances: what the gradients of several tasks are made of one, one per file.

A balance is `balance(gram, losses, state, *, seed, step, **options) -> (weights, state)`. gram: (units, T, T), float64,
on the CPU: inner products of the tasks' gradients in each unit, summed over all ranks. losses: (T,), float64, of the
step's batch over all ranks, each times its task's weight; zeros unless the file has `LOSSES = True`. state: what the
balance returned in the step before, {} in the first: names with lists of numbers, which the checkpoint keeps. weights:
(units, T), of which the step's gradient in a unit is sum_t weights[t] g_t. They are 1 for the plain sum, so a balance
whose paper has weights that sum to one gives T times these; `reduce: mean` divides all by T. Equal on all ranks, as
all that they follow from is.

A file's `GRANULARITY` names the units that it can have, the first by default.
"""

from collections.abc import Callable, Mapping, Sequence

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

State = Mapping[str, Sequence[float]]
Balance = Callable[..., tuple[Tensor, State]]
Vector = npt.NDArray[np.float64]
Matrix = npt.NDArray[np.float64]


def by_unit(gram: Tensor, weights: Callable[[Matrix], Vector]) -> Tensor:
    """(units, T), from a function of one unit's (T, T)."""
    return torch.from_numpy(np.stack([weights(unit) for unit in gram.numpy()]))


def for_all(gram: Tensor, weights: Sequence[float] | Vector) -> Tensor:
    """(units, T), the same (T,) for every unit."""
    return torch.tensor(np.asarray(weights), dtype=gram.dtype).expand(len(gram), -1)
