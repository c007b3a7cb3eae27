"""A job, or several that share one base, with all attempts: how each ends, and whether there is another."""

import contextlib
import logging
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from lori_dist import config, folder, storage
from lori_dist.cluster import gang, schedule, trials
from lori_dist.cluster.gang import Broken, Gangs
from lori_dist.cluster.schedule import Failure
from lori_dist.cluster.summary import ATTEMPTS, CHECKPOINTS, METRICS, attempts_of, is_step, log_file
from lori_dist.cluster.trials import TRIED
from lori_dist.cluster.work import (
    Assignment,
    evaluate_model,
    evaluate_models,
    merge_adapters,
    train_rank,
    train_ranks,
)
from lori_dist.config import Run
from lori_dist.errors import JobError
from lori_dist.jobs import Job, check_inputs

BACKOFF_SECONDS = 1.0
"""Before a job is started again."""

CUT_OFF = "cut off with its driver"
STOPPED = "stopped with its run"

log = logging.getLogger(__name__)


def do(
    run: Run,
    jobs: Sequence[Job],
    inputs: Mapping[str, Mapping[str, Any]],
    gangs: Gangs,
    end: Callable[[Job, dict[str, Any] | str], None],
) -> None:
    """A job with all its attempts, or several that share one base: trainings that need nothing of others, or
    evaluations. What fails is started again for all of them.

    inputs: of each job, digests of what it reads of others. end: called once for each job, with what its job.json
    holds or with why it failed.
    """
    start = time.monotonic()
    partials = [folder.open(run.folder, job) for job in jobs]
    mirror = storage.open(run.output, run.name) if storage.is_url(run.output) else None
    for partial in partials if mirror else ():
        _push(mirror, partial)
        _prune(mirror, partial)
    names, number = ", ".join(job.name for job in jobs), 0
    while True:
        number += 1
        tree = config.dump(run)
        assignments = [
            Assignment(tree=tree, job=job, attempt=folder.attempt(partial))
            for job, partial in zip(jobs, partials, strict=True)
        ]
        histories = [History(partial, one.attempt.number) for partial, one in zip(partials, assignments, strict=True)]
        try:
            for partial in partials:
                _push(mirror, partial)
            outcomes = _outcomes(run, assignments, gangs, histories)
            for partial in partials:
                _pull(mirror, partial)
            break
        except Exception as error:
            for partial in partials:
                _pull(mirror, partial)
            failure = failure_of(error)
            log.debug("%s: attempt %d failed", jobs[0].name, number, exc_info=error)
            for history in histories:
                history.end(STOPPED if gangs.is_ending and is_stop(failure) else failure.message)
            if gangs.is_ending or not schedule.retry(failure, number, run.cluster.retries):
                raise JobError(described(run, jobs[0], failure)) from error
            again = f"restarting {'them' if len(jobs) > 1 else 'it'} ({number} of {run.cluster.retries})"
            log.warning("%s: %s; %s", names, failure.message, again)
            gangs.stopping.wait(BACKOFF_SECONDS)
    for assignment, history in zip(assignments, histories, strict=True):
        job, outcome = assignment.job, outcomes[assignment.job.name]
        if "error" in outcome:
            history.end(outcome["error"])
            end(job, f"{outcome['error']}; see {log_file(run.folder, jobs[0], 0)}")
            continue
        try:
            made = publish(run, assignment, history, start, inputs[job.name], outcome["result"])
            if mirror:
                for place in folder.kept(run.folder, job.name):
                    mirror.push(place.name)
                mirror.push(job.name)
                mirror.prune(job.name)
                mirror.delete(assignment.attempt.partial.name)
        except JobError as error:
            end(job, str(error))
        else:
            end(job, made)


def _push(mirror: storage.Mirror | None, partial: Path) -> None:
    if mirror:
        mirror.push(partial.name)


def _prune(mirror: storage.Mirror | None, partial: Path) -> None:
    if mirror:
        mirror.prune(partial.name)


def _pull(mirror: storage.Mirror | None, partial: Path) -> None:
    if mirror:
        mirror.pull(partial.name)


def publish(
    run: Run,
    assignment: Assignment,
    history: "History",
    start: float,
    inputs: Mapping[str, Any],
    result: Mapping[str, Any],
) -> dict[str, Any]:
    """Makes an attempt's folder the job's. Returns what its job.json holds. start: of the work, by `time.monotonic`."""
    job = assignment.job
    assignment.attempt.check()
    check_inputs(run, job)
    history.end(None)
    seconds = round(time.monotonic() - start, 3)
    record = {"seconds": seconds, "attempts": history.attempts, "inputs": dict(inputs), "result": dict(result)}
    folder.publish(run.folder, job, record, scratch=[CHECKPOINTS, TRIED, ATTEMPTS])
    published = folder.finished(run.folder, job)
    assert published is not None
    return published


def _outcomes(
    run: Run, assignments: Sequence[Assignment], gangs: Gangs, histories: "Sequence[History]"
) -> dict[str, dict[str, Any]]:
    """Of each job, by name, its `result` or the `error` that ended it alone. Raises Broken, or what goes wrong in this
    process."""
    first, name = assignments[0], assignments[0].job.name
    if first.job.kind == "train":
        ranks = gangs.take(first.job, run.cluster)
        for history in histories:
            history.begin(workers=ranks.shape.count)
        try:
            outcomes: dict[str, dict[str, Any]]
            if len(assignments) > 1:
                outcomes = ranks.run(train_ranks, assignments, gangs.stopping, gangs.asked)
            else:
                outcomes = {name: {"result": ranks.run(train_rank, first, gangs.stopping, gangs.asked)}}
        except BaseException:
            ranks.close()
            raise
        gangs.give_back(ranks)
        return outcomes
    for history in histories:
        history.begin(workers=1)
    if len(assignments) > 1:
        call = gang.remote(run, first.job, evaluate_models)(list(assignments))
        return dict(gang.result(call, gangs.stopping))
    if "search" in first.job.settings:
        first = trials.searched(run, first, gangs.stopping)
    function = {"merge": merge_adapters, "evaluate": evaluate_model}[first.job.kind]
    return {name: {"result": dict(gang.result(gang.remote(run, first.job, function)(first), gangs.stopping))}}


def is_stop(failure: Failure) -> bool:
    """Whether a job that failed while its run ended did so for that reason: it saved, or lost its processes."""
    return "Stopped" in failure.types or not schedule.is_final(failure)


def failure_of(error: Exception) -> Failure:
    if isinstance(error, Broken):
        return error.failure
    return schedule.failure_of(schedule.record_of(error, None, time.time()))


def described(run: Run, job: Job, failure: Failure) -> str:
    where = f" (rank {failure.rank})" if job.kind == "train" and failure.rank is not None else ""
    return f"{failure.message}{where}; see {log_file(run.folder, job, failure.rank or 0)}"


class History:
    """What became of each attempt at a job, those of earlier drivers among them. For summary.json and job.json.

    Of each: its number; when it started, in seconds since the epoch; how many seconds it took, waiting for room among
    them; how many workers it had; the error that ended it; and of a training the step from which it went on, the last
    it reached, and how many seconds after the end of the attempt before it had done one. None where that is not known.
    """

    def __init__(self, partial: Path, number: int) -> None:
        self._partial = partial
        self.attempts = attempts_of(partial)
        if (partial / ATTEMPTS).exists() and len(self.attempts) != number - 1:
            log.warning(
                "%s: only %d of %d attempts can be read, as after a power cut; the job resumes anyway",
                partial / ATTEMPTS,
                len(self.attempts),
                number - 1,
            )
        if self.attempts and self.attempts[-1]["seconds"] is None:
            self._close(CUT_OFF)
        self.attempts.append(
            {
                "number": number,
                "started": time.time(),
                "seconds": None,
                "workers": None,
                "error": None,
                "resumed_at": None,
                "reached": None,
                "recovery_seconds": None,
            }
        )
        self._write()

    def begin(self, *, workers: int) -> None:
        self.attempts[-1]["workers"] = workers
        self._write()

    def end(self, error: str | None) -> None:
        self._close(error)
        self._write()

    def _close(self, error: str | None) -> None:
        entry = self.attempts[-1]
        steps = [step for step in _steps(self._partial) if step.get("time", 0.0) >= entry["started"]]
        now = steps[-1]["time"] if error == CUT_OFF and steps else time.time()
        entry.update(seconds=round(now - entry["started"], 3), error=error)
        if steps:
            entry["resumed_at"] = {"phase": steps[0]["phase"], "step": steps[0]["step"] - 1}
            entry["reached"] = {"phase": steps[-1]["phase"], "step": steps[-1]["step"]}
            if len(self.attempts) > 1:
                before = self.attempts[-2]
                ended = before["started"] + before["seconds"]
                entry["recovery_seconds"] = round(steps[0]["time"] - ended, 3)

    def _write(self) -> None:
        with contextlib.suppress(OSError):  # a full disk is for the job itself to tell
            folder.write_json(self._partial / ATTEMPTS, {"attempts": self.attempts})


def _steps(partial: Path) -> list[dict[str, Any]]:
    """What a training's metrics say, but for lines that are not whole. Other jobs have no steps."""
    records, _ = folder.read_lines(partial / METRICS)
    return [record for record in records if is_step(record)]
