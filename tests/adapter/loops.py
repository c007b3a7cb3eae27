"""Training loops as users write them, with FSDP2, DeepSpeed or neither: both phases of LoRI on the same few rows."""

import contextlib
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh

from lori_dist import Adapter, Spec, attach, dense, detach, extract, sparsify, trainable
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
        mesh = init_device_mesh("cpu", (size, 1), mesh_dim_names=("replica", "shard"))
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
            before = extract(engines[-1], name="math")
            engines[-1].destroy()
            assert torch.equal(values_of(extract(model, name="math")), values_of(before))

        return both_phases(model, train, between)


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
