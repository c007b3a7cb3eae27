"""Several jobs that one gang does together, each with a folder, attempts and an end of its own."""

import logging
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from lori_dist import config, folder
from lori_dist.cluster.attempts import History, mirror_of, of_gang, publish
from lori_dist.cluster.failures import BACKOFF_SECONDS, STOPPED, described, failure_of, is_stop, retry
from lori_dist.cluster.gang import Gangs
from lori_dist.cluster.summary import log_file
from lori_dist.cluster.work import Assignment, evaluate_rank, train_rank_of_pack
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
    mirror = mirror_of(run)
    if mirror:
        for partial in partials:
            mirror.push(partial.name)
            mirror.prune(partial.name)
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
            if mirror:
                for partial in partials:
                    mirror.push(partial.name)
            function = train_rank_of_pack if jobs[0].kind == "train" else evaluate_rank
            outcomes: dict[str, Any] = of_gang(run, histories, gangs, jobs[0], function, assignments)
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
