"""Training loops as users write them, with FSDP2, DeepSpeed or neither: both phases of LoRI on the same few rows."""

import contextlib
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh

from lori_dist import Adapter, Spec, attach, dense, extract, sparsify, trainable
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

        return both_phases(model, train, lambda: engines[-1].destroy())
