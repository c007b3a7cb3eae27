"""A run without its steps: everything before the first step is done where the run would do it, and nothing remains."""

import dataclasses
import tempfile
from collections.abc import Mapping
from typing import Any

from lori_dist import config, folder, storage
from lori_dist.cluster import schedule, scratch
from lori_dist.cluster.board import Board
from lori_dist.cluster.connection import connected, runtime_env
from lori_dist.cluster.failures import failure_of
from lori_dist.cluster.gang import Gangs
from lori_dist.cluster.run import planned, prepare, with_absolute_paths
from lori_dist.cluster.work import Rehearsal, rehearse_rank
from lori_dist.config import Run
from lori_dist.errors import ConfigError, JobError
from lori_dist.jobs import Job

TITLES = ("job", "state", "needs", "rows", "steps", "trained entries")


def dry_run(run: Run) -> tuple[list[tuple[str, ...]], list[str]]:
    """Checks a run, reads and encodes its rows, and builds each of its trainings in a gang of the run's cluster, up to
    the first step. Returns one line for each job, under TITLES, and a sentence for each job whose folder has a result
    of other settings. The run's folder stays as it is, or absent.

    Raises what `execute` would at its start, and JobError with what is wrong with trainings that cannot be built.
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
    prepare(run, board.unfinished())
    found, failed = {}, []
    with tempfile.TemporaryDirectory() as place, connected(dataclasses.replace(run, output=place)) as nodes:
        schedule.check_room(board.unfinished(), run.cluster, nodes())
        gangs = Gangs(environment=runtime_env(run), nodes=nodes)
        for job in board.unfinished():
            if job.kind == "train":
                try:
                    found[job.name] = _rehearse(board, job, gangs)
                except Exception as error:
                    failure = failure_of(error)
                    where = "" if failure.rank is None else f" (rank {failure.rank})"
                    failed.append(f"{job.name}: {failure.message}{where}")
    if failed:
        raise JobError("\n".join(failed))
    return found


def _rehearse(board: Board, job: Job, gangs: Gangs) -> dict[str, Any]:
    is_whole = board.names("finished").issuperset(job.needs)
    is_begun = is_whole and folder.begun(board.run.folder, job)
    rehearsal = Rehearsal(
        tree=config.dump(board.run),
        job=job,
        partial=board.run.folder / f"{folder.PARTIAL}{job.name}" if is_begun else None,
        sequel=job.settings.get("sequel") if is_whole else None,
    )
    ranks = gangs.take(job, board.run.cluster)
    try:
        result: dict[str, Any] = ranks.run(rehearse_rank, rehearsal, gangs.stopping)
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
