"""The meeting point of the processes that a launcher has started. The module needs no torch, so mistakes are reported
before torch is loaded."""

import re
from collections.abc import Mapping

from lori_dist.errors import JobError


def rendezvous(environment: Mapping[str, str]) -> dict[str, str] | None:
    """RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR and MASTER_PORT as a launcher gives them, or None without a launcher.

    Raises JobError if some of them are missing, or if the launcher has not started what it was asked for.
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
    if "ACCELERATE_USE_CPU" in environment and "MASTER_ADDR" in environment:  # set for two processes, of one started
        raise JobError(
            "environment: accelerate launch --cpu starts one process, whatever --num_processes says; use --multi_gpu "
            "instead, also without GPUs, or unset MASTER_ADDR for a single process"
        )
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
        raise JobError(f"environment: {nodes!r} is not a list of nodes; set MASTER_ADDR to the host of rank 0")
    return re.sub(r"\[([^\],-]+)[^\]]*\]", r"\1", first[0])
