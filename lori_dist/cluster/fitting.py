"""Whether the evaluation of a run fits the cluster's devices, asked before anything is trained."""

import logging
from collections.abc import Sequence

from lori_dist.cluster import schedule
from lori_dist.cluster.connection import runtime_env
from lori_dist.cluster.schedule import Resources
from lori_dist.config import Run
from lori_dist.errors import ConfigError
from lori_dist.gpus import GIB, RESERVED
from lori_dist.jobs import Job

log = logging.getLogger(__name__)

SMALL = 16
"""A base whose files are less than 1/SMALL of a device is not planned, which takes seconds."""
LEAST = 8 * GIB
"""Memory of a small GPU: to ask a larger one takes seconds."""
LOOK_SECONDS = 120.0
"""Seconds that a GPU's memory is waited for."""


def check_evaluation(run: Run, unfinished: Sequence[Job], nodes: Sequence[Resources]) -> None:
    """Raises ConfigError if a rank's share of the base does not fit its device while the run's models are evaluated,
    and warns if it does with too little room for the rows that `lori plan` takes.

    unfinished: jobs of the run. nodes: of the cluster that this process is connected to.
    """
    first = next((job for job in unfinished if job.kind == "evaluate"), None)
    if first is None:
        return
    from lori_dist.training.model_files import weight_files  # takes seconds, as do those below

    ranks, on_gpus = schedule.wanted(first, run.cluster), run.cluster.gpus_per_worker > 0
    files = sum(path.stat().st_size for path in weight_files(run.model))
    if on_gpus and SMALL * files < LEAST:
        return
    room = _of_gpu(run) if on_gpus else _of_host(ranks)
    if room is None or SMALL * files < room:
        return
    reason = shortfall(run, ranks.count, room, num_nodes=max(1, sum(node.fits(ranks.part) > 0 for node in nodes)))
    if reason is not None:
        log.warning("%s", reason)


def shortfall(run: Run, num_ranks: int, device_bytes: float, *, num_nodes: int = 1) -> str | None:
    """A sentence that the evaluation may not fit ranks with so many bytes each; None if it does.

    Rows are taken to have train.max_length tokens. Raises ConfigError if not even the base fits.
    """
    from lori_dist.plan import Hardware
    from lori_dist.plan.evaluation import most_memory, others, placement_of
    from lori_dist.plan.model import count

    nodes = num_nodes if num_ranks % num_nodes == 0 else 1
    hardware = Hardware(
        gpus=num_ranks, nodes=nodes, gpu_memory=device_bytes, reserved=0.0, fragmentation=0.0,
        tflops=1.0, link=1.0, network=1.0,
    )  # fmt: skip
    model, placement = count(run, ranks=num_ranks), placement_of(run, num_ranks, nodes)
    rows, longest = run.evaluate.batch_size, run.train.max_length
    kinds = most_memory(run, model, placement, hardware, longest=longest, answer=longest, rows=rows)
    total, of_base = sum(kinds.values()), kinds["base"] + kinds["gathered"]
    if total <= device_bytes:
        return None
    ways = [
        one
        for one in others(run, model, placement, hardware, longest=longest, answer=longest, rows=rows)
        if one["fits"]
    ]
    remedy = "use more or larger devices, or a quantised base (model.quantize)"
    if ways:
        best = min(ways, key=lambda one: one["total"])
        remedy = f"set evaluate.engine to {best['name']}, which takes {best['total'] / GIB:.1f} GiB"
    where = f"evaluate.engine: the evaluation on {num_ranks} rank{'s' * (num_ranks > 1)} with {placement.name}"
    there = f"and a rank has {device_bytes / GIB:.1f} GiB"
    if of_base > device_bytes:
        raise ConfigError(f"{where} takes {of_base / GIB:.1f} GiB a rank for the base alone, {there}; {remedy}")
    return (
        f"{where} may take {total / GIB:.1f} GiB a rank with evaluate.batch_size {rows} and rows of {longest:,} "
        f"tokens, {there}; lower evaluate.batch_size, or {remedy}. `lori plan` says what takes it, and `lori run "
        "--dry-run` tries it"
    )


def _of_gpu(run: Run) -> float | None:
    """Bytes of a GPU of the cluster; None if none tells within LOOK_SECONDS."""
    import ray

    look = ray.remote(num_cpus=0, num_gpus=1, max_retries=0, runtime_env=runtime_env(run))(_gpu_bytes)
    call = look.remote()
    try:
        return float(ray.get(call, timeout=LOOK_SECONDS)) - RESERVED
    except ray.exceptions.RayError as error:
        log.debug("the memory of a GPU is not known", exc_info=error)
        ray.cancel(call, force=True)
        return None


def _gpu_bytes() -> int:
    import torch

    return int(torch.cuda.get_device_properties(0).total_memory)


def _of_host(ranks: schedule.Shape) -> float | None:
    """Bytes of host memory for each rank, on the node with the least; None if Ray does not say."""
    import ray

    found = []
    for node in (one for one in ray.nodes() if one["Alive"]):
        there = node["Resources"]
        fitting = Resources(cpus=there.get("CPU", 0.0), gpus=there.get("GPU", 0.0)).fits(ranks.part)
        size = there.get("memory", 0.0) + there.get("object_store_memory", 0.0)
        if fitting and size:
            found.append(size / min(ranks.count, fitting))
    return min(found, default=None)
