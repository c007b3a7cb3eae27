"""The largest entries of one matrix, or of many that are never in memory together."""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

_SMALLEST = 2.0**-1074  # of the float64 that are not zero
_BITS = 63  # of a size: a float64's sign is none, and as integers they have the same order
_LEVEL = 16  # bits that one reading decides
_FEW = 1 << 22  # entries of one task that are sorted in memory


@dataclass(frozen=True, kw_only=True, slots=True)
class Cut:
    """A cut of one matrix: the entries of at least this size are kept, as far as they are among the first."""

    threshold: float
    num_kept: int

    def keep(self, x: Tensor) -> Tensor:
        """Mask of the entries of x that are kept, bool, as x. Of those at the threshold the later ones go."""
        sizes = x.abs().flatten()
        kept = sizes >= self.threshold
        if excess := int(torch.count_nonzero(kept)) - self.num_kept:
            kept[(sizes == self.threshold).nonzero().squeeze(1)[-excess:]] = False
        return kept.view_as(x)


def num_largest(num_entries: int, density: float) -> int:
    """How many stay of the entries that are not zero; halves are rounded to even, and one always stays."""
    return min(num_entries, max(1, round(density * num_entries)))


def largest(x: Tensor, density: float) -> Tensor:
    """Mask of the largest entries of x, bool, as x: max(1, round(density * n)) of the n that are not zero.

    Counted over all entries, the density of a sparse x would trim nothing. Ties go to the earlier entry.
    """
    return _first(x, num_largest(int(torch.count_nonzero(x)), density))


def without_outliers(x: Tensor, density: float, outliers: float) -> Tensor:
    """Mask of the entries of x that are kept, bool, as x, if its very largest are removed as well as its smallest.

    max(1, round(density * n)) of the n that are not zero stay: the largest of those that are left without the
    round(outliers * n) very largest, or without fewer of these where else too few are left. Ties go to the earlier
    entry.
    """
    num_entries = int(torch.count_nonzero(x))
    num_kept = num_largest(num_entries, density)
    num_outliers = min(round(outliers * num_entries), num_entries - num_kept)
    return _first(x, num_outliers + num_kept) & ~_first(x, num_outliers)


def _first(x: Tensor, num_kept: int) -> Tensor:
    """Mask of the `num_kept` largest entries of x, bool, as x; at most as many as are not zero."""
    sizes = x.abs().flatten()
    if num_kept >= int(torch.count_nonzero(sizes)):
        return x != 0
    if num_kept == 0:
        return torch.zeros_like(x, dtype=torch.bool)
    place = sizes.numel() - num_kept
    threshold = float(np.partition(sizes.numpy(), place)[place])  # several times as fast as kthvalue
    return Cut(threshold=threshold, num_kept=num_kept).keep(x)


def common_cuts(pieces: Callable[[], Iterable[Tensor]], density: float) -> list[Cut]:
    """The cut of each piece of one long vector of which the `largest` entries are kept.

    pieces: gives them, float64, whenever it is called: twice, or up to five times where very many are nearly equal.
    One piece at a time is in memory, and at most four million sizes. Ties go to the earlier piece.
    """
    left, prefix, low = -1, 0, _BITS
    while low:  # a radix selection: the bits of the threshold from the highest on
        high, low = low, max(0, low - _LEVEL)
        counts = np.zeros(1 << (high - low), dtype=np.int64)
        for patterns in _patterns(pieces):
            inside = patterns[patterns >> high == prefix]
            counts += np.bincount((inside >> low) & (counts.size - 1), minlength=counts.size)
        if left < 0:
            left = num_largest(int(counts.sum()), density)
        if left == 0:
            return [Cut(threshold=_SMALLEST, num_kept=0) for _ in pieces()]
        from_above = counts[::-1].cumsum()
        place = counts.size - 1 - int(np.searchsorted(from_above, left))
        left -= int(counts[place + 1 :].sum())
        prefix = (prefix << (high - low)) | place
        if counts[place] <= _FEW:
            break
    return _shared_out(pieces, prefix, low, left)


def _shared_out(pieces: Callable[[], Iterable[Tensor]], prefix: int, low: int, left: int) -> list[Cut]:
    """prefix: the threshold without its `low` lowest bits. left: how many stay of the sizes that begin so."""
    above, near = [], []
    for patterns in _patterns(pieces):
        begins = patterns >> low
        above.append(int(np.count_nonzero(begins > prefix)))
        near.append(np.unique(patterns[begins == prefix], return_counts=True))
    sizes = np.concatenate([found for found, _ in near])
    order = np.argsort(-sizes, kind="stable")
    numbers = np.concatenate([count for _, count in near])[order].cumsum()
    pattern = sizes[order][np.searchsorted(numbers, left)]
    above = [num + int(count[found > pattern].sum()) for num, (found, count) in zip(above, near, strict=True)]
    equal = [int(count[found == pattern].sum()) for found, count in near]
    left -= sum(int(count[found > pattern].sum()) for found, count in near)
    made = []
    for num_above, num_equal in zip(above, equal, strict=True):
        made.append(Cut(threshold=float(pattern.view(np.float64)), num_kept=num_above + min(num_equal, left)))
        left -= min(num_equal, left)
    return made


def _patterns(pieces: Callable[[], Iterable[Tensor]]) -> Iterator[npt.NDArray[np.int64]]:
    """The sizes of those entries of each piece that are not zero, as integers of the same order."""
    for x in pieces():
        sizes = x.abs().flatten().numpy()
        yield sizes[sizes != 0].view(np.int64)
