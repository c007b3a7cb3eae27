"""Training: LoRI's protocol from rows of text to adapter files, on one rank of a gang, of one task or of several."""

import gc
import logging
import statistics
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch.distributed as dist

from lori_dist.config import Run
from lori_dist.errors import ConfigError, JobError, LoriError
from lori_dist.jobs import Job as Planned
from lori_dist.jobs import cluster_train_job, joint_job, train_job
from lori_dist.training import checkpoint, metrics
from lori_dist.training.metrics import Record
from lori_dist.training.phases import CALIBRATE, TRAIN, Phase
from lori_dist.training.preemption import StopRequest, nothing
from lori_dist.training.task import (
    ADAPTER,
    CALIBRATED,
    CHECKPOINTS,
    Job,
    calibrated_masks,
    conflicts_of,
    is_calibrated,
    make_job,
    num_rows,
    origin_of,
    phases_of,
)
from lori_dist.training.trackers import tracked
from lori_dist.training.trainer import Group, Masks
from lori_dist.training.world import World, from_first

Outcome = dict[str, Any] | LoriError
"""The outcome of a task: its result, or why it has none."""

log = logging.getLogger(__name__)


def train(
    run: Run,
    task: str,
    world: World,
    folder: Path,
    *,
    fingerprint: str,
    still_mine: Callable[[], None] = lambda: None,
    progress: Callable[[Record], None] = lambda record: None,
    stop_request: StopRequest = nothing,
    fetch: Callable[[], None] = lambda: None,
    joint: Mapping[str, Any] | None = None,
    sequel: Mapping[str, Any] | None = None,
    cluster: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """Trains an adapter, of one task or of several, and writes it to folder/adapter.safetensors. Every rank calls this.

    With density 1 there is one dense phase (LoRI-D). Below that, a dense phase calibrates, its B gives the mask, and
    the kept entries are trained from zero, with the same A and a new optimizer (LoRI-S).

    folder: on storage that all ranks see; an earlier attempt's calibration and checkpoints in it are continued.
    fingerprint: of all that determines the result; files of another one are refused. still_mine: called before each
    write, raises JobError where a newer attempt has taken over. progress: gets each step's record, on rank 0.
    stop_request: asked after each step whether to end; if it says so on any rank, all save and end. fetch: called by
    every rank before it reads a checkpoint of this attempt, where machines have folders of their own. joint: how tasks
    are trained together instead of the one, which is then the adapter's name; as `Joint` takes it.
    sequel: `before`, the tasks that were trained one after another, to whose entries those of this one are added, and
    `masks`: whether these may be anywhere (independent) or where none of theirs are (disjoint).
    cluster: whose rows, of all tasks, are trained on, `place` its number from 0
    and `clusters` how many there are; the adapter has its name.
    Returns kept, total, bytes, steps, loss (of the last step), seconds (of this attempt) and, where tasks' gradients
    were projected, conflicts; where a validation loss chose them, best, its step and loss.
    Raises ConfigError for rows or a model that cannot be used, JobError if ranks disagree or the loss diverges,
    Preempted if it was asked to end.
    Source: LoRI (arXiv 2504.07448), section 3, but for A, which the authors' code draws again for the second phase.
    """
    start = time.monotonic()
    planned = _planned(run, task, joint, sequel, cluster)
    with tracked(run, planned.name) as track:
        job = make_job(
            run,
            planned,
            world,
            folder,
            fingerprint=fingerprint,
            still_mine=still_mine,
            track=track,
            progress=progress,
            stop_request=stop_request,
            fetch=fetch,
        )
        outcome = _trained({job.task: job}, start)[job.task]
    if isinstance(outcome, LoriError):
        raise outcome
    return outcome


def train_together(jobs: Mapping[str, Callable[[], Job]], world: World) -> dict[str, Outcome]:
    """Trains several tasks' adapters at once over one copy of the base: each gets what it would get alone. Every rank
    calls this.

    jobs: task -> what makes its job, reading its rows. Returns what `train` returns, or raises, for each task.
    """
    start = time.monotonic()
    made = {task: _agreed(world, make) for task, make in jobs.items()}
    outcomes: dict[str, Outcome] = {task: error for task, error in made.items() if isinstance(error, LoriError)}
    outcomes |= _trained({task: job for task, job in made.items() if isinstance(job, Job)}, start)
    return {task: outcomes[task] for task in jobs}


def rehearse(
    run: Run,
    task: str,
    world: World,
    folder: Path,
    *,
    fingerprint: str,
    joint: Mapping[str, Any] | None = None,
    sequel: Mapping[str, Any] | None = None,
    cluster: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """All that `train` does before its next step; nothing is written. Every rank calls this.

    The arguments are those of `train`; folder: need not be there. Returns rows, phases (name and steps of each that is
    not done yet), done (steps of the first of them, by an earlier attempt) and entries (that are trained in that one).
    Raises what `train` would by then.
    """
    planned = _planned(run, task, joint, sequel, cluster)
    job = make_job(run, planned, world, folder, fingerprint=fingerprint, is_rehearsal=True)
    left, masks = phases_of(job), None
    if len(left) > 1 and is_calibrated(job, left[0]):
        masks = calibrated_masks(job, left.pop(0))
    group = Group.build({job.task: job}, {job.task: left[0]}, {job.task: masks})
    group.engine.close()
    course = group.courses[job.task]
    steps = [(phase.name, phase.num_steps) for phase in left]
    return {"rows": num_rows(job), "phases": steps, "done": course.end.step, "entries": course.num_entries}


def _planned(
    run: Run,
    task: str,
    joint: Mapping[str, Any] | None,
    sequel: Mapping[str, Any] | None,
    cluster: Mapping[str, Any] | None,
) -> Planned:
    """The job with its settings; what it needs of others is not looked at."""
    if joint is not None:
        return joint_job(run, joint)
    if cluster is not None:
        return cluster_train_job(run, None, **cluster)
    return train_job(run, task, sequel=sequel)


def _agreed(world: World, make: Callable[[], Job]) -> Job | LoriError:
    """A job, or, on all ranks, the mistake in its rows that any of them met."""
    made: Job | LoriError
    try:
        made = make()
    except (ConfigError, JobError) as error:
        made = error
    found: list[Any] = [None] * world.size
    dist.all_gather_object(found, made if isinstance(made, LoriError) else None)
    return next((error for error in found if error is not None), made)


def _trained(jobs: Mapping[str, Job], start: float) -> dict[str, Outcome]:
    """start: of the work, by `time.monotonic`."""
    for job in jobs.values():
        job.folder.mkdir(parents=True, exist_ok=True)
    phases = {task: phases_of(job) for task, job in jobs.items()}
    calibrations = {task: of_task[0] for task, of_task in phases.items() if len(of_task) > 1}
    outcomes: dict[str, Outcome] = {}
    missing = {task: phase for task, phase in calibrations.items() if not is_calibrated(jobs[task], phase)}
    if missing:
        outcomes |= _calibrate({task: jobs[task] for task in missing}, missing)
    masks: dict[str, Masks] = {
        task: calibrated_masks(jobs[task], phase) for task, phase in calibrations.items() if task not in outcomes
    }
    gc.collect()  # models and engines refer to themselves, and two bases may not fit
    left = {task: job for task, job in jobs.items() if task not in outcomes}
    if not left:
        return outcomes
    group = Group.build(left, {task: phases[task][-1] for task in left}, masks)
    outcomes |= group.run()
    done = {task: job for task, job in left.items() if task not in outcomes}
    results = {task: _result(group, task, start) for task in done}
    group.engine.close()
    return outcomes | {task: from_first(job.world, results[task]) for task, job in done.items()}


def _calibrate(jobs: Mapping[str, Job], phases: Mapping[str, Phase]) -> Mapping[str, LoriError]:
    """Leaves each task's calibrated B in its folder. Returns what has ended a task before."""
    group = Group.build(jobs, phases, {})
    errors = group.run()
    for task, job in jobs.items():
        if task in errors:
            continue
        if job.world.rank == 0:
            job.still_mine()
        # Only B is needed from here on, and the moments are two thirds of the bytes.
        origin, path = origin_of(job, phases[task]), job.folder / CALIBRATED
        checkpoint.write_state(path, CALIBRATE, group.view(task), job.world, origin=origin, quantities=("values",))
        if job.world.rank == 0:
            checkpoint.delete(job.folder / CHECKPOINTS, CALIBRATE)
    group.engine.close()
    return errors


def _median_seconds(folder: Path) -> float | None:
    """Seconds of a step of the last phase. None where metrics.jsonl has lost them."""
    seconds = [line["seconds"] for line in metrics.steps(folder) if line["phase"] == TRAIN and "seconds" in line]
    return statistics.median(seconds) if seconds else None


def _result(group: Group, task: str, start: float) -> Callable[[], dict[str, Any]]:
    """Writes a task's adapter. Returns what makes its result on rank 0."""
    adapter, course = group.write_adapter(task), group.courses[task]
    job, end = course.job, course.end

    def result() -> dict[str, Any]:
        assert adapter is not None
        best = {"best": {"step": end.best.step, "loss": end.best.loss}}
        return {
            "kept": adapter.kept,
            "total": adapter.total,
            "trained": course.num_entries,
            "bytes": (job.folder / ADAPTER).stat().st_size,
            "steps": end.step,
            "step_seconds": _median_seconds(job.folder),
            "loss": end.loss,
            "seconds": time.monotonic() - start,
            **conflicts_of(job, group.model),
            **(best if job.run.train.early_stop is not None else {}),
        }

    return result
