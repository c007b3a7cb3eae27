"""The adapted layer: `y = W0 x + scale * B (A x)`, with A regenerated from a seed, or trained, and B sparse.

Source: LoRI (arXiv 2504.07448), section 3.
"""

from collections.abc import Callable, Sequence
from typing import Any, Self, cast

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.distributed.tensor import DTensor, distribute_tensor

from lori_dist.adapter import product
from lori_dist.adapter.bases import is_conv1d, is_plain
from lori_dist.adapter.per_task import A, PerTask, Segments, of_a
from lori_dist.adapter.projection import Recipe, checksum

Kept = tuple[Tensor | None, Tensor]
"""Entries of B: their ascending flat positions, or None for all of them, and their values."""


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
        return shaped(torch.addmm(as_rows(y), reduced, b.t(), alpha=scale), y.shape)

    @staticmethod
    @once_differentiable  # A x is saved without its graph: a second derivative would miss x
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, reduced, values, a, index = ctx.saved_tensors
        needs_x, needs_y, needs_values, needs_a = ctx.needs_input_grad[:4]
        flat = as_rows(grad)
        grad_values = _grad_values(ctx, flat, reduced, values, index) if needs_values else None
        grad_x = grad_a = None
        if needs_x or needs_a:
            grad_reduced = _grad_reduced(ctx, flat, values, index)
        if needs_a:
            grad_a = _grad_a(ctx, grad_reduced, x, a)
        if needs_x:
            grad_x = up(grad_reduced, a, ctx.recipe)
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
        y = nn.functional.linear(as_rows(x), weight.t() if transposed else weight, bias)
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
        flat = as_rows(grad)
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
                grad_x.addmm_(grad_reduced, matrix_of(a, ctx.recipe, flat.dtype))
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
    flat = as_rows(x).to(dtype)
    reduced = down(flat, a, recipe)
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
    flat = as_rows(x).to(grad_reduced.dtype)
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


def as_rows(tensor: Tensor) -> Tensor:
    """(tokens, features)."""
    return tensor.reshape(-1, tensor.shape[-1])


def down(x: Tensor, a: Tensor | None, recipe: Recipe) -> Tensor:
    return product.down(x, recipe) if a is None else x @ matrix_of(a, recipe, x.dtype).t()


def up(u: Tensor, a: Tensor | None, recipe: Recipe) -> Tensor:
    return product.up(u, recipe) if a is None else u @ matrix_of(a, recipe, u.dtype)


def matrix_of(a: Tensor, recipe: Recipe, dtype: torch.dtype) -> Tensor:
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


def shaped(fresh: Tensor, shape: Sequence[int]) -> Tensor:
    """A tensor that nothing else holds, in another shape. To autograd it is not a view, so that models may add to the
    output of a layer in place, as Falcon and Llama 4 do."""
    made: Tensor = torch.ops.aten._unsafe_view(fresh, list(shape))
    return made
