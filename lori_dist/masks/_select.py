"""The largest entries of each group of modules, exactly, without sorting or joining them, by one process or several."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lori_dist.errors import AdapterError, ConfigError

Keys = Callable[[str], Iterator[Tensor]]
"""Module path -> the keys of the entries that this process has, in flat order, in pieces."""

_DIGIT = 11  # bits a pass decides: three passes over fp32, and a histogram that costs small adapters nothing
_PIECE = 1 << 21  # entries worked on at once: bounds the temporaries, whatever the size of a module
_GROUPS = 256  # whose histograms are added up at once: 4 MB


@dataclass(frozen=True, kw_only=True, slots=True)
class Rule:
    """A rule for what is kept: the entries with the largest keys of each group, the earlier one of equal keys."""

    group: Callable[[str], str]
    """Module path -> name of its group."""
    keys: Callable[[str, int, Tensor], Tensor]
    """Module path, flat position of the first, entries that follow each other -> their keys: integers that order as the
    entries do and are not negative, always of one dtype for entries of one dtype."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ShareOfB:
    """The share of B that one of several processes holds: consecutive entries, in the order of the ranks."""

    b: Mapping[str, Tensor]
    """Module path -> the entries it has, of any shape. Every process has all modules, if only with nothing of them."""
    starts: Mapping[str, int]
    """Module path -> flat position of the first."""
    sizes: Mapping[str, int]
    """Module path -> entries of all processes."""
    process: int = 0
    num_processes: int = 1
    total: Callable[[Tensor], Tensor] = lambda counts: counts
    """Counts, int64, of this process -> those of all, added up; every process calls it as often."""

    def before(self, counts: Tensor) -> Tensor:
        """The sum of the counts of the processes before this one."""
        table = counts.new_zeros(self.num_processes, *counts.shape)
        table[self.process] = counts
        return self.total(table)[: self.process].sum(0)


def magnitudes(module: str, start: int, entries: Tensor) -> Tensor:
    """The keys of a rule that keeps the largest |b|; zeros are the smallest."""
    # Without its sign, a float orders as the integer of the same bits.
    integer = torch.int64 if entries.dtype == torch.float64 else torch.int32
    return entries.view(integer) & torch.iinfo(integer).max


def largest(b: Mapping[str, Tensor], rule: Rule, density: float) -> dict[str, Tensor]:
    """Chooses the entries that a rule keeps, in the form that the functions `mask` of this folder return.

    Of a group of n entries exactly max(1, round(density * n)) are kept, halves rounded to even. Ties go to the earlier
    entry: by the order of `b`, then by flat index.
    Raises ConfigError if density is outside (0, 1], AdapterError naming the module for an entry that is not finite.
    """
    sizes = {module: tensor.numel() for module, tensor in b.items()}
    return largest_of(ShareOfB(b=b, starts=dict.fromkeys(b, 0), sizes=sizes), rule, density)


def largest_of(share: ShareOfB, rule: Rule, density: float) -> dict[str, Tensor]:
    """Does what `largest` does for the entries of this process, in their shapes. All processes must call it.

    The same is raised by all.
    """
    if not 0 < density <= 1:
        raise ConfigError(f"density: got {density}; it is kept entries over all of them, above 0 and at most 1")
    _refuse_not_finite(share)
    # The narrower types fit in exactly.
    dtype = torch.float64 if any(tensor.dtype == torch.float64 for tensor in share.b.values()) else torch.float32
    bits = torch.iinfo(rule.keys("", 0, torch.empty(0, dtype=dtype)).dtype).bits - 1

    def keys(module: str) -> Iterator[Tensor]:
        flat = share.b[module].detach().reshape(-1)
        for start in range(0, flat.numel(), _PIECE):
            yield rule.keys(module, share.starts[module] + start, flat[start : start + _PIECE].to(dtype))

    groups: dict[str, list[str]] = {}
    for module in share.b:
        groups.setdefault(rule.group(module), []).append(module)
    found: list[tuple[int, int]] = []
    for first in range(0, len(groups), _GROUPS):
        found += _thresholds(share, keys, bits, list(groups.values())[first : first + _GROUPS], density)
    masks: dict[str, Tensor] = {}
    for modules, (threshold, num_ties) in zip(groups.values(), found, strict=True):
        masks.update(_keep(share, keys, modules, threshold, num_ties))
    return {module: masks[module] for module in share.b}


def _refuse_not_finite(share: ShareOfB) -> None:
    found = share.total(torch.tensor([_num_not_finite(tensor) for tensor in share.b.values()], dtype=torch.int64))
    for module, num_strange in zip(share.b, found.tolist(), strict=True):
        if num_strange:
            raise AdapterError(
                f"{module}: {num_strange} of {share.sizes[module]} entries of B are NaN or infinite; "
                "the calibration diverged, so lower its learning rate or clip its gradients"
            )


def _num_not_finite(tensor: Tensor) -> int:
    if torch.isfinite(tensor.sum()):  # so is every entry, seen without a copy; a sum can also overflow
        return 0
    return tensor.numel() - int(torch.isfinite(tensor).sum())


def _keep(
    share: ShareOfB, keys: Keys, modules: Sequence[str], threshold: int, num_ties: int
) -> Iterator[tuple[str, Tensor]]:
    for module in modules:
        tensor = share.b[module]
        kept = torch.empty(tensor.numel(), dtype=torch.bool, device=tensor.device)
        place = 0
        for piece in keys(module):
            mask = kept[place : place + piece.numel()]
            torch.gt(piece, threshold, out=mask)
            if num_ties:
                ties = (piece == threshold).nonzero().squeeze(1)[:num_ties]
                mask[ties] = True
                num_ties -= ties.numel()
            place += piece.numel()
        yield module, kept.view(tensor.shape)


def _thresholds(
    share: ShareOfB, keys: Keys, bits: int, groups: Sequence[Sequence[str]], density: float
) -> list[tuple[int, int]]:
    """(key, num_ties) of each group: this process keeps its entries above the key, and the first so many equal to it.

    Radix selection: each pass counts the entries by the next digit of their key, among those that agree with the
    threshold in the digits before. A group is done as soon as all of those are kept.
    """
    sizes = [sum(share.sizes[module] for module in modules) for modules in groups]
    num_left = [max(1, round(density * size)) for size in sizes]
    known, ties = [0] * len(groups), [0] * len(groups)
    left = [number for number, size in enumerate(sizes) if size]
    for shift in range((bits - 1) // _DIGIT * _DIGIT, -1, -_DIGIT):
        if not left:
            break
        is_first = shift + _DIGIT >= bits
        own = torch.stack(
            [_counts(keys, groups[number], shift, None if is_first else known[number]) for number in left]
        )
        for number, counts, here in zip(left, share.total(own.clone()), own, strict=True):
            num_above = counts.flip(0).cumsum(0).flip(0) - counts  # by digit: entries whose digit is larger
            digit = int((num_above < num_left[number]).nonzero()[0])
            known[number] = known[number] << _DIGIT | digit
            num_left[number] -= int(num_above[digit])
            ties[number] = int(here[digit])
            if num_left[number] == int(counts[digit]):
                known[number], num_left[number] = (known[number] << shift) - 1, 0
        left = [number for number in left if num_left[number]]
    before = share.before(torch.tensor(ties, dtype=torch.int64)).tolist()
    return [(key, max(0, count - earlier)) for key, count, earlier in zip(known, num_left, before, strict=True)]


def _counts(keys: Keys, modules: Sequence[str], shift: int, known: int | None) -> Tensor:
    """Entries by the digit of their key at `shift`, (2^11,), among those whose higher digits are `known`."""
    counts = torch.zeros(1 << _DIGIT, dtype=torch.int64)
    for module in modules:
        for piece in keys(module):
            digits = piece >> shift
            if known is not None:
                digits = digits[digits >> _DIGIT == known] & ((1 << _DIGIT) - 1)
            counts += torch.bincount(digits, minlength=1 << _DIGIT).cpu()
    return counts
