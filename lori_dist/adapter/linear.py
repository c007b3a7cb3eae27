"""The adapted layer: `y = W0 x + scale * B (A x)`, with A regenerated from a seed and B sparse.

Source: LoRI (arXiv 2504.07448), section 3.
"""

from collections.abc import Callable, Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from lori_dist.adapter.projection import projection


class _Update(torch.autograd.Function):
    """y + scale * B (A x), saving A x, which is rank wide, instead of x."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,  # (..., in_features)
        y: Tensor,  # (..., out_features); its dtype is the one computed in
        values: Tensor,  # (kept,)
        a: Tensor,  # (rank, in_features)
        index: Tensor | None,  # (kept,) int32; None: all entries of B are kept
        scale: float,
    ) -> Tensor:
        flat_y = y.reshape(-1, y.shape[-1])
        reduced = x.reshape(-1, x.shape[-1]).to(y.dtype) @ a.to(y.dtype).t()  # (tokens, rank)
        b = _dense(values, index, y.shape[-1], a.shape[0], y.dtype)
        ctx.save_for_backward(reduced, values, a, index)
        ctx.scale, ctx.x_dtype = scale, x.dtype
        return torch.addmm(flat_y, reduced, b.t(), alpha=scale).view(y.shape)

    @staticmethod
    @once_differentiable  # A x is saved without its graph: a second derivative would miss x
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        reduced, values, a, index = ctx.saved_tensors
        needs_x, needs_y, needs_values = ctx.needs_input_grad[:3]
        flat = grad.reshape(-1, grad.shape[-1])  # (tokens, out_features)
        grad_x = grad_values = None
        if needs_values:
            grad_b = (flat.t() @ reduced).view(-1)  # dense only until its kept entries are picked
            picked = grad_b if index is None else grad_b.index_select(0, index)
            grad_values = picked.to(values.dtype).mul_(ctx.scale)
        if needs_x:
            b = _dense(values, index, flat.shape[-1], a.shape[0], flat.dtype)
            grad_x = ((flat @ b).mul_(ctx.scale) @ a.to(flat.dtype)).to(ctx.x_dtype)
            grad_x = grad_x.view(*grad.shape[:-1], a.shape[1])
        return grad_x, grad if needs_y else None, grad_values, None, None, None


def _dense(values: Tensor, index: Tensor | None, out_features: int, rank: int, dtype: torch.dtype) -> Tensor:
    """B, (out_features, rank). Rebuilt when it is needed: keeping it would cost 1/density times the values."""
    if index is None:
        return values.view(out_features, rank).to(dtype)
    flat = torch.zeros(out_features * rank, dtype=dtype, device=values.device)
    return flat.index_add_(0, index, values.to(dtype)).view(out_features, rank)


class Delta(nn.Module):
    """One A and its sparse B for one module: adds scale * B (A x) to what the base layer gives.

    The only parameter is `values`, the kept entries of B; a Delta that keeps none has no parameter, because engines
    cannot shard empty ones. A and the index are non-persistent buffers, so they are in no checkpoint and on every rank.
    """

    values: nn.Parameter | None  # (kept,), fp32
    projection: Tensor  # (rank, in_features)
    index: Tensor | None  # (kept,) int32, ascending positions in the flat (out_features, rank); None: all

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
        explicit: Tensor | None = None,  # A, where no seed makes it
    ) -> None:
        super().__init__()
        self.module, self.seed, self.rank, self.scale = module, seed, rank, scale
        self.in_features, self.out_features = in_features, out_features
        if seed is None:
            assert explicit is not None
            a = explicit.to(device, copy=True)
        else:
            a = projection(seed, module, rank, in_features, dtype=dtype, device=device)
        self.register_buffer("projection", a, persistent=False)
        if index is not None:  # which nothing could make again, so it stays real even on the meta device
            index = index.to(index.device if device.type == "meta" else device, torch.int32)
        self.register_buffer("index", index, persistent=False)
        self.kept = out_features * rank if index is None else index.numel()
        values = torch.zeros(self.kept, dtype=torch.float32, device=device) if self.kept else None
        self.register_parameter("values", None if values is None else nn.Parameter(values))

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        if self.values is None:
            return y
        apply = cast(Callable[..., Tensor], _Update.apply)
        return apply(x, y, self.values, self.projection, self.index, self.scale)

    def weight(self, values: Tensor | None) -> Tensor:
        """The update of the base's weight, (out_features, in_features), fp32, for these values of the kept entries."""
        if values is None:
            return torch.zeros(self.out_features, self.in_features, device=self.projection.device)
        b = _dense(values.detach().to(self.projection.device), self.index, self.out_features, self.rank, torch.float32)
        return (b @ self.projection.float()).mul_(self.scale)

    def extra_repr(self) -> str:
        seed = "none, A is stored" if self.seed is None else self.seed
        return f"rank={self.rank}, kept={self.kept} of {self.out_features * self.rank}, seed={seed}"

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "Delta":
        """Follows the model to another device, but never to another A, index or less exact values.

        `model.to(bfloat16)` would round A and the values, and `to_empty` would leave garbage in all of them.
        """

        def moved(tensor: Tensor) -> Tensor:
            result = fn(tensor)
            if tensor is self.projection:
                if self.seed is None:  # as the index: nothing could make it again
                    return tensor if result.is_meta else tensor.to(result.device)
                if tensor.is_meta and not result.is_meta:
                    return projection(
                        self.seed, self.module, self.rank, self.in_features, dtype=tensor.dtype, device=result.device
                    )
                return tensor.to(result.device)
            if tensor is self.index:
                return tensor if result.is_meta else tensor.to(result.device)
            if tensor.is_meta and not result.is_meta:
                return torch.zeros_like(tensor, device=result.device)
            return result if result.dtype.itemsize >= 4 else tensor.to(result.device)

        super()._apply(moved, recurse)  # type: ignore[no-untyped-call]
        return self


class AdaptedLinear(nn.Module):
    """A frozen linear layer and the updates attached to it."""

    deltas: Sequence[Delta]

    def __init__(self, base: nn.Module, deltas: list[Delta]) -> None:
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
        y: Tensor = self.base(x)
        if self.folded is not None:
            return y
        for delta in self.deltas:
            y = delta(x, y)
        return y


def is_conv1d(module: nn.Module) -> bool:
    """Whether it is GPT-2's linear layer, whose weight is (in_features, out_features)."""
    return type(module).__name__ == "Conv1D" and hasattr(module, "nf")


def features(base: nn.Module) -> tuple[int, int]:
    """(out_features, in_features) of a linear layer or Conv1D, also where an engine has emptied the weight."""
    if is_conv1d(base):
        return int(base.nf), int(base.nx)  # type: ignore[arg-type]
    return int(base.out_features), int(base.in_features)  # type: ignore[arg-type]
