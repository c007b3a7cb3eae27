"""torch's DistributedDataParallel: the base and the values on every rank, gradients averaged."""

from collections.abc import Sequence
from contextlib import nullcontext

from torch import nn
from torch.nn.parallel import DistributedDataParallel

from lori_dist.adapter.attach import trainable
from lori_dist.config import Train
from lori_dist.training.data import Batch
from lori_dist.training.engine import (
    State,
    StepResult,
    adamw,
    clip,
    on_cpu,
    restore_moments,
    restore_values,
    set_learning_rate,
    total,
)
from lori_dist.training.loss import loss_sum
from lori_dist.training.world import World


def build(model: nn.Module, train: Train, world: World, *, state: State | None) -> "Replicated":
    """Every rank holds the whole base: for models that fit on one device with room to spare."""
    return Replicated(model, train, world, state)


class Replicated:
    """An `Engine`."""

    def __init__(self, model: nn.Module, train: Train, world: World, state: State | None) -> None:
        restore_values(trainable(model), state)
        model.to(world.device)
        self.parameters = trainable(model)
        self.model = DistributedDataParallel(
            model,
            device_ids=[world.device] if world.device.type == "cuda" else None,
            # Base, A and values are equal on all ranks by construction; sending them would cost a pass over the base,
            init_sync=False,
            gradient_as_bucket_view=True,
        )
        self.model.broadcast_buffers = False  # and A would be sent in every forward pass
        self.optimizer = adamw(self.parameters.values(), train)
        restore_moments(self.optimizer, self.parameters, state, lambda full, parameter: full)
        self.world, self.max_norm = world, train.clip
        self.num_steps = state.step if state else 0

    def step(self, micro_batches: Sequence[Batch], *, num_targets: int, lr: float) -> StepResult:
        set_learning_rate(self.optimizer, lr)
        losses = []
        for i, batch in enumerate(micro_batches):
            with nullcontext() if i == len(micro_batches) - 1 else self.model.no_sync():
                loss = loss_sum(self.model, batch.to(self.world.device)) / num_targets
                (loss * self.world.size).backward()  # gradients become means over the ranks, the loss is a sum
            losses.append(loss.detach())
        norm = clip(self.parameters.values(), self.max_norm)
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.num_steps += 1
        return StepResult(loss=total(losses), grad_norm=norm.item())

    def state(self) -> State:
        optimizer = self.optimizer.state
        return State(
            step=self.num_steps,
            values={path: on_cpu(p) for path, p in self.parameters.items()},
            exp_avg={path: on_cpu(optimizer[p]["exp_avg"]) for path, p in self.parameters.items()},
            exp_avg_sq={path: on_cpu(optimizer[p]["exp_avg_sq"]) for path, p in self.parameters.items()},
        )

    def close(self) -> None:
        """Nothing is left that would outlive it."""
