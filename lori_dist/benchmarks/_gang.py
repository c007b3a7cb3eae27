"""Processes that do something together, for benchmarks."""

import json
import multiprocessing
import os
import tempfile
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing

from lori_dist.training.device import group_settings
from lori_dist.training.world import World, from_environment

PRELOADED = (
    "deepspeed.runtime.zero.muon.muon_optimizer",  # which DeepSpeed's engine imports, and torch.compile with it
    "transformers.models.llama.modeling_llama",
    "lori_dist.engines.ddp",
    "lori_dist.engines.deepspeed",
    "lori_dist.engines.fsdp",
    "lori_dist.training.train",
)
"""Modules that every rank needs. They are imported once, in the process from which ranks are forked, and touch no
device."""


def gang(function: Callable[..., dict[str, Any]], num_ranks: int, *args: Any) -> dict[str, Any]:
    """Returns what function(world, *args) returns on rank 0, called on every rank in new processes; it must be plain
    JSON."""
    with tempfile.TemporaryDirectory() as place:
        start(_rank, (function, num_ranks, Path(place), args), num_ranks)
        found: dict[str, Any] = json.loads((Path(place) / "result.json").read_text())
        return found


def start(function: Callable[..., None], args: tuple[Any, ...], count: int) -> None:
    """Calls function(number, *args) in as many new processes, and waits for their end."""
    multiprocessing.get_context("forkserver").set_forkserver_preload(list(PRELOADED))
    torch.multiprocessing.start_processes(  # type: ignore[attr-defined]
        function, args=args, nprocs=count, start_method="forkserver"
    )


def _rank(
    number: int, function: Callable[..., dict[str, Any]], num_ranks: int, place: Path, args: tuple[Any, ...]
) -> None:
    warnings.filterwarnings("ignore", message=".*is_gradient_checkpointing", category=FutureWarning)  # of PEFT
    os.environ["LOCAL_RANK"] = str(number)
    torch.set_num_threads(max(1, (os.cpu_count() or 1) // num_ranks))
    store = f"file://{place / 'store'}"
    dist.init_process_group(init_method=store, rank=number, world_size=num_ranks, **group_settings(number))
    world: World = from_environment()
    found = function(world, *args)
    if number == 0:
        (place / "result.json").write_text(json.dumps(found))
    dist.barrier()
    dist.destroy_process_group()
