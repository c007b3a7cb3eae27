"""Updates as products of thin factors, and their singular directions without a dense matrix."""

from collections.abc import Sequence

import torch
from torch import Tensor

from lori_dist.adapter.update import Part, Update

Singular = tuple[Tensor, Tensor, Tensor]
"""U (rows, k), S (k,) descending and above zero, V^T (k, columns)."""


def factors(update: Update) -> tuple[Tensor, Tensor]:
    """s B, (out_features, rank), and A, (rank, in_features), float64: those of the kept parts, side by side."""
    return stacked(update.shape, update.kept)


def stacked(shape: tuple[int, int], parts: Sequence[Part]) -> tuple[Tensor, Tensor]:
    """s B of the parts side by side, and A of the parts one above the other."""
    out_features, in_features = shape
    none = torch.zeros(0, in_features, dtype=torch.float64)
    b = torch.cat([torch.zeros(out_features, 0, dtype=torch.float64), *(part.scaled_b() for part in parts)], dim=1)
    return b, torch.cat([none, *(part.a() for part in parts)])


def singular(x: Tensor) -> Singular:
    """The singular directions of a matrix, without those whose value is zero to rounding."""
    u, s, vh = torch.linalg.svd(x, full_matrices=False)
    return _tidy(u, s, vh, max(x.shape))


def leading(x: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """left, (rows, rank), and right, (rank, columns), whose product is the best approximation of x at that rank.

    Directions that x does not have are left out. One of the two has the singular directions, from the eigenvectors of
    the smaller product of x with itself: a fraction of the time of an SVD, and as exact, as the other is x times them.
    """
    if x.shape[0] < x.shape[1]:
        left, right = leading(x.t(), rank)
        return right.t(), left.t()
    v = torch.linalg.eigh(x.t() @ x).eigenvectors[:, x.shape[1] - rank :].flip(1)
    left = x @ v
    norms = left.norm(dim=0)
    kept = norms > norms.max() * max(x.shape) * torch.finfo(x.dtype).eps if norms.numel() else norms > 0
    return left[:, kept], v[:, kept].t()


def singular_of_product(left: Tensor, right: Tensor) -> Singular:
    """The singular directions of left @ right, from the small product of their triangular factors.

    left: (rows, k). right: (k, columns). The cost is that of k, not of rows x columns.
    """
    q_left, r_left = torch.linalg.qr(left)
    q_right, r_right = torch.linalg.qr(right.t())
    u, s, vh = torch.linalg.svd(r_left @ r_right.t(), full_matrices=False)
    return _tidy(q_left @ u, s, vh @ q_right.t(), max(left.shape[0], right.shape[1]))


def noise(sizes: Tensor) -> float:
    """Largest value that rounding makes of a zero in a product with singular directions, beside entries of these
    sizes."""
    return float(sizes.abs().max()) * 64 * torch.finfo(sizes.dtype).eps if sizes.numel() else 0.0


def without_noise(x: Tensor, cut: float) -> Tensor:
    """x with zeros where it is zero to rounding: they would be counted among the entries, and vote."""
    return torch.where(x.abs() > cut, x, 0.0)


def _tidy(u: Tensor, s: Tensor, vh: Tensor, size: int) -> Singular:
    """Without zeros. The largest entry of a column of U is positive, so that signs do not depend on the library."""
    if not s.numel():
        return u, s, vh
    num = int((s > s[0] * size * torch.finfo(s.dtype).eps).sum())
    u, s, vh = u[:, :num], s[:num], vh[:num]
    largest = u.gather(0, u.abs().argmax(dim=0, keepdim=True))
    signs = torch.where(largest < 0, -1.0, 1.0).to(u.dtype)
    return u * signs, s, vh * signs.t()
