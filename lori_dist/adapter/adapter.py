"""An adapter in memory: what was trained, apart from any model."""

import copy
import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol

import torch
from torch import Tensor

from lori_dist.adapter.projection import GENERATOR, projection
from lori_dist.errors import AdapterError
from lori_dist.forms import FormChoice, Given


@dataclass(frozen=True, kw_only=True, slots=True)
class Spec:
    """An adapter before training: enough to build it on any rank. Raises AdapterError if it cannot be built."""

    rank: int
    """Rows of A, columns of B."""
    alpha: float
    """The update is (alpha / rank) * B A."""
    seed: int
    """A is generated from this and the module's path."""
    targets: str | tuple[str, ...] = "all-linear"
    """Module names, patterns, or `all-linear`."""
    dtype: torch.dtype = torch.float32
    """Data type of A. A is computed in fp32 and cast once, so casting the model never changes what was trained."""
    projection: Literal["cached", "recomputed", "trained"] = "cached"
    """Whether A is made once and kept, or is regenerated in each product and takes no memory, which is equal up to
    rounding; or is trained as B is, from the A of the seed on (LoRA)."""
    modules_to_save: tuple[str, ...] = ()
    """Paths, or their last parts, of modules that are trained in full and stored with the adapter."""
    exclude: tuple[str, ...] = ()
    """Names, paths or patterns of layers that are left out of the targets."""
    form: FormChoice | None = None
    """A form other than LoRI's own, with the tasks whose rows train it; None: one update for all rows."""
    given: Mapping[str, Given] | None = field(default=None, compare=False, repr=False)
    """Module path -> the A that it begins with, as it was computed from data, for every target; None: that of the seed.
    An adapter stores it."""

    def __post_init__(self) -> None:
        if self.rank < 1:
            raise AdapterError(f"rank: got {self.rank}; wanted an integer of at least 1")
        if not 0 < self.alpha < math.inf:
            raise AdapterError(f"alpha: got {self.alpha}; wanted a finite number above 0")
        if not self.targets or (not isinstance(self.targets, str) and not all(self.targets)):
            raise AdapterError(f"targets: got {self.targets!r}; name at least one layer, or give 'all-linear'")
        if self.projection not in ("cached", "recomputed", "trained"):
            raise AdapterError(f"projection: got {self.projection!r}; wanted 'cached', 'recomputed' or 'trained'")
        if self.given is not None and self.form is None and self.projection != "cached":
            raise AdapterError(f"projection: got {self.projection!r} for an A that is given; wanted 'cached'")

    def start_of(self, module: str, in_features: int) -> Given | None:
        """What a module begins with; None: the A of the seed. Raises AdapterError for one that is missing, or of
        another shape."""
        if self.given is None:
            return None
        found = self.given.get(module)
        if found is None or found.a.shape != (self.rank, in_features):
            what = "there is none" if found is None else f"it is {tuple(found.a.shape)}"
            raise AdapterError(f"given: wanted an A of shape {(self.rank, in_features)} for {module}, and {what}")
        return found

    @property
    def scale(self) -> float:
        return self.alpha / self.rank


@dataclass(frozen=True, kw_only=True, slots=True)
class Entries:
    """The kept entries of one module's B."""

    index: Tensor | None  # (kept,), int32, ascending flat positions in (out_features, rank); None: all are kept
    values: Tensor  # (kept,)

    @property
    def kept(self) -> int:
        return self.values.numel()

    def __copy__(self) -> "Entries":
        return self  # as for all that never changes; those in a file have a reason for another one

    def dense(self, out_features: int, rank: int) -> Tensor:
        """B, (out_features, rank)."""
        if self.index is None:
            return self.values.view(out_features, rank)
        flat = self.values.new_zeros(out_features * rank)
        return flat.index_copy_(0, self.index.long(), self.values).view(out_features, rank)


class Elsewhere(Protocol):
    """A that lies in a file, and is read when it is asked for."""

    @property
    def shape(self) -> tuple[int, ...]: ...

    def read(self) -> Tensor: ...


@dataclass(frozen=True, kw_only=True, slots=True)
class Block:
    """One A and its sparse B over all modules. A trained adapter has one block, a concat merge of T tasks has T."""

    name: str
    """The task it was trained on."""
    seed: int | None
    """A is generated from it. None: A was computed, as by an SVD, or trained, and is in `projections`."""
    rank: int
    """Rows of A. Where they differ between the modules of a block without a seed: the most that one has."""
    alpha: float
    dtype: torch.dtype = torch.float32
    """Data type of A."""
    weight: float = 1.0
    """The block's share in a merge: its update is weight * (alpha / rank) * B A."""
    entries: Mapping[str, Entries]
    """Module path -> kept entries. A module that keeps none is absent."""
    checksums: Mapping[str, str]
    """Module path -> checksum of A, for every module of the adapter; without a seed, for those that keep entries."""
    projections: Mapping[str, Tensor | Elsewhere] = field(default_factory=dict)
    """A of a block without a seed: module path -> (at most rank, in_features), for every module that keeps entries."""

    @property
    def scale(self) -> float:
        return self.weight * self.alpha / self.rank

    def projection(self, module: str, in_features: int, *, device: torch.device | str = "cpu") -> Tensor:
        """A of one module, (rank_of(module), in_features)."""
        if self.seed is None:
            return in_memory(self.projections[module]).to(device)
        return projection(self.seed, module, self.rank, in_features, dtype=self.dtype, device=device)

    def rank_of(self, module: str) -> int:
        """Rows of A, and columns of B, for one module; 0 where a block without a seed has no A."""
        if self.seed is not None:
            return self.rank
        return self.projections[module].shape[0] if module in self.projections else 0


def in_memory(a: Tensor | Elsewhere) -> Tensor:
    return a if isinstance(a, Tensor) else a.read()


@dataclass(frozen=True, kw_only=True, slots=True)
class Adapter:
    """Kept entries of every block over every target module."""

    shapes: Mapping[str, tuple[int, int]]
    """Module path -> (out_features, in_features) of the weight it adapts, for every target, kept entries or not."""
    blocks: tuple[Block, ...]
    targets: str | tuple[str, ...]
    """The targets that were asked for at attach."""
    base: Mapping[str, Any] = field(default_factory=dict)
    """Identity of the base model; empty when unknown."""
    generator: str = GENERATOR
    saved: Mapping[str, Tensor | Elsewhere] = field(default_factory=dict)
    """Name of a parameter that was trained in full -> its values, which take the place of the base's."""

    @property
    def kept(self) -> int:
        return sum(entries.kept for block in self.blocks for entries in block.entries.values())

    @property
    def total(self) -> int:
        """Entries of B over all modules and blocks."""
        return sum(
            out_features * block.rank_of(module)
            for block in self.blocks
            for module, (out_features, _) in self.shapes.items()
        )

    def delta(self, module: str) -> Tensor:
        """The update of one module's weight, (out_features, in_features), fp32: the sum over blocks of scale * B A."""
        out_features, in_features = self.shapes[module]
        update = torch.zeros(out_features, in_features)
        for block in self.blocks:
            if module in block.entries:
                b = block.entries[module].dense(out_features, block.rank_of(module)).float()
                update.addmm_(b, block.projection(module, in_features).float(), alpha=block.scale)
        return update


def loaded(adapter: Adapter) -> Adapter:
    """The adapter with all in memory that lay in files."""
    return dataclasses.replace(
        adapter,
        blocks=tuple(_loaded(block) for block in adapter.blocks),
        saved={name: in_memory(tensor) for name, tensor in adapter.saved.items()},
    )


def _loaded(block: Block) -> Block:
    return dataclasses.replace(
        block,
        entries={
            name: Entries(index=entries.index, values=entries.values)
            for name, entries in ((name, copy.copy(entries)) for name, entries in block.entries.items())
        },
        projections={name: in_memory(a) for name, a in block.projections.items()},
    )
