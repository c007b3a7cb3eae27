"""Layers of forms other than LoRI's own: their tensors on a model, and what was trained of them, apart from any model.

What a form declares is registered here once for all of them: trained tensors are flat float32 parameters, those of
tasks stacked into one, and A is a buffer. So engines, checkpoints and masks need to know nothing of forms.
"""

import dataclasses
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from lori_dist.adapter import saved, sharded
from lori_dist.adapter.adapter import Adapter, Block, Elsewhere, Entries, Spec, in_memory
from lori_dist.adapter.linear import AdaptedLinear, BaseDelta, base_with_factors, features, share_as, with_factors
from lori_dist.adapter.per_task import PerTask, of_tensor
from lori_dist.adapter.projection import GENERATOR, Recipe, checksum, projection
from lori_dist.adapter.routing import NOBODY, Routing, Segment, adapter_of, module_of, name_of
from lori_dist.errors import AdapterError
from lori_dist.forms import AnyForm, DependentForm, Entry, Form, FormChoice, Penalised, Site, of_one_layer

ROUTING = "lori_routing"
"""Attribute of a model in which tasks have updates of their own, for what routes rows to them."""


PENALTIES = "lori_penalties"
"""Attribute of a model whose form has a penalty, for what all of its layers know of a step."""


@dataclass(kw_only=True, slots=True)
class Penalties:
    """A step, as far as its penalty takes one: the gradient is injected in each layer's backward pass, where engines
    have its tensors whole, and is the same on every rank, of which engines take the mean."""

    num_layers: int
    num_micro_batches: int = 1
    """Backward passes of the step on this rank."""


def penalties_of(model: nn.Module) -> Penalties | None:
    """What the layers of a form with a penalty know of a step; None for a model without one."""
    return getattr(sharded.unwrapped(model), PENALTIES, None)


def routing_of(model: nn.Module) -> Routing | None:
    """What routes the rows of a batch to the tasks' own updates; None for a model that has none.

    Its names are the tasks. The model may be wrapped by DDP or an engine.
    """
    return getattr(sharded.unwrapped(model), ROUTING, None)


COLUMN, HOOK = "task", "lori_column"
"""Argument of a model's forward pass that names each row's task, and the attribute that has its hook."""


def route_by_column(model: nn.Module, routing: Routing) -> None:
    """Makes a model take `task` beside its inputs, as Trainers pass a column of their data on: the name or the number
    of each row's task. It holds for the backward pass too.

    Raises AdapterError, in a forward pass, for an unknown task, and for a batch without the column that follows one
    with it.
    """
    last: list[tuple[tuple[int, int], ...]] = []

    def number_of(task: Any) -> int:
        if isinstance(task, str) and task in routing.names:
            return routing.names.index(task)
        if isinstance(task, str) or not 0 <= int(task) < len(routing.names):
            raise AdapterError(f"{COLUMN}: unknown task {task!r}; there are {', '.join(routing.names)}")
        return int(task)

    def route(module: nn.Module, args: Any, named: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        tasks = named.pop(COLUMN, None)
        if tasks is not None:
            routing.begin([number_of(task) for task in (tasks.tolist() if isinstance(tasks, Tensor) else tasks)])
            last[:] = [routing.rows_of]
        elif last and routing.only_one is None and routing.rows_of is last[0]:
            raise AdapterError(f"{COLUMN}: the batch does not say which task its rows are of, as earlier ones did")
        return args, named

    setattr(model, HOOK, model.register_forward_pre_hook(route, with_kwargs=True))


@dataclass(frozen=True, kw_only=True, slots=True)
class Sizes:
    """The tensors of a form in one layer, stacked over tasks."""

    site: Site
    entries: Mapping[str, Entry]

    @classmethod
    def of(cls, form: AnyForm, site: Site) -> "Sizes":
        return cls(site=site, entries=form.entries(site))

    def shape(self, name: str) -> tuple[int, ...]:
        """Of the whole tensor: with the tasks first, where each has its own."""
        entry = self.entries[name]
        return (len(self.site.tasks), *entry.shape) if entry.per_task else entry.shape

    def numel(self, name: str) -> int:
        return math.prod(self.shape(name))

    def mask_shape(self, name: str) -> tuple[int, ...]:
        """Of the mask of a sparse tensor: one for all places before its last two axes, for each task with its own."""
        entry = self.entries[name]
        return (len(self.site.tasks), *entry.shape[-2:]) if entry.per_task else entry.shape[-2:]

    def index(self, name: str, mask: Tensor) -> Tensor | None:
        """Flat positions in the whole tensor of what a mask keeps, int32; None for all."""
        entry = self.entries[name]
        if bool(mask.all()):
            return None
        wide = mask.view(*mask.shape[:-2], *[1] * (len(entry.shape) - 2), *mask.shape[-2:]).expand(self.shape(name))
        return wide.flatten().nonzero().squeeze(1).to(torch.int32)

    def recipes(self, name: str, choice: FormChoice, seed: int, dtype: torch.dtype) -> list[Recipe]:
        """How a tensor that starts as `a` is made: one recipe, or one for each task. Raises AdapterError where tasks
        lack seeds."""
        entry = self.entries[name]
        if entry.per_task and not choice.seeds:
            raise AdapterError(f"form: {choice.name} has an A for each task with these options; give their seeds")
        seeds = choice.seeds if entry.per_task else (seed,)
        rank, in_features = entry.shape
        return [
            Recipe(seed=one, module=self.site.module, rank=rank, in_features=in_features, dtype=dtype) for one in seeds
        ]

    def start(self, name: str, choice: FormChoice, seed: int, dtype: torch.dtype, device: torch.device) -> Tensor:
        """The whole tensor before training."""
        entry, shape = self.entries[name], self.shape(name)
        match entry.start:
            case "a":
                made = [recipe.make(device=device) for recipe in self.recipes(name, choice, seed, dtype)]
                return torch.stack(made) if entry.per_task else made[0]
            case "eye":
                return torch.eye(entry.shape[-1], device=device).expand(shape).contiguous()
            case "uniform":
                place, columns = f"{self.site.module}:{name}", shape[-1]
                rows = math.prod(shape) // columns
                return projection(seed, place, rows, columns, device=device).view(shape)
            case "ones":
                return torch.ones(shape, device=device)
            case "zeros":
                return torch.zeros(shape, device=device)


class FormedDelta(BaseDelta):
    """The tensors of a form for one module.

    A trained tensor is the parameter `tensor_NAME`, its kept entries; a sparse one that keeps none has no parameter,
    and where that is so of all sparse ones, nothing is trained here. A frozen A is the buffer `tensor_NAME`.
    """

    def __init__(
        self,
        *,
        module: str,
        in_features: int,
        out_features: int,
        spec: Spec,
        masks: Mapping[str, Tensor] | None,
        routing: Routing | None,
        penalties: Penalties,
        device: torch.device,
    ) -> None:
        """masks: name of each sparse tensor -> its mask, (out_features, rank), with the tasks first where each has its
        own; None: all entries exist. routing: of rows to tasks, if each has an update of its own."""
        super().__init__()
        assert spec.form is not None
        self.module, self.in_features, self.out_features = module, in_features, out_features
        self.choice, self.seed, self.dtype, self.rank = spec.form, spec.seed, spec.dtype, spec.rank
        self.routing, self.per_task = routing, None
        self.form = form_of(spec)
        self.penalties = penalties if isinstance(self.form, Penalised) else None
        self.is_dependent = isinstance(self.form, DependentForm)
        site = Site(module=module, in_features=in_features, out_features=out_features, tasks=tuple(self.choice.tasks))
        self.sizes = Sizes.of(self.form, site)
        self.kept = {name: self.sizes.numel(name) for name in self.entries}
        for name, entry in self.entries.items():
            index = None
            if entry.sparse and masks is not None:
                index = self.sizes.index(name, _checked(module, name, masks, self.sizes.mask_shape(name)))
            if index is not None:
                self.kept[name] = index.numel()
                # What nothing could make again stays real even on the meta device.
                index = index.to(index.device if device.type == "meta" else device)
            self.register_buffer(_index(name), index, persistent=False)
        for name, entry in self.entries.items():
            if not entry.trained:
                self.register_buffer(_tensor(name), self._start(name, device), persistent=False)
            elif self.kept[name] and not self.is_empty:
                self.register_parameter(_tensor(name), nn.Parameter(self._start(name, device)))

    @property
    def entries(self) -> Mapping[str, Entry]:
        return self.sizes.entries

    @property
    def is_empty(self) -> bool:
        sparse = [name for name, entry in self.entries.items() if entry.sparse]
        return bool(sparse) and not any(self.kept[name] for name in sparse)

    @property
    def has_penalty(self) -> bool:
        """Whether it adds anything to what is minimised."""
        if self.penalties is None or self.is_empty:
            return False
        return cast(Penalised, self.form).penalty(self._of_tasks()(0), self.sizes.site) is not None

    def trained(self) -> dict[str, nn.Parameter]:
        there = {name: self._parameters.get(_tensor(name)) for name in self.entries}
        return {name: parameter for name, parameter in there.items() if parameter is not None}

    def index(self, name: str) -> Tensor | None:
        """Positions of a tensor's kept entries; None: all."""
        return self._buffers[_index(name)]

    def counted(self) -> tuple[int, int]:
        sizes = {name: self.sizes.numel(name) for name, entry in self.entries.items() if entry.trained}
        sparse = sum(size for name, size in sizes.items() if self.entries[name].sparse)
        return sparse, sum(sizes.values()) - sparse

    @property
    def trains_a(self) -> bool:
        return any(entry.trained and entry.start == "a" for entry in self.entries.values())

    def checksum(self) -> str:
        return ",".join(self.checksums())

    def checksums(self) -> list[str]:
        """Of each A as its seed makes it."""
        found = []
        for name, entry in self.entries.items():
            if entry.start == "a" and entry.trained:
                recipes = self.sizes.recipes(name, self.choice, self.seed, self.dtype)
                found += [checksum(recipe.make(device="cpu")) for recipe in recipes]
            elif entry.start == "a":
                held = self._buffers[_tensor(name)]
                assert held is not None
                found += [checksum(a) for a in (held if entry.per_task else held[None])]
        return found

    # --- the layer

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        segments = self._segments(x)
        if self.is_empty or not segments:
            return y
        of_task = self._of_tasks()

        first = next((one.adapter for one in segments if one.adapter != NOBODY), NOBODY)

        def updated(task: int, x: Tensor, y: Tensor) -> Tensor:
            if task == NOBODY:
                return y
            if self.is_dependent:
                return y + cast(DependentForm, self.form).update(of_task(task), x.to(y.dtype))
            return with_factors(x, y, *self._factors(of_task(task), is_first=task == first), self.module)

        if len(segments) == 1:
            return updated(segments[0].adapter, x, y)
        flat, rows = x.reshape(-1, x.shape[-1]), y.reshape(-1, y.shape[-1])
        made = [updated(one.adapter, flat[one.tokens], rows[one.tokens]) for one in segments]
        return torch.cat(made).view(y.shape)

    def adapted(self, x: Tensor, base: nn.Module) -> Tensor:
        segments = self._segments(x)
        if len(segments) != 1 or segments[0].adapter == NOBODY or self.is_dependent:
            return cast(Tensor, self(x, base(x)))
        return base_with_factors(x, base, *self._factors(self._of_tasks()(segments[0].adapter)), self.module)

    def _factors(self, tensors: Mapping[str, Tensor], *, is_first: bool = True) -> tuple[Tensor, Tensor]:
        """B and A, whose backward pass adds the penalty's gradient, once for a batch."""
        b, a = cast(Form, self.form).factors(tensors)
        if self.penalties is not None and is_first and torch.is_grad_enabled():
            penalty = cast(Penalised, self.form).penalty(tensors, self.sizes.site)
            if penalty is not None:
                share = 1 / (self.penalties.num_layers * self.penalties.num_micro_batches)
                b = cast(Callable[..., Tensor], _Injected.apply)(b, penalty * share)
        return b, a

    def _segments(self, x: Tensor) -> Sequence[Segment]:
        """The places of each task's tokens; all of them are the first task's where the update is one for all."""
        if self.routing is not None:
            return self.routing.segments(self.module, x)
        num_tokens = x.numel() // x.shape[-1]
        if self.per_task is not None:
            return [Segment(adapter=task, tokens=where) for task, where in self.per_task.of(self.module, num_tokens)]
        return [Segment(adapter=0, tokens=slice(0, num_tokens))]

    def _of_tasks(self) -> Callable[[int], dict[str, Tensor]]:
        """What gives the tensors of a task, differentiable."""
        if self.per_task is None:
            shared: dict[str, Tensor | tuple[Tensor, ...]] = {}
            for name, entry in self.entries.items():
                whole = self._dense(name, self._held(name))
                shared[name] = whole.unbind() if entry.per_task else whole
            return lambda task: {name: held[task] if isinstance(held, tuple) else held for name, held in shared.items()}
        count, trained = self.per_task.num_tasks, self.trained()
        apply = cast(Callable[..., Tensor], _FanOut.apply)
        fanned = {
            name: apply(parameter, count, self.per_task, of_tensor(self.module, name)).unbind()
            for name, parameter in trained.items()
        }

        def of_task(task: int) -> dict[str, Tensor]:
            found = {}
            for name, entry in self.entries.items():
                whole = self._dense(name, fanned[name][task] if name in fanned else self._held(name))
                found[name] = whole[task] if entry.per_task else whole
            return found

        return of_task

    def _held(self, name: str) -> Tensor | None:
        held = self._parameters.get(_tensor(name))
        return held if held is not None else self._buffers.get(_tensor(name))

    def _dense(self, name: str, held: Tensor | None) -> Tensor:
        """The whole tensor, from its kept entries."""
        shape, index = self.sizes.shape(name), self.index(name)
        if held is None:
            assert index is not None
            return torch.zeros(shape, device=index.device)
        if index is None:
            return held.view(shape)
        flat = torch.zeros(self.sizes.numel(name), dtype=held.dtype, device=held.device)
        return flat.index_add(0, index, held).view(shape)

    # --- its memory

    def _start(self, name: str, device: torch.device) -> Tensor:
        """A tensor's initial value: of one that is trained the kept entries, flat."""
        entry = self.entries[name]
        if entry.sparse:
            return torch.zeros(self.kept[name], device=device)
        made = self.sizes.start(name, self.choice, self.seed, self.dtype, device)
        return made.reshape(-1).float() if entry.trained else made

    def moved(self, tensor: Tensor, result: Tensor) -> Tensor:
        name = next((name for name in self.entries if self._held(name) is tensor), None)
        if name is not None and tensor.is_meta and not result.is_meta:
            return share_as(self._start(name, result.device), tensor)
        if name is not None and name not in self.trained():
            return tensor.to(result.device)
        if any(tensor is self.index(other) for other in self.entries):
            return tensor if result.is_meta else tensor.to(result.device)
        return super().moved(tensor, result)

    def extra_repr(self) -> str:
        sizes = ", ".join(f"{name}={self.kept[name]} of {self.sizes.numel(name)}" for name in self.trained())
        return f"form={self.choice.name}, tasks={len(self.choice.tasks)}, rank={self.rank}, {sizes}"


def _tensor(name: str) -> str:
    return f"tensor_{name}"


def _index(name: str) -> str:
    return f"index_{name}"


def _checked(module: str, name: str, masks: Mapping[str, Tensor], shape: tuple[int, ...]) -> Tensor:
    if name not in masks:
        raise AdapterError(f"masks: no mask for {of_tensor(module, name)}; give one for every sparse tensor, or none")
    mask = masks[name]
    if mask.dtype != torch.bool or tuple(mask.shape) != shape:
        found = f"{mask.dtype} {tuple(mask.shape)}"
        raise AdapterError(f"masks: the mask of {of_tensor(module, name)} is {found}; wanted torch.bool {shape}")
    return mask


class _FanOut(torch.autograd.Function):
    """(entries,) -> (tasks, entries), a copy for each task, whose gradients go to the tasks' sums, none to it."""

    @staticmethod
    def forward(ctx: Any, parameter: Tensor, count: int, per_task: PerTask, name: str) -> Tensor:
        ctx.per_task, ctx.name = per_task, name
        return parameter.expand(count, -1)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[None, None, None, None]:
        ctx.per_task.sum_of(ctx.name, grad[0]).add_(grad)
        return None, None, None, None


class _Injected(torch.autograd.Function):
    """A tensor whose backward pass also adds the gradient of a penalty, whatever the loss is scaled by."""

    @staticmethod
    def forward(ctx: Any, tensor: Tensor, penalty: Tensor) -> Tensor:
        return tensor.view_as(tensor)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:
        return grad, grad.new_ones(())


def form_of(spec: Spec) -> AnyForm:
    """Raises AdapterError for a form or options that do not exist or fit, and where A is to be recomputed."""
    assert spec.form is not None
    if spec.projection == "recomputed":
        raise AdapterError(
            f"projection: recomputed is for the form lori, and this is {spec.form.name}; use cached or trained"
        )
    return spec.form.form(rank=spec.rank, alpha=spec.alpha, trains_a=spec.projection == "trained")


def deltas_for(
    bases: Mapping[str, nn.Module], spec: Spec, masks: Mapping[str, Tensor] | None, device: Callable[[nn.Module], Any]
) -> Iterator[tuple[str, FormedDelta]]:
    """Path -> the tensors of a form for each layer, and one routing for all of them.

    masks: `path:tensor` -> the mask of a sparse tensor. Raises AdapterError for masks that do not fit.
    """
    assert spec.form is not None
    own = {path: dict[str, Tensor]() for path in bases}
    sparse = {name for name, one in form_of(spec).entries(of_one_layer(spec.form.tasks)).items() if one.sparse}
    for key, mask in (masks or {}).items():
        path, _, name = key.partition(":")
        if path not in own or name not in sparse:
            known = " and ".join(sorted(sparse)) or "none"
            raise AdapterError(f"masks: there is a mask for {key}; the sparse tensors of each target are {known}")
        own[path][name] = mask
    routing = Routing(names=spec.form.tasks) if spec.form.is_per_task else None
    if routing is not None:
        routing.only(routing.names[0])
    penalties = Penalties(num_layers=len(bases))
    for path, base in bases.items():
        out_features, in_features = features(base)
        yield (
            path,
            FormedDelta(
                module=path,
                in_features=in_features,
                out_features=out_features,
                spec=spec,
                masks=None if masks is None else own[path],
                routing=routing,
                penalties=penalties,
                device=device(base),
            ),
        )


def formed(layers: Mapping[str, AdaptedLinear]) -> dict[str, FormedDelta]:
    """Path -> the tensors of a form, of the layers that have them."""
    return {path: one for path, layer in layers.items() for one in layer.deltas if isinstance(one, FormedDelta)}


# --- what was trained ------------------------------------------------------------------------------------------------


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
    """Module path -> name of a trained tensor -> its kept entries, in the flat tensor of all tasks. Tensors that keep
    none are absent."""
    checksums: Mapping[str, tuple[str, ...]]
    """Module path -> checksum of each A as its seed makes it, for every target."""
    targets: str | tuple[str, ...]
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
        )

    def sizes(self, module: str, form: AnyForm | None = None) -> Sizes:
        out_features, in_features = self.shapes[module]
        site = Site(module=module, in_features=in_features, out_features=out_features, tasks=self.form.tasks)
        return Sizes.of(form or self.made, site)

    @property
    def kept(self) -> int:
        """Entries that were trained and exist."""
        return sum(entries.kept for tensors in self.tensors.values() for entries in tensors.values())

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
        targets=spec.targets,
        base=dict(base or {}),
        saved=whole,
    )


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
    if not isinstance(form, Form):
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


@torch.no_grad()
def deltas_of(
    bases: Mapping[str, nn.Module], adapter: TaskAdapter, device: Callable[[nn.Module], Any]
) -> Iterator[tuple[str, FormedDelta]]:
    """Path -> the trained tensors of a form for each layer. Raises AdapterError where A is another than in training."""
    form, masks, wholes = adapter.made, dict[str, Tensor](), dict[str, Tensor]()
    for path in bases:
        sizes = adapter.sizes(path, form)
        for name, entry in sizes.entries.items():
            if not entry.trained:
                continue
            whole, mask = _whole(sizes, name, adapter.tensors.get(path, {}).get(name))
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
        if tuple(found := delta.checksums()) != adapter.checksums[path]:
            raise AdapterError(
                f"{path}: A made from its seed has the checksums {found}, the adapter was trained with "
                f"{list(adapter.checksums[path])}; the file is damaged or comes from another generator"
            )
        yield path, delta


@dataclass(frozen=True, kw_only=True, slots=True)
class _Part:
    """A task's update of one module."""

    entries: Entries  # of B, without the scale
    a: Tensor | None  # None: as a seed makes it
    rank: int


def _part(adapter: TaskAdapter, form: Form, sizes: Sizes, number: int) -> _Part | None:
    """None where the update is zero."""
    held = adapter.tensors.get(sizes.site.module, {})
    if not any(name in held for name, entry in sizes.entries.items() if entry.sparse):
        return None
    tensors, is_kept = dict[str, Tensor](), dict[str, Tensor]()
    for name, entry in sizes.entries.items():
        if entry.trained:
            whole, mask = _whole(sizes, name, held.get(name))
        else:
            whole = sizes.start(name, adapter.form, adapter.seed, adapter.dtype, torch.device("cpu"))
            mask = None
        tensors[name] = whole[number] if entry.per_task else whole
        if mask is not None and entry.sparse:
            own = mask[number] if entry.per_task else mask
            is_kept[name] = own.view(-1, *own.shape[-2:]).any(0)
    b, a = form.factors(tensors)
    b = (b / (adapter.alpha / adapter.rank)).float()
    # Kept entries whose value is zero are kept all the same.
    there = torch.stack([b != 0, *(mask for mask in is_kept.values() if mask.shape == b.shape)]).any(0)
    if not bool(there.any()):
        return None
    index = None if bool(there.all()) else there.flatten().nonzero().squeeze(1).to(torch.int32)
    values = b.flatten() if index is None else b.flatten()[index.long()]
    is_seeded = any(a is tensors[name] for name, entry in sizes.entries.items() if not entry.trained)
    return _Part(
        entries=Entries(index=index, values=values.contiguous()),
        a=None if is_seeded else a.float().contiguous(),
        rank=b.shape[1],
    )


def _whole(sizes: Sizes, name: str, entries: Entries | None) -> tuple[Tensor, Tensor]:
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


def _block(
    adapter: TaskAdapter, modules: Mapping[str, Sizes], task: str, number: int, parts: Mapping[str, _Part]
) -> Block:
    entries = {module: part.entries for module, part in parts.items()}
    # The scale is the form's, whatever the rank of what it gives.
    alpha_of_row = adapter.alpha / adapter.rank
    if parts and any(part.a is not None for part in parts.values()):
        projections = {module: part.a for module, part in parts.items() if part.a is not None}
        rank = max(part.rank for part in parts.values())
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


def loaded_formed(adapter: TaskAdapter) -> TaskAdapter:
    """The adapter with all in memory that lay in a file."""
    tensors = {
        module: {name: Entries(index=one.index, values=one.values) for name, one in of_module.items()}
        for module, of_module in adapter.tensors.items()
    }
    saved_there = {name: in_memory(tensor) for name, tensor in adapter.saved.items()}
    return dataclasses.replace(adapter, tensors=tensors, saved=saved_there)
