"""Training loops as users write them, with FSDP2, DeepSpeed or neither: both phases of LoRI on the same few rows."""

import contextlib
import os
import warnings
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.nn.parallel import DistributedDataParallel

from lori_dist import Adapter, Spec, attach, attach_several, dense, detach, extract, sparsify, trainable
from lori_dist.adapter.adapter import in_memory
from lori_dist.errors import AdapterError
from lori_dist.masks.magnitude import mask
from tests.models import tiny_llama

SPEC = Spec(rank=4, alpha=8.0, seed=3, targets="all-linear")
STEPS, LR, CLIP, DENSITY = 3, 1e-2, 0.25, 0.1
EPS = 1e-4
"""Of Adam: a smaller one makes much of the rounding of entries whose gradients are near it."""
IDS = torch.randint(3, 64, (4, 9), generator=torch.Generator().manual_seed(2))
"""Rows of equal length, of which every rank has as many: the mean over ranks is that over all."""

Train = Callable[[nn.Module], list[float]]
"""Trains an adapted model for some steps. Returns the norm of each step's gradient, before it is clipped."""


def my_rows() -> Tensor:
    if not dist.is_initialized():
        return IDS
    count = len(IDS) // dist.get_world_size()
    return IDS[dist.get_rank() * count :][:count]


def loss_of(model: nn.Module) -> Tensor:
    rows = my_rows()
    loss: Tensor = model(input_ids=rows, labels=rows, use_cache=False).loss
    return loss


def train(model: nn.Module) -> list[float]:
    """The loop of plain torch and of FSDP2, to the letter."""
    optimizer = torch.optim.AdamW(trainable(model).values(), lr=LR, eps=EPS, weight_decay=0.0)
    return steps(model, optimizer, STEPS)


def steps(model: nn.Module, optimizer: torch.optim.Optimizer, count: int) -> list[float]:
    norms = []
    for _ in range(count):
        loss_of(model).backward()
        norm: Any = torch.nn.utils.clip_grad_norm_(trainable(model).values(), CLIP)
        norms.append(float(norm.full_tensor() if hasattr(norm, "full_tensor") else norm))
        optimizer.step()
        optimizer.zero_grad()
    return norms


def both_phases(model: nn.Module, train: Train, between: Callable[[], None] = lambda: None) -> dict[str, Any]:
    """LoRI-D, its mask, LoRI-S. What every rank has of the results, all of them being whole."""
    dense_norms = train(model)
    b = dense(model)
    between()
    sparsify(model, mask(b, density=DENSITY))
    norms = train(model)
    made = extract(model, name="math")
    return {
        "norms": torch.tensor([*dense_norms, *norms]),
        "dense": torch.cat([one.flatten() for one in b.values()]),
        "positions": torch.cat([_index(made, path) for path in made.blocks[0].entries]),
        "values": values_of(made),
    }


def _index(made: Adapter, path: str) -> Tensor:
    index = made.blocks[0].entries[path].index
    return torch.arange(made.blocks[0].entries[path].values.numel()) if index is None else index


def values_of(made: Adapter) -> Tensor:
    return torch.cat([entries.values for entries in made.blocks[0].entries.values()])


def one_process() -> dict[str, Any]:
    model = tiny_llama()
    attach(model, SPEC)
    return both_phases(model, train)


# --- FSDP2 -----------------------------------------------------------------------------------------------------------


def shard(model: Any, how: str = "blocks") -> None:
    from torch.distributed.fsdp import CPUOffloadPolicy, OffloadPolicy, fully_shard

    size = dist.get_world_size()
    if how == "hybrid":
        mesh = init_device_mesh("cpu", (2, size // 2), mesh_dim_names=("replica", "shard"))
    else:
        mesh = init_device_mesh("cpu", (size,))
    offload = CPUOffloadPolicy(pin_memory=False) if how == "offloaded" else OffloadPolicy()
    ignored = {p for p in model.parameters() if not p.requires_grad} if how == "base ignored" else None
    for block in [] if how == "root" else model.model.layers:
        fully_shard(block, mesh=mesh, offload_policy=offload, ignored_params=ignored)
    fully_shard(model, mesh=mesh, offload_policy=offload, ignored_params=ignored)


def fsdp(order: str, how: str) -> dict[str, Any]:
    model = tiny_llama()
    if order == "attach first":
        attach(model, SPEC)
    shard(model, how)
    if order == "after a forward pass":
        with torch.no_grad():
            loss_of(model)
    if order != "attach first":
        attach(model, SPEC)
    return both_phases(model, train)


# --- DeepSpeed -------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def quiet_deepspeed() -> Iterator[Any]:
    """DeepSpeed in a test's process, where warnings are errors and nothing is compiled."""
    import logging

    import deepspeed

    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=r"`torch\.distributed\.", category=FutureWarning)
        deepspeed.init_distributed("gloo")
        yield deepspeed


def deepspeed_config(stage: int, **more: Any) -> dict[str, Any]:
    zero = {"stage": stage, "stage3_param_persistence_threshold": 0, **more.pop("zero", {})}
    return {
        "train_micro_batch_size_per_gpu": len(my_rows()),
        "gradient_clipping": CLIP,
        "optimizer": {"type": "AdamW", "params": {"lr": LR, "eps": EPS, "weight_decay": 0.0, "torch_adam": True}},
        "zero_optimization": zero,
        "zero_allow_untested_optimizer": True,
        **more,
    }


def zero(stage: int, how: str) -> dict[str, Any]:
    """how: `initialize`, or `zero.Init`, which has partitioned the base before."""
    with quiet_deepspeed() as deepspeed:
        config = deepspeed_config(stage)
        model = tiny_llama()
        if how == "zero.Init":
            deepspeed.zero.Init(module=model, config_dict_or_path=config)
        attach(model, SPEC)
        engines: list[Any] = []

        def train(model: nn.Module) -> list[float]:
            engine, *_ = deepspeed.initialize(
                model=model, model_parameters=[*trainable(model).values()], config=dict(config)
            )
            engines.append(engine)
            norms = []  # stage 0 says none
            for _ in range(STEPS):
                engine.backward(loss_of(engine))
                engine.step()
                norms.append(engine.get_global_grad_norm())
            return [] if None in norms else list(map(float, norms))

        def between() -> None:
            if stage:
                with pytest.raises(AdapterError, match=r"^model: is trained by an engine of DeepSpeed"):
                    sparsify(model, {})
                with pytest.raises(AdapterError, match=r"^model: is already managed by a DeepSpeed engine"):
                    attach(engines[-1], SPEC)
            with pytest.raises(AdapterError, match=r"^model: is a DeepSpeedEngine"):
                sparsify(engines[-1], {})
            before = extract(engines[-1], name="math")
            engines[-1].destroy()
            assert torch.equal(values_of(extract(model, name="math")), values_of(before))

        return both_phases(model, train, between)


def zero_resumed(stage: int, folder: Path) -> dict[str, Any]:
    """Trained for all steps, and for half of them, saved without the base, and by another engine for the other half."""
    with quiet_deepspeed() as deepspeed:

        def started() -> Any:
            model = tiny_llama()
            attach(model, SPEC)
            parameters = [*trainable(model).values()]
            config = deepspeed_config(stage)
            return deepspeed.initialize(model=model, model_parameters=parameters, config=config)[0]

        def stepped(engine: Any) -> Tensor:
            for _ in range(STEPS):
                engine.backward(loss_of(engine))
                engine.step()
            return values_of(extract(engine, name="math"))

        engine = started()
        stepped(engine)
        engine.save_checkpoint(folder, tag="half", exclude_frozen_parameters=True)
        whole = stepped(engine)
        engine.destroy()
        engine = started()
        engine.load_checkpoint(folder, tag="half", load_module_strict=False)
        return {"whole": whole, "resumed": stepped(engine)}


def zero_with(more: dict[str, Any]) -> dict[str, Any]:
    """One phase with other sections of DeepSpeed's configuration."""
    with quiet_deepspeed() as deepspeed:
        model = tiny_llama()
        attach(model, SPEC)
        parameters = [*trainable(model).values()]
        config = deepspeed_config(more.pop("stage", 3), **more)
        engine, *_ = deepspeed.initialize(model=model, model_parameters=parameters, config=config)
        for _ in range(STEPS):
            engine.backward(loss_of(engine))
            engine.step()
        return {"values": values_of(extract(engine, name="math")), "dtypes": {one.dtype for one in parameters}}


# --- accelerate ------------------------------------------------------------------------------------------------------


def as_launched_by_accelerate(how: str) -> None:
    """how: `fsdp2`, a stage of ZeRO, or nothing, which is DDP.

    FSDP is for the devices that accelerate lists, which CPUs are not among; so it takes this one for another.
    """
    from accelerate.state import PartialState
    from accelerate.utils import DistributedType

    os.environ.update(MASTER_ADDR="127.0.0.1", LOCAL_WORLD_SIZE=os.environ["WORLD_SIZE"])
    if how == "fsdp2":
        names = {"USE_FSDP": "true", "FSDP_VERSION": "2", "FSDP_AUTO_WRAP_POLICY": "TRANSFORMER_BASED_WRAP"}
        os.environ.update({f"ACCELERATE_{name}" if name == "USE_FSDP" else name: of for name, of in names.items()})
        PartialState(cpu=True)
        PartialState._shared_state["distributed_type"] = DistributedType.MULTI_XPU
    elif how:
        settings = {"USE_DEEPSPEED": "true", "DEEPSPEED_ZERO_STAGE": how, "GRADIENT_CLIPPING": "1.0"}
        os.environ.update({f"ACCELERATE_{name}": value for name, value in settings.items()})


def accelerate_resumed(how: str, folder: Path) -> dict[str, Any]:
    """Trained for all steps, and for half of them, saved by `save_state`, and on a new model for the other half."""
    from accelerate import Accelerator, PartialState

    as_launched_by_accelerate(how)
    with quiet_deepspeed():
        PartialState(cpu=True)
        accelerator = Accelerator()
        if is_zero := how.isdigit():
            accelerator.state.deepspeed_plugin.deepspeed_config["train_micro_batch_size_per_gpu"] = len(my_rows())

        def started() -> Any:
            model = tiny_llama()
            attach(model, SPEC)
            return accelerator.prepare(model, torch.optim.AdamW(trainable(model).values(), lr=LR, weight_decay=0.0))

        def stepped(model: Any, optimizer: Any) -> Tensor:
            for _ in range(STEPS):
                accelerator.backward(loss_of(model))
                accelerator.clip_grad_norm_(trainable(model).values(), CLIP)
                optimizer.step()
                optimizer.zero_grad()
            return values_of(extract(model, name="math"))

        prepared = started()
        stepped(*prepared)
        accelerator.save_state(folder, **({"exclude_frozen_parameters": True} if is_zero else {}))
        whole = stepped(*prepared)
        accelerator.free_memory()
        prepared = started()
        accelerator.load_state(folder, **({"load_module_strict": False} if is_zero else {}))
        return {"whole": whole, "resumed": stepped(*prepared)}


# --- what else a loop does with FSDP2 --------------------------------------------------------------------------------


def whole(model: nn.Module) -> Tensor:
    with torch.no_grad():
        logits: Tensor = model(input_ids=IDS, use_cache=False).logits
    return logits


def trained_and_taken_off() -> dict[str, Any]:
    """An adapter trained, taken off, put on to be used, and put on to be trained further, on one sharded model."""
    model: Any = tiny_llama()
    shard(model)
    base = whole(model)
    attach(model, SPEC)
    train(model)
    made, adapted = extract(model, name="math"), whole(model)
    detach(model)
    bare = whole(model)
    attach(model, made)
    used = whole(model)
    detach(model)
    attach(model, made, train=True)
    again = extract(model, name="math")
    train(model)
    return {
        "base": base,
        "bare": bare,
        "adapted": adapted,
        "used": used,
        "values": values_of(made),
        "again": values_of(again),
        "further": values_of(extract(model, name="math")),
    }


def with_a_head(shards: bool) -> dict[str, Any]:
    """An output layer trained in full beside B, both phases, then taken off."""
    from dataclasses import replace

    model: Any = tiny_llama()
    if shards:
        shard(model)
    base = whole(model)
    attach(model, replace(SPEC, modules_to_save=("lm_head",)))

    def train(model: nn.Module) -> list[float]:
        trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
        optimizer = torch.optim.AdamW(trained, lr=LR, eps=EPS, weight_decay=0.0)
        for _ in range(STEPS):
            loss_of(model).backward()
            optimizer.step()
            optimizer.zero_grad()
        return [0.0]

    found = both_phases(model, train)
    head = extract(model, name="math").saved["lm_head.weight"]
    detach(model)
    return {**found, "head": in_memory(head), "moved": whole(model) - base}


def from_meta() -> dict[str, Any]:
    """Sharded and adapted on the meta device, given memory, then the base's weights."""
    from lori_dist.adapter import sharded
    from lori_dist.training.weights import base_parameters
    from tests.models import on_meta

    model, weights = on_meta(tiny_llama().requires_grad_(False))
    buffers = {name: buffer.clone() for name, buffer in model.named_buffers()}
    shard(model)
    attach(model, SPEC)
    model.to_empty(device="cpu")
    for name, buffer in model.named_buffers():
        if name in buffers:
            buffer.copy_(buffers[name])
    for name, parameter in base_parameters(model).items():
        sharded.put(parameter, weights.tensors[name])
    return both_phases(model, train)


def saved_by_dcp(folder: Path, resumes: bool) -> Tensor:
    """The adapter's state alone in torch's distributed checkpoint, after half of the steps or for the other half."""
    import torch.distributed.checkpoint as dcp
    from torch.distributed.checkpoint.state_dict import StateDictOptions, get_state_dict, set_state_dict

    model: Any = tiny_llama()
    shard(model)
    attach(model, SPEC)
    optimizer = torch.optim.AdamW(trainable(model).values(), lr=LR, eps=EPS, weight_decay=0.0)
    options = StateDictOptions(ignore_frozen_params=True, strict=False)
    if not resumes:
        steps(model, optimizer, STEPS)
    of_model, of_optimizer = get_state_dict(model, optimizer, options=options)
    assert len(of_model) == len(trainable(model))
    if not resumes:
        dcp.save({"model": of_model, "optimizer": of_optimizer}, checkpoint_id=folder)
        return torch.empty(0)
    dcp.load({"model": of_model, "optimizer": of_optimizer}, checkpoint_id=folder)
    set_state_dict(model, optimizer, model_state_dict=of_model, optim_state_dict=of_optimizer, options=options)
    steps(model, optimizer, STEPS)
    return values_of(extract(model, name="math"))


def several(shards: bool, adapters: dict[str, Adapter]) -> Tensor:
    """Rows of one batch that meet different adapters, and none."""
    model: Any = tiny_llama()
    if shards:
        shard(model)
        whole(model)
    routing = attach_several(model, adapters)
    with routing.rows(["math", "code", None, "code"]):
        return whole(model)


TASKS = {"math": replace(SPEC, modules_to_save=("lm_head",)), "code": replace(SPEC, seed=4)}
"""The second has an output layer of its own, of more words than the base's."""
OF_ROWS = ["code", "code", "math", "math"]
"""The task of each of IDS: of two ranks, each has rows of one task alone."""


def wider(model: Any) -> nn.Linear:
    with torch.random.fork_rng():
        torch.manual_seed(5)
        return nn.Linear(model.config.hidden_size, model.config.vocab_size + 16, bias=False)


def means(model: nn.Module, rows: Tensor) -> Tensor:
    """The mean loss of each row."""
    logits = model(input_ids=rows, use_cache=False).logits[:, :-1]
    losses = nn.functional.cross_entropy(logits.transpose(1, 2), rows[:, 1:], reduction="none")
    return losses.mean(1)


def trained_alone(task: str, clips: bool) -> dict[str, Tensor]:
    """Both phases of one task on its own rows, with one adapter on the model."""
    model: Any = tiny_llama()
    if task == "code":
        model.lm_head = wider(model)
    attach(model, replace(TASKS[task], modules_to_save=("lm_head",)))
    rows = IDS[[place for place, name in enumerate(OF_ROWS) if name == task]]

    def train(model: nn.Module) -> list[float]:
        optimizer = torch.optim.AdamW(trainable(model).values(), lr=LR, eps=EPS, weight_decay=0.0)
        for _ in range(STEPS):
            means(model, rows).mean().backward()
            if clips:
                torch.nn.utils.clip_grad_norm_(trainable(model).values(), CLIP)
            optimizer.step()
            optimizer.zero_grad()
        return []

    return _parts(task, _both_phases(model, train, task))


def _parts(task: str, made: Adapter) -> dict[str, Tensor]:
    return {task: values_of(made), f"{task}: head": in_memory(made.saved["lm_head.weight"])}


def _both_phases(model: nn.Module, train: Train, task: str) -> Adapter:
    train(model)
    sparsify(model, mask(dense(model), density=DENSITY))
    train(model)
    return extract(model, name=task)


def trained_together(how: str) -> dict[str, Tensor]:
    """Both phases of both tasks over one base. how: `` for one process, `ddp`, `fsdp attach first`, `fsdp shard first`,
    or a stage of ZeRO."""
    with quiet_deepspeed() if how.isdecimal() else contextlib.nullcontext() as deepspeed:
        return _trained_together(how, deepspeed)


def _trained_together(how: str, deepspeed: Any) -> dict[str, Tensor]:
    model: Any = tiny_llama()
    if how == "fsdp shard first":
        shard(model)
    heads = {"code": {"lm_head": wider(model)}}
    routing = attach_several(model, TASKS, heads=heads)
    if how == "fsdp attach first":
        shard(model)
    size, rank = (dist.get_world_size(), dist.get_rank()) if dist.is_initialized() else (1, 0)
    count = len(IDS) // size
    mine = slice(rank * count, (rank + 1) * count)

    def loss(model: nn.Module) -> Tensor:
        """Each task's mean over its two rows; the mean over ranks that engines take is undone."""
        return means(model, IDS[mine]).sum() / 2 * size

    def train() -> Any:
        called = DistributedDataParallel(model) if how == "ddp" else model
        optimizer = torch.optim.AdamW(trainable(model).values(), lr=LR, eps=EPS, weight_decay=0.0)
        for _ in range(STEPS):
            with routing.rows(OF_ROWS[mine]):
                loss(called).backward()
            for task in TASKS:
                torch.nn.utils.clip_grad_norm_(trainable(model, task).values(), CLIP)
            optimizer.step()
            optimizer.zero_grad()

    def train_by_deepspeed() -> Any:
        with quiet_deepspeed() as deepspeed:
            config = {**deepspeed_config(int(how)), "gradient_clipping": 0.0}
            engine, *_ = deepspeed.initialize(model=model, model_parameters=[*trainable(model).values()], config=config)
            for _ in range(STEPS):
                with routing.rows(OF_ROWS[mine]):
                    engine.backward(loss(engine))
                engine.step()
        return engine

    run = train_by_deepspeed if how.isdecimal() else train
    engine = run()
    masks = {task: mask(dense(model, task), density=DENSITY) for task in TASKS}
    if engine is not None:
        engine.destroy()
    sparsify(model, masks)
    run()
    parts = [_parts(task, extract(model, name=task)) for task in TASKS]
    return parts[0] | parts[1]


def mixed() -> dict[str, Any]:
    """bf16 in the passes, and what is kept and stepped in float32."""
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

    model: Any = tiny_llama()
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    for block in model.model.layers:
        fully_shard(block, mp_policy=policy)
    fully_shard(model, mp_policy=policy)
    attach(model, SPEC)
    train(model)
    return {
        "values": values_of(extract(model, name="math")),
        "dtypes": {one.dtype for one in trainable(model).values()},
    }


def refused() -> dict[str, str]:
    """What `attach` and `sparsify` say to models they cannot work on."""
    from deepspeed.runtime.pipe.module import PipelineModule
    from torch.distributed.tensor.parallel import ColwiseParallel, parallelize_module

    found = {}

    def of(name: str, call: Callable[[], Any]) -> None:
        with pytest.raises(AdapterError) as caught:
            call()
        found[name] = str(caught.value)

    model: Any = tiny_llama()
    attach(model, SPEC)
    of("ddp", lambda: sparsify(DistributedDataParallel(model), {}))
    split: Any = tiny_llama()
    parallelize_module(split.model.layers[0].mlp.up_proj, init_device_mesh("cpu", (1,)), ColwiseParallel())
    of("tensor parallel", lambda: attach(split, SPEC))
    of("several", lambda: attach_several(DistributedDataParallel(model), {"math": SPEC}))
    with quiet_deepspeed():
        piped = PipelineModule(layers=[nn.Linear(4, 4)], num_stages=1)
        of("pipeline", lambda: attach(piped, SPEC))
    return found
