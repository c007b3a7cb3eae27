"""An adapter's effect on one module. Adapters are merged in this form, one module at a time."""

import copy
import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lori_dist.adapter.adapter import Adapter, Block, Elsewhere, Entries, in_memory
from lori_dist.adapter.projection import checksum, projection
from lori_dist.errors import AdapterError


@dataclass(frozen=True, kw_only=True, slots=True)
class Part:
    """One A and its B for one module, which add scale * B A to its weight: a block of an adapter, as far as one module
    goes."""

    name: str
    """Name of the task."""
    module: str
    shape: tuple[int, int]
    """(out_features, in_features) of the module's weight."""
    seed: int | None
    """A is generated from it; None: A is `stored`."""
    rank: int
    """Rows of A; 0 where a part without a seed has no A."""
    alpha: float
    """Without a seed: the rank."""
    gain: float = 1.0
    """Without a seed: alpha / rank of the block, whose modules may have other ranks."""
    weight: float = 1.0
    dtype: torch.dtype = torch.float32
    """Data type of A."""
    entries: Entries | None = None
    """The kept entries of B; None: none is kept."""
    checksum: str | None = None
    """Checksum of A; None while it is unknown."""
    stored: Tensor | Elsewhere | None = None
    """A without a seed, (rank, in_features), in dtype."""

    @property
    def scale(self) -> float:
        return self.weight * self.gain * self.alpha / self.rank

    @property
    def key(self) -> tuple[object, ...]:
        """Parts of one key stand on one A."""
        return (self.checksum if self.seed is None else self.seed, self.rank, self.dtype)

    def a(self) -> Tensor:
        """A, (rank, in_features), float64. Raises AdapterError if it is not the A that was trained with."""
        if self.stored is not None:
            return in_memory(self.stored).double()
        assert self.seed is not None
        made = projection(self.seed, self.module, self.rank, self.shape[1], dtype=self.dtype)
        if self.checksum is not None and checksum(made) != self.checksum:
            raise AdapterError(
                f"{self.module}: A made from seed {self.seed} has checksum {checksum(made)}, {self.name} was trained "
                f"with {self.checksum}; the file is damaged or comes from another generator"
            )
        return made.double()

    def b(self) -> Tensor:
        """B, (out_features, rank), float64, dense."""
        if self.entries is None:
            return torch.zeros(self.shape[0], self.rank, dtype=torch.float64)
        return self.entries.dense(self.shape[0], self.rank).double()

    def scaled_b(self) -> Tensor:
        """scale * B, (out_features, rank), float64, dense."""
        return self.b() * self.scale if self.entries is not None else self.b()


@dataclass(frozen=True, kw_only=True, slots=True)
class Update:
    """The effect of one adapter on one module."""

    name: str
    """Name of the adapter: the names of its blocks, joined by `+`."""
    module: str
    shape: tuple[int, int]
    """(out_features, in_features) of the module's weight."""
    parts: tuple[Part, ...]
    """One for each block of the adapter, also for those that keep nothing here."""
    surveyed: Any = None
    """Result of the method's survey of all modules; None for a method that looks at one module alone."""

    @property
    def kept(self) -> tuple[Part, ...]:
        """The parts that keep an entry."""
        return tuple(part for part in self.parts if part.entries is not None)

    def delta(self) -> Tensor:
        """The update of the module's weight, (out_features, in_features), float64."""
        update = torch.zeros(self.shape, dtype=torch.float64)
        for part in self.kept:
            update.addmm_(part.scaled_b(), part.a())
        return update


def split(adapter: Adapter, module: str, shape: tuple[int, int]) -> Update:
    """The adapter's update of one module; one that adapts nothing if the module is not among the adapter's."""
    return Update(
        name=label(adapter),
        module=module,
        shape=shape,
        parts=tuple(_part(block, module, shape) for block in adapter.blocks),
    )


def label(adapter: Adapter) -> str:
    """The adapter's name in messages and in names of merges."""
    return "+".join(block.name for block in adapter.blocks)


def told_apart(adapters: Sequence[Adapter]) -> list[Adapter]:
    """The adapters with a name of its own for every block: of equal ones, the later get a number (`math`, `math-2`).

    Folders are often called alike, and a task is known by its name: in messages, in concat's options, in DARE's draws.
    """
    taken: set[str] = set()
    return [
        dataclasses.replace(adapter, blocks=tuple(_named_apart(block, taken) for block in adapter.blocks))
        for adapter in adapters
    ]


def _part(block: Block, module: str, shape: tuple[int, int]) -> Part:
    rank = block.rank_of(module)
    # Ranks differ between the modules of a block without a seed, and alpha with them: the gain says it for all.
    is_stored, entries = block.seed is None, block.entries.get(module)
    return Part(
        name=block.name,
        module=module,
        shape=shape,
        seed=block.seed,
        rank=rank,
        alpha=float(rank) if is_stored else block.alpha,
        gain=block.alpha / block.rank if is_stored else 1.0,
        weight=block.weight,
        dtype=block.dtype,
        # A copy: entries that lie in a file keep what was read of them, which is to go with this part.
        entries=None if entries is None or not entries.kept else copy.copy(entries),
        checksum=block.checksums.get(module),
        stored=block.projections.get(module),
    )


def blocks(merged: Mapping[str, Sequence[Part]], shapes: Mapping[str, tuple[int, int]]) -> tuple[Block, ...]:
    """The blocks that parts of many modules make: those of equal name, A, scale and place among such become one.

    merged: module path -> its parts. Blocks come in the order of their first part. Blocks of one name are told apart
    (`math`, `math-2`).
    """
    groups: dict[tuple[object, ...], dict[str, Part]] = {}
    for module, parts in merged.items():
        for part in parts:
            place, key = 0, _block_key(part)
            while module in groups.setdefault((*key, place), {}):
                place += 1
            groups[*key, place][module] = part
    known = {(*part.key, part.module): part.checksum for parts in merged.values() for part in parts if part.checksum}
    taken: set[str] = set()
    return tuple(_named_apart(_block(list(parts.values()), shapes, known), taken) for parts in groups.values())


def _block_key(part: Part) -> tuple[object, ...]:
    if part.seed is not None:
        return (part.name, part.seed, part.rank, part.alpha, part.weight, part.dtype)
    return (part.name, None, part.gain, part.weight, part.dtype)


def _block(
    parts: Sequence[Part], shapes: Mapping[str, tuple[int, int]], known: Mapping[tuple[object, ...], str]
) -> Block:
    """known: the key of an A and a module -> its checksum."""
    first, kept = parts[0], [part for part in parts if part.entries is not None]
    rank = max((part.rank for part in kept), default=1) if first.seed is None else first.rank
    checksums = {part.module: part.checksum for part in parts if part.checksum is not None}
    if first.seed is not None:
        # Also for modules that only other blocks adapt: the file has one checksum for every block and module.
        for module in shapes.keys() - checksums.keys():
            checksums[module] = known.get((*first.key, module)) or checksum(
                projection(first.seed, module, rank, shapes[module][1], dtype=first.dtype)
            )
    return Block(
        name=first.name,
        seed=first.seed,
        rank=rank,
        alpha=first.gain * rank if first.seed is None else first.alpha,
        dtype=first.dtype,
        weight=first.weight,
        entries={part.module: part.entries for part in kept if part.entries is not None},
        checksums={module: checksums[module] for module in shapes if module in checksums},
        projections={part.module: part.stored for part in kept if part.stored is not None},
    )


def _named_apart(block: Block, taken: set[str]) -> Block:
    name, number = block.name, 2
    while name in taken:
        name, number = f"{block.name}-{number}", number + 1
    taken.add(name)
    return dataclasses.replace(block, name=name)
