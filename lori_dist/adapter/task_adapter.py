"""What was trained of a form, apart from any model: taken from a model that trains it, and given to one."""

import dataclasses
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from lori_dist.adapter import saved, sharded
from lori_dist.adapter.adapter import Elsewhere, Entries, Spec, in_memory
from lori_dist.adapter.form_tensors import Sizes
from lori_dist.adapter.formed import FormedDelta, deltas_for, formed
from lori_dist.adapter.linear import AdaptedLinear
from lori_dist.adapter.per_task import of_tensor
from lori_dist.adapter.projection import GENERATOR
from lori_dist.adapter.routing import name_of
from lori_dist.errors import AdapterError
from lori_dist.forms import AnyForm, FormChoice, Given, Site, of_one_layer


@dataclass(frozen=True, kw_only=True, slots=True)
class TaskAdapter:
    """What was trained of a form: tensors, from which `split` makes an adapter of each task."""

    form: FormChoice
    rank: int
    alpha: float
    seed: int
    """Seed of what all tasks have in common."""
    trains_a: bool
    dtype: torch.dtype = torch.float32
    """Data type of A, where it is frozen."""
    shapes: Mapping[str, tuple[int, int]]
    """Module path -> (out_features, in_features) of the weight it adapts, for every target."""
    tensors: Mapping[str, Mapping[str, Entries]]
    """Module path -> name of a tensor that is trained, or follows from counts -> its kept entries, in the flat tensor
    of all tasks. Tensors that keep none are absent."""
    checksums: Mapping[str, tuple[str, ...]]
    """Module path -> checksum of each A as its seed makes it, for every target."""
    targets: str | tuple[str, ...]
    given: Mapping[str, Given] = field(default_factory=dict)
    """Module path -> the A that it began with, if that was computed from data."""
    base: Mapping[str, Any] = field(default_factory=dict)
    generator: str = GENERATOR
    saved: Mapping[str, Tensor | Elsewhere] = field(default_factory=dict)
    """As of an `Adapter`; what each task has of its own has the name `name@task`."""

    @property
    def made(self) -> AnyForm:
        return self.form.form(rank=self.rank, alpha=self.alpha, trains_a=self.trains_a)

    @property
    def spec(self) -> Spec:
        """What it was before it was trained."""
        return Spec(
            rank=self.rank,
            alpha=self.alpha,
            seed=self.seed,
            targets=self.targets,
            dtype=self.dtype,
            projection="trained" if self.trains_a else "cached",
            form=self.form,
            given=self.given or None,
        )

    def sizes(self, module: str, form: AnyForm | None = None) -> Sizes:
        out_features, in_features = self.shapes[module]
        site = Site(module=module, in_features=in_features, out_features=out_features, tasks=self.form.tasks)
        return Sizes.of(form or self.made, site, self.given.get(module))

    @property
    def kept(self) -> int:
        """Entries that were trained and exist."""
        form = self.made
        trained = {name for name, entry in form.entries(of_one_layer(self.form.tasks)).items() if entry.trained}
        return sum(one.kept for tensors in self.tensors.values() for name, one in tensors.items() if name in trained)

    @property
    def total(self) -> int:
        """Entries of all trained tensors, kept or not."""
        form = self.made
        return sum(
            sizes.numel(name)
            for sizes in (self.sizes(module, form) for module in self.shapes)
            for name, entry in sizes.entries.items()
            if entry.trained
        )


def extract_formed(
    model: nn.Module, *, values: Mapping[str, Tensor] | None = None, base: Mapping[str, Any] | None = None
) -> TaskAdapter:
    """What a model that trains a form holds. A collective where the model is sharded: every rank calls it.

    values: `per_task.of_tensor(path, name)` -> kept entries on the CPU, in the place of the parameters; a parameter
    that is trained in full has the key `saved.key(name)`, one of a task `name_of` that. base: identity of the base.
    Raises AdapterError for a model that does not train one.
    """
    model = sharded.unwrapped(model)
    layers = {path: module for path, module in model.named_modules() if isinstance(module, AdaptedLinear)}
    deltas, spec = formed(layers), getattr(model, "lori_attached", None)
    if not isinstance(spec, Spec) or spec.form is None:
        raise AdapterError("model: trains no form other than lori; use extract")
    if values is None:
        sharded.reshard(model)
        held: dict[str, Tensor] = {
            of_tensor(path, name): one for path, delta in deltas.items() for name, one in delta.trained().items()
        }
        held |= {name_of(saved.key(name), task): one for task, name, one in saved.trained(model)}
        values = {name: sharded.full(one).flatten() for name, one in held.items()}

    def entries(path: str, delta: FormedDelta) -> dict[str, Entries]:
        found = {}
        for name in delta.trained():
            index = delta.index(name)
            found[name] = Entries(
                index=None if index is None else index.cpu(), values=values[of_tensor(path, name)].float()
            )
        if not delta.is_empty:
            found |= {name: Entries(index=None, values=state.float().cpu()) for name, state in delta.states().items()}
        return found

    whole = {name: values[saved.key(name)].view(shape) for name, shape in saved.shapes(model).items()}
    for number, task in enumerate(spec.form.tasks):
        of_task = saved.shapes_of_copies(model, number).items()
        whole |= {name_of(name, task): values[name_of(saved.key(name), task)].view(shape) for name, shape in of_task}
    return TaskAdapter(
        form=spec.form,
        rank=spec.rank,
        alpha=spec.alpha,
        seed=spec.seed,
        trains_a=spec.projection == "trained",
        dtype=spec.dtype,
        shapes={path: (delta.out_features, delta.in_features) for path, delta in deltas.items()},
        tensors={path: entries(path, delta) for path, delta in deltas.items()},
        checksums={path: tuple(delta.checksums()) for path, delta in deltas.items()},
        given=dict(spec.given or {}),
        targets=spec.targets,
        base=dict(base or {}),
        saved=whole,
    )


@torch.no_grad()
def deltas_of(
    bases: Mapping[str, nn.Module], adapter: TaskAdapter, device: Callable[[nn.Module], Any]
) -> Iterator[tuple[str, FormedDelta]]:
    """Path -> the trained tensors of a form for each layer. Raises AdapterError where A is another than in training."""
    form, masks, wholes = adapter.made, dict[str, Tensor](), dict[str, Tensor]()
    for path in bases:
        sizes = adapter.sizes(path, form)
        for name, entry in sizes.entries.items():
            if not entry.is_stored:
                continue
            whole, mask = stacked(sizes, name, adapter.tensors.get(path, {}).get(name))
            wholes[of_tensor(path, name)] = whole
            if entry.sparse:
                # The places of a task's tensor have one mask.
                own = mask if entry.per_task else mask[None]
                kept = own.view(len(own), -1, *own.shape[-2:])[:, 0]
                masks[of_tensor(path, name)] = kept if entry.per_task else kept[0]
    for path, delta in deltas_for(bases, adapter.spec, masks, device):
        for name, parameter in delta.trained().items():
            index, flat = delta.index(name), wholes[of_tensor(path, name)].flatten()
            parameter.copy_(flat if index is None else flat[index.cpu().long()])
        delta.take({name: wholes[of_tensor(path, name)] for name in delta.states()})
        if tuple(found := delta.checksums()) != adapter.checksums[path]:
            raise AdapterError(
                f"{path}: A made from its seed has the checksums {found}, the adapter was trained with "
                f"{list(adapter.checksums[path])}; the file is damaged or comes from another generator"
            )
        yield path, delta


def stacked(sizes: Sizes, name: str, entries: Entries | None) -> tuple[Tensor, Tensor]:
    """A trained tensor of all tasks, and which entries exist."""
    shape = sizes.shape(name)
    if entries is None:
        return torch.zeros(shape), torch.zeros(shape, dtype=torch.bool)
    if entries.index is None:
        return entries.values.float().view(shape), torch.ones(shape, dtype=torch.bool)
    flat, mask = torch.zeros(sizes.numel(name)), torch.zeros(sizes.numel(name), dtype=torch.bool)
    flat[entries.index.long()] = entries.values.float()
    mask[entries.index.long()] = True
    return flat.view(shape), mask.view(shape)


def loaded_formed(adapter: TaskAdapter) -> TaskAdapter:
    """The adapter with all in memory that lay in a file."""
    tensors = {
        module: {name: Entries(index=one.index, values=one.values) for name, one in of_module.items()}
        for module, of_module in adapter.tensors.items()
    }
    saved_there = {name: in_memory(tensor) for name, tensor in adapter.saved.items()}
    return dataclasses.replace(adapter, tensors=tensors, saved=saved_there)
