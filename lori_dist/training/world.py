"""The processes that train together, and this one among them."""

import hashlib
import os
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar, cast

import torch
import torch.distributed as dist

from lori_dist.errors import JobError, LoriError

T = TypeVar("T")

TIMEOUT = timedelta(minutes=5)
"""How long a rank waits for the others: longer than any step, shorter than anyone's patience."""


@dataclass(frozen=True, kw_only=True, slots=True)
class World:
    """This process among those that train together."""

    rank: int
    """Of this process, from 0."""
    size: int
    """Number of processes."""
    local_rank: int
    """Of this process among those on its machine."""
    device: torch.device
    """Where this process computes."""


def from_environment() -> World:
    """The world a launcher describes: torchrun, deepspeed, accelerate, srun, or none of them, which is a world of one.

    Joins the process group that there is, as Ray Train makes one, or makes it: nccl where there is CUDA, else gloo.
    There is always a group, as all engines need one. Raises JobError for an incomplete environment.
    """
    if not dist.is_initialized():
        _make_group()
    local_rank = int(os.environ.get("LOCAL_RANK", "0"))
    # Who made a gloo group wants the CPU, whatever else the machine has.
    device = torch.device("cpu") if dist.get_backend() == "gloo" else _cuda(local_rank)
    if device.type == "cuda":
        torch.cuda.set_device(device)
    return World(rank=dist.get_rank(), size=dist.get_world_size(), local_rank=local_rank, device=device)


def from_first(world: World, make: Callable[[], T]) -> T:
    """What `make` gives on rank 0, which alone calls it, on all ranks. A LoriError it raises is raised on all."""
    made: list[Any] = [None]
    if world.rank == 0:
        try:
            made[0] = make()
        except LoriError as error:
            made[0] = error
    dist.broadcast_object_list(made, device=world.device)
    if isinstance(made[0], LoriError):
        raise made[0]
    return cast(T, made[0])


def agree(world: World, found: str, what: str, remedy: str) -> None:
    """Raises JobError, on all ranks, naming those that found something else than rank 0."""
    digest = int.from_bytes(hashlib.blake2b(found.encode(), digest_size=8).digest(), "little", signed=True)
    own = torch.tensor([digest], device=world.device)
    all_digests = [torch.empty_like(own) for _ in range(world.size)]
    dist.all_gather(all_digests, own)
    others = [str(rank) for rank, other in enumerate(all_digests) if other.item() != all_digests[0].item()]
    if others:
        raise JobError(f"rank {', '.join(others)}: its {what} differs from that of rank 0; {remedy}")


def _make_group() -> None:
    backend = "nccl" if torch.cuda.is_available() else "gloo"
    launcher = rendezvous(os.environ)
    if launcher is None:
        dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1, timeout=TIMEOUT)  # type: ignore[attr-defined]
        return
    os.environ.update(launcher)  # libraries look there as well, and srun leaves them unset
    if backend == "nccl":
        torch.cuda.set_device(_cuda(int(launcher["LOCAL_RANK"])))
    dist.init_process_group(backend, init_method="env://", timeout=TIMEOUT)


def rendezvous(environment: Mapping[str, str]) -> dict[str, str] | None:
    """RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR and MASTER_PORT as a launcher gives them, or None without a launcher.

    Raises JobError if some of them are missing.
    """
    if "RANK" in environment or "WORLD_SIZE" in environment:
        wanted = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
        missing = [name for name in wanted if name not in environment]
        if missing:
            raise JobError(
                f"environment: RANK or WORLD_SIZE is set, {', '.join(missing)} not; start with torchrun, deepspeed, "
                "accelerate launch or srun, or unset RANK and WORLD_SIZE for a single process"
            )
        for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_PORT"):
            if not environment[name].isdecimal():
                raise JobError(f"environment: {name} is {environment[name]!r}, wanted a number; start with a launcher")
        rank, size = int(environment["RANK"]), int(environment["WORLD_SIZE"])
        if rank >= size:
            raise JobError(f"environment: RANK is {rank}, WORLD_SIZE {size}; ranks count from 0, so give smaller ones")
        return {name: environment[name] for name in wanted}
    # A batch script or an salloc shell has SLURM_NTASKS as well; only in a step are there that many processes.
    if "SLURM_PROCID" in environment and ("SLURM_STEP_ID" in environment or "SLURM_STEP_NUM_TASKS" in environment):
        return _slurm(environment)
    return None


def _slurm(environment: Mapping[str, str]) -> dict[str, str]:
    def get(*names: str) -> str:
        value = next((environment[name] for name in names if name in environment), None)
        if value is None:
            raise JobError(f"environment: SLURM_PROCID is set, {' and '.join(names)} not; start the ranks with srun")
        return value

    job, step = int(get("SLURM_JOB_ID", "SLURM_JOBID")), int(environment.get("SLURM_STEP_ID", "0"))
    return {
        "RANK": get("SLURM_PROCID"),
        "WORLD_SIZE": get("SLURM_STEP_NUM_TASKS", "SLURM_NTASKS"),
        "LOCAL_RANK": get("SLURM_LOCALID"),
        # Rank 0 is on the step's first host. SLURM_LAUNCH_NODE_IPADDR is where srun was typed: maybe a login node.
        "MASTER_ADDR": environment.get("MASTER_ADDR")
        or first_host(get("SLURM_STEP_NODELIST", "SLURM_LAUNCH_NODE_IPADDR")),
        # Below the ports systems hand out by themselves, and its own for each step of a job.
        "MASTER_PORT": environment.get("MASTER_PORT") or str(15000 + (job + step) % 15000),
    }


def first_host(nodes: str) -> str:
    """The first host of a Slurm node list: `node[07-12,15],gpu1` begins with node07."""
    first = re.match(r"(?:[^,\[]|\[[^\]]*\])+", nodes)
    if first is None:
        raise JobError(f"environment: {nodes!r} is no list of nodes; set MASTER_ADDR to the host of rank 0")
    return re.sub(r"\[([^\],-]+)[^\]]*\]", r"\1", first[0])


def _cuda(local_rank: int) -> torch.device:
    visible = torch.cuda.device_count()
    if local_rank < visible:
        return torch.device("cuda", local_rank)
    if visible == 1:  # a launcher that shows each process its own device
        return torch.device("cuda", 0)
    raise JobError(
        f"environment: this is rank {local_rank} of its machine, which shows {visible} CUDA devices; "
        "start at most one rank per device"
    )
