"""What a run asks about the cluster's devices before anything is trained: whether its evaluation fits them, and whether
its tasks are trained at once over one base."""

import logging
import math
from collections.abc import Callable, Sequence
from typing import Any

from lori_dist.cluster import schedule
from lori_dist.cluster.connection import runtime_env
from lori_dist.cluster.schedule import Resources
from lori_dist.config import Run
from lori_dist.errors import ConfigError
from lori_dist.gpus import ASSUMED, DEVICES, GIB, RESERVED, known
from lori_dist.jobs import Job

log = logging.getLogger(__name__)

SMALL = 16
"""A base whose files are less than 1/SMALL of a device is not planned, which takes seconds."""
LEAST = 8 * GIB
"""Memory of a small GPU: to ask a larger one takes seconds."""
LOOK_SECONDS = 120.0
"""Seconds that a GPU's answer is waited for."""
OF_CPUS = {
    "gpu_memory": math.inf, "tflops": 0.05, "bandwidth": 20.0, "link": 2.0, "host": 10.0, "network": 1.0,
}  # fmt: skip
"""As DEVICES has them, of a CPU: float32 products of one core, and what gloo sends."""


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


def packing(run: Run, unfinished: Sequence[Job], nodes: Sequence[Resources]) -> str | int:
    """Trainings that share a base, as `schedule.packs` takes it: `cluster.packing`, or `off` in place of `auto` where
    the tasks take less time one after another on these nodes, by the count of `lori plan`. Says so in the log."""
    packed = [job for job in unfinished if job.kind == "train" and schedule.may_be_packed(job)]
    if run.cluster.packing != "auto" or len(packed) < 2:
        return run.cluster.packing
    from lori_dist.plan import Hardware
    from lori_dist.plan.packing import chosen
    from lori_dist.plan.rows import Counter

    ranks, of_rank = schedule.wanted(packed[0], run.cluster), max(1, run.cluster.gpus_per_worker)
    num_nodes = max(1, sum(node.fits(ranks.part) > 0 for node in nodes))
    if run.cluster.gpus_per_worker:
        device: dict[str, Any] = dict(DEVICES[known(str(_asked(run, _gpu_name) or "")) or ASSUMED])
    else:
        device = OF_CPUS | {"tflops": OF_CPUS["tflops"] * run.cluster.cpus_per_worker}
    nodes_used = num_nodes if ranks.count % num_nodes == 0 else 1
    try:
        settled, said = chosen(run, Hardware(gpus=ranks.count * of_rank, nodes=nodes_used, **device), Counter(run))
    except ConfigError as error:
        log.info("cluster.packing: auto trains all tasks at once, as no plan could be made: %s", error)
        return run.cluster.packing
    if said is not None:
        log.info("%s", said)
    return settled.cluster.packing


def _of_gpu(run: Run) -> float | None:
    """Bytes of a GPU of the cluster; None if none tells within LOOK_SECONDS."""
    found = _asked(run, _gpu_bytes)
    return None if found is None else float(found) - RESERVED


def _asked(run: Run, question: Callable[[], Any]) -> Any:
    """What a GPU of the cluster says; None if none tells within LOOK_SECONDS."""
    import ray

    look = ray.remote(num_cpus=0, num_gpus=1, max_retries=0, runtime_env=runtime_env(run))(question)
    call = look.remote()
    try:
        return ray.get(call, timeout=LOOK_SECONDS)
    except ray.exceptions.RayError as error:
        log.debug("no GPU was asked", exc_info=error)
        ray.cancel(call, force=True)
        return None


def _gpu_name() -> str:
    import torch

    return str(torch.cuda.get_device_name(0))


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
