"""torch's FSDP2, `fully_shard`: values, gradients and moments sharded over the ranks, and the base too if asked for."""

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Annotated, Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import CPUOffloadPolicy, FSDPModule, OffloadPolicy, fully_shard
from torch.distributed.tensor import DTensor

from lori_dist.config import Train
from lori_dist.errors import ConfigError, JobError
from lori_dist.training.cost import FP32, Collective, Counted, Held, Kind, Load, Owner
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
    finish,
    restore,
    set_learning_rate,
    set_num_steps,
    start_moments,
    steps_had,
    trained,
)
from lori_dist.training.loss import task_loss_sums
from lori_dist.training.model import blocks
from lori_dist.training.weights import Weights, fill, materialize, on, whole
from lori_dist.training.world import World


def build(
    model: nn.Module,
    weights: Weights,
    train: Train,
    world: World,
    *,
    state: State | None,
    base: Literal["sharded", "replicated"] = "sharded",
    replicas: Annotated[int, "[1, inf)"] = 1,
    offload: bool = False,
) -> "FullySharded":
    """Each transformer block is gathered when it runs: for models that do not fit on one device.

    base: `replicated` keeps the whole base on every rank, and shards only what is trained. replicas: of the base, each
    sharded over its part of the ranks (HSDP); with one per node, gathering stays inside the nodes. offload: shards
    wait in host memory, and are taken to the device block by block.
    Raises ConfigError for replicas that do not divide the ranks, and for replicas or offload of a replicated base.
    """
    _check(world.size, base, replicas, offload)
    return FullySharded(model, weights, train, world, state, base == "sharded", replicas, offload)


def _check(ranks: int, base: str, replicas: int, offload: bool) -> None:
    if ranks % replicas:
        raise ConfigError(f"train.engine.replicas: got {replicas} for {ranks} ranks; give a number that divides them")
    if base == "replicated" and (replicas > 1 or offload):
        found = f"replicas is {replicas}" if replicas > 1 else "offload is true"
        raise ConfigError(
            f"train.engine: base is replicated and {found}, which is for a sharded base; remove one of them"
        )


# --- cost ------------------------------------------------------------------------------------------------------------


def placements(ranks: int, nodes: int) -> Iterator[dict[str, Any]]:
    """The base sharded over all, over the ranks of a node, and over none."""
    yield {}
    if ranks > nodes > 1:
        yield {"replicas": nodes}
    yield {"base": "replicated"}


def memory(model: Counted, load: Load, *, base: str = "sharded", replicas: int = 1, offload: bool = False) -> Held:
    """Of FSDP all but blocks stays whole from the forward to the backward pass. A block is there whole while it
    computes, with the next, as it arrives and is copied into place."""
    _check(load.ranks, base, replicas, offload)
    shards = load.ranks // replicas
    is_sharded = base == "sharded" and shards > 1
    share = -(-FP32 * load.trained // shards)
    summed = FP32 * load.trained if load.micro_batches > 1 and not load.tasks else 0
    rest = model.base - model.blocks if is_sharded else 0
    return Held(
        base=0 if offload else -(-model.base // (shards if base == "sharded" else 1)),
        values=0 if offload else share,
        gradients=(0 if offload else share) + summed,
        moments=0 if offload else -(-2 * FP32 * load.trained // shards),
        gathered_at_loss=rest,
        gathered_in_block=rest + 3 * model.block if is_sharded else 0,
    )


def traffic(
    model: Counted, load: Load, *, base: str = "sharded", replicas: int = 1, offload: bool = False
) -> list[Collective]:
    """The base is gathered in each pass of each micro-batch, but what is outside of blocks once for both passes."""
    found = list[Collective]()
    group, per_node, values = load.ranks // replicas, load.ranks // load.nodes, FP32 * load.trained
    crosses = load.nodes > 1 and group > per_node

    def add(kind: Kind, owner: Owner, size: int, ranks: int, spans: bool, rings: int = 1) -> None:
        if ranks > 1:
            found.append(Collective(kind=kind, owner=owner, bytes=size, group=ranks, spans_nodes=spans, rings=rings))

    if base == "sharded":
        rest = model.base - model.blocks
        add("gather", "base", load.micro_batches * (2 * model.blocks + rest), group, crosses)
        add("gather", "adapter", load.micro_batches * 2 * values, group, crosses)
    else:
        add("gather", "adapter", load.micro_batches * values, group, crosses)
    if not load.tasks:
        add("reduce", "adapter", values, group, crosses)
    if offload:
        copied = 2 * load.micro_batches * -(-(model.base + values) // group)
        found.append(Collective(kind="copy", owner="base", bytes=copied, group=1, spans_nodes=False))
    # A rank's share is that of one rank of every other group, with which it is summed, or which has a part of it.
    kind: Kind = "gather" if load.tasks else "all_reduce"
    add(kind, "adapter", -(-values // group), replicas, load.nodes > 1, min(group, per_node))
    return found


class FullySharded:
    """An `Engine`."""

    def __init__(
        self,
        model: nn.Module,
        weights: Weights,
        train: Train,
        world: World,
        state: State | None,
        shards_base: bool,
        replicas: int,
        offload: bool,
    ) -> None:
        self.mesh = init_device_mesh(
            world.device.type, (replicas, world.size // replicas), mesh_dim_names=("replica", "shard")
        )
        self.model: Any = _shard(model, self.mesh, shards_base, offload)  # an nn.Module and an FSDPModule
        place = torch.device("cpu") if offload else world.device
        materialize(model, world.device, lambda parameter: on(place, parameter))
        fill(model, weights, _part)
        self.parameters: dict[str, Any] = trained(model)  # DTensors
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
            self.model.set_requires_gradient_sync(i == len(micro_batches) - 1 and tasks is None)
            loss = task_loss_sums(self.model, batch.to(self.world.device)) / num_targets
            # Gradients become means over the ranks, the loss is a sum.
            (loss.sum() * (self.world.size if tasks is None else 1)).backward()
            losses.append(loss.detach())
        if tasks is not None:
            for path, gradient in tasks.gradient(self.parts("values"), self.num_steps).items():
                self.parameters[path].grad = _like(self.parameters[path], gradient)
        norm = self._clip()
        result = finish(losses, norm)
        if accept(result):
            self.optimizer.step()
            self.num_steps += 1
        self.optimizer.zero_grad()
        return result

    def load(self, state: State) -> None:
        self.num_steps = state.step
        set_num_steps(self.optimizer, state.step)
        restore(self, state)

    def parts(self, quantity: Quantity) -> Mapping[str, Part]:
        state = self.optimizer.state
        return {path: _part(p if quantity == "values" else state[p][quantity]) for path, p in self.parameters.items()}

    def _clip(self) -> Tensor:
        """As `clip_grad_norm_`, which makes a DTensor's way of each operation, and cannot where they are offloaded."""
        grads = [parameter.grad.to_local() for parameter in self.parameters.values()]
        squared = torch.nn.utils.get_total_norm(grads).to(self.world.device).square()
        dist.all_reduce(squared, group=self.mesh.get_group("shard"))
        norm = squared.sqrt()
        if self.max_norm is not None:
            factor = (self.max_norm / (norm + 1e-6)).clamp(max=1.0)
            torch._foreach_mul_(grads, factor.to(grads[0].device))
        return norm

    def close(self) -> None:
        """Nothing is left that would outlive it."""


def _shard(model: nn.Module, mesh: DeviceMesh, shards_base: bool, offload: bool) -> FSDPModule:
    """Blocks first, the rest with the root: embeddings and head, tied or not, are then in one group."""
    policy = CPUOffloadPolicy(pin_memory=mesh.device_type == "cuda") if offload else OffloadPolicy()
    ignored = None if shards_base else {parameter for parameter in model.parameters() if not parameter.requires_grad}
    if mesh.shape[0] == 1:
        mesh = mesh["shard"]
    for block in _blocks(model):
        # Values alone are so small that they may stay gathered between forward and backward.
        fully_shard(block, mesh=mesh, ignored_params=ignored, offload_policy=policy, reshard_after_forward=shards_base)
    return fully_shard(model, mesh=mesh, ignored_params=ignored, offload_policy=policy)


def _blocks(model: nn.Module) -> list[nn.Module]:
    found = blocks(model)
    if not found:
        raise JobError(
            f"train.engine: fsdp shards transformer blocks, and {type(model).__name__} does not say which of its "
            "modules they are (_no_split_modules); use ddp or deepspeed"
        )
    return found


def _like(parameter: DTensor, flat: Tensor) -> DTensor:
    """A DTensor as the parameter, of this rank's share."""
    local = flat.to(parameter.to_local().device).view(parameter.to_local().shape)
    shape, stride = parameter.shape, parameter.stride()
    return DTensor.from_local(
        local, parameter.device_mesh, parameter.placements, run_check=False, shape=shape, stride=stride
    )


def _part(tensor: Tensor) -> Part:
    """Rows of a tensor: each rank but the last has as many as divide them evenly, rounded up."""
    if not isinstance(tensor, DTensor):
        return whole(tensor)
    mesh = tensor.device_mesh
    rank, size = mesh.get_local_rank(mesh.ndim - 1), mesh.size(mesh.ndim - 1)
    rows = -(-tensor.shape[0] // size)
    first = min(rank * rows, tensor.shape[0])
    return Part(start=first * math.prod(tensor.shape[1:]), data=tensor.to_local().detach().view(-1))
