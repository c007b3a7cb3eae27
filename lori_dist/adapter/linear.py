"""The adapted layer: `y = W0 x + scale * B (A x)`, with A regenerated from a seed, or trained, and B sparse.

Source: LoRI (arXiv 2504.07448), section 3.
"""

import copy
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Self, cast

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.distributed.tensor import DTensor, distribute_tensor

from lori_dist.adapter import product
from lori_dist.adapter.per_task import A, PerTask, Segments, of_a
from lori_dist.adapter.projection import Recipe, checksum
from lori_dist.adapter.routing import Routing, name_of

Kept = tuple[Tensor | None, Tensor]
"""Entries of B: their ascending flat positions, or None for all of them, and their values."""

NARROW, SEVERAL = 0.5, 16
"""The products with A and B over that with the weight, and the tokens of an adapter over the rank, from which updates
that adapters share are added to the weight: the sum must cost less than what it saves."""

QUANTIZED = ("Linear4bit", "Linear8bitLt", "QuantizedLinear")
"""Classes of quantised linear layers."""


class _Update(torch.autograd.Function):
    """y + scale * B (A x), saving A x, which is rank wide, instead of x. y comes from a base of any kind."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,  # (..., in_features)
        y: Tensor,  # (..., out_features); its dtype is the one computed in
        values: Tensor | None,  # (kept,); None: there are only those of before
        a: Tensor | None,  # rank * in_features entries; None: made from the recipe in each product
        recipe: Recipe,
        index: Tensor | None,  # (kept,) int32; None: all entries of B are kept
        before: Kept | None,  # what B is without the values
        scale: float,
        per_task: PerTask | None,
    ) -> Tensor:
        trains_a = ctx.needs_input_grad[3]
        ctx.before = before
        reduced, b = _operands(ctx, x, values, a, recipe, index, scale, per_task, trains_a, y.shape[-1], y.dtype)
        return shaped(torch.addmm(_rows(y), reduced, b.t(), alpha=scale), y.shape)

    @staticmethod
    @once_differentiable  # A x is saved without its graph: a second derivative would miss x
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, reduced, values, a, index = ctx.saved_tensors
        needs_x, needs_y, needs_values, needs_a = ctx.needs_input_grad[:4]
        flat = _rows(grad)
        grad_values = _grad_values(ctx, flat, reduced, values, index) if needs_values else None
        grad_x = grad_a = None
        if needs_x or needs_a:
            grad_reduced = _grad_reduced(ctx, flat, values, index)
        if needs_a:
            grad_a = _grad_a(ctx, grad_reduced, x, a)
        if needs_x:
            grad_x = _up(grad_reduced, a, ctx.recipe)
            grad_x = grad_x.to(ctx.x_dtype).view(*grad.shape[:-1], ctx.recipe.in_features)
        return grad_x, grad if needs_y else None, grad_values, grad_a, None, None, None, None, None


class _Adapted(torch.autograd.Function):
    """W0 x + bias + scale * B (A x), for a base that is a plain linear layer.

    As `_Update` after it, but the update is added to the base's product in place, and so is its gradient: that saves
    a pass over the output and two over the input, which is a third of what the update costs.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,  # (out_features, in_features), or transposed; frozen
        bias: Tensor | None,  # (out_features,), frozen
        transposed: bool,
        values: Tensor | None,
        a: Tensor | None,
        recipe: Recipe,
        index: Tensor | None,
        before: Kept | None,
        scale: float,
        per_task: PerTask | None,
    ) -> Tensor:
        y = nn.functional.linear(_rows(x), weight.t() if transposed else weight, bias)
        # The weight itself, not a view of it: engines take its memory away, and give it back for the backward pass.
        trains_a = ctx.needs_input_grad[5]
        ctx.before = before
        reduced, b = _operands(
            ctx, x, values, a, recipe, index, scale, per_task, trains_a, y.shape[-1], y.dtype, weight
        )
        ctx.transposed = transposed
        return shaped(y.addmm_(reduced, b.t(), alpha=scale), (*x.shape[:-1], y.shape[-1]))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, reduced, values, a, index, weight = ctx.saved_tensors
        flat = _rows(grad)
        needs_x, needs_values, needs_a = (ctx.needs_input_grad[number] for number in (0, 4, 5))
        grad_values = _grad_values(ctx, flat, reduced, values, index) if needs_values else None
        grad_x = grad_a = None
        if needs_x or needs_a:
            grad_reduced = _grad_reduced(ctx, flat, values, index)
        if needs_a:
            grad_a = _grad_a(ctx, grad_reduced, x, a)
        if needs_x:
            weight = weight.to(flat.dtype)  # which autocast does for the forward pass alone
            grad_x = flat @ (weight.t() if ctx.transposed else weight)
            if a is None:
                grad_x.add_(product.up(grad_reduced, ctx.recipe))
            else:
                grad_x.addmm_(grad_reduced, _matrix(a, ctx.recipe, flat.dtype))
            grad_x = grad_x.to(ctx.x_dtype).view(*grad.shape[:-1], ctx.recipe.in_features)
        return grad_x, None, None, None, grad_values, grad_a, None, None, None, None, None


def with_factors(x: Tensor, y: Tensor, b: Tensor, a: Tensor, module: str) -> Tensor:
    """y + B (A x), with factors that may have been computed: (out_features, k) and (k, in_features)."""
    apply = cast(Callable[..., Tensor], _Update.apply)
    return apply(x, y, *_of_factors(b, a, module))


def base_with_factors(x: Tensor, base: nn.Module, b: Tensor, a: Tensor, module: str) -> Tensor:
    """W0 x + bias + B (A x), as `with_factors` after a base that `is_plain`."""
    apply = cast(Callable[..., Tensor], _Adapted.apply)
    return apply(x, base.weight, base.bias, is_conv1d(base), *_of_factors(b, a, module))


def _of_factors(b: Tensor, a: Tensor, module: str) -> tuple[Any, ...]:
    shape = Recipe(seed=0, module=module, rank=a.shape[0], in_features=a.shape[1])  # which makes nothing
    return b.reshape(-1), a, shape, None, None, 1.0, None


def _operands(
    ctx: Any,
    x: Tensor,
    values: Tensor | None,
    a: Tensor | None,
    recipe: Recipe,
    index: Tensor | None,
    scale: float,
    per_task: PerTask | None,
    trains_a: bool,
    out_features: int,
    dtype: torch.dtype,
    *more: Tensor,
) -> tuple[Tensor, Tensor]:
    """A x, (tokens, rank), and B, (out_features, rank). Keeps what the backward pass needs, and `more`."""
    flat = _rows(x).to(dtype)
    reduced = _down(flat, a, recipe)
    ctx.save_for_backward(x if trains_a else None, reduced, values, a, index, *more)
    ctx.recipe, ctx.scale, ctx.x_dtype, ctx.per_task = recipe, scale, x.dtype, per_task
    # Kept, as the pass backward may come after other batches.
    ctx.segments = per_task.of(recipe.module, len(flat)) if per_task is not None else None
    return reduced, _dense(values, index, ctx.before, out_features, recipe.rank, dtype)


def _grad_values(ctx: Any, grad: Tensor, reduced: Tensor, values: Tensor, index: Tensor | None) -> Tensor | None:
    """None where it goes to the tasks' own sums."""
    if ctx.per_task is not None:
        _add_products(ctx.per_task.sum_of(ctx.recipe.module, values), grad, reduced, index, ctx.scale, ctx.segments)
        return None
    grad_b = (grad.t() @ reduced).view(-1)  # dense only until its kept entries are picked
    picked = grad_b if index is None else grad_b.index_select(0, index)
    return picked.to(values.dtype).mul_(ctx.scale)


def _grad_a(ctx: Any, grad_reduced: Tensor, x: Tensor, a: Tensor) -> Tensor | None:
    """Gradient of a trained A, flat, or None as `_grad_values`. The scale is in grad_reduced."""
    flat = _rows(x).to(grad_reduced.dtype)
    if ctx.per_task is not None:
        _add_products(ctx.per_task.sum_of(of_a(ctx.recipe.module), a), grad_reduced, flat, None, 1.0, ctx.segments)
        return None
    return (grad_reduced.t() @ flat).view_as(a).to(a.dtype)


def _add_products(
    sums: Tensor,  # (tasks, entries)
    left: Tensor,  # (tokens, rows)
    right: Tensor,  # (tokens, columns)
    index: Tensor | None,
    scale: float,
    segments: Segments,
) -> None:
    """Adds scale * left^T right over each task's tokens, or of it the entries that are kept, to the task's sum."""
    for task, tokens in segments:
        if index is None and left.dtype == sums.dtype:
            sums[task].view(left.shape[1], -1).addmm_(left[tokens].t(), right[tokens], alpha=scale)
        else:
            made = (left[tokens].t() @ right[tokens]).view(-1)
            sums[task].add_(made if index is None else made.index_select(0, index), alpha=scale)


def _grad_reduced(ctx: Any, grad: Tensor, values: Tensor | None, index: Tensor | None) -> Tensor:
    """The gradient of A x, (tokens, rank)."""
    b = _dense(values, index, ctx.before, grad.shape[-1], ctx.recipe.rank, grad.dtype)
    return (grad @ b).mul_(ctx.scale)


def _rows(tensor: Tensor) -> Tensor:
    """(tokens, features)."""
    return tensor.reshape(-1, tensor.shape[-1])


def _down(x: Tensor, a: Tensor | None, recipe: Recipe) -> Tensor:
    return product.down(x, recipe) if a is None else x @ _matrix(a, recipe, x.dtype).t()


def _up(u: Tensor, a: Tensor | None, recipe: Recipe) -> Tensor:
    return product.up(u, recipe) if a is None else u @ _matrix(a, recipe, u.dtype)


def _matrix(a: Tensor, recipe: Recipe, dtype: torch.dtype) -> Tensor:
    """A, (rank, in_features), which is kept flat where it is trained."""
    return a.view(recipe.rank, recipe.in_features).to(dtype)


def _dense(
    values: Tensor | None, index: Tensor | None, before: Kept | None, out_features: int, rank: int, dtype: torch.dtype
) -> Tensor:
    """B, (out_features, rank). Rebuilt when it is needed: keeping it would cost 1/density times the values."""
    parts = [part for part in (before, None if values is None else (index, values)) if part is not None]
    if [where for where, _ in parts] == [None]:
        return parts[0][1].view(out_features, rank).to(dtype)
    flat = torch.zeros(out_features * rank, dtype=dtype, device=parts[0][1].device)
    for where, what in parts:
        flat = flat.add_(what.to(dtype)) if where is None else flat.index_add_(0, where, what.to(dtype))
    return flat.view(out_features, rank)


class BaseDelta(nn.Module):
    """What is added to the output of one layer: parameters and buffers that follow the model to another device, but
    never to another A, index or less exact values.

    `model.to(bfloat16)` would round A and the values, and `to_empty` would leave garbage in all of them.
    """

    per_task: PerTask | None
    """What gets each task's gradient instead of the parameters."""

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        """y, (..., out_features), of the base, with what x, (..., in_features), adds to it."""
        raise NotImplementedError

    def adapted(self, x: Tensor, base: nn.Module) -> Tensor:
        """The result of `forward` after a base that `is_plain`."""
        raise NotImplementedError

    @property
    def is_empty(self) -> bool:
        """Whether it adds nothing, and never will."""
        raise NotImplementedError

    def trained(self) -> dict[str, nn.Parameter]:
        """Name in the layer -> parameter, flat; see `per_task.of_tensor`."""
        raise NotImplementedError

    def counted(self) -> tuple[int, int]:
        """Entries that a mask may leave out, and others that are trained, if nothing is masked."""
        raise NotImplementedError

    @property
    def trains_a(self) -> bool:
        raise NotImplementedError

    def checksum(self) -> str:
        """Of each A as a seed makes it, whether it is trained or not, one after the other."""
        raise NotImplementedError

    def moved(self, tensor: Tensor, result: Tensor) -> Tensor:
        """What becomes of a tensor that a change of device or dtype would make `result`."""
        return result if result.dtype.itemsize >= 4 else tensor.to(result.device)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        super()._apply(lambda tensor: self.moved(tensor, fn(tensor)), recurse)  # type: ignore[no-untyped-call]
        return self


class Delta(BaseDelta):
    """One A and its sparse B for one module: adds scale * B (A x) to what the base layer gives.

    The only parameter is `values`, the kept entries of B; a Delta that keeps none has no parameter, because engines
    cannot shard empty ones. A and the index are non-persistent buffers, so they are in no checkpoint and on every rank.
    So is what B was `before`, to which the values are added: entries of earlier tasks on the same A, which stay.
    With cached=False A is regenerated in each product. With trains_a=True it is a second parameter, flat as engines
    shard it evenly then, which begins as the A of the seed.
    """

    values: nn.Parameter | None  # (kept,), fp32
    trained_a: nn.Parameter | None  # (rank * in_features,), fp32
    projection: Tensor | None  # (rank, in_features); None unless cached
    index: Tensor | None  # (kept,) int32, ascending positions in the flat (out_features, rank); None: all
    before_index: Tensor | None  # as index
    before_values: Tensor | None  # fp32

    def __init__(
        self,
        *,
        module: str,
        in_features: int,
        out_features: int,
        seed: int | None,
        rank: int,
        scale: float,
        dtype: torch.dtype,
        index: Tensor | None,
        device: torch.device,
        cached: bool = True,
        stored: Tensor | None = None,  # A, where no seed makes it
        trains_a: bool = False,
        before: Kept | None = None,
    ) -> None:
        super().__init__()
        self.is_stored = stored is not None
        self.per_task: PerTask | None = None
        # Of a stored A, the recipe says the shape alone.
        self.recipe = Recipe(seed=seed or 0, module=module, rank=rank, in_features=in_features, dtype=dtype)
        self.rank, self.scale = rank, scale
        self.in_features, self.out_features = in_features, out_features
        a = self.recipe.make(device=device) if cached and not trains_a and stored is None else None
        # What nothing could make again stays real even on the meta device.
        if stored is not None:
            a = stored.to(stored.device if device.type == "meta" else device, copy=True)
        self.register_buffer("projection", a, persistent=False)
        given = {"index": index, "before_index": before and before[0], "before_values": before and before[1]}
        for name, tensor in given.items():
            if tensor is not None:
                exact = torch.float32 if name == "before_values" else torch.int32
                tensor = tensor.to(tensor.device if device.type == "meta" else device, exact)
            self.register_buffer(name, tensor, persistent=False)
        self.kept = out_features * rank if index is None else index.numel()
        values = torch.zeros(self.kept, dtype=torch.float32, device=device) if self.kept else None
        self.register_parameter("values", None if values is None else nn.Parameter(values))
        start = self._start(device) if trains_a and self.kept else None
        self.register_parameter("trained_a", None if start is None else nn.Parameter(start))

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        if self.is_empty:
            return y
        apply = cast(Callable[..., Tensor], _Update.apply)
        return apply(x, y, *self._operands)

    def adapted(self, x: Tensor, base: nn.Module) -> Tensor:
        """The result of `forward` after a base that `is_plain`, in one operation."""
        apply = cast(Callable[..., Tensor], _Adapted.apply)
        return apply(x, base.weight, base.bias, is_conv1d(base), *self._operands)

    @property
    def is_empty(self) -> bool:
        """Whether B is zero, and stays so."""
        return self.values is None and self.before_values is None

    @property
    def _operands(self) -> tuple[Any, ...]:
        return self.values, self.held_a, self.recipe, self.index, self._before, self.scale, self.per_task

    @property
    def _before(self) -> Kept | None:
        return None if self.before_values is None else (self.before_index, self.before_values)

    @property
    def held_a(self) -> Tensor | None:
        """A in memory, (rank, in_features), or flat where it is trained; None where each product makes it."""
        return self.projection if self.trained_a is None else self.trained_a

    def parts_of_b(self, values: Tensor | None) -> list[Kept]:
        """The matrices whose sum is B."""
        return [part for part in (self._before, None if values is None else (self.index, values)) if part is not None]

    def dense_b(self, values: Tensor | None, dtype: torch.dtype) -> Tensor:
        """B, (out_features, rank), for these values of the kept entries."""
        return _dense(values, self.index, self._before, self.out_features, self.rank, dtype)

    def _start(self, device: torch.device) -> Tensor:
        """The initial value of a trained A."""
        return self.recipe.make(device=device).view(-1).to(torch.float32)

    def a(self) -> Tensor:
        """A, (rank, in_features), on the layer's device: that in memory, or one made for the caller."""
        if self.trained_a is not None:
            return self.trained_a.detach().view(self.rank, self.in_features)
        return self.recipe.make(device=self._device) if self.projection is None else self.projection

    def weight(self, values: Tensor | None) -> Tensor:
        """The update of the base's weight, (out_features, in_features), fp32, for these values of the kept entries."""
        if self.is_empty:
            return torch.zeros(self.out_features, self.in_features, device=self._device)
        there = None if values is None else values.detach().to(self._device)
        b = _dense(there, self.index, self._before, self.out_features, self.rank, torch.float32)
        return (b @ self.a().float()).mul_(self.scale)

    @property
    def _device(self) -> torch.device:
        held = (self.projection, self.values, self.index)  # a layer that has no values has an index
        return next(tensor.device for tensor in held if tensor is not None)

    def restrict(self, index: Tensor | None) -> None:
        """Keeps only these entries of B from now on, from zero, and resets a trained A to its start.

        index: ascending flat positions, int32; None for all. The parameters are new ones.
        """
        device = self._device
        self.index = None if index is None else index.to(device)
        self.kept = self.out_features * self.rank if index is None else index.numel()
        values = torch.zeros(self.kept, dtype=torch.float32, device=device) if self.kept else None
        self.values = None if values is None else nn.Parameter(values)
        if self.trained_a is not None:
            self.trained_a = nn.Parameter(self._start(device)) if self.kept else None

    def extra_repr(self) -> str:
        kept = f"{self.kept} of {self.out_features * self.rank}"
        is_trained = self.trained_a is not None
        projection = "trained" if is_trained else "recomputed" if self.projection is None else "cached"
        made = "A is stored" if self.is_stored else f"seed={self.recipe.seed}, projection={projection}"
        return f"rank={self.rank}, kept={kept}, {made}"

    def trained(self) -> dict[str, nn.Parameter]:
        found = {"": self.values, A: self.trained_a}
        return {name: parameter for name, parameter in found.items() if parameter is not None}

    def counted(self) -> tuple[int, int]:
        return self.out_features * self.rank, 0 if self.trained_a is None else self.rank * self.in_features

    @property
    def trains_a(self) -> bool:
        return self.trained_a is not None

    def checksum(self) -> str:
        return checksum(self.a() if self.trained_a is None else self.recipe.make(device="cpu"))

    def moved(self, tensor: Tensor, result: Tensor) -> Tensor:
        if tensor is self.projection:
            if self.is_stored:  # as the index: nothing could make it again
                return tensor if result.is_meta else tensor.to(result.device)
            if tensor.is_meta and not result.is_meta:
                return self.recipe.make(device=result.device)
            return tensor.to(result.device)
        if any(tensor is other for other in (self.index, self.before_index, self.before_values)):
            return tensor if result.is_meta else tensor.to(result.device)
        if tensor is self.trained_a and tensor.is_meta and not result.is_meta:
            return share_as(self._start(result.device), tensor)
        if tensor.is_meta and not result.is_meta:
            return torch.zeros_like(tensor, device=result.device)
        return super().moved(tensor, result)


def share_as(whole: Tensor, like: Tensor) -> Tensor:
    """A tensor that every rank has made, sharded as another one, if that is: nothing is sent."""
    if not isinstance(like, DTensor):
        return whole
    return distribute_tensor(whole, like.device_mesh, like.placements, src_data_rank=None)


class AdaptedLinear(nn.Module):
    """A frozen linear layer and the updates attached to it."""

    deltas: Sequence[BaseDelta]

    def __init__(self, base: nn.Module, deltas: Sequence[BaseDelta]) -> None:
        super().__init__()
        self.base = base
        self.deltas = nn.ModuleList(deltas)  # type: ignore[assignment]  # which is such a sequence, but not typed as one
        self.folded: tuple[Tensor | None, ...] | None = None
        """While the updates are part of the base's weight: the values they had then, one item per delta."""

    @property
    def weight(self) -> Tensor:
        """The base's weight, for code that looks at its dtype or device."""
        return self.base.weight  # type: ignore[return-value]

    @property
    def bias(self) -> Tensor | None:
        return self.base.bias  # type: ignore[return-value]

    def forward(self, x: Tensor) -> Tensor:
        if self.folded is None and len(self.deltas) == 1 and not self.deltas[0].is_empty and is_plain(self.base):
            return self.deltas[0].adapted(x, self.base)
        y: Tensor = self.base(x)
        if self.folded is not None:
            return y
        for delta in self.deltas:
            y = delta(x, y)
        return y


class RoutedLinear(AdaptedLinear):
    """A frozen linear layer and the updates of several adapters, each met by its own rows."""

    deltas: Sequence[Delta]

    def __init__(
        self, base: nn.Module, deltas: list[Delta], *, module: str, routing: Routing, scales: Sequence[dict[int, float]]
    ) -> None:
        """scales: of each update, number of an adapter that has it -> its scale there."""
        super().__init__(base, deltas)
        self.module, self.routing, self.scales = module, routing, tuple(scales)

    @property
    def owners(self) -> tuple[int, ...]:
        """Number of each update's adapter, or of the first that has it."""
        return tuple(next(iter(scales)) for scales in self.scales)

    def of(self, adapter: int) -> list[Delta]:
        """The updates of one adapter."""
        return [delta for delta, scales in zip(self.deltas, self.scales, strict=True) if adapter in scales]

    def forward(self, x: Tensor) -> Tensor:
        if self.folded is None and not torch.is_grad_enabled() and (made := self._multiplied(x)) is not None:
            return made
        y: Tensor = self.base(x)
        if self.folded is not None:
            return y
        # In the same order on all ranks, whatever rows each has: engines gather and reduce parameters in this order.
        tensors = {number: (delta.values, delta.held_a) for number, delta in enumerate(self.deltas)}
        uses = tuple(
            Use(number=number, tokens=segment.tokens, scale=self.scales[number][segment.adapter])
            for segment in self.routing.segments(self.module, x)
            for number, delta in enumerate(self.deltas)
            if segment.adapter in self.scales[number] and not delta.is_empty
        )
        used = {use.number for use in uses}
        if len(used) < len(uses) and not torch.is_grad_enabled():
            return self._summed(x, y, uses)
        if not self.routing.collects:
            used |= {
                number for number, pair in tensors.items() if any(one is not None and one.requires_grad for one in pair)
            }
        if not used:
            return y
        numbers = tuple(sorted(used))
        apply = cast(Callable[..., Tensor], _Routed.apply)
        return apply(x, y, self, uses, numbers, *(tensor for number in numbers for tensor in tensors[number]))

    def _multiplied(self, x: Tensor) -> Tensor | None:
        """The output without a graph, each adapter's tokens times the sum of the weight and its updates, where that is
        less work than the products with A and B: in narrow layers, for updates of many adapters that share them. None
        where it is not, or where the weight cannot be read or would be rounded."""
        if max(map(len, self.scales), default=0) < 2 or not is_plain(self.base):
            return None
        weight, bias = self.weight, self.bias
        if type(weight.data) is not Tensor or weight.dtype != torch.float32 or x.dtype != torch.float32:
            return None
        segments, flat = self.routing.segments(self.module, x), _rows(x)
        size, deltas = len(flat) // max(1, len(segments)), [delta for delta in self.deltas if not delta.is_empty]
        rank, (out, width) = sum(delta.rank for delta in deltas), features(self.base)
        if weight.numel() != out * width or rank * (out + width) < NARROW * out * width or size < SEVERAL * rank:
            return None
        if any(segment.tokens != slice(n * size, (n + 1) * size) for n, segment in enumerate(segments)):
            return None
        a = torch.cat([delta.a().float() for delta in deltas])
        b = torch.cat([delta.dense_b(delta.values, torch.float32) for delta in deltas], dim=1)
        places = [number for number, delta in enumerate(self.deltas) if not delta.is_empty]
        of_segments = [[self.scales[number].get(segment.adapter, 0.0) for number in places] for segment in segments]
        ranks = torch.tensor([delta.rank for delta in deltas], device=x.device)
        scales = torch.tensor(of_segments, device=x.device).repeat_interleave(ranks, dim=1)  # (segments, rank)
        whole = torch.matmul(b * scales[:, None], a) + (weight.t() if is_conv1d(self.base) else weight)
        made = torch.bmm(flat.view(len(segments), size, width), whole.mT)
        if bias is not None:
            made += bias
        return shaped(made, (*x.shape[:-1], out))

    def _summed(self, x: Tensor, y: Tensor, uses: Sequence["Use"]) -> Tensor:
        """The output without a graph, where adapters share updates: each update once for all tokens that meet it, and
        those that the same tokens meet together. Every token has scales of its own."""
        flat, made = _rows(x).to(y.dtype), _rows(y) if is_plain(self.base) else _rows(y).clone()
        of_updates: dict[int, list[Use]] = {}
        for use in uses:
            of_updates.setdefault(use.number, []).append(use)
        alike: dict[tuple[tuple[int, int], ...], list[int]] = {}
        for number, of_one in of_updates.items():
            alike.setdefault(tuple((use.tokens.start, use.tokens.stop) for use in of_one), []).append(number)
        for edges, numbers in alike.items():
            deltas = [self.deltas[number] for number in numbers]
            a = torch.cat([delta.a().to(y.dtype) for delta in deltas])
            b = torch.cat([delta.dense_b(delta.values, y.dtype) for delta in deltas], dim=1)
            exact = torch.promote_types(y.dtype, torch.float32)
            of_uses = [[use.scale for use in of_updates[number]] for number in numbers]
            ranks = torch.tensor([delta.rank for delta in deltas], device=y.device)
            scales = torch.tensor(of_uses, dtype=exact, device=y.device).t().repeat_interleave(ranks, dim=1)
            for first, last in _runs(edges):
                tokens = slice(edges[first][0], edges[last - 1][1])
                counts = torch.tensor([stop - start for start, stop in edges[first:last]], device=y.device)
                reduced = (flat[tokens] @ a.t()).to(exact).mul_(scales[first:last].repeat_interleave(counts, dim=0))
                made[tokens].addmm_(reduced.to(y.dtype), b.t())
        return shaped(made, y.shape)

    def add_gradient(self, number: int, gradient: Tensor, *, of_projection: bool = False) -> None:
        """Adds to what an update's parameter has got in this step. gradient: flat."""
        name = of_a(self.module) if of_projection else self.module
        name = name_of(name, self.routing.names[self.owners[number]])
        self.routing.sum_of(name, gradient.numel(), gradient.device).add_(gradient)


@dataclass(frozen=True, slots=True, kw_only=True)
class Use:
    """An update that tokens of a batch meet."""

    number: int
    """Number of the update in its layer."""
    tokens: slice
    scale: float


def _runs(edges: Sequence[tuple[int, int]]) -> Iterator[tuple[int, int]]:
    """The first of each run of slices that follow each other, and the one after its last."""
    first = 0
    for place in range(1, len(edges) + 1):
        if place == len(edges) or edges[place][0] != edges[place - 1][1]:
            yield first, place
            first = place


class _Routed(torch.autograd.Function):
    """y + scale * B (A x), with A and B of each token's own adapter, saving A x, which is rank wide, instead of x."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,  # (..., in_features)
        y: Tensor,  # (..., out_features); its dtype is the one computed in
        layer: RoutedLinear,
        uses: tuple[Use, ...],
        numbers: tuple[int, ...],  # of the updates whose tensors follow, those of all uses among them
        *tensors: Tensor | None,  # of each of them: values and A; None: there are none in memory
    ) -> Tensor:
        deltas = [layer.deltas[use.number] for use in uses]
        held = _of_uses(uses, numbers, tensors)
        flat, rows = _rows(x), _rows(y)
        made: Tensor
        reduced: list[Tensor]
        trains_a = any(ctx.needs_input_grad[6::2])
        ctx.layer, ctx.uses, ctx.numbers, ctx.x_dtype, ctx.x_shape = layer, uses, numbers, x.dtype, x.shape
        ctx.is_even = _is_even(uses, deltas, len(rows), held[1::2])
        if ctx.is_even:
            a, b = _stacked(uses, deltas, held, y.dtype)
            reduced = [torch.bmm(flat.to(y.dtype).view(len(uses), -1, flat.shape[1]), a.mT)]
            made = torch.baddbmm(rows.reshape(len(uses), -1, rows.shape[1]), reduced[0], b.mT)
        else:
            made, reduced = rows.clone(), []
            for use, delta, values, own_a in zip(uses, deltas, held[::2], held[1::2], strict=True):
                reduced.append(_down(flat[use.tokens].to(y.dtype), own_a, delta.recipe))
                made[use.tokens].addmm_(reduced[-1], delta.dense_b(values, y.dtype).t(), alpha=use.scale)
        ctx.save_for_backward(x if trains_a else None, *reduced, *tensors)
        return shaped(made, y.shape)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        layer, uses, numbers = ctx.layer, ctx.uses, ctx.numbers
        x, *saved = ctx.saved_tensors
        count = 1 if ctx.is_even else len(uses)
        reduced, held = saved[:count], _of_uses(uses, numbers, saved[count:])
        (needs_x, needs_y), needs = ctx.needs_input_grad[:2], ctx.needs_input_grad[5:]
        deltas, rows = [layer.deltas[use.number] for use in uses], _rows(grad)
        of_reduced: Sequence[Tensor]  # of each use, the gradient of A x, (tokens, rank)
        of_b: Sequence[Tensor] = ()  # and of B, flat
        grad_x: Tensor | None = None
        if ctx.is_even:
            a, b = _stacked(uses, deltas, held, grad.dtype)
            groups = rows.reshape(len(uses), -1, rows.shape[1])
            stacked = torch.bmm(groups, b)
            of_reduced = stacked.unbind()
            if any(needs[::2]):
                of_b = torch.bmm(groups.mT, reduced[0]).flatten(1).unbind()
            if needs_x:
                grad_x = torch.bmm(stacked, a)
        else:
            own = [rows[use.tokens] for use in uses]
            matrices = [delta.dense_b(values, grad.dtype) for delta, values in zip(deltas, held[::2], strict=True)]
            of_reduced = [(o @ b).mul_(use.scale) for o, b, use in zip(own, matrices, uses, strict=True)]
            if any(needs[::2]):
                of_b = [(o.t() @ r).view(-1) for o, r in zip(own, reduced, strict=True)]
            if needs_x:
                grad_x = rows.new_zeros(len(rows), ctx.x_shape[-1])
                for use, delta, of_one, own_a in zip(uses, deltas, of_reduced, held[1::2], strict=True):
                    grad_x[use.tokens] += _up(of_one, own_a, delta.recipe)
        grads: list[Tensor | None] = [None] * len(needs)

        def add(use: Use, place: int, gradient: Tensor) -> None:
            if layer.routing.collects:
                layer.add_gradient(use.number, gradient, of_projection=place % 2 == 1)
            else:
                before = grads[place]
                grads[place] = gradient if before is None else before + gradient

        for n, (use, delta) in enumerate(zip(uses, deltas, strict=True)):
            place = 2 * numbers.index(use.number)
            if needs[place]:
                picked = of_b[n] if delta.index is None else of_b[n].index_select(0, delta.index)
                add(use, place, picked.float().mul_(use.scale))
            if needs[place + 1]:
                made = of_reduced[n].t() @ _rows(x)[use.tokens].to(grad.dtype)
                add(use, place + 1, made.float().view(-1))
        for place, is_needed in enumerate(needs) if not layer.routing.collects else ():
            if is_needed and grads[place] is None:  # no row of this rank meets it
                delta = layer.deltas[numbers[place // 2]]
                grads[place] = grad.new_zeros(
                    delta.rank * delta.in_features if place % 2 else delta.kept, dtype=torch.float32
                )
        if grad_x is not None:
            grad_x = grad_x.to(ctx.x_dtype).view(ctx.x_shape)
        return grad_x, grad if needs_y else None, None, None, None, *grads


def _of_uses(uses: Sequence[Use], numbers: Sequence[int], tensors: Sequence[Tensor | None]) -> list[Tensor | None]:
    """Values and A of each use, one after the other."""
    places = [2 * numbers.index(use.number) for use in uses]
    return [tensor for place in places for tensor in tensors[place : place + 2]]


def _is_even(uses: Sequence[Use], deltas: Sequence[Delta], num_rows: int, projections: Sequence[Tensor | None]) -> bool:
    """Whether a batched product does them all: equal parts of all tokens, with an A in memory and one rank."""
    if not uses:
        return False
    size = num_rows // len(uses)
    return (
        all(
            use.tokens == slice(n * size, (n + 1) * size) and a is not None and delta.rank == deltas[0].rank
            for n, (use, delta, a) in enumerate(zip(uses, deltas, projections, strict=True))
        )
        and size * len(uses) == num_rows
    )


def _stacked(
    uses: Sequence[Use], deltas: Sequence[Delta], held: Sequence[Tensor | None], dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """A, (uses, rank, in_features), and scale * B, (uses, out_features, rank)."""
    a = torch.stack(
        [_matrix(cast(Tensor, a), delta.recipe, dtype) for delta, a in zip(deltas, held[1::2], strict=True)]
    )
    first, device = deltas[0], a.device
    b = torch.zeros(len(deltas), first.out_features, first.rank, dtype=dtype, device=device)
    for into, use, delta, values in zip(b, uses, deltas, held[::2], strict=True):
        for index, kept in delta.parts_of_b(values):
            flat = into.view(-1)
            flat.add_(kept.to(dtype)) if index is None else flat.index_add_(0, index, kept.to(dtype))
        into.mul_(use.scale)
    return a, b


def shaped(fresh: Tensor, shape: Sequence[int]) -> Tensor:
    """A tensor that nothing else holds, in another shape. To autograd it is not a view, so that models may add to the
    output of a layer in place, as Falcon and Llama 4 do."""
    made: Tensor = torch.ops.aten._unsafe_view(fresh, list(shape))
    return made


def is_conv1d(module: nn.Module) -> bool:
    """Whether it is GPT-2's linear layer, whose weight is (in_features, out_features)."""
    return type(module).__name__ == "Conv1D" and hasattr(module, "nf")


def is_product(module: nn.Module) -> bool:
    """Whether a linear layer, or one of a class derived from it, computes x W^T + bias and nothing else.

    A class with a forward of its own is tried on a few numbers in a small weight.
    """
    kind = type(module)
    # What torch's MultiheadAttention has as `out_proj` is never called.
    if not isinstance(module, nn.Linear) or kind.__name__ == "NonDynamicallyQuantizableLinear":
        return False
    if kind.forward is nn.Linear.forward:
        return True
    if set(module._parameters) != {"weight", "bias"} or module._buffers or module._modules:
        return False
    with torch.no_grad(), torch.device("cpu"):
        weight, bias, x = torch.arange(12.0).view(3, 4).cos(), torch.arange(3.0).sin(), torch.arange(8.0).sin()
        small = copy.copy(module)
        small._parameters = {
            "weight": nn.Parameter(weight),
            "bias": None if module.bias is None else nn.Parameter(bias),
        }
        small.in_features, small.out_features = 4, 3
        try:
            tried = [(given, kind.forward(small, given)) for given in (x.view(2, 4), x.view(1, 2, 4))]
        except Exception:  # whatever it is, it is not a product alone
            return False
        return all(
            isinstance(y, Tensor)
            and y.shape == (*given.shape[:-1], 3)
            and torch.allclose(y, nn.functional.linear(given, weight, small.bias), rtol=1e-5, atol=1e-6)
            for given, y in tried
        )


def is_plain(base: nn.Module) -> bool:
    """Whether calling a linear layer is its product and nothing else: no hooks, no other forward, nothing trained."""
    return (
        (type(base) is nn.Linear or is_conv1d(base))
        and not is_quantized(base)
        and not base.weight.requires_grad
        and (base.bias is None or not base.bias.requires_grad)
        and not (base._forward_hooks or base._forward_pre_hooks or base._backward_hooks or base._backward_pre_hooks)
        and "forward" not in vars(base)
    )


def is_quantized(module: nn.Module) -> bool:
    """Whether it is a linear layer of bitsandbytes, or one whose weight torchao has replaced, or our own."""
    if not isinstance(module, nn.Linear):
        return False
    weight = type(module.weight.data)
    return type(module).__name__ in QUANTIZED or (
        weight is not Tensor and weight.__module__.startswith("torchao.")  # of other libraries, FSDP has its own
    )


@torch.no_grad()
def dequantized(base: nn.Linear, dtype: torch.dtype) -> nn.Linear:
    """A layer of this dtype that computes what a quantised one does: its weight is what that makes of the unit
    vectors."""
    device = base.weight.device
    made = nn.Linear(base.in_features, base.out_features, base.bias is not None, device=device, dtype=dtype)
    for start in range(0, base.in_features, 1024):
        size = min(1024, base.in_features - start)
        units = torch.zeros(size, base.in_features, device=device, dtype=dtype)
        units[:, start : start + size].fill_diagonal_(1.0)
        columns = base(units).float()
        made.weight[:, start : start + size] = (columns if base.bias is None else columns - base.bias.float()).t()
    if base.bias is not None:
        made.bias.copy_(base.bias)
    return made.requires_grad_(False)


def features(base: nn.Module) -> tuple[int, int]:
    """(out_features, in_features) of a linear layer or Conv1D, also where an engine has emptied the weight."""
    if is_conv1d(base):
        return int(base.nf), int(base.nx)  # type: ignore[arg-type]
    return int(base.out_features), int(base.in_features)  # type: ignore[arg-type]
