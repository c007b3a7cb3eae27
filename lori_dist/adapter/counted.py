"""How often the layers of a form take what they choose from, over all ranks of a step."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, cast

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable


@dataclass(kw_only=True, slots=True)
class Counts:
    """What layers have counted since the last step, on this rank: in backward passes, of which there is one for each
    batch that is trained on, also where activations are computed again."""

    sums: dict[str, Tensor] = field(default_factory=dict)
    """Module -> (rank,), int64."""

    def of(self, module: str, rank: int, device: torch.device) -> Tensor:
        """(rank,), to be added to."""
        if module not in self.sums:
            self.sums[module] = torch.zeros(rank, dtype=torch.int64, device=device)
        return self.sums[module]


def counting(tensor: Tensor, ranks: Tensor, weights: Tensor, counts: Counts, module: str, rank: int) -> Tensor:
    """The tensor, whose backward pass counts the numbers of ranks, (n, k), of those of the n that weigh 1, not 0."""
    found = torch.zeros(rank, dtype=torch.int64, device=ranks.device)
    found.index_add_(0, ranks.flatten(), weights.long()[:, None].expand(ranks.shape).flatten())
    return cast(Callable[..., Tensor], _Counting.apply)(tensor, found, counts, module)


class _Counting(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, tensor: Tensor, found: Tensor, counts: Counts, module: str) -> Tensor:
        ctx.found, ctx.counts, ctx.module = found, counts, module
        return tensor.view_as(tensor)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None]:
        ctx.counts.of(ctx.module, len(ctx.found), ctx.found.device).add_(ctx.found)
        return grad, None, None, None
