"""The mask that follows from a calibrated B: all ranks choose together, and none needs all of B for it."""

import math
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from lori_dist import config, plugin
from lori_dist.adapter.adapter import Adapter
from lori_dist.adapter.per_task import is_a, module_of, tensor_of
from lori_dist.adapter.saved import is_saved
from lori_dist.errors import JobError
from lori_dist.forms import Entry, FormChoice, of_one_layer
from lori_dist.masks._select import Rule, ShareOfB, largest_of
from lori_dist.tensors import Stored
from lori_dist.training import checkpoint
from lori_dist.training.world import World, from_first

TINY = 1e-45
"""Key of an entry that calibration left at zero, chosen only after all others."""
PIECE = 2**20
"""Entries of B that are sent at once: 4 MB."""


def choose(
    path: Path,
    phase: str,
    *,
    origin: checkpoint.Origin,
    settings: config.Adapter,
    world: World,
    apart_from: Adapter | None = None,
    form: FormChoice | None = None,
) -> dict[str, Tensor]:
    """Module path -> which entries are kept, (out_features, rank), the same on all ranks. Every rank calls this.

    form: of another form than LoRI's, `path:tensor` -> the same of each sparse tensor, with the tasks first where each
    has its own.

    path: a checkpoint of the dense values, which only rank 0 need see. settings: density, rank and mask. apart_from:
    whose entries are not to be had.
    Each rank has a share of B and counts of the others' shares, if the file of `settings.mask` has a function `rule`;
    of another method rank 0 gives `mask` all of B. Raises, on all ranks, AdapterError for entries that are not finite,
    JobError for a file that is damaged or of something else, or if too few entries are left.
    """
    method = plugin.find("masks", settings.mask.name, "mask", "adapter.mask")
    options = method.bind(settings.mask.options, "adapter.mask")
    if form is not None:
        return _of_form(path, phase, origin, settings, world, form, partial(method.load(), **options))
    rule = method.companion("rule")
    if rule is None:
        masks = _by_first(path, phase, origin, settings, world, apart_from, method.load(), options)
    else:
        modules, values = from_first(world, lambda: checkpoint.check(path, phase, origin=origin))
        masks = _by_all(modules, values, settings, world, apart_from, rule(**options))
    if apart_from is not None:
        _refuse_taken(settings.mask.name, masks, apart_from)
    return masks


def taken_by(adapter: Adapter, module: str) -> Tensor:
    """The entries of a module's B that an adapter's blocks keep, (out_features, rank)."""
    shape = adapter.shapes[module][0], adapter.blocks[0].rank
    taken = torch.zeros(shape, dtype=torch.bool)
    for block in adapter.blocks:
        if module in block.entries:
            index = block.entries[module].index
            taken.view(-1)[slice(None) if index is None else index.long()] = True
    return taken


def _keep_out(b: Mapping[str, Tensor], starts: Mapping[str, int], adapter: Adapter) -> None:
    """Makes zeros, which are kept last, of the entries that an adapter has, and of no others."""
    for module, entries in b.items():
        if entries.numel():
            taken = taken_by(adapter, module).view(-1)[starts[module] :][: entries.numel()]
            entries.masked_fill_(entries == 0, TINY).masked_fill_(taken, 0.0)


def _refuse_taken(method: str, masks: Mapping[str, Tensor], adapter: Adapter) -> None:
    for module, mask in masks.items():
        count = int((mask & taken_by(adapter, module)).sum())
        if count:
            raise JobError(
                f"adapter.mask: {method} keeps {count} entries of {module} that earlier tasks have, as too few others "
                "are left; give a lower adapter.density, a mask over the whole model, or masks: independent"
            )


# --- of a form -------------------------------------------------------------------------------------------------------


def _of_form(
    path: Path,
    phase: str,
    origin: checkpoint.Origin,
    settings: config.Adapter,
    world: World,
    choice: FormChoice,
    mask: Callable[..., Mapping[str, Tensor]],
) -> dict[str, Tensor]:
    """Each sparse tensor, and each task's, gets a mask as LoRI's B would. Rank 0 chooses."""
    is_trained = settings.projection == "trained"
    form = choice.form(rank=settings.rank, alpha=settings.alpha, trains_a=is_trained)
    entries = form.entries(of_one_layer(choice.tasks))

    def make() -> dict[str, tuple[torch.Size, bytes]]:
        values = checkpoint.read(path, phase, origin=origin).values
        made = dict[str, Tensor]()
        for tensor, entry in entries.items():
            if not entry.sparse:
                continue
            num_owners = len(choice.tasks) if entry.per_task else 1
            scores = {
                name: of_layer.view(num_owners, -1, *_rows_of(of_layer, num_owners, entry))
                for name, of_layer in values.items()
                if tensor_of(name) == tensor and not is_saved(name)
            }
            chosen = [
                mask(
                    {module_of(name): _score(of_layer[owner]) for name, of_layer in scores.items()},
                    density=settings.density,
                )
                for owner in range(num_owners)
            ]
            for name in scores:
                of_owners = [of_owner[module_of(name)] for of_owner in chosen]
                made[name] = torch.stack(of_owners) if entry.per_task else of_owners[0]
        return {name: (one.shape, np.packbits(one.flatten().numpy()).tobytes()) for name, one in made.items()}

    def unpacked(shape: torch.Size, bits: bytes) -> Tensor:
        return _unpacked(np.frombuffer(bits, dtype=np.uint8), shape.numel()).view(shape)

    return {name: unpacked(shape, bits) for name, (shape, bits) in from_first(world, make).items()}


def _rows_of(values: Tensor, num_owners: int, entry: Entry) -> tuple[int, int]:
    """(out_features, rank) of one layer's B in a sparse tensor."""
    rank = entry.shape[-1]
    return values.numel() // (num_owners * math.prod(entry.shape[:-2]) * rank), rank


def _score(places: Tensor) -> Tensor:
    """(places, out_features, rank) -> (out_features, rank): of several that have one mask, the sum of magnitudes."""
    return places[0] if len(places) == 1 else places.abs().sum(0)


# --- on one rank -----------------------------------------------------------------------------------------------------


def _by_first(
    path: Path,
    phase: str,
    origin: checkpoint.Origin,
    settings: config.Adapter,
    world: World,
    apart_from: Adapter | None,
    mask: Callable[..., Mapping[str, Tensor]],
    options: Mapping[str, Any],
) -> dict[str, Tensor]:
    def make() -> dict[str, tuple[torch.Size, bytes]]:
        values = checkpoint.read(path, phase, origin=origin).values
        b = {module: of_module for module, of_module in values.items() if _is_b(module)}
        if apart_from is not None:
            _keep_out(b, dict.fromkeys(b, 0), apart_from)
        shaped = {module: of_module.view(-1, settings.rank) for module, of_module in b.items()}
        masks = mask(shaped, density=settings.density, **options)
        return {module: (mask.shape, np.packbits(mask.numpy()).tobytes()) for module, mask in masks.items()}

    def unpacked(shape: torch.Size, bits: bytes) -> Tensor:
        return _unpacked(np.frombuffer(bits, dtype=np.uint8), shape.numel()).view(shape)

    return {module: unpacked(shape, bits) for module, (shape, bits) in from_first(world, make).items()}


def _is_b(module: str) -> bool:
    return not is_a(module) and not is_saved(module)


def _unpacked(bits: Any, count: int) -> Tensor:
    return torch.from_numpy(np.unpackbits(bits, count=count).view(np.bool_))


# --- on all ----------------------------------------------------------------------------------------------------------


def _by_all(
    modules: Mapping[str, int],
    values: Stored,
    settings: config.Adapter,
    world: World,
    apart_from: Adapter | None,
    rule: Rule,
) -> dict[str, Tensor]:
    """modules: their entries, in the order in which `values` has them."""
    places = {module: place for module, place in _places(modules) if _is_b(module)}
    num_entries = max(place.stop for place in places.values())
    size = -(-num_entries // (8 * world.size)) * 8  # of a share: whole bytes of bits
    first = min(size * world.rank, num_entries)
    mine = slice(first, min(first + size, num_entries))

    def kept() -> Tensor:  # what is held of B is gone before the whole mask is there
        held = _dealt(values, num_entries, mine, world)
        share = _share(held, mine, places, world)
        if apart_from is not None:
            _keep_out(share.b, share.starts, apart_from)
        flat = torch.zeros(size, dtype=torch.bool)
        for module, mask in largest_of(share, rule, settings.density).items():
            flat[_common(places[module], mine)] = mask
        return flat

    masks = _everywhere(kept(), num_entries, world)
    return {module: masks[place].view(-1, settings.rank) for module, place in places.items()}


def _places(modules: Mapping[str, int]) -> Iterator[tuple[str, slice]]:
    start = 0
    for module, size in modules.items():
        yield module, slice(start, start + size)
        start += size


def _common(place: slice, mine: slice) -> slice:
    """This rank's share of a slice, relative to the start of its own part; it may be empty."""
    start = min(max(place.start, mine.start), mine.stop)
    return slice(start - mine.start, max(start, min(place.stop, mine.stop)) - mine.start)


def _dealt(values: Stored, num_entries: int, mine: slice, world: World) -> Tensor:
    """This rank's entries among the first so many values.

    Rank 0 reads and sends them: with storage by URL, or on other machines a moment after it was written, the others
    may not see the file. To all, as the libraries have no lasting connection between two ranks.
    """
    held = torch.empty(mine.stop - mine.start)
    buffer = torch.empty(min(PIECE, num_entries), device=world.device)
    for start in range(0, num_entries, PIECE):
        piece = buffer[: num_entries - start]
        if world.rank == 0:
            values.read(piece, start)
        dist.broadcast(piece, src=0)
        place = slice(start, start + piece.numel())
        held[_common(place, mine)] = piece[_common(mine, place)].to(held.device)
    return held


def _share(held: Tensor, mine: slice, places: Mapping[str, slice], world: World) -> ShareOfB:
    b = {module: held[_common(place, mine)] for module, place in places.items()}
    starts = {module: _common(mine, place).start for module, place in places.items()}

    def total(counts: Tensor) -> Tensor:
        summed = counts.to(world.device)
        dist.all_reduce(summed)
        return summed.cpu()

    sizes = {module: place.stop - place.start for module, place in places.items()}
    return ShareOfB(b=b, starts=starts, sizes=sizes, process=world.rank, num_processes=world.size, total=total)


def _everywhere(kept: Tensor, num_entries: int, world: World) -> Tensor:
    """The ranks' masks one after the other, on every rank; sent are bits."""
    own = torch.from_numpy(np.packbits(kept.numpy())).to(world.device)
    bits = own.new_empty(world.size, own.numel())
    dist.all_gather(list(bits), own)
    return _unpacked(bits.view(-1).cpu().numpy(), num_entries)
