"""Layers of forms other than LoRI's own: their tensors on a model.

What a form declares is registered here once for all of them: trained tensors are flat float32 parameters, those of
tasks stacked into one, and A is a buffer. So engines, checkpoints and masks need to know nothing of forms.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from lori_dist.adapter import sharded
from lori_dist.adapter.adapter import Adapter, Spec
from lori_dist.adapter.bases import features
from lori_dist.adapter.counted import Counts, counting
from lori_dist.adapter.form_tensors import Sizes
from lori_dist.adapter.linear import AdaptedLinear, BaseDelta, base_with_factors, share_as, with_factors
from lori_dist.adapter.per_task import PerTask, of_tensor
from lori_dist.adapter.projection import checksum
from lori_dist.adapter.routing import NOBODY, Routing, Segment
from lori_dist.adapter.row_tokens import Rows, Tokens
from lori_dist.errors import AdapterError
from lori_dist.forms import (
    AnyForm,
    Choosing,
    Counting,
    DependentForm,
    Entry,
    Form,
    Penalised,
    Site,
    Tensors,
    of_one_layer,
)

PAST, PAST_RANKS = "past", "past_ranks"
"""Buffers of a layer with what earlier tasks left, and the name of the former among its tensors."""
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


@dataclass(frozen=True, kw_only=True, slots=True)
class Shared:
    """What all layers of a form on a model have in common."""

    routing: Routing | None
    """Of rows to tasks, if each has an update of its own."""
    penalties: Penalties
    counts: Counts
    rows: Rows


@dataclass(frozen=True, kw_only=True, slots=True)
class Past:
    """The update that earlier tasks of a sequence left in a layer, on some rows of its A."""

    b: Tensor  # (out_features, columns)
    ranks: Tensor  # (columns,), int64: the row of A that each column meets
    scale: float


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
        shared: Shared,
        device: torch.device,
        past: Past | None = None,
    ) -> None:
        """masks: name of each sparse tensor -> its mask, (out_features, rank), with the tasks first where each has its
        own; None: all entries exist. past: of earlier tasks, which stays as it is."""
        super().__init__()
        assert spec.form is not None
        self.module, self.in_features, self.out_features = module, in_features, out_features
        self.choice, self.seed, self.dtype, self.rank = spec.form, spec.seed, spec.dtype, spec.rank
        self.routing, self.per_task = shared.routing, None
        self.form = form_of(spec)
        self.penalties = shared.penalties if isinstance(self.form, Penalised) else None
        self.is_dependent = isinstance(self.form, DependentForm)
        site = Site(module=module, in_features=in_features, out_features=out_features, tasks=tuple(self.choice.tasks))
        self.sizes = Sizes.of(self.form, site, spec.start_of(module, in_features))
        counts = any(entry.counted for entry in self.entries.values())
        self.counts = shared.counts if counts else None
        self.is_of_rows = self.choice.is_of_rows
        self.rows = shared.rows if self.is_of_rows or counts else None
        self.past_scale = 0.0 if past is None else past.scale
        self.register_buffer(PAST, _real(None if past is None else past.b, device), persistent=False)
        self.register_buffer(PAST_RANKS, _real(None if past is None else past.ranks, device), persistent=False)
        self.kept = {name: self.sizes.numel(name) for name in self.entries}
        for name, entry in self.entries.items():
            index = None
            if entry.sparse and masks is not None:
                index = self.sizes.index(name, _checked(module, name, masks, self.sizes.mask_shape(name)))
            if index is not None:
                self.kept[name] = index.numel()
            self.register_buffer(_index(name), _real(index, device), persistent=False)
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

    def states(self) -> dict[str, Tensor]:
        """What follows from counts, by name, (rank,) each."""
        return {name: self._buffers[_tensor(name)] for name, entry in self.entries.items() if entry.counted}  # type: ignore[misc]

    @torch.no_grad()
    def take(self, states: Mapping[str, Tensor]) -> None:
        """Puts what follows from counts in place of what did before."""
        for name, state in states.items():
            held = self._buffers[_tensor(name)]
            assert held is not None
            held.copy_(state)

    @torch.no_grad()
    def after_step(self, counts: Tensor) -> None:
        """counts: of a step, over all ranks, (rank,), int64."""
        self.take(cast(Counting, self.form).after_step(self.states(), counts))

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
            if entry.start == "a" and entry.trained and self.sizes.given is not None:
                found.append(checksum(self.sizes.given))
            elif entry.start == "a" and entry.trained:
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
        y = self._with_past(x, y)
        if self.is_empty or not segments:
            return y
        of_task = self._of_tasks()

        first = next((one.adapter for one in segments if one.adapter != NOBODY), NOBODY)
        tokens = self.rows.of(self.module, x) if self.rows is not None and self._looks_at_rows else None

        def updated(task: int, x: Tensor, y: Tensor, tokens: Tokens | None) -> Tensor:
            if task == NOBODY:
                return y
            if self.is_dependent:
                tensors = of_task(task)
                made = self._dependent(tensors, x.to(y.dtype), tokens)
                return y + self._penalised(made, tensors, is_first=task == first)
            return with_factors(x, y, *self._factors(of_task(task), is_first=task == first), self.module)

        if len(segments) == 1:
            return updated(segments[0].adapter, x, y, tokens)
        flat, rows = x.reshape(-1, x.shape[-1]), y.reshape(-1, y.shape[-1])
        made = [
            updated(one.adapter, flat[one.tokens], rows[one.tokens], None if tokens is None else tokens.of(one.tokens))
            for one in segments
        ]
        return torch.cat(made).view(y.shape)

    @property
    def _looks_at_rows(self) -> bool:
        """Whether this forward pass needs to know the tokens: to choose for rows, or to count what is trained on."""
        return self.is_of_rows or torch.is_grad_enabled()

    def _dependent(self, t: Tensors, x: Tensor, tokens: Tokens | None) -> Tensor:
        """What an update that depends on the input adds. tokens: those of x, if they matter."""
        if not isinstance(self.form, Choosing):
            return cast(DependentForm, self.form).update(t, x)
        flat = x.reshape(-1, x.shape[-1])
        if self.is_of_rows:
            assert tokens is not None
            of_rows = self._chosen(t, flat, tokens)
            chosen = {name: one[tokens.row] for name, one in of_rows.items()}
        else:
            of_rows = chosen = dict(self.form.choose(t, flat))
        made = self.form.update(t, flat, chosen)
        if self.counts is not None and tokens is not None:
            weights = tokens.rows_that_count() if self.is_of_rows else tokens.counts
            made = counting(made, of_rows["ranks"], weights, self.counts, self.module, self.rank)
        return made.view(*x.shape[:-1], made.shape[-1])

    def _chosen(self, t: Tensors, x: Tensor, tokens: Tokens) -> Mapping[str, Tensor]:
        """What is chosen for each row, (rows, ...), or was when its prompt was read."""
        assert self.rows is not None
        if self.rows.continues:
            return self.rows.kept(self.module)
        chosen = cast(Choosing, self.form).choose(t, tokens.means(x))
        if not torch.is_grad_enabled():
            self.rows.chosen[self.module] = chosen
        return chosen

    def _with_past(self, x: Tensor, y: Tensor) -> Tensor:
        past, ranks, a = self._buffers[PAST], self._buffers[PAST_RANKS], self._buffers.get(_tensor("a"))
        if past is None or ranks is None or not past.numel():
            return y
        assert a is not None
        return with_factors(x, y, self.past_scale * past, a[ranks], self.module)

    def adapted(self, x: Tensor, base: nn.Module) -> Tensor:
        segments = self._segments(x)
        if len(segments) != 1 or segments[0].adapter == NOBODY or self.is_dependent or self._buffers[PAST] is not None:
            return cast(Tensor, self(x, base(x)))
        return base_with_factors(x, base, *self._factors(self._of_tasks()(segments[0].adapter)), self.module)

    def _factors(self, tensors: Mapping[str, Tensor], *, is_first: bool = True) -> tuple[Tensor, Tensor]:
        """B and A, whose backward pass adds the penalty's gradient, once for a batch."""
        b, a = cast(Form, self.form).factors(tensors)
        return self._penalised(b, tensors, is_first=is_first), a

    def _penalised(self, tensor: Tensor, tensors: Mapping[str, Tensor], *, is_first: bool) -> Tensor:
        """A tensor whose backward pass adds the penalty's gradient, once for a batch."""
        if self.penalties is not None and is_first and torch.is_grad_enabled():
            penalty = cast(Penalised, self.form).penalty(tensors, self.sizes.site)
            if penalty is not None:
                share = 1 / (self.penalties.num_layers * self.penalties.num_micro_batches)
                return cast(Callable[..., Tensor], _Injected.apply)(tensor, penalty * share)
        return tensor

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
        left = self._buffers[PAST]
        past = {} if left is None else {PAST: left}
        if self.per_task is None:
            shared: dict[str, Tensor | tuple[Tensor, ...]] = {}
            for name, entry in self.entries.items():
                whole = self._dense(name, self._held(name))
                shared[name] = whole.unbind() if entry.per_task else whole
            return lambda task: {
                **{name: held[task] if isinstance(held, tuple) else held for name, held in shared.items()},
                **past,
            }
        count, trained = self.per_task.num_tasks, self.trained()
        apply = cast(Callable[..., Tensor], _FanOut.apply)
        fanned = {
            name: apply(parameter, count, self.per_task, of_tensor(self.module, name)).unbind()
            for name, parameter in trained.items()
        }

        def of_task(task: int) -> dict[str, Tensor]:
            found = dict(past)
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
        lasting = [*map(self.index, self.entries), self._buffers[PAST], self._buffers[PAST_RANKS]]
        if any(tensor is one for one in lasting):
            return tensor if result.is_meta else tensor.to(result.device)
        return super().moved(tensor, result)

    def extra_repr(self) -> str:
        sizes = ", ".join(f"{name}={self.kept[name]} of {self.sizes.numel(name)}" for name in self.trained())
        return f"form={self.choice.name}, tasks={len(self.choice.tasks)}, rank={self.rank}, {sizes}"


def _tensor(name: str) -> str:
    return f"tensor_{name}"


def _index(name: str) -> str:
    return f"index_{name}"


def _real(tensor: Tensor | None, device: torch.device) -> Tensor | None:
    """On a device, but not on meta: what nothing could make again stays real even there."""
    return tensor if tensor is None or device.type == "meta" else tensor.to(device)


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
    bases: Mapping[str, nn.Module],
    spec: Spec,
    masks: Mapping[str, Tensor] | None,
    device: Callable[[nn.Module], Any],
    before: Adapter | None = None,
) -> Iterator[tuple[str, FormedDelta]]:
    """Path -> the tensors of a form for each layer, and one routing for all of them.

    masks: `path:tensor` -> the mask of a sparse tensor. before: what earlier tasks left, on the same A.
    Raises AdapterError for masks that do not fit.
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
    shared = Shared(
        routing=routing,
        penalties=Penalties(num_layers=len(bases)),
        counts=Counts(),
        rows=Rows(choose=spec.form.is_of_rows),
    )
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
                shared=shared,
                device=device(base),
                past=None if before is None else _past(path, before),
            ),
        )


def formed(layers: Mapping[str, AdaptedLinear]) -> dict[str, FormedDelta]:
    """Path -> the tensors of a form, of the layers that have them."""
    return {path: one for path, layer in layers.items() for one in layer.deltas if isinstance(one, FormedDelta)}


def _past(path: str, before: Adapter) -> Past:
    """The columns of B that the adapters of earlier tasks have in a layer."""
    columns, ranks = list[Tensor](), list[Tensor]()
    out_features, _ = before.shapes[path]
    for block in before.blocks:
        if path in block.entries:
            b = block.entries[path].dense(out_features, block.rank).float()
            there = b.any(0).nonzero().squeeze(1)
            columns.append(b[:, there])
            ranks.append(there)
    scale = before.blocks[0].scale
    if not columns:
        return Past(b=torch.zeros(out_features, 0), ranks=torch.zeros(0, dtype=torch.int64), scale=scale)
    return Past(b=torch.cat(columns, dim=1), ranks=torch.cat(ranks), scale=scale)
