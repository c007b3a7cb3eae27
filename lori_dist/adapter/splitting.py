"""An ordinary adapter of each task, from the tensors of a form that all tasks have."""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from lori_dist.adapter.adapter import Adapter, Block, Entries
from lori_dist.adapter.form_tensors import Sizes
from lori_dist.adapter.projection import checksum
from lori_dist.adapter.routing import adapter_of, module_of
from lori_dist.adapter.task_adapter import TaskAdapter, stacked
from lori_dist.errors import AdapterError
from lori_dist.forms import Form, Settling


def split(adapter: TaskAdapter) -> dict[str, Adapter]:
    """Task -> an ordinary adapter with what the form gives that task, which everything that takes adapters takes.

    Where the factors' A is the seeded one, it stays a seed, and B is as sparse as the form leaves it; else both are
    stored. Raises AdapterError where A is another than it was in training.
    """
    return {task: of_task(adapter, task) for task in adapter.form.tasks}


@torch.no_grad()
def of_task(adapter: TaskAdapter, task: str) -> Adapter:
    """What `split` gives for one of the tasks."""
    form, number = adapter.made, adapter.form.tasks.index(task)
    if not isinstance(form, Form | Settling):
        raise AdapterError(dependent(adapter.form.name))
    modules = {module: adapter.sizes(module, form) for module in adapter.shapes}
    parts = {
        module: part for module, sizes in modules.items() if (part := _part(adapter, form, sizes, number)) is not None
    }
    return Adapter(
        shapes=dict(adapter.shapes),
        blocks=(_block(adapter, modules, task, number, parts),),
        targets=adapter.targets,
        base=dict(adapter.base),
        generator=adapter.generator,
        saved={module_of(name): one for name, one in adapter.saved.items() if adapter_of(name) in ("", task)},
    )


def dependent(name: str) -> str:
    """Why the adapter of a form is none for all that takes factors."""
    return (
        f"the update of the form {name} depends on the input, so it cannot be folded, exported or merged; attach it, "
        "or use `lori evaluate` and `lori generate`"
    )


@dataclass(frozen=True, kw_only=True, slots=True)
class _Part:
    """A task's update of one module."""

    entries: Entries  # of B, without the scale
    a: Tensor | None  # None: as a seed makes it
    rank: int


def _part(adapter: TaskAdapter, form: Form | Settling, sizes: Sizes, number: int) -> _Part | None:
    """None where the update is zero."""
    held = adapter.tensors.get(sizes.site.module, {})
    if not any(name in held for name, entry in sizes.entries.items() if entry.sparse):
        return None
    tensors, is_kept = dict[str, Tensor](), dict[str, Tensor]()
    for name, entry in sizes.entries.items():
        if entry.is_stored:
            whole, mask = stacked(sizes, name, held.get(name))
        else:
            whole = sizes.start(name, adapter.form, adapter.seed, adapter.dtype, torch.device("cpu"))
            mask = None
        tensors[name] = whole[number] if entry.per_task else whole
        if mask is not None and entry.sparse:
            own = mask[number] if entry.per_task else mask
            is_kept[name] = own.view(-1, *own.shape[-2:]).any(0)
    if isinstance(form, Settling):
        b, a = form.settled(tensors)
        is_kept = {}  # of what training has kept, a part
    else:
        b, a = form.factors(tensors)
    b = (b / (adapter.alpha / adapter.rank)).float()
    # Kept entries whose value is zero are kept all the same.
    there = torch.stack([b != 0, *(mask for mask in is_kept.values() if mask.shape == b.shape)]).any(0)
    if not bool(there.any()):
        return None
    index = None if bool(there.all()) else there.flatten().nonzero().squeeze(1).to(torch.int32)
    values = b.flatten() if index is None else b.flatten()[index.long()]
    is_frozen = any(a is tensors[name] for name, entry in sizes.entries.items() if not entry.trained)
    is_seeded = is_frozen and sizes.given is None
    return _Part(
        entries=Entries(index=index, values=values.contiguous()),
        a=None if is_seeded else a.float().contiguous(),
        rank=b.shape[1],
    )


def _block(
    adapter: TaskAdapter, modules: Mapping[str, Sizes], task: str, number: int, parts: Mapping[str, _Part]
) -> Block:
    entries = {module: part.entries for module, part in parts.items()}
    # The scale is the form's, whatever the rank of what it gives.
    alpha_of_row = adapter.alpha / adapter.rank
    if adapter.given or (parts and any(part.a is not None for part in parts.values())):
        projections = {module: part.a for module, part in parts.items() if part.a is not None}
        rank = max((part.rank for part in parts.values()), default=adapter.rank)
        return Block(
            name=task,
            seed=None,
            rank=rank,
            alpha=alpha_of_row * rank,
            dtype=torch.float32,
            entries=entries,
            checksums={module: checksum(a) for module, a in projections.items()},
            projections=projections,
        )
    name, entry = next((name, one) for name, one in next(iter(modules.values())).entries.items() if one.start == "a")
    which = number if entry.per_task else 0
    made = {
        module: checksum(sizes.recipes(name, adapter.form, adapter.seed, adapter.dtype)[which].make(device="cpu"))
        for module, sizes in modules.items()
    }
    wrong = next((module for module, found in made.items() if found != adapter.checksums[module][which]), None)
    if wrong is not None:
        raise AdapterError(
            f"{wrong}: A made from its seed has checksum {made[wrong]}, the adapter was trained with "
            f"{adapter.checksums[wrong][which]}; the file is damaged or comes from another generator"
        )
    return Block(
        name=task,
        seed=adapter.form.seeds[number] if entry.per_task else adapter.seed,
        rank=entry.shape[0],
        alpha=alpha_of_row * entry.shape[0],
        dtype=adapter.dtype,
        entries=entries,
        checksums=made,
    )
