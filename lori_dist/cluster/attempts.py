"""One job with all its attempts: how each ends, and whether there is another."""

import json
import logging
import threading
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lori_dist import config, folder
from lori_dist.cluster import gang, schedule
from lori_dist.cluster.schedule import Failure
from lori_dist.cluster.summary import CHECKPOINTS
from lori_dist.cluster.trials import TRIED
from lori_dist.cluster.work import FAILURE, RESULT, Assignment, log_file
from lori_dist.config import Run
from lori_dist.errors import JobError
from lori_dist.folder import Attempt
from lori_dist.jobs import Job, check_inputs

DIED = "the process died: it was killed, or its machine ran out of memory or was lost"

WITHOUT_A_WORD = frozenset({"RayActorError", "WorkerHealthCheckFailedError", "WorkerHealthCheckTimeoutError"})
"""What Ray says of a process that is gone."""

BACKOFF_SECONDS = 10.0
"""Before a job is started again: what is left of a gang lives up to 6 seconds longer than its controller."""

log = logging.getLogger(__name__)


def do(run: Run, job: Job, inputs: Mapping[str, Any], stopping: threading.Event) -> dict[str, Any]:
    """One job with all its attempts. Returns what its job.json holds. inputs: digests of what it reads of others."""
    start = time.monotonic()
    partial = folder.open(run.folder, job)
    number = 0
    while True:
        number += 1
        attempt = new_attempt(partial)
        assignment = Assignment(tree=config.dump(run), job=job, attempt=attempt)
        try:
            (gang.run_training if job.kind == "train" else gang.run_task)(run, assignment)
            result = _result(assignment)
            break
        except Exception as error:
            failure = _failure(assignment, error)
            log.debug("%s: attempt %d failed", job.name, attempt.number, exc_info=error)
            if stopping.is_set() or not schedule.retry(failure, number, run.cluster.retries):
                raise JobError(_described(run, job, failure)) from error
            again = f"it is started again ({number} of {run.cluster.retries})"
            log.warning("%s: %s; %s", job.name, failure.message, again)
            stopping.wait(BACKOFF_SECONDS)
    attempt.check()
    check_inputs(run, job)
    seconds = round(time.monotonic() - start, 3)
    record = {"seconds": seconds, "attempts": attempt.number, "inputs": dict(inputs), "result": result}
    folder.publish(run.folder, job, record, scratch=[CHECKPOINTS, TRIED])
    published = folder.finished(run.folder, job)
    assert published is not None
    return published


def new_attempt(partial: Path) -> Attempt:
    """A new attempt in a folder that `folder.open` gave, without what earlier ones have left for a driver."""
    attempt = folder.attempt(partial)
    for left in (partial / RESULT, *partial.glob(f"{FAILURE}*")):
        left.unlink(missing_ok=True)
    return attempt


def _result(assignment: Assignment) -> dict[str, Any]:
    """What the job's rank 0 returned."""
    file = assignment.attempt.partial / RESULT
    try:
        result: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise JobError(
            f"{file}: is not there though the job ended well; `output` must be on storage that all nodes share"
        ) from error
    file.unlink()
    return result


def _described(run: Run, job: Job, failure: Failure) -> str:
    where = f" (rank {failure.rank})" if job.kind == "train" and failure.rank is not None else ""
    return f"{failure.message}{where}; see {log_file(run.folder, job, failure.rank or 0)}"


def _failure(assignment: Assignment, error: Exception) -> Failure:
    """What brought an attempt down, from what its processes wrote and what Ray saw."""
    reported = []
    for file in assignment.attempt.partial.glob(f"{FAILURE}*.json"):
        record = json.loads(file.read_text(encoding="utf-8"))
        if record["attempt"] == assignment.attempt.number:
            reported.append(schedule.failure_of(record))
        file.unlink()
    ranks = {failure.rank for failure in reported}
    lost = []
    for rank, seen in sorted(getattr(error, "worker_failures", {}).items()):
        failure = schedule.failure_of(schedule.record_of(seen, rank, time.time()))
        if rank in ranks:
            continue
        if WITHOUT_A_WORD.isdisjoint(failure.types):  # its own report could not be written
            reported.append(failure)
        else:
            lost.append(Failure(rank=rank, time=0.0, types=(), message=DIED))
    other = schedule.failure_of(schedule.record_of(error, None, 0.0))
    return schedule.cause(reported, lost) or other
