"""The forms a merged update of one module can have: B on one of the tasks' own A, or computed A and B."""

from collections.abc import Iterable, Sequence

import numpy as np
import torch
from torch import Tensor

from lori_dist.adapter.adapter import Entries
from lori_dist.adapter.projection import checksum
from lori_dist.adapter.update import Part, Update
from lori_dist.errors import AdapterError


def groups(updates: Sequence[Update]) -> list[list[Part]]:
    """The parts by the A they stand on: seed, rank and dtype, in the order of their first."""
    found: dict[tuple[object, ...], list[Part]] = {}
    for update in updates:
        for part in update.parts:
            if part.rank:
                found.setdefault(part.key, []).append(part)
    for parts in found.values():
        _refuse_two_checksums(parts)
    return list(found.values())


def shared(updates: Sequence[Update]) -> list[Part] | None:
    """All parts on the one A that every task's kept entries in this module stand on; None if there is no such A."""
    keeping = [parts for parts in groups(updates) if any(part.entries is not None for part in parts)]
    if len(keeping) == 1:
        return keeping[0]
    return groups(updates)[0] if not keeping and groups(updates) else None


class Support:
    """The places in B where some of the tasks keep an entry: all that a method need look at which maps zeros to zero,
    wherever they are. An eighth of a sparse B's memory, and of the time."""

    positions: Tensor
    """(size,), int64, ascending flat positions in (out_features, rank)."""

    def __init__(self, kept: Iterable[Entries], num_entries: int) -> None:
        """kept: of B's of `num_entries` entries."""
        found = torch.zeros(num_entries, dtype=torch.bool)
        for entries in kept:
            found[_places(entries)] = True
        self.positions = torch.from_numpy(np.flatnonzero(found.numpy()))  # several times as fast as torch's
        self._order = torch.empty(num_entries, dtype=torch.int32)  # flat position -> place among `positions`
        self._order[self.positions] = torch.arange(self.positions.numel(), dtype=torch.int32)

    def spread(self, entries: Entries) -> Tensor:
        """Values of the entries at `positions`, (size,), zero where they have none."""
        return self.sum([entries])

    def sum(self, kept: Iterable[Entries]) -> Tensor:
        """The sum of their values at `positions`, (size,), float64."""
        total = torch.zeros(self.positions.numel(), dtype=torch.float64)
        for entries in kept:
            total[self._order[_places(entries)].long()] += entries.values
        return total


def scaled_entries(parts: Iterable[Part]) -> Entries:
    """The entries of the sum of scale * B over parts that stand on one A, float64."""
    parts = list(parts)
    scaled = [
        Entries(index=part.entries.index, values=part.entries.values.double() * part.scale)
        for part in parts
        if part.entries is not None
    ]
    if not scaled:
        return Entries(index=torch.zeros(0, dtype=torch.int32), values=torch.zeros(0, dtype=torch.float64))
    if len(scaled) == 1:
        return scaled[0]
    support = Support(scaled, parts[0].shape[0] * parts[0].rank)
    return Entries(index=support.positions.to(torch.int32), values=support.sum(scaled))


def only(entries: Entries, kept: Tensor) -> Entries:
    """The entries that are kept. kept: bool, one for each."""
    if bool(kept.all()):
        return entries
    places = torch.from_numpy(np.flatnonzero(kept.numpy()))
    index = places.to(torch.int32) if entries.index is None else entries.index[places]
    return Entries(index=index, values=entries.values[places])


def _places(entries: Entries) -> Tensor | slice:
    return slice(None) if entries.index is None else entries.index.long()


def on_projection(
    parts: Sequence[Part],
    b: Tensor,
    name: str,
    *,
    support: Tensor | None = None,
    positions: Tensor | None = None,
) -> Part:
    """A part with the update b A, where `parts` stand on this A.

    b: (out_features, rank), float64, or (size,) if there are as many flat `positions`, ascending, outside of which it
    is zero. support: bool, as b, what is kept of it; by default what is not zero. alpha is that of the parts if they
    agree, and else the rank.
    """
    first = parts[0]
    is_same = all(part.alpha == first.alpha for part in parts)
    alpha = first.alpha if is_same and first.alpha != 0 else float(first.rank)
    return Part(
        name=name,
        module=first.module,
        shape=first.shape,
        seed=first.seed,
        rank=first.rank,
        alpha=alpha,
        dtype=first.dtype,
        entries=_entries(
            b * (first.rank / alpha), support, values_dtype(parts), first.shape[0] * first.rank, positions
        ),
        checksum=_known(parts).checksum,
        stored=first.stored,
    )


def computed(updates: Sequence[Update], left: Tensor, right: Tensor) -> Part:
    """A part without a seed, with B = left, (out_features, rank), and A = right, (rank, in_features), float64.

    Both are kept in fp32, or in the dtype of the tasks' values if that is wider.
    """
    dtype = values_dtype(part for update in updates for part in update.parts)
    rank, first = right.shape[0], updates[0]
    a = right.to(dtype).contiguous()
    return Part(
        name=joined_name(updates),
        module=first.module,
        shape=first.shape,
        seed=None,
        rank=rank,
        alpha=float(rank),
        dtype=dtype,
        entries=_entries(left, None, dtype, left.numel()),
        checksum=checksum(a) if rank else None,
        stored=a if rank else None,
    )


def _entries(
    b: Tensor, support: Tensor | None, dtype: torch.dtype, num_entries: int, positions: Tensor | None = None
) -> Entries | None:
    kept = (b != 0 if support is None else support).flatten().nonzero().squeeze(1)
    if not kept.numel():
        return None
    values = b.flatten() if kept.numel() == b.numel() else b.flatten()[kept]
    places = kept if positions is None else positions[kept]
    index = None if kept.numel() == num_entries else places.to(torch.int32)
    return Entries(index=index, values=values.to(dtype))


def in_row_space(updates: Sequence[Update], left: Tensor, right: Tensor) -> Part:
    """A part with the update left @ right, whose rows lie in the span of the tasks' A.

    Where the tasks share A, it is a dense B on that A: B = left right A^T (A A^T)^-1. Else A and B are computed.
    """
    parts = shared(updates)
    if parts is None:
        return computed(updates, left, right)
    a = _known(parts).a()
    b = left @ torch.linalg.solve(a @ a.t(), a @ right.t()).t()
    return dense_on_projection(parts, b, joined_name(updates))


def dense_on_projection(parts: Sequence[Part], b: Tensor, name: str) -> Part:
    """Makes a part as `on_projection` does, for a b that a product made: its zeros are few, and are kept with the
    rest."""
    return on_projection(parts, b, name, support=torch.ones_like(b, dtype=torch.bool) if bool(b.any()) else None)


def scaled_b(update: Update, parts: Sequence[Part]) -> Tensor:
    """The sum of scale * B over those of the update's parts that are among `parts`, all on one A; float64, dense."""
    total = torch.zeros(parts[0].shape[0], parts[0].rank, dtype=torch.float64)
    for part in update.kept:
        if part.key == parts[0].key:
            total += part.scaled_b()
    return total


def joined_name(named: Sequence[Update] | Sequence[Part]) -> str:
    return "+".join(item.name for item in named)


def values_dtype(parts: Iterable[Part]) -> torch.dtype:
    """Data type of what is computed from the parts' values: fp32, or their own if that is wider."""
    dtype = torch.float32
    for part in parts:
        if part.entries is not None:
            dtype = torch.promote_types(dtype, part.entries.values.dtype)
    return dtype


def _known(parts: Sequence[Part]) -> Part:
    """The first whose checksum of A is known: adapters of other modules have none for this one."""
    return next((part for part in parts if part.checksum is not None), parts[0])


def _refuse_two_checksums(parts: Sequence[Part]) -> None:
    first = _known(parts)
    for part in parts:
        if part.checksum not in (None, first.checksum):
            raise AdapterError(
                f"{part.module}: A of {part.name} has checksum {part.checksum}, another of the same seed {part.seed} "
                f"has {first.checksum}; one of the adapters is damaged, write it again"
            )
