"""The k largest entries of each group of modules, exactly, without sorting or joining them."""

from collections.abc import Callable, Iterator, Mapping, Sequence

import torch
from torch import Tensor

from lori_dist.errors import AdapterError, ConfigError

Keys = Callable[[str], Iterator[Tensor]]
"""Module path -> its entries' keys in flat order, in pieces: integers in [0, 2^bits) that order as the entries do."""

_DIGIT = 11  # bits a pass decides: three passes over fp32, and a histogram that costs small adapters nothing
_PIECE = 1 << 21  # entries worked on at once: bounds the temporaries, whatever the size of a module


def magnitudes(b: Mapping[str, Tensor], group: Callable[[str], str], density: float) -> dict[str, Tensor]:
    """Which entries are among the largest |b| of their group, as the functions `mask` of this folder return it.

    group: module path -> name of its group. Of a group of n entries exactly max(1, round(density * n)) are kept, halves
    rounded to even. Ties go to the earlier entry: by the order of `b`, then by flat index. Zeros are the smallest, so
    they are kept only where there are too few others.
    Raises ConfigError if density is outside (0, 1], AdapterError naming the module for an entry that is not finite.
    """
    wide = any(tensor.dtype == torch.float64 for tensor in b.values())
    floating, integer, bits = (torch.float64, torch.int64, 63) if wide else (torch.float32, torch.int32, 31)

    def keys(module: str) -> Iterator[Tensor]:
        # Without its sign, a float orders as the integer of the same bits; the narrower types fit in exactly.
        flat = b[module].detach().reshape(-1)
        for start in range(0, flat.numel(), _PIECE):
            piece = flat[start : start + _PIECE]
            yield piece.to(floating).view(integer) & (2**bits - 1)

    return largest(b, keys, bits, group, density)


def largest(
    b: Mapping[str, Tensor], keys: Keys, bits: int, group: Callable[[str], str], density: float
) -> dict[str, Tensor]:
    """As `magnitudes`, for any keys: the largest of each group are kept, and ties go to the earlier entry."""
    if not 0 < density <= 1:
        raise ConfigError(f"density: {density} was given; it is kept entries over all of them, above 0 and at most 1")
    for module, tensor in b.items():
        _refuse_not_finite(module, tensor)
    groups: dict[str, list[str]] = {}
    for module in b:
        groups.setdefault(group(module), []).append(module)
    masks: dict[str, Tensor] = {}
    for modules in groups.values():
        masks.update(_keep(b, modules, keys, bits, density))
    return {module: masks[module] for module in b}


def _refuse_not_finite(module: str, tensor: Tensor) -> None:
    if torch.isfinite(tensor.sum()):  # so is every entry, seen without a copy; a sum can also overflow
        return
    num_strange = tensor.numel() - int(torch.isfinite(tensor).sum())
    if num_strange:
        raise AdapterError(
            f"{module}: {num_strange} of {tensor.numel()} entries of B are NaN or infinite; "
            "the calibration diverged, so lower its learning rate or clip its gradients"
        )


def _keep(
    b: Mapping[str, Tensor], modules: Sequence[str], keys: Keys, bits: int, density: float
) -> Iterator[tuple[str, Tensor]]:
    num_entries = sum(b[module].numel() for module in modules)
    if num_entries == 0:
        yield from ((module, torch.zeros_like(b[module], dtype=torch.bool)) for module in modules)
        return
    threshold, num_ties = _threshold(modules, keys, bits, max(1, round(density * num_entries)))
    for module in modules:
        kept = torch.empty(b[module].numel(), dtype=torch.bool, device=b[module].device)
        place = 0
        for piece in keys(module):
            mask = kept[place : place + piece.numel()]
            torch.gt(piece, threshold, out=mask)
            if num_ties:
                ties = (piece == threshold).nonzero().squeeze(1)[:num_ties]
                mask[ties] = True
                num_ties -= ties.numel()
            place += piece.numel()
        yield module, kept.view(b[module].shape)


def _threshold(modules: Sequence[str], keys: Keys, bits: int, num_kept: int) -> tuple[int, int]:
    """(key, num_ties): to keep num_kept entries, keep those above the key, and the first num_ties of those equal to it.

    Radix selection: each pass counts the entries by the next digit of their key, among those that agree with the
    threshold in the digits before. It ends as soon as all of those are kept.
    """
    known, num_left = 0, num_kept
    for shift in range((bits - 1) // _DIGIT * _DIGIT, -1, -_DIGIT):
        counts = _counts(modules, keys, shift, known if shift + _DIGIT < bits else None)
        num_above = counts.flip(0).cumsum(0).flip(0) - counts  # by digit: entries whose digit is larger
        digit = int((num_above < num_left).nonzero()[0])
        known = known << _DIGIT | digit
        num_left -= int(num_above[digit])
        if num_left == int(counts[digit]):
            return (known << shift) - 1, 0
    return known, num_left


def _counts(modules: Sequence[str], keys: Keys, shift: int, known: int | None) -> Tensor:
    """Entries by the digit of their key at `shift`, (2^11,), among those whose higher digits are `known`."""
    counts = torch.zeros(1 << _DIGIT, dtype=torch.int64)
    for module in modules:
        for piece in keys(module):
            digits = piece >> shift
            if known is not None:
                digits = digits[digits >> _DIGIT == known] & ((1 << _DIGIT) - 1)
            counts += torch.bincount(digits, minlength=1 << _DIGIT).cpu()
    return counts
