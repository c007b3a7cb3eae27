"""Several jobs that one gang does together, each with a folder, attempts and an end of its own."""

import logging
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from lori_dist import config, folder
from lori_dist.cluster import gang
from lori_dist.cluster.attempts import History, publish
from lori_dist.cluster.failures import BACKOFF_SECONDS, STOPPED, described, failure_of, is_stop, retry
from lori_dist.cluster.gang import Gangs
from lori_dist.cluster.summary import log_file
from lori_dist.cluster.work import Assignment, evaluate_models, train_rank_of_pack
from lori_dist.config import Run
from lori_dist.errors import JobError
from lori_dist.jobs import Job

log = logging.getLogger(__name__)


def do(
    run: Run,
    jobs: Sequence[Job],
    inputs: Mapping[str, Mapping[str, Any]],
    gangs: Gangs,
    end: Callable[[Job, dict[str, Any] | str], None],
) -> None:
    """Does trainings that read no other results, or evaluations, in one gang. A failed attempt is repeated for all of
    them.

    inputs: job -> digests of the results that it reads. end: called once for each job, with the content of its job.json
    or with the message of its failure. Raises JobError with the last attempt's failure.
    """
    start = time.monotonic()
    partials = [folder.open(run.folder, job) for job in jobs]
    number = 0
    while True:
        number += 1
        tree = config.dump(run)
        assignments = [
            Assignment(tree=tree, job=job, attempt=folder.attempt(partial))
            for job, partial in zip(jobs, partials, strict=True)
        ]
        histories = [History(partial, one.attempt.number) for partial, one in zip(partials, assignments, strict=True)]
        try:
            if jobs[0].kind == "train":
                outcomes = _trained(run, assignments, histories, gangs)
            else:
                outcomes = _evaluated(run, assignments, histories, gangs)
            break
        except Exception as error:
            failure = failure_of(error)
            log.debug("%s: attempt %d failed", jobs[0].name, number, exc_info=error)
            for history in histories:
                history.end(STOPPED if gangs.is_ending and is_stop(failure) else failure.message)
            if gangs.is_ending or not retry(failure, number, run.cluster.retries):
                raise JobError(described(run, jobs[0], failure)) from error
            again = f"restarting them ({number} of {run.cluster.retries})"
            log.warning("%s: %s; %s", ", ".join(job.name for job in jobs), failure.message, again)
            gangs.stopping.wait(BACKOFF_SECONDS)
    for assignment, history in zip(assignments, histories, strict=True):
        outcome = outcomes[assignment.job.name]
        if "error" in outcome:
            history.end(outcome["error"])
            end(assignment.job, f"{outcome['error']}; see {log_file(run.folder, jobs[0], 0)}")
            continue
        try:
            end(
                assignment.job, publish(run, assignment, history, start, inputs[assignment.job.name], outcome["result"])
            )
        except JobError as error:
            end(assignment.job, str(error))


def _trained(
    run: Run, assignments: Sequence[Assignment], histories: Sequence[History], gangs: Gangs
) -> dict[str, dict[str, Any]]:
    ranks = gangs.take(assignments[0].job, run.cluster)
    for history in histories:
        history.begin(workers=ranks.shape.count)
    try:
        outcomes: dict[str, dict[str, Any]] = ranks.run(train_rank_of_pack, assignments, gangs.stopping, gangs.asked)
    except BaseException:
        ranks.close()
        raise
    gangs.give_back(ranks)
    return outcomes


def _evaluated(
    run: Run, assignments: Sequence[Assignment], histories: Sequence[History], gangs: Gangs
) -> dict[str, dict[str, Any]]:
    for history in histories:
        history.begin(workers=1)
    call = gang.remote(run, assignments[0].job, evaluate_models)(list(assignments))
    return dict(gang.result(call, gangs.stopping))
