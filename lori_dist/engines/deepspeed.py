"""DeepSpeed ZeRO: moments (stage 1), gradients (2) and base and values (3) sharded over all ranks.

The portable state and loading without a whole base need names that DeepSpeed does not document, which a test holds on
to: `single_partition_of_fp32_groups`, `_lazy_init_hp_params_optimizer_state` and a parameter's `_hp_mapping` (stages 1
and 2), `fp32_partitioned_groups_flat`, and `_convert_to_deepspeed_param` and a parameter's `ds_tensor` (stage 3). So
do gradients of tasks together, `_index_in_param_group` (stages 1 and 2), and training once more in the same processes:
`comm.cdb`, `_WORLD_GROUP` and `_ZERO_PARAM_INTRA_PARALLEL_GROUP`.
"""

import functools
import logging
import math
import os
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from typing import Annotated, Any, Literal

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

if not torch.cuda.is_available():  # DeepSpeed looks for itself when it is imported, and warns if it finds none
    os.environ.setdefault("DS_ACCELERATOR", "cpu")
import deepspeed
from deepspeed.comm import comm
from deepspeed.utils import (
    groups,
    safe_get_local_fp32_param,
    safe_get_local_optimizer_state,
    safe_set_local_grad,
    set_z3_leaf_modules,
)

from lori_dist.adapter.experts import AdaptedExperts
from lori_dist.adapter.routed import RoutedLinear
from lori_dist.adapter.routing import name_of
from lori_dist.config import COMPILED_AT_STAGE_3, Run, Train
from lori_dist.engines import _ds_config, _ds_keys, ddp
from lori_dist.errors import ConfigError
from lori_dist.training.cost import FP32, Collective, Counted, Held, Kind, Load, Owner
from lori_dist.training.data import Batch
from lori_dist.training.device import return_freed
from lori_dist.training.engine import (
    ADAPTER,
    Accept,
    LearningRate,
    Part,
    Quantity,
    State,
    StepResult,
    TaskGradients,
    adamw,
    adapters_of,
    always,
    finish,
    is_accepted,
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

LIVE = 10**9
"""Entries that stage 3 keeps gathered (stage3_max_live_parameters, max_reuse_distance)."""
BUCKET = 25_000_000
"""Entries reduced or gathered at once; a sparse adapter has about that many at 70B."""


PREFETCHED = 50_000_000
"""Entries that stage 3 gathers ahead (stage3_prefetch_bucket_size)."""
SMALL = 24
"""Share of the base, as 1/SMALL, up to which parameters stay gathered where nothing is trained."""


def build(
    model: nn.Module,
    weights: Weights,
    train: Train,
    world: World,
    *,
    state: State | None,
    stage: Literal[1, 2, 3] = 2,
    hpz: Annotated[int, "[1, inf)"] = 1,
    offload: bool = False,
    config: str | None = None,
) -> "Partitioned":
    """Stages 1 and 2 keep the whole base on every rank, stage 3 gathers each layer when it runs.

    hpz: at stage 3, as many neighbouring ranks, those of a node, keep a second copy of the base among them, so that
    the backward pass gathers inside the node (ZeRO++ hpZ, arXiv 2306.10209). offload: at stage 3, the base's shards
    wait in host memory. config: path of a DeepSpeed configuration in JSON, all of which reaches DeepSpeed; "auto" and
    what it leaves out are as the other settings say.
    Raises ConfigError for hpz that does not divide the ranks, for hpz or offload at another stage, and for a file that
    cannot be used.
    """
    found = settled({"stage": stage, "hpz": hpz, "offload": offload, "config": config})
    stage, hpz, offload = found["stage"], found["hpz"], found["offload"]
    _check(world.size, stage, hpz, offload)
    if config is not None and (problems := list(_ds_config.of_ranks(config, train, world.size))):
        raise ConfigError("\n".join(problems))
    return Partitioned(model, weights, train, world, state, stage, hpz, offload, config)


def place(
    model: nn.Module,
    weights: Weights,
    world: World,
    *,
    stage: Literal[1, 2, 3] = 2,
    hpz: Annotated[int, "[1, inf)"] = 1,
    offload: bool = False,
) -> Callable[[], None]:
    """The base as for a training, to compute with: at stage 3 each layer is gathered when it runs, else it is whole.

    The options are those of `build`. Returns what frees it. Raises ConfigError as `build`.
    """
    _check(world.size, stage, hpz, offload)
    if stage < 3:
        return ddp.place(model, weights, world)
    total = sum(parameter.numel() for parameter in model.parameters())
    largest = max((sum(p.numel() for p in block.parameters()) for block in blocks(model)), default=BUCKET)
    live = min(largest, total // SMALL)
    zero: dict[str, Any] = {
        "stage": 3,
        "stage3_param_persistence_threshold": 0,
        # There is no backward pass for which anything should stay gathered.
        "stage3_max_reuse_distance": 0,
        "stage3_max_live_parameters": live,
        "stage3_prefetch_bucket_size": min(live // 2, PREFETCHED),
        "memory_efficient_linear": False,  # see _FrozenLinear
        "zero_hpz_partition_size": hpz,
    }
    if offload:
        zero["offload_param"] = {"device": "cpu", "pin_memory": world.device.type == "cuda"}
    config = {"train_micro_batch_size_per_gpu": 1, "steps_per_print": SELDOM, "zero_optimization": zero}
    _prepare(world)
    if world.device.type == "cpu":
        return_freed()
    _partition(model, weights, config, world)
    engine, *_ = deepspeed.initialize(model=model, config=config)

    def close() -> None:
        engine.destroy()
        _free(model)

    return close


def forget_groups() -> None:
    """Makes DeepSpeed look for the process group again: it keeps the first one, also when that was destroyed."""
    comm.cdb = None
    groups._WORLD_GROUP = None
    groups._ZERO_PARAM_INTRA_PARALLEL_GROUP = None


# --- its configuration file ------------------------------------------------------------------------------------------

FILES = ("config",)
"""Options that are paths of files."""
RESULT = ("config",)
"""Options that may change the result by more than rounding."""


def settled(options: Mapping[str, Any]) -> dict[str, Any]:
    """The options, with what a configuration file among them says."""
    return _ds_config.settled(options)


def check(run: Run, ranks: int | None = None) -> Iterator[str]:
    """Yields mistakes in a run's DeepSpeed file and its contradictions to the YAML. ranks: their number, if it is
    known."""
    options = run.train.engine.options
    path = options.get("config")
    if path is None:
        return
    yield from _ds_config.contradictions(run)
    if ranks is not None:
        yield from _ds_config.of_ranks(path, run.train, ranks)
    found = settled({"stage": 2, "hpz": 1, "offload": False, **options})
    if run.train.compile and found["stage"] == 3:
        yield COMPILED_AT_STAGE_3
    try:
        _check(ranks or found["hpz"], found["stage"], found["hpz"], found["offload"])
    except ConfigError as error:
        yield str(error)
    # The name of every section that DeepSpeed gets, with one rank, which divides all batches.
    tree = _ds_config.filled(path, {"train_micro_batch_size_per_gpu": 1, "zero_optimization": {}})
    for place, found, message, known in _ds_keys.mistakes(tree):
        yield _ds_config.mistake(path, place, found, message, known)


def _check(ranks: int, stage: int, hpz: int, offload: bool) -> None:
    if ranks % hpz:
        raise ConfigError(f"train.engine.hpz: got {hpz} for {ranks} ranks; give a number that divides them")
    for name, given in (("hpz", hpz if hpz > 1 else None), ("offload", offload or None)):
        if given is not None and stage < 3:
            raise ConfigError(
                f"train.engine.{name}: got {given} at stage {stage}, where the base is not sharded; "
                "give stage 3, or remove it"
            )


# --- cost ------------------------------------------------------------------------------------------------------------


def placements(ranks: int, nodes: int) -> Iterator[dict[str, Any]]:
    """All stages, and a second copy of the base in each node where there are several."""
    yield from ({"stage": stage} for stage in (1, 2, 3))
    if ranks > nodes > 1:
        yield {"stage": 3, "hpz": ranks // nodes}


def memory(
    model: Counted, load: Load, *, stage: int = 2, hpz: int = 1, offload: bool = False, config: str | None = None
) -> Held:
    """Updated values are sharded at every stage, computing ones at stage 3 alone. Gradients of an adapter form one
    bucket, which is whole until it is reduced, except at stage 3."""
    _check(load.ranks, stage, hpz, offload)
    zero = _ds_config.zero(config)
    size, share = FP32 * load.trained, -(-FP32 * load.trained // load.ranks)
    is_sharded = stage == 3 and load.ranks > 1
    live, bucket = zero.get("stage3_max_live_parameters", LIVE), zero.get("reduce_bucket_size", BUCKET)
    root = min(model.base, live * model.dtype) if is_sharded else 0
    is_on_host = (zero.get("offload_optimizer") or {}).get("device", "none") != "none"
    second = -(-model.base // hpz) if hpz > 1 else 0
    return Held(
        base=0 if offload else -(-model.base // (load.ranks if stage == 3 else 1)) + second,
        values=share + (share if stage == 3 else size),
        gradients=share if stage == 3 else size,
        moments=0 if is_on_host else -(-2 * size // load.ranks),
        buffers=FP32 * min(load.trained, bucket),
        gathered_at_loss=root,
        gathered_in_block=root,
    )


def traffic(
    model: Counted, load: Load, *, stage: int = 2, hpz: int = 1, offload: bool = False, config: str | None = None
) -> list[Collective]:
    """At stage 3 the base is gathered in both passes of each micro-batch, unless all of it may stay: in the backward
    pass from the neighbours' own copy, where there is one."""
    found, values, spans = list[Collective](), FP32 * load.trained, load.nodes > 1
    live = _ds_config.zero(config).get("stage3_max_live_parameters", LIVE)

    def add(kind: Kind, owner: Owner, size: int, group: int, spans_nodes: bool) -> None:
        if group > 1:
            found.append(Collective(kind=kind, owner=owner, bytes=size, group=group, spans_nodes=spans_nodes))

    if stage < 3:
        if not load.tasks:
            times = load.micro_batches if stage == 2 else 1
            add("all_reduce", "adapter", times * values, load.ranks, spans)
        add("gather", "adapter", values, load.ranks, spans)
        return found
    times = 1 if model.parameters <= live else 2
    add("gather", "base", load.micro_batches * model.base, load.ranks, spans)
    if times == 2:
        is_near = 1 < hpz <= load.ranks // load.nodes
        add("gather", "base", load.micro_batches * model.base, hpz if hpz > 1 else load.ranks, spans and not is_near)
    if offload:
        copied = load.micro_batches * times * -(-model.base // load.ranks)
        found.append(Collective(kind="copy", owner="base", bytes=copied, group=1, spans_nodes=False))
    add("gather", "adapter", load.micro_batches * times * values, load.ranks, spans)
    if not load.tasks:
        add("reduce", "adapter", load.micro_batches * values, load.ranks, spans)
    return found


def place_memory(model: Counted, load: Load, *, stage: int = 2, hpz: int = 1, offload: bool = False) -> Held:
    """At stage 3 the largest weight is gathered beside those that stay for a while."""
    _check(load.ranks, stage, hpz, offload)
    if stage < 3:
        return Held(base=model.base, values=0, gradients=0, moments=0)
    gathered = min(model.block, model.base // SMALL) + model.largest if load.ranks > 1 or offload else 0
    second = -(-model.base // hpz) if hpz > 1 else 0
    return Held(
        base=(0 if offload else -(-model.base // load.ranks)) + second,
        values=0,
        gradients=0,
        moments=0,
        gathered_at_loss=gathered,
        gathered_in_block=gathered,
    )


def place_traffic(
    model: Counted, load: Load, *, stage: int = 2, hpz: int = 1, offload: bool = False
) -> list[Collective]:
    """At stage 3 the base is gathered once in each forward pass, from all ranks."""
    if stage < 3:
        return []
    spans = load.nodes > 1
    found = [Collective(kind="gather", owner="base", bytes=model.base, group=load.ranks, spans_nodes=spans)]
    if offload:
        copied = -(-model.base // load.ranks)
        found.append(Collective(kind="copy", owner="base", bytes=copied, group=1, spans_nodes=False))
    return found


class Partitioned:
    """An `Engine`."""

    def __init__(
        self,
        model: nn.Module,
        weights: Weights,
        train: Train,
        world: World,
        state: State | None,
        stage: int,
        hpz: int,
        offload: bool,
        path: str | None,
    ) -> None:
        num_values = sum(p.numel() for p in model.parameters() if p.requires_grad)
        config = _config(train, stage, hpz, offload, world, num_values, path)
        _prepare(world, speaks=any(config.get(key) not in (None, False) for key in SPEAKING))
        if stage == 3:
            _partition(model, weights, config, world)
        else:
            materialize(model, world.device)
            fill(model, weights, whole)
        if stage == 3 and any(isinstance(module, AdaptedExperts) for module in model.modules()):
            set_z3_leaf_modules(model, [AdaptedExperts])  # their weights are used by others than their owner
        self.parameters: dict[str, Any] = trained(model)
        self.optimizer = adamw(self.parameters, train)
        self.model: Any
        self.model, *_ = deepspeed.initialize(model=model, optimizer=self.optimizer, config=config)
        self.world, self.stage = world, stage
        self.num_steps = state.step if state else 0
        self._restore(state)

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
        with nullcontext() if tasks is None else self.model.coalesce_grad_reduction():
            for i, batch in enumerate(micro_batches):
                if tasks is not None:
                    tasks.begin(batch)
                # Set for each step, as steps have different numbers of them.
                self.model.set_gradient_accumulation_boundary(i == len(micro_batches) - 1)
                loss = task_loss_sums(self.model, batch.to(self.world.device)) / num_targets
                # Gradients become means over the ranks, the loss is a sum.
                self.model.backward(loss.sum() * (self.world.size if tasks is None else 1))
                losses.append(loss.detach())
        if tasks is not None:
            for path, gradient in tasks.gradient(self.parts("values"), self.num_steps, losses).items():
                self._put_gradient(self.parameters[path], gradient)
            self.model.set_gradient_accumulation_boundary(True)
        return self._update(losses, accept)

    def _update(self, losses: Sequence[Tensor], accept: Accept) -> StepResult:
        """DeepSpeed has the norm only when it is about to call the optimizer, which it does once for each group of
        parameters, and not at all where the norm is not finite."""
        decided: list[tuple[StepResult, bool | Mapping[str, bool]]] = []

        def decide(norm: Tensor) -> bool | Mapping[str, bool]:
            if not decided:
                result = finish(losses, norm)
                decided.append((result, accept(result)))
            return decided[0][1]

        update = self.optimizer.step

        def step() -> None:
            # Of the other groups DeepSpeed gives no parameters meanwhile.
            [adapter] = [group[ADAPTER] for group in self.optimizer.param_groups if group["params"]]
            if is_accepted(decide(torch.as_tensor(self.model.optimizer._global_grad_norm)), adapter):
                update()

        self.optimizer.step = step  # type: ignore[method-assign, assignment]
        try:
            self.model.step()
        finally:
            del self.optimizer.step
        answer = decide(torch.tensor(math.nan))
        self.num_steps += answer if isinstance(answer, bool) else any(answer.values())
        return decided[0][0]

    def load(self, state: State) -> None:
        self.num_steps = state.step
        set_num_steps(((adapter, self.optimizer.state[part]) for adapter, part in self._partitions()), state)
        self._copy(state)

    def parts(self, quantity: Quantity) -> Mapping[str, Part]:
        part = self._part_of_three if self.stage == 3 else _part_of_one_and_two
        return {path: part(parameter, quantity) for path, parameter in self.parameters.items()}

    def _put_gradient(self, parameter: Any, gradient: Tensor) -> None:
        """Writes a gradient where DeepSpeed expects its reduced one, which is empty here."""
        if self.stage == 3:
            padded = gradient.new_zeros(parameter.ds_tensor.numel())
            padded[: gradient.numel()] = gradient
            safe_set_local_grad(parameter, padded)
        elif parameter._hp_mapping is not None:
            held = parameter._hp_mapping.get_lp_grad_fragment(parameter._index_in_param_group)
            held.view(-1)[: gradient.numel()].copy_(gradient)

    def _part_of_three(self, parameter: Any, quantity: Quantity) -> Part:
        is_value = quantity == "values"
        padded = (
            safe_get_local_fp32_param(parameter) if is_value else safe_get_local_optimizer_state(parameter, quantity)
        )
        return _share(padded, parameter)

    def close(self) -> None:
        self.model.destroy()
        if self.stage == 3:
            _free(self.model)
            self.optimizer.state.clear()

    def _restore(self, state: State | None) -> None:
        moments = [(part, steps_had(name_of("", adapter), state)) for adapter, part in self._partitions()]
        start_moments(self.optimizer, moments)
        if self.stage < 3:
            self.model.optimizer._lazy_init_hp_params_optimizer_state()
        if state is not None:
            self._copy(state)

    def _partitions(self) -> list[tuple[str, Tensor]]:
        """The tensors that the optimizer updates on this rank, each with its adapter."""
        zero, adapters = self.model.optimizer, adapters_of(self.parameters)
        partitions = zero.fp32_partitioned_groups_flat if self.stage == 3 else zero.single_partition_of_fp32_groups
        of_groups = zero.sub_group_to_group_id if self.stage == 3 else range(len(partitions))
        return [(adapters[of_groups[number]], part) for number, part in enumerate(partitions)]

    @torch.no_grad()
    def _copy(self, state: State) -> None:
        """Copies a state to the values that are updated, and to the copies that compute."""
        restore(self, state)
        for path, parameter in self.parameters.items():
            if path not in state.values:
                continue
            part = _share(parameter.ds_tensor, parameter) if self.stage == 3 else whole(parameter)
            part.data.copy_(state.values[path].view(-1)[part.start : part.start + part.data.numel()])
            parameter.ds_secondary_tensor = None  # recomputed from the first, as after every step
        if self.stage == 3 and (persistent := self.model.optimizer.persistent_parameters):
            persistent[0].partition(persistent)
            persistent[0].all_gather(persistent)


def _free(model: nn.Module) -> None:
    """DeepSpeed keeps the modules in lists and caches of its own, for ever."""
    for parameter in model.parameters():
        shard: Any = parameter
        if hasattr(shard, "ds_tensor"):  # what was attached after it has none
            shard.ds_tensor.data = torch.empty(0)
            shard.ds_secondary_tensor = None
    for module in model.modules():
        for name, _ in list(module.named_buffers(recurse=False)):
            setattr(module, name, torch.empty(0))


def _part_of_one_and_two(parameter: Any, quantity: Quantity) -> Part:
    """A rank's partition is cut anywhere: it may have some of a parameter, or nothing."""
    held = parameter._hp_mapping
    if held is None:
        return Part(start=0, data=torch.empty(0, device=parameter.device))
    data = held.get_hp_fragment(None if quantity == "values" else quantity)
    return Part(start=held.lp_fragment_address.start, data=data.detach())


def _share(padded: Tensor, parameter: Any, rank: int | None = None) -> Part:
    """A rank's part at stage 3, without what makes all parts equally large. rank: by default this one."""
    start = (parameter.ds_zero_partition_rank if rank is None else rank) * padded.numel()
    start = min(start, parameter.ds_numel)
    return Part(start=start, data=padded.detach().view(-1)[: min(padded.numel(), parameter.ds_numel - start)])


SPEAKING = ("wall_clock_breakdown", "memory_breakdown", "dump_state", "log_level", "steps_per_print")
"""Settings that ask DeepSpeed for lines in the log."""
SELDOM = 2**31
"""Steps between lines of DeepSpeed's own about the speed, where nobody asks for them."""


def _config(
    train: Train, stage: int, hpz: int, offload: bool, world: World, num_values: int, path: str | None
) -> dict[str, Any]:
    """No bf16 section: it would cast the fp32 values too."""
    bucket = min(BUCKET, num_values + num_values % 2)  # odd ones are refused
    zero: dict[str, Any] = {
        "stage": stage,
        "reduce_bucket_size": bucket,
        "allgather_bucket_size": bucket,
        # At the default, values and norms would be gathered one by one after each step, not with the base.
        "stage3_param_persistence_threshold": 0,
        "memory_efficient_linear": False,  # see _FrozenLinear
        "zero_hpz_partition_size": hpz,
    }
    if offload:
        zero["offload_param"] = {"device": "cpu", "pin_memory": world.device.type == "cuda"}
    made = {
        "train_micro_batch_size_per_gpu": train.rows_at_once,
        "gradient_accumulation_steps": 1,  # losses are not divided; see set_gradient_accumulation_boundary
        "gradient_clipping": train.clip or 0.0,
        "zero_force_ds_cpu_optimizer": False,  # torch's AdamW updates offloaded values and moments, too
        "zero_optimization": zero,
    }
    return {"steps_per_print": SELDOM, **made} if path is None else _ds_config.filled(path, made)


# --- stage 3 ---------------------------------------------------------------------------------------------------------


def _partition(model: nn.Module, weights: Weights, config: dict[str, Any], world: World) -> None:
    """Shards a model tensor by tensor, before any weight is read: no rank ever holds more than one of them whole."""
    has_second = config["zero_optimization"]["zero_hpz_partition_size"] > 1
    # Its groups are the process's: a second model in it needs those of the first.
    group = groups._get_zero_param_intra_parallel_group() if has_second else None
    init = deepspeed.zero.Init(config_dict_or_path=config, zero_param_parallel_group=group)

    def make(parameter: nn.Parameter) -> nn.Parameter:
        made: Any = on(world.device, parameter)
        init._convert_to_deepspeed_param(made)
        made.partition()
        return made

    materialize(model, world.device, make)
    fill(model, weights, lambda parameter: _share(parameter.ds_tensor, parameter))
    if has_second:
        fill(model, weights, lambda parameter: _share(parameter.ds_secondary_tensor, parameter, init.rank_in_group))
    for module in model.modules():
        if isinstance(module, RoutedLinear):  # which computes with what its updates hold, without calling them
            for parameter in module.deltas.parameters():  # type: ignore[attr-defined]
                deepspeed.zero.register_external_parameter(module, parameter)
        if type(module) is nn.Linear and not module.weight.requires_grad:
            module.forward = functools.partial(_linear, module)  # type: ignore[method-assign]


def _linear(module: nn.Linear, x: Tensor) -> Tensor:
    return _FrozenLinear.apply(x, module.weight, module.bias)


class _FrozenLinear(torch.autograd.Function):
    """A linear layer that saves its parameter instead of the gathered weight, and not its input.

    torch's own would keep every gathered weight until the backward pass; DeepSpeed's, which replaces
    torch's for the whole process, saves the input too, as if the weight were trained.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.weight = weight
        return nn.functional.linear(x, weight, bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        return grad @ ctx.weight, None, None  # which DeepSpeed has gathered again


def init_distributed(backend: str | None, **options: Any) -> None:
    """DeepSpeed's own, which compiles nothing for gloo. backend: None for that of the accelerator."""
    if deepspeed.get_accelerator().device_name() == "cpu":
        _build_nothing_for_gloo()
        backend = backend or "gloo"
    deepspeed.init_distributed(backend, **options)


def _build_nothing_for_gloo() -> None:
    """Keeps DeepSpeed on CPUs from a build that takes minutes on a busy machine, or waits for ever for one that was
    killed. Gloo does without it: it is for tensors in the memory that ranks share."""
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False


def _prepare(world: World, *, speaks: bool = False) -> None:
    # Its way of saying which device, asked for also where there is no launcher.
    os.environ["LOCAL_RANK"] = str(world.local_rank if world.device.index is None else world.device.index)
    if world.device.type == "cpu":
        _build_nothing_for_gloo()
    # Without this, each rank hears of every part that is set up and of every collective that torch has renamed.
    logging.getLogger("DeepSpeed").setLevel(logging.INFO if speaks else logging.WARNING)
    renamed = r"`torch\.distributed\.(all_gather_into_tensor|reduce_scatter_tensor)` is deprecated"
    warnings.filterwarnings("ignore", message=renamed, category=FutureWarning)
