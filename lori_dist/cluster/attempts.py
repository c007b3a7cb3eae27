"""A job, or several that share one base, with all attempts: the loop, the record of each, and the published result.

Why an attempt failed and whether there is another is decided in failures.py.
"""

import contextlib
import logging
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from lori_dist import config, folder, storage
from lori_dist.cluster import gang
from lori_dist.cluster.failures import BACKOFF_SECONDS, CUT_OFF, STOPPED, described, failure_of, is_stop, retry
from lori_dist.cluster.gang import Gangs
from lori_dist.cluster.summary import ATTEMPTS, CHECKPOINTS, METRICS, START, attempts_of, is_step, log_file
from lori_dist.cluster.trials import TRIED, search_rank, trial
from lori_dist.cluster.work import (
    Assignment,
    cluster_rank,
    evaluate_rank,
    merge_adapters,
    moments_rank,
    train_rank,
    train_ranks,
)
from lori_dist.config import Run
from lori_dist.errors import JobError
from lori_dist.jobs import Job, check_inputs
from lori_dist.scores import MEASURED

log = logging.getLogger(__name__)


def do(
    run: Run,
    jobs: Sequence[Job],
    inputs: Mapping[str, Mapping[str, Any]],
    gangs: Gangs,
    end: Callable[[Job, dict[str, Any] | str], None],
) -> None:
    """Does a job, or several that share one base, with all attempts: trainings that read no other adapter, measurements
    of moments, or evaluations.
    A failed attempt is repeated for all of them.

    inputs: job -> digests of the results that it reads. end: called once for each job, with the content of its job.json
    or with the reason why it failed. Raises JobError with the last attempt's failure.
    """
    start = time.monotonic()
    partials = [folder.open(run.folder, job) for job in jobs]
    mirror = _mirror(run)
    if mirror:
        for partial in partials:
            mirror.push(partial.name)
            mirror.prune(partial.name)
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
            if mirror:
                for partial in partials:
                    mirror.push(partial.name)
            outcomes = _outcomes(run, assignments, gangs, histories)
            if mirror:
                for partial in partials:
                    mirror.pull(partial.name)
            break
        except Exception as error:
            if mirror:
                for partial in partials:
                    mirror.pull(partial.name)
            failure = failure_of(error)
            log.debug("%s: attempt %d failed", jobs[0].name, number, exc_info=error)
            for history in histories:
                history.end(STOPPED if gangs.is_ending and is_stop(failure) else failure.message)
            if gangs.is_ending or not retry(failure, number, run.cluster.retries):
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
        except JobError as error:
            end(job, str(error))
        else:
            end(job, made)


def _mirror(run: Run) -> storage.Mirror | None:
    """The mirror of a run's folder on storage, if its output is a URL."""
    return storage.open(run.output, run.name) if storage.is_url(run.output) else None


def publish(
    run: Run,
    assignment: Assignment,
    history: "History",
    start: float,
    inputs: Mapping[str, Any],
    result: Mapping[str, Any],
) -> dict[str, Any]:
    """Publishes an attempt's folder as the job's result. Returns what its job.json holds. start: when the work began,
    by `time.monotonic`."""
    job = assignment.job
    assignment.attempt.check()
    check_inputs(run, job)
    history.end(None)
    seconds = round(time.monotonic() - start, 3)
    record = {"seconds": seconds, "attempts": history.attempts, "inputs": dict(inputs), "result": dict(result)}
    folder.publish(run.folder, job, record, scratch=[CHECKPOINTS, TRIED, ATTEMPTS, MEASURED, START])
    if mirror := _mirror(run):
        for place in (*folder.kept(run.folder, job.name), run.folder / job.name):
            mirror.push(place.name)
        mirror.prune(job.name)
        mirror.delete(assignment.attempt.partial.name)
    published = folder.finished(run.folder, job)
    assert published is not None
    return published


def _outcomes(
    run: Run, assignments: Sequence[Assignment], gangs: Gangs, histories: "Sequence[History]"
) -> dict[str, dict[str, Any]]:
    """Job -> its `result`, or the `error` that ended it alone. Raises Broken if processes fail, and any error of this
    process."""
    first, name = assignments[0], assignments[0].job.name
    if first.job.kind in ("evaluate", "moments"):
        function = evaluate_rank if first.job.kind == "evaluate" else moments_rank
        return dict(_of_gang(run, histories, gangs, first.job, function, assignments))
    if first.job.kind == "train":
        if len(assignments) > 1:
            return dict(_of_gang(run, histories, gangs, first.job, train_ranks, assignments))
        return {name: {"result": dict(_of_gang(run, histories, gangs, first.job, train_rank, first))}}
    if first.job.kind == "cluster":
        return {name: {"result": dict(_of_gang(run, histories, gangs, first.job, cluster_rank, first))}}
    if "search" in first.job.settings:
        return {name: {"result": dict(_of_gang(run, histories, gangs, first.job, search_rank, trial(run, first)))}}
    for history in histories:
        history.begin(workers=1)
    return {name: {"result": dict(gang.result(gang.remote(run, first.job, merge_adapters)(first), gangs.stopping))}}


def _of_gang(
    run: Run, histories: Sequence["History"], gangs: Gangs, job: Job, function: Callable[[Any], Any], argument: Any
) -> Any:
    """Returns what function(argument) returns on rank 0 of a gang of the job's shape. Raises Broken."""
    ranks = gangs.take(job, run.cluster)
    for history in histories:
        history.begin(workers=ranks.shape.count)
    try:
        result = ranks.run(function, argument, gangs.stopping, gangs.asked)
    except BaseException:
        ranks.close()
        raise
    gangs.give_back(ranks)
    return result


class History:
    """The record of each attempt at a job, those of earlier drivers included, for summary.json and job.json.

    A record has the attempt's number; its start, in seconds since the epoch; the seconds it took, with those that it
    waited for room; its number of workers; the error that ended it; and, for a training, the step from which it
    resumed, the last step it reached, and the seconds from the end of the attempt before to its first step. What is not
    known is None.
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
        """Records that the attempt has got its workers."""
        self.attempts[-1]["workers"] = workers
        self._write()

    def end(self, error: str | None) -> None:
        """Records the end of the attempt. error: its message, or None if the attempt succeeded."""
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
    """The steps in a training's metrics, without damaged lines. Other jobs have no steps."""
    records, _ = folder.read_lines(partial / METRICS)
    return [record for record in records if is_step(record)]
