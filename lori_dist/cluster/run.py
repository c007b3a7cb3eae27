"""A run on a Ray cluster: each of its jobs is done once, as soon as it can be.

The driver holds the plan and the run's folder; a thread of its own watches each running job. What a job leaves is in
files, so nothing is lost with a process, a node or the cluster: the same command resumes from them.
"""

import contextlib
import dataclasses
import logging
import queue
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from lori_dist import folder, storage, tables
from lori_dist.cluster import attempts, schedule, scratch
from lori_dist.cluster.board import Board, Progress
from lori_dist.cluster.connection import TOKEN_FILE, connected, disconnect, runtime_env
from lori_dist.cluster.fitting import check_evaluation, packing
from lori_dist.cluster.gang import Gangs
from lori_dist.cluster.schedule import Resources
from lori_dist.cluster.summary import ATTEMPTS, CHECKPOINTS
from lori_dist.cluster.trials import TRIED
from lori_dist.config import Run
from lori_dist.errors import JobError, Preempted, Stopped
from lori_dist.integrations import model_card
from lori_dist.jobs import Job, plan, same_merges, same_merges_said
from lori_dist.report import write_of_run
from lori_dist.training import preemption

POLL_SECONDS = 1.0
STOP_SECONDS = 15.0
LEAVE_SECONDS = 5.0
"""Seconds within which watchers of jobs notice that the run ends."""
SAVE_SECONDS = 60.0
"""Seconds for which a run that is to end waits until its trainings have saved: some steps. Batch systems may give
less."""

log = logging.getLogger(__name__)


def execute(run: Run, *, progress: Callable[[Progress], None] | None = None) -> dict[str, Any]:
    """Does the jobs of a run that are not finished. Returns the summary, which is also in run.folder/summary.json.

    progress: called whenever a job changes its state, and every second for each training that runs.
    Raises ConfigError before anything is started if a job is larger than the cluster, or the base larger than the
    devices that are to evaluate it; and JobError if another process
    is working on the run, or when jobs failed, after all others that did not need them are done; Stopped after
    `lori stop`, and Preempted, which is one, after SIGTERM or train.time_limit. Then what is in training is saved.
    """
    with preemption.raised_by_sigterm(f"{run.folder}: "):
        return _execute(with_absolute_paths(run), progress)


def _execute(run: Run, progress: Callable[[Progress], None] | None) -> dict[str, Any]:
    scratch.check()
    jobs = planned(run)
    with storage.driving(run.output, run.name), folder.lock(run.folder) as owner:
        (run.folder / TOKEN_FILE).unlink(missing_ok=True)  # of a driver that was killed
        folder.clean(run.folder, scratch=[CHECKPOINTS, TRIED, ATTEMPTS])
        board = Board(run=run, jobs=jobs, progress=progress or (lambda event: None))
        for text in board.superseded():
            log.warning("%s", text)
        if names := board.keep_report():
            log.warning("%s: the earlier results' summary and report are kept as %s", run.folder, ", ".join(names))
        board.write()
        if board.unfinished():
            prepare(run, board.unfinished())
            with connected(run) as nodes:
                schedule.check_room(board.unfinished(), run.cluster, nodes())
                check_evaluation(run, board.unfinished(), nodes())
                board.packing = packing(run, board.unfinished(), nodes())
                _work(board, nodes, owner)
        board.report = write_of_run(board.summary(), run.folder)
        model_card.write_of_run(board.summary(), run.model.path)
        board.write()
    failed = {name: state["error"] for name, state in board.states.items() if state["state"] == "failed"}
    if failed:
        raise JobError("\n".join(f"{name}: {error}" for name, error in failed.items()))
    return board.summary()


def planned(run: Run) -> list[Job]:
    """The jobs of a run, each after those that it needs."""
    jobs = plan(run)
    for line in same_merges_said(same_merges(run, jobs)):
        log.warning("%s", line)
    return jobs


def prepare(run: Run, unfinished: Sequence[Job]) -> None:
    """Makes the tokens that the jobs of a run read on this machine, if they are not there. Raises ConfigError with
    every row that cannot be used."""
    from lori_dist import progress  # which shows what this module reports
    from lori_dist.training import job_rows
    from lori_dist.training.model_files import load_tokenizer

    trainings = [job for job in unfinished if job.kind in ("train", "moments", "cluster")]
    if trainings or any(job.kind == "evaluate" for job in unfinished):
        parts = ("validation", "test") if trainings else ("test",)
        with progress.of_rows() as show:
            job_rows.prepare(run, trainings, load_tokenizer(run.model), parts, show)


def with_absolute_paths(run: Run) -> Run:
    """The same run for a process that works in another folder."""

    def absolute(name: str) -> str:
        return name if tables.is_hub(name) else str(Path(name).absolute())

    tasks = {
        name: dataclasses.replace(
            task,
            train=absolute(task.train),
            test=absolute(task.test),
            validation=None if task.validation is None else absolute(task.validation),
            start=None if task.start is None else absolute(task.start),
            mixture={absolute(path): share for path, share in task.mixture.items()},
        )
        for name, task in run.tasks.items()
    }
    evaluate, measured = run.evaluate, run.evaluate.lm_eval
    if measured is not None and measured.include is not None:
        measured = dataclasses.replace(measured, include=absolute(measured.include))
        evaluate = dataclasses.replace(evaluate, lm_eval=measured)
    base = absolute(run.model.path) if Path(run.model.path).exists() else run.model.path
    model = dataclasses.replace(run.model, path=base)
    output = run.output if storage.is_url(run.output) else absolute(run.output)
    return dataclasses.replace(run, output=output, model=model, tasks=tasks, evaluate=evaluate)


def _work(board: Board, nodes: Callable[[], Sequence[Resources]], owner: str) -> None:
    """Starts every job that can start, until nothing runs and nothing more can start."""
    ended: queue.Queue[tuple[Job, dict[str, Any] | str]] = queue.Queue()
    gangs = Gangs(environment=runtime_env(board.run), nodes=nodes)
    watchers: list[threading.Thread] = []
    limit = board.run.train.time_limit

    def watch(jobs: Sequence[Job]) -> None:
        left = {job.name: job for job in jobs}

        def end(job: Job, outcome: dict[str, Any] | str) -> None:
            del left[job.name]
            ended.put((job, outcome))

        try:
            attempts.do(board.run, jobs, {job.name: board.inputs(job) for job in jobs}, gangs, end)
        except JobError as error:
            for job in list(left.values()):
                end(job, str(error))
        except BaseException as error:
            log.debug("%s", jobs[0].name, exc_info=error)
            for job in list(left.values()):
                end(job, f"{type(error).__name__}: {error}")

    reason = "it cannot continue"
    try:
        room = time.monotonic()
        while board.named("running") or board.ready():
            if folder.stop_requested(board.run.folder, owner):
                reason = "`lori stop` was called"
                raise Stopped(f"{board.run.folder}: stopped by `lori stop`; the same command continues from here")
            if limit is not None and preemption.age() > limit:
                reason = "train.time_limit has passed"
                raise Preempted(
                    f"{board.run.folder}: ended, as train.time_limit has passed; the same command continues from here"
                )
            starting = board.startable(nodes())
            if starting or board.named("running"):
                room = time.monotonic()
            elif time.monotonic() - room > board.run.cluster.patience:
                for job in board.ready():
                    board.fail(job, schedule.no_room(job, board.run.cluster, nodes()))
            if starting:
                gangs.keep(sum(jobs[0].is_gang for jobs in starting))
            elif not any(job.is_gang for job in board.named("waiting") + board.named("running")):
                gangs.keep(0)  # a job that began while a node was being lost may wait for their room
            for jobs in starting:
                board.start(jobs)
                watchers.append(threading.Thread(target=watch, args=(jobs,), name=jobs[0].name, daemon=True))
                watchers[-1].start()
            try:
                job, outcome = ended.get(timeout=POLL_SECONDS)
            except queue.Empty:
                board.report_steps()
                continue
            if isinstance(outcome, str):
                board.fail(job, outcome)
            else:
                board.finish(job, outcome)
    except KeyboardInterrupt as interrupt:
        reason = "SIGTERM was received" if isinstance(interrupt, preemption.Terminated) else "Ctrl-C was pressed"
        raise
    finally:
        gangs.asked.set()
        if board.named("running"):
            log.warning("%s: ending, as %s; running training jobs are saved first", board.run.name, reason)
            with contextlib.suppress(KeyboardInterrupt):  # a second one: at once
                _await_saved(board, watchers, ended)
            board.interrupt()  # first, as Ray may end the driver of a job that has left it
            gangs.stopping.set()
            with contextlib.suppress(KeyboardInterrupt):
                _join(watchers, LEAVE_SECONDS)  # or Ray may abort this process, as it goes while they use it
            disconnect()  # which ends what the watchers wait for
        gangs.stopping.set()
        _join(watchers, STOP_SECONDS)


def _join(watchers: Sequence[threading.Thread], seconds: float) -> None:
    end = time.monotonic() + seconds
    for watcher in watchers:
        watcher.join(timeout=max(0.0, end - time.monotonic()))


def _await_saved(
    board: Board, watchers: Sequence[threading.Thread], ended: "queue.Queue[tuple[Job, dict[str, Any] | str]]"
) -> None:
    """Waits until the trainings that have something to save have saved it and ended. Jobs that finish meanwhile count
    as finished."""
    end = time.monotonic() + SAVE_SECONDS
    saving = {board.leaders[job.name] for job in board.named("running") if job.kind == "train" and board.has_steps(job)}
    for watcher in watchers:
        if watcher.name in saving:
            watcher.join(timeout=max(0.0, end - time.monotonic()))
    with contextlib.suppress(queue.Empty):
        while True:
            job, outcome = ended.get_nowait()
            if not isinstance(outcome, str):
                board.finish(job, outcome)
