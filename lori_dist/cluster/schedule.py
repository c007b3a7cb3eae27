"""The jobs that start next, as a function of data: what each takes of the cluster, and whether there is room for it.

Why a job failed and whether it is tried again is in failures.py.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

from lori_dist.config import Cluster
from lori_dist.errors import ConfigError
from lori_dist.jobs import Job

UNIT = 10_000
"""Steps in which amounts are added up: Ray counts resources in ten-thousandths as well."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Resources:
    """CPUs and GPUs of one node, or of one process."""

    cpus: float
    gpus: float = 0.0

    def fits(self, part: "Resources") -> int:
        """Number of processes with the resources `part` that fit here."""
        wanted = [(_units(self.cpus), _units(part.cpus)), (_units(self.gpus), _units(part.gpus))]
        return min(have // want for have, want in wanted if want > 0)


@dataclass(frozen=True, kw_only=True, slots=True)
class Shape:
    """The processes of a job, their resources and their placement."""

    count: int
    """Number of processes."""
    part: Resources
    """Resources of each process."""
    placement: str = "pack"
    """A strategy of Ray's placement groups, in lower case."""

    def room(self, nodes: Iterable[Resources]) -> int:
        """Number of such processes that fit on the nodes under this placement."""
        fitting = [node.fits(self.part) for node in nodes]
        match self.placement:
            case "strict_pack":
                return max(fitting, default=0)
            case "strict_spread":
                return sum(number > 0 for number in fitting)
        return sum(fitting)


def wanted(job: Job, cluster: Cluster) -> Shape:
    """The shape of a job if the cluster has all that it asks for."""
    if job.is_gang:
        part = Resources(cpus=cluster.cpus_per_worker, gpus=cluster.gpus_per_worker)
        return Shape(count=cluster.workers, part=part, placement=cluster.placement)
    # Small matrices, one module at a time; has room wherever a training has.
    return Shape(count=cluster.workers, part=Resources(cpus=min(1.0, cluster.cpus_per_worker)))


def possible(job: Job, cluster: Cluster, nodes: Iterable[Resources]) -> Shape | None:
    """The shape of a job that has these nodes for itself, with fewer workers than wanted if the run allows that. None
    if there is no room."""
    shape = wanted(job, cluster)
    room = shape.room(nodes)
    if room >= shape.count:
        return shape
    if not job.is_gang and room > 0:  # its result does not depend on their number
        return replace(shape, count=room)
    if job.is_gang and cluster.min_workers is not None and room >= cluster.min_workers:
        return replace(shape, count=room)
    return None


def check_room(jobs: Iterable[Job], cluster: Cluster, nodes: Sequence[Resources]) -> None:
    """Raises ConfigError for a job that would not fit even if it had the whole cluster for itself."""
    for job in jobs:
        if possible(job, cluster, nodes) is None:
            raise ConfigError(no_room(job, cluster, nodes))


def no_room(job: Job, cluster: Cluster, nodes: Sequence[Resources]) -> str:
    """The message that the nodes are too few or too small for a job, with a remedy."""
    shape = wanted(job, cluster)
    there = "; ".join(_text(node) for node in nodes) or "no node"
    where = {"strict_pack": " on one node", "strict_spread": ", each on its own node"}.get(shape.placement, "")
    found = f"{job.name} takes {shape.count} x ({_text(shape.part)}){where}, the cluster has room for "
    found += f"{shape.room(nodes)} ({there})"
    if job.is_gang:
        return f"cluster.workers: {found}; lower it, or what a worker takes, or use a larger cluster"
    return f"cluster: {found}; use a larger cluster"


def admit(ready: Iterable[Job], running: Sequence[Job], cluster: Cluster, nodes: Sequence[Resources]) -> list[Job]:
    """The jobs to start now: of those that are ready, in their order, each that still finds room."""
    taken = [_total(possible(job, cluster, nodes) or wanted(job, cluster)) for job in running]
    cpus = sum(_units(node.cpus) for node in nodes) - sum(total[0] for total in taken)
    gpus = sum(_units(node.gpus) for node in nodes) - sum(total[1] for total in taken)
    admitted: list[Job] = []
    for job in ready:
        if cluster.max_concurrent is not None and len(running) + len(admitted) >= cluster.max_concurrent:
            break
        shape = possible(job, cluster, nodes)
        if shape is None:
            continue
        job_cpus, job_gpus = _total(shape)
        if job_cpus <= cpus and job_gpus <= gpus:
            cpus, gpus = cpus - job_cpus, gpus - job_gpus
            admitted.append(job)
    return admitted


def packs(ready: Iterable[Job], packing: str | int) -> list[tuple[Job, ...]]:
    """The jobs that could start, in their order, those together that are to share a copy of the base: all evaluations,
    all measurements of moments, and, with packing, trainings of a task each, which read no other adapter."""
    most = 1 if packing == "off" else packing if isinstance(packing, int) else None
    found: list[list[Job]] = []
    packs: dict[str, list[Job]] = {}
    for job in ready:
        pack = packs.get(job.kind)
        if not may_be_packed(job):
            found.append([job])
        elif pack is not None and (job.kind != "train" or most is None or len(pack) < most):
            pack.append(job)
        else:
            packs[job.kind] = [job]
            found.append(packs[job.kind])
    return [tuple(jobs) for jobs in found]


def may_be_packed(job: Job) -> bool:
    """Whether a job may share a gang with others: an evaluation, a measurement of moments, or a task's training that
    reads no other adapter."""
    if job.kind in ("evaluate", "moments"):
        return True
    reads_moments_alone = all(need.startswith("moments-") for need in job.needs)
    return job.kind == "train" and reads_moments_alone and not {"joint", "sequel"} & set(job.settings)


def _total(shape: Shape) -> tuple[int, int]:
    return shape.count * _units(shape.part.cpus), shape.count * _units(shape.part.gpus)


def _units(amount: float) -> int:
    return round(amount * UNIT)


def _text(resources: Resources) -> str:
    amounts = [("CPU", resources.cpus)] + [("GPU", resources.gpus)] * (resources.gpus > 0)
    return ", ".join(f"{amount:g} {unit}{'' if amount == 1 else 's'}" for unit, amount in amounts)
