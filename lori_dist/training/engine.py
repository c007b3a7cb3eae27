"""What trains a model: one small protocol, and what all of its implementations share.

An engine is `build(model, train, world, *, state, ...)` in a file of engines/. The keyword-only parameters that have a
default are its options.
"""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
import torch.distributed as dist
from torch import Tensor, nn

from lori_dist.config import Train
from lori_dist.training.data import Batch


@dataclass(frozen=True, kw_only=True, slots=True)
class State:
    """All that training has changed, whatever engine holds it: full tensors on the CPU, fp32.

    The mappings have one key per module that keeps any entries, in the model's order.
    """

    step: int
    """Optimizer steps done."""
    values: Mapping[str, Tensor]
    """Module path -> (kept,)."""
    exp_avg: Mapping[str, Tensor]
    """Adam's first moment, as values."""
    exp_avg_sq: Mapping[str, Tensor]
    """Adam's second moment, as values."""


@dataclass(frozen=True, kw_only=True, slots=True)
class StepResult:
    """Equal on all ranks."""

    loss: float
    """Mean negative log-likelihood of a target token, in nats, over the global batch."""
    grad_norm: float
    """Of the whole gradient, before clipping."""


class Engine(Protocol):
    """A model being trained. All methods are collectives: every rank calls them in the same order."""

    @property
    def model(self) -> nn.Module:
        """What computes: the library's own wrapper."""
        ...

    def step(self, micro_batches: Sequence[Batch], *, num_targets: int, lr: float) -> StepResult:
        """One optimizer step over this rank's micro-batches, of which every rank has the same number.

        num_targets: of the global batch, over all ranks. lr: for this step.
        """
        ...

    def state(self) -> State:
        """The portable state, in full on every rank."""
        ...

    def close(self) -> None:
        """Gives its memory back. Neither the engine nor the model it was built from is of use afterwards."""
        ...


def restore_values(parameters: Mapping[str, nn.Parameter], state: State | None) -> None:
    """Puts the values of a state into a model that no engine has yet."""
    if state is not None:
        with torch.no_grad():
            for path, parameter in parameters.items():
                parameter.copy_(state.values[path])


def adamw(parameters: Iterable[Tensor], train: Train) -> torch.optim.AdamW:
    """The optimizer, over the trained values only."""
    return torch.optim.AdamW(
        parameters, lr=train.lr, betas=train.betas, eps=train.eps, weight_decay=train.weight_decay, fused=True
    )


def set_learning_rate(optimizer: torch.optim.Optimizer, lr: float) -> None:
    for group in optimizer.param_groups:
        group["lr"] = lr


def zero_moments(like: Tensor, num_steps: int) -> dict[str, Tensor]:
    """What AdamW keeps for a parameter. Made before the first step, so that it can always be read."""
    return {
        "step": torch.tensor(float(num_steps), device=like.device),
        "exp_avg": torch.zeros_like(like),
        "exp_avg_sq": torch.zeros_like(like),
    }


def restore_moments(
    optimizer: torch.optim.Optimizer,
    parameters: Mapping[str, Tensor],
    state: State | None,
    share: Callable[[Tensor, Tensor], Tensor],
) -> None:
    """Puts the moments of a state, or zeros, into an optimizer.

    share: of a full tensor, what belongs to a parameter as this rank holds it.
    """
    for path, parameter in parameters.items():
        kept = optimizer.state[parameter] = zero_moments(parameter, state.step if state else 0)
        if state is not None:
            kept["exp_avg"].copy_(share(state.exp_avg[path], parameter))
            kept["exp_avg_sq"].copy_(share(state.exp_avg_sq[path], parameter))


def clip(parameters: Iterable[Tensor], max_norm: float | None) -> Tensor:
    """Scales the gradients down to a global norm. Returns the norm they had."""
    return torch.nn.utils.clip_grad_norm_(list(parameters), math.inf if max_norm is None else max_norm)


def total(losses: Sequence[Tensor]) -> float:
    """The sum over micro-batches and ranks."""
    loss = torch.stack(list(losses)).sum()
    dist.all_reduce(loss)
    return loss.item()


def on_cpu(tensor: Tensor) -> Tensor:
    """A copy that later steps leave alone."""
    return tensor.detach().to("cpu", torch.float32, copy=True)
