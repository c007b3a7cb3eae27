"""torch's DistributedDataParallel: the base and the values on every rank, gradients averaged."""

from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext

from torch import nn
from torch.nn.parallel import DistributedDataParallel

from lori_dist.adapter.routing import adapter_of
from lori_dist.config import Train
from lori_dist.training.cost import FP32, Collective, Counted, Held, Kind, Load
from lori_dist.training.data import Batch
from lori_dist.training.engine import (
    Accept,
    LearningRate,
    Part,
    Quantity,
    State,
    StepResult,
    TaskGradients,
    adamw,
    always,
    clip,
    finish,
    restore,
    set_learning_rate,
    set_num_steps,
    start_moments,
    steps_had,
    trained,
    update,
)
from lori_dist.training.loss import task_loss_sums
from lori_dist.training.weights import Weights, fill, materialize, whole
from lori_dist.training.world import World

BUCKETS = 100_000_000
"""Bytes through which gradients are reduced: torch's buckets of 25 MB, of which some are under way at once."""


def build(model: nn.Module, weights: Weights, train: Train, world: World, *, state: State | None) -> "Replicated":
    """Every rank holds the whole base: for models that fit on one device with room to spare."""
    return Replicated(model, weights, train, world, state)


def place(model: nn.Module, weights: Weights, world: World) -> Callable[[], None]:
    """The whole base on every rank, to compute with. Returns what frees it."""
    materialize(model, world.device)
    fill(model, weights, whole)
    return lambda: None


def memory(model: Counted, load: Load) -> Held:
    """Everything whole, on every rank."""
    size = FP32 * load.trained
    return Held(base=model.base, values=size, gradients=size, moments=2 * size, buffers=min(size, BUCKETS))


def traffic(model: Counted, load: Load) -> list[Collective]:
    """One reduction of the gradients; of tasks whose gradients are kept apart, what is made of them is gathered."""
    kind: Kind = "gather" if load.tasks else "all_reduce"
    size, spans = FP32 * load.trained, load.nodes > 1
    return [Collective(kind=kind, owner="adapter", bytes=size, group=load.ranks, spans_nodes=spans)]


class Replicated:
    """An `Engine`."""

    def __init__(self, model: nn.Module, weights: Weights, train: Train, world: World, state: State | None) -> None:
        place(model, weights, world)
        self.parameters = trained(model)
        self.model = DistributedDataParallel(
            model,
            device_ids=[world.device] if world.device.type == "cuda" else None,
            # Base, A and values are equal on all ranks by construction; sending them would cost a pass over the base,
            init_sync=False,
            gradient_as_bucket_view=True,
        )
        self.model.broadcast_buffers = False  # and A would be sent in every forward pass
        self.optimizer = adamw(self.parameters, train)
        self.world, self.max_norm = world, train.clip
        self.num_steps = state.step if state else 0
        start_moments(self.optimizer, [(p, steps_had(name, state)) for name, p in self.parameters.items()])
        restore(self, state)

    def step(
        self,
        micro_batches: Sequence[Batch],
        *,
        num_targets: int,
        lr: LearningRate,
        tasks: TaskGradients | None = None,
        accept: Accept = always,
    ) -> StepResult:
        set_learning_rate(self.optimizer, lr)
        losses = []
        for i, batch in enumerate(micro_batches):
            if tasks is not None:
                tasks.begin(batch)
            with nullcontext() if i == len(micro_batches) - 1 and tasks is None else self.model.no_sync():
                loss = task_loss_sums(self.model, batch.to(self.world.device)) / num_targets
                # Gradients become means over the ranks, the loss is a sum.
                (loss.sum() * (self.world.size if tasks is None else 1)).backward()
            losses.append(loss.detach())
        if tasks is not None:
            for path, gradient in tasks.gradient(self.parts("values"), self.num_steps, losses).items():
                self.parameters[path].grad = gradient.view_as(self.parameters[path])
        norm = clip(self.parameters.values(), self.max_norm)
        result = finish(losses, norm)
        self.num_steps += update(self.optimizer, self.parameters, accept(result))
        self.optimizer.zero_grad()
        return result

    def load(self, state: State) -> None:
        self.num_steps = state.step
        moments = ((adapter_of(name), self.optimizer.state[p]) for name, p in self.parameters.items())
        set_num_steps(moments, state)
        restore(self, state)

    def parts(self, quantity: Quantity) -> Mapping[str, Part]:
        state = self.optimizer.state
        return {path: whole(p if quantity == "values" else state[p][quantity]) for path, p in self.parameters.items()}

    def close(self) -> None:
        """Nothing is left that would outlive it."""
