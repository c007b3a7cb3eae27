"""Tasks made more orthogonal, then the sizes and the directions of their rows merged apart."""

from collections.abc import Sequence
from typing import Annotated

import torch
from torch import Tensor

from lori_dist.adapter.update import Part, Update
from lori_dist.merges._factors import factors, noise, singular, without_noise
from lori_dist.merges._forms import in_row_space


def merge(
    updates: Sequence[Update],
    *,
    weights: Sequence[float],
    steps: Annotated[int, "[0, inf)"] = 100,
    gamma: Annotated[float, "[0, inf)"] = 1.0,
) -> list[Part]:
    """The tasks made more orthogonal, then the sizes and the directions of their rows merged apart (DO-Merging).

    Orthogonalise: B_t and A_t, each at norm 1, move by gradient descent on sum_{s != t} |B_s^T B_t|^2 + gamma sum_t
    |B_t - its start|^2, and so for A, and get their norms back. Decouple: m_t is the norm of each row of D_t, and
    V_t = D_t / m_t. The result has rows m sum_t w_t V_t, where m is the mean of the m_t of those tasks that have the
    row: a computed A and B, or a dense B on the A that the tasks share.
    updates: of one module, one per adapter. weights: one per adapter, of any sign, by default equal ones that sum to
    one: T equal adapters then give one of them, apart from the orthogonalisation. steps: of the descent; 0: none.
    gamma: how strongly factors are held at their start.
    Depends on how an update is split into s B and A.
    Source: Zheng et al., "Decouple and Orthogonalize" (arXiv 2505.15875), of which the abstract and summaries could be
    read, and no code was found: the two penalties, descent layer by layer, and magnitude and direction merged apart are
    the paper's. Squared norms at length 1, the step 1 / (12 T + 2 gamma), rows of the weight as what has a magnitude
    (as in PEFT's DoRA; it leaves a shared A as it is), and means and sums of the two are ours.
    """
    tasks = [(update, weight) for update, weight in zip(updates, weights, strict=True) if update.kept]
    pairs = [factors(update) for update, _ in tasks]
    lefts = _orthogonalized([b for b, _ in pairs], steps, gamma)
    rights = [a.t() for a in _orthogonalized([a.t() for _, a in pairs], steps, gamma)]
    left = _decoupled(lefts, rights, [weight for _, weight in tasks])
    none = torch.zeros(0, updates[0].shape[1], dtype=torch.float64)
    return [in_row_space(updates, left.reshape(updates[0].shape[0], -1), torch.cat([none, *rights]))]


def _orthogonalized(factors: Sequence[Tensor], steps: int, gamma: float) -> list[Tensor]:
    """The tasks' factors, (features, r_t), moved away from each other, at their norms."""
    if len(factors) < 2 or not steps:
        return list(factors)
    basis = singular(torch.cat(list(factors), dim=1))[0]  # they move in what they span: small matrices are enough
    norms = [x.norm() for x in factors]
    starts = [basis.t() @ x / norm for x, norm in zip(factors, norms, strict=True)]
    moved = starts
    step = 1 / (12 * len(factors) + 2 * gamma)
    for _ in range(steps):
        total = torch.stack([x @ x.t() for x in moved]).sum(dim=0)
        moved = [
            x - step * (4 * (total @ x - x @ (x.t() @ x)) + 2 * gamma * (x - start))
            for x, start in zip(moved, starts, strict=True)
        ]
    return [basis @ (x * norm / x.norm()) for x, norm in zip(moved, norms, strict=True)]


def _decoupled(lefts: Sequence[Tensor], rights: Sequence[Tensor], weights: Sequence[float]) -> Tensor:
    """The left factor for the tasks' A, one above the other: sizes of rows at their mean, directions weighted."""
    if not lefts:
        return torch.zeros(0, dtype=torch.float64)
    sizes = torch.stack([_row_norms(b, a) for b, a in zip(lefts, rights, strict=True)])
    sizes = without_noise(sizes, noise(sizes))
    has = sizes > 0
    mean = sizes.sum(dim=0) / has.sum(dim=0).clamp(min=1)
    factor = torch.where(has, mean / torch.where(has, sizes, 1.0), 0.0)
    return torch.cat([weight * f.unsqueeze(1) * b for weight, f, b in zip(weights, factor, lefts, strict=True)], dim=1)


def _row_norms(b: Tensor, a: Tensor) -> Tensor:
    """Norms of the rows of b @ a, (rows,): without that product, as the triangular factor of a has the same rows in
    another basis."""
    norms: Tensor = (b @ torch.linalg.qr(a.t()).R.t()).norm(dim=1)
    return norms
