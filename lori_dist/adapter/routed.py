"""The adapted layer of several adapters: each row of a batch meets the update of its own, in one pass over the base."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from lori_dist.adapter.bases import features, is_conv1d, is_plain
from lori_dist.adapter.linear import AdaptedLinear, Delta, as_rows, down, matrix_of, shaped, up
from lori_dist.adapter.per_task import of_a
from lori_dist.adapter.routing import Routing, name_of

NARROW, SEVERAL = 0.5, 16
"""The products with A and B over that with the weight, and the tokens of an adapter over the rank, from which updates
that adapters share are added to the weight: the sum must cost less than what it saves."""


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
        segments, flat = self.routing.segments(self.module, x), as_rows(x)
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
        flat, made = as_rows(x).to(y.dtype), as_rows(y) if is_plain(self.base) else as_rows(y).clone()
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
        flat, rows = as_rows(x), as_rows(y)
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
                reduced.append(down(flat[use.tokens].to(y.dtype), own_a, delta.recipe))
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
        deltas, rows = [layer.deltas[use.number] for use in uses], as_rows(grad)
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
                    grad_x[use.tokens] += up(of_one, own_a, delta.recipe)
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
                made = of_reduced[n].t() @ as_rows(x)[use.tokens].to(grad.dtype)
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
        [matrix_of(cast(Tensor, a), delta.recipe, dtype) for delta, a in zip(deltas, held[1::2], strict=True)]
    )
    first, device = deltas[0], a.device
    b = torch.zeros(len(deltas), first.out_features, first.rank, dtype=dtype, device=device)
    for into, use, delta, values in zip(b, uses, deltas, held[::2], strict=True):
        for index, kept in delta.parts_of_b(values):
            flat = into.view(-1)
            flat.add_(kept.to(dtype)) if index is None else flat.index_add_(0, index, kept.to(dtype))
        into.mul_(use.scale)
    return a, b
