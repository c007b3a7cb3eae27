"""One training in the processes that a launcher has started, with its result where a run looks for it."""

import contextlib
import gc
import logging
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from lori_dist import folder
from lori_dist.cluster.attempts import History
from lori_dist.cluster.run import with_absolute_paths
from lori_dist.cluster.summary import ATTEMPTS, CHECKPOINTS, LOG_FORMAT, START, log_file, made, path
from lori_dist.config import Run
from lori_dist.errors import ConfigError, JobError, Preempted, Redacting
from lori_dist.folder import Attempt
from lori_dist.integrations import model_card
from lori_dist.jobs import Job, check_inputs, plan
from lori_dist.training import preemption
from lori_dist.training.metrics import Record
from lori_dist.training.train import train
from lori_dist.training.world import World, from_first

log = logging.getLogger(__name__)

Begun = tuple[Job, Attempt | None, dict[str, str]]  # without an attempt, the job is finished; digests of its needs


def train_task(run: Run, task: str, world: World, *, progress: Callable[[Record], None]) -> Path:
    """Trains one task's adapter unless that is done already, and before that measures what it begins from: moments, or
    clusters of rows. Returns its file. Every rank calls this.

    progress: gets each step's record, on rank 0. Raises JobError if the task needs another one that is not trained, or
    if another process has taken the job over; Preempted, saved, after SIGTERM or train.time_limit; else what
    `training.train` raises.
    """
    run = with_absolute_paths(run)
    measured = from_first(world, lambda: _unmeasured(run, task))
    if measured:
        _measure(run, measured, world)
    job, attempt, inputs = from_first(world, lambda: _begin(run, task))
    if attempt is None:
        return path(run, job)
    with _logged(log_file(run.folder, job, world.rank)):
        return _train(run, task, world, (job, attempt, inputs), progress)


def _train(
    run: Run, task: str, world: World, begun: tuple[Job, Attempt, dict[str, str]], progress: Callable[[Record], None]
) -> Path:
    job, attempt, inputs = begun
    start = time.monotonic()
    if world.rank == 0:
        history = History(attempt.partial, attempt.number)
        history.begin(workers=world.size)
    try:
        with preemption.of_process(run.train.time_limit) as stop_request:
            result = train(
                run,
                task,
                world,
                attempt.partial,
                fingerprint=job.fingerprint,
                still_mine=attempt.check,
                progress=progress,
                stop_request=stop_request,
                joint=job.settings.get("joint"),
                sequel=job.settings.get("sequel"),
                cluster=job.settings.get("cluster"),
            )
    except Preempted as error:
        if world.rank == 0:
            history.end(str(error))
        raise
    if world.rank == 0:
        seconds = round(time.monotonic() - start, 3)
        history.end(None)
        record = {"seconds": seconds, "attempts": history.attempts, "inputs": inputs, "result": result}
        attempt.check()
        check_inputs(run, job)
        folder.publish(run.folder, job, record, scratch=[CHECKPOINTS, ATTEMPTS, START])
        model_card.write_beside(path(run, job), run.model.path)
    return path(run, job)


def _unmeasured(run: Run, task: str) -> list[tuple[Job, Attempt]]:
    """The unfinished measurements of rows, moments or clusters, that a training needs, each with an attempt at it."""
    jobs = {job.name: job for job in plan(run)}
    training = jobs.get(f"train-{task}")
    if training is None or folder.finished(run.folder, training) is not None:
        return []
    wanted = [jobs[need] for need in training.needs if jobs[need].kind in ("moments", "cluster")]
    if wanted:
        folder.check_entries(run.folder)
    left = [job for job in wanted if folder.finished(run.folder, job) is None]
    return [(job, folder.attempt(folder.open(run.folder, job))) for job in left]


def _measure(run: Run, measured: list[tuple[Job, Attempt]], world: World) -> None:
    from lori_dist.evaluation._clusters import divide  # most trainings need no evaluation
    from lori_dist.evaluation._moments import Wanted, measure

    start, (first, at) = time.monotonic(), measured[0]
    with _logged(log_file(run.folder, first, world.rank)):
        if first.kind == "cluster":
            results = {first.name: divide(run, first, world, at.partial, still_mine=at.check)}
        else:
            wanted = [Wanted(job=job, folder=one.partial, still_mine=one.check) for job, one in measured]
            results = measure(run, wanted, world)
    gc.collect()  # models refer to themselves, and two bases may not fit
    if world.rank > 0:
        return
    for job, attempt in measured:
        history = History(attempt.partial, attempt.number)
        history.begin(workers=world.size)
        history.end(None)
        seconds = round(time.monotonic() - start, 3)
        record = {"seconds": seconds, "attempts": history.attempts, "inputs": {}, "result": results[job.name]}
        attempt.check()
        check_inputs(run, job)
        folder.publish(run.folder, job, record, scratch=[ATTEMPTS])


@contextlib.contextmanager
def _logged(file: Path) -> Iterator[None]:
    """Appends to a file what this package logs."""
    file.parent.mkdir(parents=True, exist_ok=True)
    handler = logging.FileHandler(file, encoding="utf-8", errors="backslashreplace", delay=True)
    handler.setFormatter(Redacting(LOG_FORMAT))
    package = logging.getLogger("lori_dist")
    package.addHandler(handler)
    try:
        yield
    finally:
        package.removeHandler(handler)
        handler.close()


def _begin(run: Run, task: str) -> Begun:
    jobs = {job.name: job for job in plan(run)}
    job = jobs.get(f"train-{task}")
    if job is None:
        raise ConfigError(f"multitask: the plan of {run.multitask.name} has no job for {task} alone; use `lori run`")
    folder.check_entries(run.folder)
    if folder.finished(run.folder, job) is not None:
        return job, None, {}
    if (text := folder.superseded(run.folder, job)) is not None:
        log.warning("%s", text)
    inputs = {}
    for need in job.needs:
        found = folder.finished(run.folder, jobs[need])
        if found is None:
            raise JobError(f"{job.name}: needs {need}, which is not finished; train that one first")
        inputs[need] = made(found)
    return job, folder.attempt(folder.open(run.folder, job)), inputs
