"""Fused experts of a mixture: a 3-D weight for each projection, of which every expert's matrix is adapted by itself.

So A and B of an expert are those of a linear layer whose path is that of the weight and the expert's number
(`model.layers.0.mlp.experts.down_proj.3`), and masks, files and merges know nothing of experts.
"""

import contextlib
import itertools
from collections.abc import Mapping
from typing import Any, cast

import torch
from torch import Tensor, nn

from lori_dist.adapter.linear import AdaptedLinear
from lori_dist.adapter.per_task import PerTask
from lori_dist.adapter.routed import RoutedLinear
from lori_dist.adapter.routing import Routing


class Expert(nn.Module):
    """One expert's matrix as a linear layer. It holds no parameter, but looks at the experts' weight."""

    def __init__(self, experts: nn.Module, projection: str, number: int) -> None:
        super().__init__()
        self.held = (experts,)  # in a tuple, so that it is not a submodule
        self.projection, self.number = projection, number
        self.is_transposed = bool(experts.is_transposed)
        """Whether the weight is (experts, in_features, out_features)."""
        sizes = self.fused.shape[1:]
        self.in_features, self.out_features = sizes if self.is_transposed else sizes[::-1]

    @property
    def experts(self) -> nn.Module:
        return self.held[0]

    @property
    def fused(self) -> nn.Parameter:
        return cast(nn.Parameter, getattr(self.experts, self.projection))

    @property
    def weight(self) -> Tensor:
        """(out_features, in_features), a view."""
        matrix = self.fused[self.number]
        return matrix.t() if self.is_transposed else matrix

    @property
    def bias(self) -> Tensor | None:
        return getattr(self.experts, f"{self.projection}_bias")[self.number] if self.experts.has_bias else None

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.linear(x, self.weight.to(x.dtype), self.bias)

    def extra_repr(self) -> str:
        return f"{self.projection}[{self.number}]"


class AdaptedExperts(nn.Module):
    """The experts of a layer, with updates for some of their matrices.

    Every expert computes, if with no token: so all parameters have a gradient on every rank.
    """

    def __init__(
        self, base: nn.Module, layers: Mapping[tuple[str, int], AdaptedLinear], module: str = "experts"
    ) -> None:
        super().__init__()
        self.base, self.module = base, module
        self.first = tuple(itertools.islice(layers.values(), 1))  # in a tuple, so that it is no submodule of this one
        for projection in projections(base):
            chosen = {str(number): layer for (name, number), layer in layers.items() if name == projection}
            if chosen:  # as a child whose path is the weight's own
                self.add_module(projection, nn.ModuleDict(chosen))

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        """hidden_states, (tokens, features); the experts of each token and their weights, (tokens, chosen)."""
        num_chosen, num_experts = top_k_index.shape[-1], cast(int, self.base.num_experts)
        router, places, num_owners = self.router(), top_k_index.flatten(), 1
        if router is not None:  # an expert's tokens are then in the order of their adapters or tasks
            owners, num_owners = router.of_tokens(self.module, hidden_states) + 1, router.num_owners + 1
            places = places * num_owners + owners.repeat_interleave(num_chosen)
        order = places.argsort(stable=True)
        found = self.count(places, num_experts * num_owners)
        counts = [found[first : first + num_owners] for first in range(0, len(found), num_owners)]
        inputs = torch.split(hidden_states[order // num_chosen], [sum(of_expert) for of_expert in counts])
        made = []
        for number, (x, of_expert) in enumerate(zip(inputs, counts, strict=True)):
            owned = [(owner - 1, count) for owner, count in enumerate(of_expert)]
            with contextlib.nullcontext() if router is None else router.within(owned):
                made.append(self._expert(number, x))
        outputs = torch.cat(made)
        weighted = outputs * top_k_weights.flatten()[order, None]
        back = torch.empty_like(order).index_copy_(0, order, torch.arange(len(order), device=order.device))
        return weighted[back].view(*top_k_index.shape, -1).sum(-2).to(hidden_states.dtype)

    def count(self, places: Tensor, num_places: int) -> list[int]:
        """How many tokens go to each place: an expert, or an expert and an adapter."""
        counts: list[int] = places.bincount(minlength=num_places).tolist()
        return counts

    def router(self) -> Routing | PerTask | None:
        """The routing that distinguishes the tokens of several adapters, or of several tasks."""
        if not self.first:
            return None
        [first] = self.first
        if isinstance(first, RoutedLinear):
            return first.routing
        return first.deltas[0].per_task if first.deltas else None

    def _expert(self, number: int, x: Tensor) -> Tensor:
        base = cast(Any, self.base)
        up, down = projections(base)
        wide = self._linear(up, number)(x)
        y: Tensor = self._linear(down, number)(base._apply_gate(wide) if base.has_gate else base.act_fn(wide))
        return base.post_expert_norm(y) if base.has_post_expert_norm else y

    def _linear(self, projection: str, number: int) -> nn.Module:
        layers = cast(nn.ModuleDict, self._modules.get(projection, {}))
        return layers[str(number)] if str(number) in layers else Expert(self.base, projection, number)


def is_experts(module: nn.Module) -> bool:
    """Whether it is what transformers' `use_experts_implementation` makes of a mixture's experts."""
    marks = ("num_experts", "has_gate", "has_bias", "is_transposed", "has_post_expert_norm")
    return all(hasattr(module, mark) for mark in marks) and isinstance(getattr(module, "down_proj", None), nn.Parameter)


def projections(experts: nn.Module) -> tuple[str, str]:
    """The names of its two weights, in the order of computation."""
    return ("gate_up_proj" if experts.has_gate else "up_proj"), "down_proj"


def matrices(path: str, experts: nn.Module) -> dict[str, Expert]:
    """Path -> matrix of every expert."""
    return {
        f"{path}.{projection}.{number}": Expert(experts, projection, number)
        for projection in projections(experts)
        for number in range(cast(int, experts.num_experts))
    }
