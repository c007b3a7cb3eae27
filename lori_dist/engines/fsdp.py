"""torch's FSDP2, `fully_shard`: values, gradients and moments sharded over the ranks, and the base too if asked for."""

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import (
    CPUOffloadPolicy,
    FSDPModule,
    MixedPrecisionPolicy,
    OffloadPolicy,
    fully_shard,
)
from torch.distributed.tensor import DTensor
from transformers import PreTrainedModel

from lori_dist import plugin
from lori_dist.adapter.bases import is_quantized
from lori_dist.adapter.probe import probe
from lori_dist.adapter.routing import adapter_of
from lori_dist.config import Train
from lori_dist.engines import ddp
from lori_dist.errors import ConfigError, JobError
from lori_dist.training.cost import FP32, Collective, Counted, Held, Kind, Load, Owner
from lori_dist.training.data import Batch
from lori_dist.training.device import return_freed
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
    update,
)
from lori_dist.training.loss import task_loss_sums
from lori_dist.training.model import blocks
from lori_dist.training.weights import Weights, fill, materialize, on, whole
from lori_dist.training.world import World

RESULT = ("param_dtype", "reduce_dtype", "output_dtype")
"""Options that may change the result by more than rounding."""


def build(
    model: nn.Module,
    weights: Weights,
    train: Train,
    world: World,
    *,
    state: State | None,
    base: Literal["sharded", "replicated"] = "sharded",
    replicas: Annotated[int, "[1, inf)"] = 1,
    wrap: list[str] | None = None,
    reshard_after_forward: bool | Annotated[int, "[2, inf)"] | None = None,
    forward_prefetch: Annotated[int, "[0, inf)"] = 0,
    backward_prefetch: Annotated[int, "[1, inf)"] = 1,
    param_dtype: Literal["float32", "bfloat16", "float16", None] = None,
    reduce_dtype: Literal["float32", "bfloat16", "float16", None] = None,
    output_dtype: Literal["float32", "bfloat16", "float16", None] = None,
    offload: bool = False,
    pin_memory: bool = True,
) -> "FullySharded":
    """Each transformer block is gathered when it runs: for models that do not fit on one device.

    base: `replicated` keeps the whole base on every rank, and shards only what is trained. replicas: of the base, each
    sharded over its part of the ranks (HSDP); with one per node, gathering stays inside the nodes. wrap: class names
    of the modules that are each gathered by themselves, such as [LlamaAttention, LlamaMLP]; null: the transformer
    blocks. reshard_after_forward: whether these are freed between the forward and the backward pass, or the number of
    neighbouring ranks that keep a copy among them meanwhile; null: true, and false for a replicated base.
    forward_prefetch, backward_prefetch: how many of them are gathered ahead of the one that computes. param_dtype,
    reduce_dtype, output_dtype: what is gathered and computes, what gradients are summed in, and what a block returns;
    null: as it is. Shards, moments and checkpoints stay as they are, values in float32. offload: shards wait in host
    memory, and are taken to the device block by block. pin_memory: where the host keeps them, on a GPU: page-locked,
    for fast copies.
    Raises ConfigError for replicas that do not divide the ranks, for what only a sharded base can have, for a number
    in reshard_after_forward that does not divide the ranks of a replica, and for a class that no module has.
    """
    shards = _check(world.size, base, replicas, offload, pin_memory, reshard_after_forward)
    frees: bool | int = base == "sharded" if reshard_after_forward is None else reshard_after_forward
    settings = Settings(
        shards_base=base == "sharded",
        replicas=replicas,
        wrap=None if wrap is None else tuple(wrap),
        frees=True if frees is not True and frees == shards else frees,
        forward_prefetch=forward_prefetch,
        backward_prefetch=backward_prefetch,
        precision=MixedPrecisionPolicy(
            param_dtype=_dtype(param_dtype), reduce_dtype=_dtype(reduce_dtype), output_dtype=_dtype(output_dtype)
        ),
        offload=CPUOffloadPolicy(pin_memory=pin_memory and world.device.type == "cuda") if offload else OffloadPolicy(),
    )
    return FullySharded(model, weights, train, world, state, settings)


def place(
    model: nn.Module,
    weights: Weights,
    world: World,
    *,
    base: Literal["sharded", "replicated"] = "sharded",
    replicas: Annotated[int, "[1, inf)"] = 1,
    wrap: list[str] | None = None,
    forward_prefetch: Annotated[int, "[0, inf)"] = 0,
    offload: bool = False,
    pin_memory: bool = True,
) -> Callable[[], None]:
    """The base sharded as for a training, to compute with: each block is gathered when it runs, and freed after it.

    The options are those of `build`. Returns what frees it. Raises ConfigError as `build`.
    """
    _check(world.size, base, replicas, offload, pin_memory, None)
    if base == "replicated":
        return ddp.place(model, weights, world)
    settings = Settings(
        shards_base=True,
        replicas=replicas,
        wrap=None if wrap is None else tuple(wrap),
        frees=True,
        forward_prefetch=forward_prefetch,
        backward_prefetch=1,
        precision=MixedPrecisionPolicy(),
        offload=CPUOffloadPolicy(pin_memory=pin_memory and world.device.type == "cuda") if offload else OffloadPolicy(),
    )
    mesh = _mesh(world, replicas)
    layers = _layers_of_large_blocks(model) if wrap is None else []
    root = _shard(model, mesh, settings, apart=[*layers, *_ends(model)])
    if world.device.type == "cpu":
        root._set_unshard_async_op(True)  # else each group's buffer is kept until the next, for overlap that GPUs have
        return_freed()
    _fill(model, weights, world, settings)
    return lambda: None


SMALL = 24
"""Share of the base, as 1/SMALL, above which a block is gathered layer by layer."""


def _layers_of_large_blocks(model: nn.Module) -> list[nn.Module]:
    """The linear layers of blocks that are so large that the gathered ones would be much of a rank's memory."""
    total, known = sum(parameter.numel() for parameter in model.parameters()), probe(model)
    large = {one for one in blocks(model) if SMALL * sum(parameter.numel() for parameter in one.parameters()) > total}
    return [
        layer
        for path, block in model.named_modules()
        if block in large
        for name, layer in block.named_modules()
        if isinstance(layer, nn.Linear) and not known.is_idle(f"{path}.{name}") and not is_quantized(layer)
    ]


def _ends(model: nn.Module) -> list[nn.Module]:
    """The embedding of a model and its output layer, if they are not tied: each is gathered by itself where there is no
    backward pass, for which the root's group stays gathered."""
    if not isinstance(model, PreTrainedModel):
        return []
    found = [model.get_input_embeddings(), model.get_output_embeddings()]
    ends = [
        module for module in found if module is not None and next(module.parameters(recurse=False), None) is not None
    ]
    owners = [id(parameter) for module in model.modules() for parameter in module.parameters(recurse=False)]
    is_shared = any(owners.count(id(parameter)) > 1 for module in ends for parameter in module.parameters())
    return [] if is_shared else ends


@dataclass(frozen=True, kw_only=True, slots=True)
class Settings:
    """The options of `build` in torch's terms."""

    shards_base: bool
    replicas: int
    wrap: tuple[str, ...] | None
    frees: bool | int
    forward_prefetch: int
    backward_prefetch: int
    precision: MixedPrecisionPolicy
    offload: OffloadPolicy


def _dtype(name: str | None) -> torch.dtype | None:
    return None if name is None else getattr(torch, name)


def _check(ranks: int, base: str, replicas: int, offload: bool, pin_memory: bool, frees: bool | int | None) -> int:
    """Returns the ranks of a replica."""
    if ranks % replicas:
        raise ConfigError(f"train.engine.replicas: got {replicas} for {ranks} ranks; give a number that divides them")
    if base == "replicated" and (replicas > 1 or offload):
        found = f"replicas is {replicas}" if replicas > 1 else "offload is true"
        raise ConfigError(
            f"train.engine: base is replicated and {found}, which is for a sharded base; remove one of them"
        )
    if not pin_memory and not offload:
        raise ConfigError("train.engine.pin_memory: got False, which is for offload: true; remove it, or add that")
    shards = ranks // replicas
    if frees is not None and not isinstance(frees, bool) and shards % frees:
        raise ConfigError(
            f"train.engine.reshard_after_forward: got {frees} for {shards} ranks that share a base; give true, false "
            "or a number that divides them"
        )
    return shards


# --- cost ------------------------------------------------------------------------------------------------------------


def placements(ranks: int, nodes: int) -> Iterator[dict[str, Any]]:
    """The base sharded over all, over the ranks of a node, and over none."""
    yield {}
    if ranks > nodes > 1:
        yield {"replicas": nodes}
    yield {"base": "replicated"}


WIDTHS = {"float32": 4, "bfloat16": 2, "float16": 2}


def memory(
    model: Counted,
    load: Load,
    *,
    base: str = "sharded",
    replicas: int = 1,
    wrap: Sequence[str] | None = None,
    reshard_after_forward: bool | int | None = None,
    forward_prefetch: int = 0,
    backward_prefetch: int = 1,
    param_dtype: str | None = None,
    reduce_dtype: str | None = None,
    output_dtype: str | None = None,
    offload: bool = False,
    pin_memory: bool = True,
) -> Held:
    """FSDP keeps everything but the blocks whole from the forward to the backward pass, and blocks that are not
    resharded. A block is whole while it computes, with those that are prefetched, of which one is also being copied
    into place."""
    shards = _check(load.ranks, base, replicas, offload, pin_memory, reshard_after_forward)
    is_sharded = base == "sharded" and shards > 1
    share = -(-FP32 * load.trained // shards)
    summed = FP32 * load.trained if load.micro_batches > 1 and not load.tasks else 0
    block, blocks = _groups(model, wrap, param_dtype)
    rest = _wide(model, model.base, param_dtype) - blocks
    ahead = max(forward_prefetch, backward_prefetch)
    is_kept = reshard_after_forward is False
    between = blocks // int(reshard_after_forward or 1) if _is_part(reshard_after_forward, shards) else 0
    return Held(
        base=0 if offload else -(-model.base // (shards if base == "sharded" else 1)),
        values=0 if offload else share,
        gradients=(0 if offload else share) + summed,
        moments=0 if offload else -(-2 * FP32 * load.trained // shards),
        gathered_at_loss=rest + (blocks if is_kept else between) if is_sharded else 0,
        gathered_in_block=rest + (blocks if is_kept else between + (2 + ahead) * block) if is_sharded else 0,
    )


def _is_part(frees: bool | int | None, shards: int) -> bool:
    """Whether fewer ranks than all keep a copy among them."""
    return frees is not None and not isinstance(frees, bool) and frees < shards


def _wide(model: Counted, size: int, dtype: str | None) -> int:
    """Bytes of the base once they are gathered."""
    return size if dtype is None else size * WIDTHS[dtype] // model.dtype


def _groups(model: Counted, wrap: Sequence[str] | None, dtype: str | None) -> tuple[int, int]:
    """Bytes of the largest module that is gathered by itself, and of all of them. Raises ConfigError."""
    if wrap is None:
        return _wide(model, model.block, dtype), _wide(model, model.blocks, dtype)
    for name in wrap:
        if name not in model.classes:
            raise _unknown_class(name, model.classes, "the model")
    sizes = [model.classes[name] for name in dict.fromkeys(wrap)]
    largest, total = max(one.largest for one in sizes), min(model.base, sum(one.total for one in sizes))
    return _wide(model, largest, dtype), _wide(model, total, dtype)


def traffic(
    model: Counted,
    load: Load,
    *,
    base: str = "sharded",
    replicas: int = 1,
    wrap: Sequence[str] | None = None,
    reshard_after_forward: bool | int | None = None,
    forward_prefetch: int = 0,
    backward_prefetch: int = 1,
    param_dtype: str | None = None,
    reduce_dtype: str | None = None,
    output_dtype: str | None = None,
    offload: bool = False,
    pin_memory: bool = True,
) -> list[Collective]:
    """The base is gathered in each pass of each micro-batch, but what is outside of blocks, and what is not freed
    after the forward pass, once for both."""
    found = list[Collective]()
    group, per_node = load.ranks // replicas, load.ranks // load.nodes
    values = load.trained * WIDTHS[param_dtype or "float32"]
    reduced = load.trained * WIDTHS[reduce_dtype or param_dtype or "float32"]
    crosses = _spans_nodes(load, group)
    frees = base == "sharded" if reshard_after_forward is None else reshard_after_forward
    _, blocks = _groups(model, wrap, param_dtype)

    def add(kind: Kind, owner: Owner, size: int, ranks: int, spans: bool, rings: int = 1) -> None:
        if ranks > 1:
            found.append(Collective(kind=kind, owner=owner, bytes=size, group=ranks, spans_nodes=spans, rings=rings))

    # Ranks that have a copy among them after the forward pass gather it from there.
    near = int(frees) if _is_part(frees, group) else group
    times = 2 if frees and near == group else 1
    owners: list[tuple[Owner, int, int]] = [("adapter", values, values)]
    if base == "sharded":
        owners.insert(0, ("base", _wide(model, model.base, param_dtype), blocks))
    for owner, size, again in owners:
        add("gather", owner, load.micro_batches * (size + (times - 1) * again), group, crosses)
        if near < group:
            add("gather", owner, load.micro_batches * again, near, crosses and near > per_node)
    if not load.tasks:
        add("reduce", "adapter", reduced, group, crosses)
    if offload:
        passes = 2 if frees else 1
        copied = passes * load.micro_batches * -(-(model.base + FP32 * load.trained) // group)
        found.append(Collective(kind="copy", owner="base", bytes=copied, group=1, spans_nodes=False))
    # A rank's share is that of one rank of every other group, with which it is summed, or which has a part of it.
    kind: Kind = "gather" if load.tasks else "all_reduce"
    size = FP32 * load.trained if load.tasks else reduced
    add(kind, "adapter", -(-size // group), replicas, load.nodes > 1, min(group, per_node))
    return found


def _spans_nodes(load: Load, group: int) -> bool:
    """Whether a group of so many ranks is on more than one node."""
    return load.nodes > 1 and group > load.ranks // load.nodes


def place_memory(
    model: Counted,
    load: Load,
    *,
    base: str = "sharded",
    replicas: int = 1,
    wrap: Sequence[str] | None = None,
    forward_prefetch: int = 0,
    offload: bool = False,
    pin_memory: bool = True,
) -> Held:
    """What is gathered by itself is freed when it has run, and is there twice while it is copied into place. What is
    outside of blocks and ends stays gathered."""
    shards = _check(load.ranks, base, replicas, offload, pin_memory, None)
    group, grouped = _groups(model, wrap, None)
    if wrap is None and SMALL * model.block > model.base:
        group = model.layer
    rest = max(0, model.base - grouped - sum(model.ends))
    gathered = rest + (2 + forward_prefetch) * max(group, *model.ends, 0)
    is_gathered = base == "sharded" and (shards > 1 or offload)
    return Held(
        base=0 if offload else -(-model.base // (shards if base == "sharded" else 1)),
        values=0,
        gradients=0,
        moments=0,
        gathered_at_loss=gathered if is_gathered else 0,
        gathered_in_block=gathered if is_gathered else 0,
    )


def place_traffic(
    model: Counted,
    load: Load,
    *,
    base: str = "sharded",
    replicas: int = 1,
    wrap: Sequence[str] | None = None,
    forward_prefetch: int = 0,
    offload: bool = False,
    pin_memory: bool = True,
) -> list[Collective]:
    """The base is gathered once in each forward pass."""
    if base == "replicated":
        return []
    group = load.ranks // replicas
    spans = _spans_nodes(load, group)
    found = [Collective(kind="gather", owner="base", bytes=model.base, group=group, spans_nodes=spans)]
    if offload:
        copied = -(-model.base // group)
        found.append(Collective(kind="copy", owner="base", bytes=copied, group=1, spans_nodes=False))
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
        settings: Settings,
    ) -> None:
        self.mesh = _mesh(world, settings.replicas)
        self.model: Any = _shard(model, self.mesh, settings)  # an nn.Module and an FSDPModule
        _fill(model, weights, world, settings)
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
            for path, gradient in tasks.gradient(self.parts("values"), self.num_steps, losses).items():
                self.parameters[path].grad = _like(self.parameters[path], gradient)
        norm = self._clip()
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
        return {path: _part(p if quantity == "values" else state[p][quantity]) for path, p in self.parameters.items()}

    def _clip(self) -> Tensor:
        """Clips as `clip_grad_norm_` does, which would make each operation one on DTensors, and cannot clip offloaded
        ones."""
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


def _mesh(world: World, replicas: int) -> DeviceMesh:
    shape = (replicas, world.size // replicas)
    return init_device_mesh(world.device.type, shape, mesh_dim_names=("replica", "shard"))


def _fill(model: nn.Module, weights: Weights, world: World, settings: Settings) -> None:
    place = torch.device("cpu") if isinstance(settings.offload, CPUOffloadPolicy) else world.device
    materialize(model, world.device, lambda parameter: on(place, parameter))
    fill(model, weights, _part)


def _shard(model: nn.Module, mesh: DeviceMesh, settings: Settings, apart: Sequence[nn.Module] = ()) -> FSDPModule:
    """Blocks first, the rest with the root: embeddings and head, tied or not, are then in one group, but for modules
    that are to be `apart`."""
    frozen = {parameter for parameter in model.parameters() if not parameter.requires_grad}
    options: dict[str, Any] = {
        "mesh": mesh["shard"] if mesh.shape[0] == 1 else mesh,
        "ignored_params": None if settings.shards_base else frozen,
        "offload_policy": settings.offload,
        "mp_policy": settings.precision,
    }
    for module in apart:
        fully_shard(module, reshard_after_forward=settings.frees, **options)
    # A module is sharded after those inside it, and blocks are given last first.
    groups = blocks(model) if settings.wrap is None else _of_classes(model, settings.wrap)
    if not groups:
        raise JobError(
            f"train.engine: fsdp shards transformer blocks, and {type(model).__name__} does not say which of its "
            "modules they are (_no_split_modules); give their classes in train.engine.wrap, or use ddp or deepspeed"
        )
    for group in groups:
        # Values alone are so small that they may stay gathered between forward and backward.
        if not hasattr(group, "_get_fsdp_state"):  # one that is apart
            fully_shard(group, reshard_after_forward=settings.frees, **options)
    root = fully_shard(model, **options)
    _prefetch([group for group in groups if isinstance(group, FSDPModule)][::-1], settings)
    return root


def _of_classes(model: nn.Module, names: Sequence[str]) -> list[nn.Module]:
    """Modules of classes with these names, each after those inside it."""
    there = {
        type(module).__name__
        for module in model.modules()
        if next(module.parameters(), None) is not None and not type(module).__module__.startswith("lori_dist.")
    }
    for name in names:
        if name not in there:
            raise _unknown_class(name, there, type(model).__name__)
    return [module for module in model.modules() if type(module).__name__ in names and module is not model][::-1]


def _unknown_class(name: str, there: Iterable[str], model: str) -> ConfigError:
    listing = f"there are {', '.join(sorted(there))}.{plugin.nearest(name, there)}"
    return ConfigError(f"train.engine.wrap: no module of {model} is a {name}; {listing}")


def _prefetch(groups: Sequence[FSDPModule], settings: Settings) -> None:
    """Sets prefetching in the order of the forward pass. By default torch prefetches one group, in the backward pass
    alone."""
    for number, group in enumerate(groups):
        if settings.forward_prefetch:
            group.set_modules_to_forward_prefetch(list(groups[number + 1 : number + 1 + settings.forward_prefetch]))
        if settings.backward_prefetch > 1:
            group.set_modules_to_backward_prefetch(
                list(groups[max(0, number - settings.backward_prefetch) : number][::-1])
            )


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
