"""What the runner of jobs decides, as functions of data: what starts, why a job failed, whether it is tried again."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from lori_dist.config import Cluster
from lori_dist.errors import ConfigError
from lori_dist.jobs import Job

UNIT = 10_000
"""Ray counts resources in ten-thousandths; so do sums here."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Resources:
    """Of one node, or of one process."""

    cpus: float
    gpus: float = 0.0

    def fits(self, part: "Resources") -> int:
        """How many processes that take `part` have room here."""
        wanted = [(_units(self.cpus), _units(part.cpus)), (_units(self.gpus), _units(part.gpus))]
        return min(have // want for have, want in wanted if want > 0)


@dataclass(frozen=True, kw_only=True, slots=True)
class Failure:
    """What one process of a job ended with."""

    rank: int | None
    """None where it is not known which one it was."""
    time: float
    """Seconds since the epoch, by its own clock."""
    types: tuple[str, ...]
    """Names of the error's class and of its bases; empty if the process died without a word."""
    message: str


# --- room ------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True, slots=True)
class Shape:
    """What a job takes of the cluster."""

    count: int
    """Processes."""
    part: Resources
    """Of each of them."""
    placement: str = "pack"
    """A strategy of Ray's placement groups, in small letters."""

    def room(self, nodes: Iterable[Resources]) -> int:
        """How many such processes fit on the nodes, placed so."""
        fitting = [node.fits(self.part) for node in nodes]
        match self.placement:
            case "strict_pack":
                return max(fitting, default=0)
            case "strict_spread":
                return sum(number > 0 for number in fitting)
        return sum(fitting)


def wanted(job: Job, cluster: Cluster) -> Shape:
    """What a job takes where nothing is missing."""
    if job.kind == "train":
        part = Resources(cpus=cluster.cpus_per_worker, gpus=cluster.gpus_per_worker)
        return Shape(count=cluster.workers, part=part, placement=cluster.placement)
    if job.kind == "merge" and "search" not in job.settings:
        # Small matrices, one module at a time; has room wherever a training has.
        return Shape(count=cluster.workers, part=Resources(cpus=min(1.0, cluster.cpus_per_worker)))
    # An evaluation, and a search, whose evaluations wait for each other's room, runs the model: as a training does.
    return Shape(count=1, part=Resources(cpus=1.0, gpus=min(1, cluster.gpus_per_worker)))


def possible(job: Job, cluster: Cluster, nodes: Iterable[Resources]) -> Shape | None:
    """What a job takes of these nodes if it has them for itself: with fewer workers than wanted where the run allows
    that. None if there is no room."""
    shape = wanted(job, cluster)
    room = shape.room(nodes)
    if room >= shape.count:
        return shape
    if job.kind == "merge" and room > 0:  # its result does not depend on their number
        return replace(shape, count=room)
    if job.kind == "train" and cluster.min_workers is not None and room >= cluster.min_workers:
        return replace(shape, count=room)
    return None


def check_room(jobs: Iterable[Job], cluster: Cluster, nodes: Sequence[Resources]) -> None:
    """Raises ConfigError for a job that would not fit even if it had the whole cluster for itself."""
    for job in jobs:
        if possible(job, cluster, nodes) is None:
            raise ConfigError(no_room(job, cluster, nodes))


def no_room(job: Job, cluster: Cluster, nodes: Sequence[Resources]) -> str:
    """Why the nodes are too few or too small for a job, with what can be done."""
    shape = wanted(job, cluster)
    there = "; ".join(_text(node) for node in nodes) or "no node"
    where = {"strict_pack": " on one node", "strict_spread": ", each on its own node"}.get(shape.placement, "")
    found = f"{job.name} takes {shape.count} x ({_text(shape.part)}){where}, the cluster has room for "
    found += f"{shape.room(nodes)} ({there})"
    if job.kind == "train":
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
    """The jobs that could start, in their order, those together that are to share a copy of the base: trainings of a
    task each, which read nothing of others, and evaluations."""
    most = 1 if packing == "off" else packing if isinstance(packing, int) else None
    found: list[list[Job]] = []
    packs: dict[str, list[Job]] = {}
    for job in ready:
        pack = packs.get(job.kind)
        if not may_be_packed(job):
            found.append([job])
        elif pack is not None and (most is None or len(pack) < most):
            pack.append(job)
        else:
            packs[job.kind] = [job]
            found.append(packs[job.kind])
    return [tuple(jobs) for jobs in found]


def may_be_packed(job: Job) -> bool:
    if job.kind == "evaluate":
        return True
    return job.kind == "train" and not job.needs and not {"joint", "sequel"} & set(job.settings)


def _total(shape: Shape) -> tuple[int, int]:
    return shape.count * _units(shape.part.cpus), shape.count * _units(shape.part.gpus)


def _units(amount: float) -> int:
    return round(amount * UNIT)


def _text(resources: Resources) -> str:
    amounts = [("CPU", resources.cpus)] + [("GPU", resources.gpus)] * (resources.gpus > 0)
    return ", ".join(f"{amount:g} {unit}{'' if amount == 1 else 's'}" for unit, amount in amounts)


# --- failures --------------------------------------------------------------------------------------------------------

FINAL = (
    "LoriError",
    "ArithmeticError",
    "AssertionError",
    "AttributeError",
    "ImportError",
    "LookupError",
    "NameError",
    "NotImplementedError",
    "SyntaxError",
    "TypeError",
    "ValueError",
)
"""Errors that the next attempt would meet again: mistakes of the user or of a program."""


def cause(reported: Iterable[Failure], lost: Iterable[Failure]) -> Failure | None:
    """The failure that brought a job down; the others are its consequences. None if there is none.

    reported: by the processes themselves. lost: processes that died without a word. Where one died, its peers report
    broken connections, unless one of them had found a mistake before.
    """
    by_time = sorted(reported, key=lambda failure: failure.time)
    final = [failure for failure in by_time if is_final(failure)]
    return next(iter([*final, *lost, *by_time]), None)


def is_final(failure: Failure) -> bool:
    """Whether another attempt would end in the same way."""
    return not set(FINAL).isdisjoint(failure.types)


def retry(failure: Failure, number: int, retries: int) -> bool:
    """Whether attempt `number`, counted from 1, that failed so is followed by another."""
    return number <= retries and not is_final(failure)


def failure_of(record: Mapping[str, Any]) -> Failure:
    """The failure that `record_of` wrote down."""
    return Failure(rank=record["rank"], time=record["time"], types=tuple(record["types"]), message=record["message"])


def record_of(error: BaseException, rank: int | None, time: float) -> dict[str, Any]:
    """A failure as plain JSON. Of our own errors the whole message, of others the first line."""
    names = [kind.__name__ for kind in type(error).__mro__]
    text = str(error).strip()
    if "LoriError" not in names or not text:
        text = f"{names[0]}: {text.partition(chr(10))[0]}" if text else names[0]
    return {"rank": rank, "time": time, "types": names, "message": text}
