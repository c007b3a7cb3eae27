"""All tasks as one sum of rank-1 matrices that they share, each with a number per task, which is then averaged."""

from collections.abc import Sequence
from typing import Annotated

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from lori_dist.adapter.update import Part, Update
from lori_dist.merges._cores import in_core_space
from lori_dist.merges._factors import singular
from lori_dist.merges._forms import in_row_space
from lori_dist.merges._spaces import rank_of_one

Matrix = npt.NDArray[np.float64]

Terms = tuple[Tensor, Tensor, Tensor]
"""U, (p, R), V, (q, R), and C, (T, R), of task t = sum_k c_tk u_k v_k^T."""


def merge(
    updates: Sequence[Update],
    *,
    weights: Sequence[float],
    rank: Annotated[int, "[1, inf)"] | None = None,
    sweeps: Annotated[int, "[0, inf)"] = 200,
    tolerance: Annotated[float, "[0, inf)"] = 1e-9,
) -> list[Part]:
    """The tasks as a sum of rank-1 matrices common to all, whose numbers for each task are averaged (CP merging).

    D_t = sum_k c_tk u_k v_k^T for k = 1..rank, as nearly as alternating least squares finds it (the CP decomposition of
    the D_t as one tensor), and the result is sum_k (sum_t w_t c_tk) u_k v_k^T: a computed A and B of that rank, or a
    dense B on the A that the tasks share. At the sum of the tasks' ranks it is the exact weighted sum.
    updates: of one module, one per adapter. weights: one per adapter, of any sign, by default equal ones that sum to
    one; they do not move the u_k and v_k. rank: by default the largest of the tasks' ranks. sweeps: at most so many,
    until the relative error falls by less than `tolerance` in one. It is done from two starts, singular directions of
    all tasks together and those of each, and the better fit counts.
    Raises ConfigError for a rank above what the shape allows.
    Source: TC-LoRA (arXiv 2508.03999), of which the abstract and reviews could be read: adapters as a third-order
    tensor, CP, a merge through the task factors. Which tensor, the rank, and how the factors are combined were not
    established; the updates in core space, their average and the starts are ours.
    """
    rank = rank_of_one(updates, rank)
    # In one order, whatever that of the adapters is: rounding would grow with the sweeps.
    order = sorted(range(len(updates)), key=lambda place: updates[place].name)
    u, v, cores = in_core_space([updates[place] for place in order])
    if not cores[0].numel():  # no adapter keeps anything here
        return [in_row_space(updates, u @ cores[0], v.t())]
    share = torch.tensor([weights[place] for place in order], dtype=torch.float64)
    left, right, numbers = _decomposed(torch.stack(cores), rank, sweeps, tolerance)
    return [in_row_space(updates, u @ (left * (share @ numbers)), (v @ right).t())]


def _decomposed(x: Tensor, rank: int, sweeps: int, tolerance: float) -> Terms:
    """The better of two decompositions of x, (T, p, q); the first if they are equally good."""
    found = [_fitted(x, start, sweeps, tolerance) for start in (_together(x, rank), _apart(x, rank))]
    return min(found, key=lambda one: one[0])[1]


def _together(x: Tensor, rank: int) -> Terms:
    """The largest right singular vectors of all tasks, in all tasks alike: exact where the tasks are equal."""
    v = torch.linalg.svd(x.flatten(0, 1), full_matrices=False).Vh[:rank].t()
    return torch.zeros(x.shape[1], v.shape[1], dtype=x.dtype), v, x.new_ones(x.shape[0], v.shape[1])


def _apart(x: Tensor, rank: int) -> Terms:
    """The largest singular directions of single tasks: exact where the rank is the sum of theirs."""
    found = [singular(task) for task in x]
    sizes = torch.cat([s for _, s, _ in found])
    tasks = torch.cat([torch.full((s.numel(),), place) for place, (_, s, _) in enumerate(found)])
    chosen = sizes.argsort(descending=True, stable=True)[:rank]
    u, v = torch.cat([u for u, _, _ in found], dim=1), torch.cat([vh for _, _, vh in found]).t()
    numbers = x.new_zeros(x.shape[0], chosen.numel())
    numbers[tasks[chosen], torch.arange(chosen.numel())] = 1.0
    return (u * sizes)[:, chosen], v[:, chosen], numbers


def _fitted(tensor: Tensor, start: Terms, sweeps: int, tolerance: float) -> tuple[float, Terms]:
    """The relative error of the fit, and its terms after at most so many sweeps of alternating least squares."""
    x = tensor.numpy()  # on small matrices several times as fast as torch
    u, v, numbers = (factor.numpy() for factor in start)
    by_row, by_column, by_task = (np.moveaxis(x, axis, 0).reshape(x.shape[axis], -1) for axis in (1, 2, 0))
    norm = float(np.linalg.norm(x)) or 1.0
    error = float(np.linalg.norm(by_task - numbers @ _pairs(u, v).T)) / norm
    for _ in range(sweeps):
        # Of length 1, all else in the numbers, so that none grows without bound.
        u = _of_length_1(_solved(by_row, numbers, v, _pairs(numbers, v)))
        v = _of_length_1(_solved(by_column, numbers, u, _pairs(numbers, u)))
        pairs = _pairs(u, v)
        numbers = _solved(by_task, u, v, pairs)
        before, error = error, float(np.linalg.norm(by_task - numbers @ pairs.T)) / norm
        if before - error < tolerance:
            break
    return error, (torch.from_numpy(u), torch.from_numpy(v), torch.from_numpy(numbers))


def _pairs(one: Matrix, other: Matrix) -> Matrix:
    """The products of every row of one with every row of the other, (rows x rows, R)."""
    return (one[:, None] * other[None]).reshape(-1, one.shape[1])


def _solved(unfolded: Matrix, one: Matrix, other: Matrix, pairs: Matrix) -> Matrix:
    """The least squares of one factor, where the other two, and their pairs of rows, are given."""
    values, vectors = np.linalg.eigh((one.T @ one) * (other.T @ other))
    # Terms that the others make superfluous get no share, as in a pseudo-inverse.
    kept = values > values.max(initial=0.0) * values.size * np.finfo(values.dtype).eps
    found: Matrix = (unfolded @ pairs @ vectors[:, kept] / values[kept]) @ vectors[:, kept].T
    return found


def _of_length_1(x: Matrix) -> Matrix:
    lengths = np.linalg.norm(x, axis=0)
    found: Matrix = x / np.where(lengths > 0, lengths, 1.0)
    return found
