"""What the layers of a form keep beside what is trained: it follows from what they count in each step."""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from lori_dist.adapter import sharded
from lori_dist.adapter.formed import FormedDelta, formed
from lori_dist.adapter.linear import AdaptedLinear
from lori_dist.adapter.row_tokens import rows_of

States = Mapping[str, Mapping[str, list[float]]]
"""Module -> name -> what follows from its counts, as plain JSON."""


def _counting(model: nn.Module) -> dict[str, FormedDelta]:
    """Path -> the layers that count, in the order of the model, which is the same on all ranks."""
    model = sharded.unwrapped(model)
    if rows_of(model) is None:  # as of most forms, in each step
        return {}
    layers = {path: module for path, module in model.named_modules() if isinstance(module, AdaptedLinear)}
    return {path: one for path, one in formed(layers).items() if one.counts is not None and not one.is_empty}


@torch.no_grad()
def end_step(model: nn.Module, reduce: Callable[[Tensor], Any] | None = None, *, is_taken: bool = True) -> None:
    """After each step: what follows from the counts of a form changes by those of the step. Every rank calls this.

    reduce: sums a tensor over all ranks, in place. is_taken: whether the step's update was; else its counts are dropped
    as well.
    """
    layers = _counting(model)
    if not layers:
        return
    counts = next(iter(layers.values())).counts
    assert counts is not None
    if is_taken:
        device = next(iter(next(iter(layers.values())).states().values())).device
        summed = torch.stack([counts.of(delta.module, delta.rank, device) for delta in layers.values()])
        if reduce is not None:
            reduce(summed)
        for delta, of_layer in zip(layers.values(), summed, strict=True):
            delta.after_step(of_layer)
    counts.sums.clear()


def states_of(model: nn.Module) -> States:
    """What follows from counts by now, the same on all ranks; empty where nothing does."""
    return {
        path: {name: state.tolist() for name, state in delta.states().items()}
        for path, delta in _counting(model).items()
    }


def take(model: nn.Module, states: States) -> None:
    """Puts what `states_of` gave in place of what there is: zeros without any."""
    for path, delta in _counting(model).items():
        zeros = {name: torch.zeros_like(state) for name, state in delta.states().items()}
        delta.take({**zeros, **{name: torch.tensor(state) for name, state in states.get(path, {}).items()}})
