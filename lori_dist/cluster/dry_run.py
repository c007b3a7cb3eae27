"""A run without its steps: everything before the first step of each training is done where the run would do it, its
models are evaluated on one batch, and nothing remains."""

import dataclasses
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from lori_dist import config, folder, rows, storage
from lori_dist.cluster import schedule, scratch
from lori_dist.cluster.board import Board
from lori_dist.cluster.connection import connected, runtime_env
from lori_dist.cluster.failures import failure_of
from lori_dist.cluster.fitting import check_evaluation
from lori_dist.cluster.gang import Gangs
from lori_dist.cluster.run import planned, with_absolute_paths
from lori_dist.cluster.summary import ADAPTER
from lori_dist.cluster.work import EvaluationRehearsal, Rehearsal, rehearse_evaluation_rank, rehearse_rank
from lori_dist.config import Run
from lori_dist.errors import ConfigError, JobError
from lori_dist.jobs import Job

TITLES = ("job", "state", "needs", "rows", "steps", "trained entries")


def dry_run(run: Run) -> tuple[list[tuple[str, ...]], list[str]]:
    """Checks a run, reads and encodes its rows, builds each of its trainings in a gang of the run's cluster, up to the
    first step, and evaluates all models on one batch there, with stand-ins for adapters that are not trained yet.
    Returns one line for each job, under TITLES, and a sentence for each job whose folder has a result of other
    settings. The run's folder stays as it is, or absent.

    Raises what `execute` would at its start, and JobError with what is wrong with trainings that cannot be built, and
    with an evaluation that cannot run.
    """
    run = with_absolute_paths(run)
    if storage.is_url(run.output):
        raise ConfigError(f"output: {run.output!r} is a URL, and a dry run looks into folders only; give a path")
    scratch.check()
    folder.check_free(run.folder)
    board = Board(run=run, jobs=planned(run), progress=lambda event: None)
    found = _rehearsed(board) if board.unfinished() else {}
    return [_line(board, job, found.get(job.name)) for job in board.jobs], board.superseded()


def _rehearsed(board: Board) -> dict[str, dict[str, Any]]:
    """Training -> the result of `training.rehearse`."""
    run = board.run
    rows.check(run)
    found: dict[str, dict[str, Any]] = {}
    failed: list[str] = []
    with tempfile.TemporaryDirectory() as place, connected(dataclasses.replace(run, output=place)) as nodes:
        schedule.check_room(board.unfinished(), run.cluster, nodes())
        check_evaluation(run, board.unfinished(), nodes())
        gangs = Gangs(environment=runtime_env(run), nodes=nodes)

        def attempt(name: str, job: Job, function: Callable[[Any], Any], work: Any) -> Any:
            """The result on rank 0 of a gang; None, with the failure noted, if it fails."""
            try:
                return _on_gang(board, job, gangs, function, work)
            except Exception as error:
                failure = failure_of(error)
                where = "" if failure.rank is None else f" (rank {failure.rank})"
                failed.append(f"{name}: {failure.message}{where}")
                return None

        evaluations = [job for job in board.unfinished() if job.kind == "evaluate"]
        for job in board.unfinished():
            if job.kind == "train" and (result := attempt(job.name, job, rehearse_rank, _training(board, job))):
                found[job.name] = result
        if evaluations:
            attempt("evaluation", evaluations[0], rehearse_evaluation_rank, _evaluation(board, evaluations))
    if failed:
        raise JobError("\n".join(failed))
    return found


def _training(board: Board, job: Job) -> Rehearsal:
    is_whole = board.names("finished").issuperset(job.needs)
    is_begun = is_whole and folder.begun(board.run.folder, job)
    return Rehearsal(
        tree=config.dump(board.run),
        job=job,
        partial=board.run.folder / f"{folder.PARTIAL}{job.name}" if is_begun else None,
        sequel=job.settings.get("sequel") if is_whole else None,
    )


def _evaluation(board: Board, evaluations: Sequence[Job]) -> EvaluationRehearsal:
    """The evaluation of all models, with the adapters that are finished."""
    from lori_dist.plan.evaluation import components_of  # takes seconds

    sizes, finished = components_of(board.run), board.names("finished")
    models: dict[str, Path | int] = {}
    for job in evaluations:
        need = job.settings["adapter"]
        models[job.name] = board.run.folder / need / ADAPTER if need in finished else sizes[job.name]
    return EvaluationRehearsal(tree=config.dump(board.run), models=models)


def _on_gang(board: Board, job: Job, gangs: Gangs, function: Callable[[Any], Any], work: Any) -> Any:
    ranks = gangs.take(job, board.run.cluster)
    try:
        result = ranks.run(function, work, gangs.stopping)
    except BaseException:
        ranks.close()
        raise
    gangs.give_back(ranks)
    return result


def _line(board: Board, job: Job, found: Mapping[str, Any] | None) -> tuple[str, ...]:
    state = "finished" if job.name in board.names("finished") else "to do"
    if found is None:
        return job.name, state, ", ".join(job.needs), "", "", ""
    steps = ", ".join(f"{name} {count}" for name, count in found["phases"])
    if found["done"]:
        state, steps = "begun", f"{steps}; {found['done']} done"
    entries = f"{found['entries']:,}"
    if len(found["phases"]) > 1:
        entries += f", then {board.run.adapter.density:g} of them"
    return job.name, state, ", ".join(job.needs), f"{found['rows']:,}", steps, entries
