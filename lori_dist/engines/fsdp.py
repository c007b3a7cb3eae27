"""torch's FSDP2, `fully_shard`: base, values, gradients and moments sharded over all ranks."""

from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor

from lori_dist.adapter.attach import trainable
from lori_dist.config import Train
from lori_dist.errors import JobError
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


def build(model: nn.Module, train: Train, world: World, *, state: State | None) -> "FullySharded":
    """Each transformer block is gathered when it runs: for models that do not fit on one device."""
    return FullySharded(model, train, world, state)


class FullySharded:
    """An `Engine`."""

    def __init__(self, model: nn.Module, train: Train, world: World, state: State | None) -> None:
        restore_values(trainable(model), state)
        self.model: Any = _shard(model, world)  # an nn.Module and an FSDPModule
        self.parameters = {path: _sharded(parameter) for path, parameter in trainable(model).items()}
        self.optimizer = adamw(self.parameters.values(), train)
        restore_moments(self.optimizer, self.parameters, state, _share)
        self.world, self.max_norm = world, train.clip
        self.num_steps = state.step if state else 0

    def step(self, micro_batches: Sequence[Batch], *, num_targets: int, lr: float) -> StepResult:
        set_learning_rate(self.optimizer, lr)
        losses = []
        for i, batch in enumerate(micro_batches):
            self.model.set_requires_gradient_sync(i == len(micro_batches) - 1)
            loss = loss_sum(self.model, batch.to(self.world.device)) / num_targets
            (loss * self.world.size).backward()  # gradients become means over the ranks, the loss is a sum
            losses.append(loss.detach())
        norm = clip(self.parameters.values(), self.max_norm)
        assert isinstance(norm, DTensor)
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.num_steps += 1
        return StepResult(loss=total(losses), grad_norm=norm.full_tensor().item())

    def state(self) -> State:
        optimizer = self.optimizer.state
        return State(
            step=self.num_steps,
            values={path: _gathered(p) for path, p in self.parameters.items()},
            exp_avg={path: _gathered(optimizer[p]["exp_avg"]) for path, p in self.parameters.items()},
            exp_avg_sq={path: _gathered(optimizer[p]["exp_avg_sq"]) for path, p in self.parameters.items()},
        )

    def close(self) -> None:
        """Nothing is left that would outlive it."""


def _shard(model: nn.Module, world: World) -> FSDPModule:
    """Blocks first, the rest with the root: embeddings and head, tied or not, are then in one group."""
    mesh = init_device_mesh(world.device.type, (world.size,))
    for block in _blocks(model):
        fully_shard(block, mesh=mesh)
    model.to(world.device)  # what no group manages: buffers outside of blocks
    return fully_shard(model, mesh=mesh)


def _blocks(model: nn.Module) -> list[nn.Module]:
    """The modules that transformers keeps on one device, inner ones first."""
    names = set(getattr(model, "_no_split_modules", None) or ())
    blocks = [module for module in model.modules() if type(module).__name__ in names]
    if not blocks:
        raise JobError(
            f"train.engine: fsdp shards transformer blocks, and {type(model).__name__} does not say which of its "
            "modules they are (_no_split_modules); use ddp or deepspeed"
        )
    return blocks[::-1]


def _sharded(parameter: nn.Parameter) -> DTensor:
    assert isinstance(parameter, DTensor)
    return parameter


def _share(full: Tensor, parameter: Tensor) -> DTensor:
    assert isinstance(parameter, DTensor)
    # Every rank has the full tensor, so nothing is sent.
    return distribute_tensor(full.to(parameter.device), parameter.device_mesh, parameter.placements, src_data_rank=None)


def _gathered(tensor: DTensor) -> Tensor:
    return on_cpu(tensor.full_tensor())
