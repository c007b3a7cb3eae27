"""The work of a job's processes, wherever in the cluster they are."""

import contextlib
import logging
import os
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lori_dist import config, folder, storage
from lori_dist.cluster import schedule
from lori_dist.cluster.connection import runtime_env
from lori_dist.cluster.summary import ADAPTER, LOG_FORMAT, log_file
from lori_dist.config import Run
from lori_dist.errors import LoriError, Redacting, Stopped, print_anything, redacted
from lori_dist.folder import Attempt
from lori_dist.jobs import Job
from lori_dist.training.metrics import recorded

if TYPE_CHECKING:
    from lori_dist.training.preemption import StopRequest
    from lori_dist.training.world import World

PUSH_SECONDS = 1.0
LOOK_SECONDS = 2.0
"""Seconds between two checks whether the node is about to go."""

log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True, slots=True)
class Assignment:
    """The work that a process gets."""

    tree: dict[str, Any]
    """The run as a plain tree."""
    job: Job
    attempt: Attempt


def moments_rank(assignments: Sequence[Assignment]) -> dict[str, Any]:
    """Does one rank of the measurement of several tasks' moments on one copy of the base. Returns, for each job, its
    `result`.

    What the process writes goes to the log of the first.
    """
    with working(assignments, int(os.environ["RANK"])) as run:
        import torch

        from lori_dist.evaluation._moments import Wanted, measure
        from lori_dist.training.world import from_environment

        torch.set_num_threads(max(1, int(run.cluster.cpus_per_worker)))
        wanted = [Wanted(job=one.job, folder=one.attempt.partial, still_mine=one.attempt.check) for one in assignments]
        found = measure(run, wanted, from_environment())
    return {name: {"result": result} for name, result in found.items()}


def cluster_rank(assignment: Assignment) -> dict[str, Any]:
    """Does one rank of the division of rows into clusters. Returns its result."""
    with working([assignment], int(os.environ["RANK"])) as run:
        import torch

        from lori_dist.evaluation._clusters import divide
        from lori_dist.training.world import from_environment

        torch.set_num_threads(max(1, int(run.cluster.cpus_per_worker)))
        job, attempt = assignment.job, assignment.attempt
        return divide(run, job, from_environment(), attempt.partial, still_mine=attempt.check)


def train_rank(assignment: Assignment) -> dict[str, Any]:
    """Does one rank of a training, in a process of a gang. Returns the training's result."""
    with working([assignment], int(os.environ["RANK"])) as run, _listening() as stop_request:
        import torch

        from lori_dist.training.train import train
        from lori_dist.training.world import from_environment

        torch.set_num_threads(max(1, int(run.cluster.cpus_per_worker)))
        world = from_environment()
        return train(
            run,
            assignment.job.settings["task"],
            world,
            assignment.attempt.partial,
            fingerprint=assignment.job.fingerprint,
            still_mine=assignment.attempt.check,
            progress=pushing(run, [assignment]),
            stop_request=stop_request,
            fetch=_fetching(run, assignment, world),
            joint=assignment.job.settings.get("joint"),
            sequel=assignment.job.settings.get("sequel"),
            cluster=assignment.job.settings.get("cluster"),
        )


def train_ranks(assignments: Sequence[Assignment]) -> dict[str, Any]:
    """Does one rank of several tasks' trainings. Returns, for each job, its `result` or the `error` that ended it.

    What the process writes goes to the log of the first.
    """
    rank = int(os.environ["RANK"])
    with working(assignments, rank) as run, _listening() as stop_request, contextlib.ExitStack() as stack:
        import torch

        from lori_dist.training.task import make_job
        from lori_dist.training.trackers import tracked
        from lori_dist.training.train import train_together
        from lori_dist.training.world import from_environment

        torch.set_num_threads(max(1, int(run.cluster.cpus_per_worker)))
        world, push = from_environment(), pushing(run, assignments)

        def make(assignment: Assignment) -> Callable[[], Any]:
            return lambda: make_job(
                run,
                assignment.job,
                world,
                assignment.attempt.partial,
                fingerprint=assignment.job.fingerprint,
                still_mine=assignment.attempt.check,
                track=stack.enter_context(tracked(run, assignment.job.name)),
                progress=push if assignment is assignments[0] else lambda record: None,
                stop_request=stop_request,
                fetch=_fetching(run, assignment, world),
            )

        outcomes = train_together({one.job.settings["task"]: make(one) for one in assignments}, world)
    return {
        f"train-{task}": {"error": str(outcome)} if isinstance(outcome, LoriError) else {"result": outcome}
        for task, outcome in outcomes.items()
    }


@contextlib.contextmanager
def _listening() -> Iterator["StopRequest"]:
    """Yields what a rank asks after each step: whether its driver wants it to save and end, or Ray to save as its node
    goes."""
    import ray

    from lori_dist.training.preemption import Notice

    context = ray.get_runtime_context()
    node, ended, is_leaving = context.get_node_id(), threading.Event(), threading.Event()

    def look() -> None:
        """Asks beside the steps, as Ray may take its time."""
        while not ended.wait(LOOK_SECONDS):
            try:
                if node in ray._private.state.state.get_draining_nodes():
                    is_leaving.set()
                    return
            except Exception as error:  # it may be restarting; what ends with the node is done again elsewhere
                log.debug("it is unknown whether this node will be preempted", exc_info=error)

    was_requested = False

    def stop_request() -> Notice:
        nonlocal was_requested
        if context.is_canceled():
            return Notice.RUN
        if was_requested or not is_leaving.is_set():
            return Notice.NONE
        was_requested = True
        return Notice.NODE

    if os.environ["LOCAL_RANK"] == "0":  # one for all of a node
        threading.Thread(target=look, name="leaving", daemon=True).start()
    try:
        yield stop_request
    finally:
        ended.set()


def _refer(root: Path, assignments: Sequence[Assignment], rank: int) -> None:
    """Says in the logs of all jobs of a pack but the first where theirs is."""
    names, first = ", ".join(one.job.name for one in assignments), log_file(root, assignments[0].job, rank)
    for one in assignments[1:]:
        with log_file(root, one.job, rank).open("a", encoding="utf-8") as stream:
            stream.write(f"attempt {one.attempt.number}: over one base, {names}; see {first}\n")


@dataclass(frozen=True, kw_only=True, slots=True)
class Rehearsal:
    """The work of a process in a training that is built but not done."""

    tree: dict[str, Any]
    """The run as a plain tree."""
    job: Job
    partial: Path | None
    """The folder that an earlier attempt has left."""
    sequel: Mapping[str, Any] | None
    """The adapter that the training adds to, if that is finished."""


def rehearse_rank(rehearsal: Rehearsal) -> dict[str, Any]:
    """Does one rank of a training up to its first step. It logs nothing and leaves nothing."""
    import torch

    from lori_dist.training.train import rehearse
    from lori_dist.training.world import from_environment

    run = config.validate(rehearsal.tree)
    torch.set_num_threads(max(1, int(run.cluster.cpus_per_worker)))
    with tempfile.TemporaryDirectory() as place:
        return rehearse(
            run,
            rehearsal.job.settings["task"],
            from_environment(),
            rehearsal.partial or Path(place),
            fingerprint=rehearsal.job.fingerprint,
            joint=rehearsal.job.settings.get("joint"),
            sequel=rehearsal.sequel,
            cluster=rehearsal.job.settings.get("cluster"),
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class EvaluationRehearsal:
    """The work of a process in an evaluation that is built, and measures one batch."""

    tree: dict[str, Any]
    """The run as a plain tree."""
    models: Mapping[str, Path | int]
    """Models as `evaluation._rehearsal.rehearse` takes them."""


def rehearse_evaluation_rank(rehearsal: EvaluationRehearsal) -> None:
    """Does one rank of the evaluation's first batch. It logs nothing and leaves nothing."""
    import torch

    from lori_dist.evaluation._rehearsal import rehearse
    from lori_dist.training.world import from_environment

    run = config.validate(rehearsal.tree)
    torch.set_num_threads(max(1, int(run.cluster.cpus_per_worker)))
    rehearse(run, rehearsal.models, from_environment())


def merge_adapters(assignment: Assignment) -> dict[str, Any]:
    """Does a merge, in a Ray task. Returns its result."""
    with working([assignment], 0) as run:
        given = assignment.job.settings["weights"]
        weights = [dict(weight) if isinstance(weight, list) else weight for weight in given]
        return merged(run, assignment, weights, **_spread(run, assignment.job))


def merged(run: Run, assignment: Assignment, weights: Sequence[Any], **spread: Any) -> dict[str, Any]:
    """Writes and records the merge of the job's adapters. Returns its result. spread: arguments of `merge_files`."""
    from lori_dist.merges import merge_files

    method, partial = dict(assignment.job.settings["method"]), assignment.attempt.partial
    adapters = merged_from(run, assignment.job)
    with recorded(run, assignment.job.name, partial) as record:
        start = time.monotonic()
        result = merge_files(
            adapters, partial / ADAPTER, method=method.pop("name"), options=method, weights=weights, **spread
        )
        del result["path"]  # the folder is about to get another name
        density = result["kept"] / result["total"]
        record({**result, "density": density, "seconds": time.monotonic() - start})
    return result


def merged_from(run: Run, job: Job) -> list[Path]:
    """The adapters of a merge."""
    if job.settings.get("split"):
        return [run.folder / job.needs[0] / f"{ADAPTER}@{task}" for task in job.settings["tasks"]]
    return [run.folder / need / ADAPTER for need in job.needs]


def _spread(run: Run, job: Job) -> dict[str, Any]:
    """The division of a merge among workers, as keyword arguments of `merge_files`. Empty for one worker, or if the
    workers have no files in common: the result is the same."""
    import ray

    shape = schedule.wanted(job, run.cluster)
    if shape.count == 1 or storage.is_url(run.output):
        return {}
    # The task that waits for them gives its own CPU back meanwhile.
    call = ray.remote(num_cpus=shape.part.cpus, max_retries=0, runtime_env=runtime_env(run))(_call)

    def spread(function: Callable[[Any], Any], items: Iterable[Any]) -> list[Any]:
        calls = [call.remote(function, item) for item in items]
        ray.wait(calls, num_returns=len(calls))  # where one fails, the others write until they end
        try:
            return ray.get(calls)
        except ray.exceptions.RayTaskError as error:
            raise error.cause from error

    return {"num_ranges": shape.count, "spread": spread}


def _call(function: Callable[[Any], Any], item: Any) -> Any:
    return function(item)


def evaluate_rank(assignments: Sequence[Assignment]) -> dict[str, Any]:
    """Does one rank of the evaluation of several models on one copy of the base. Returns, for each job, its `result`.

    What the process writes goes to the log of the first.
    """
    rank = int(os.environ.get("RANK", "0"))
    with working(assignments, rank) as run, contextlib.ExitStack() as stack:
        import torch

        from lori_dist.evaluation import Store, evaluate_all
        from lori_dist.training.world import from_environment

        torch.set_num_threads(max(1, int(run.cluster.cpus_per_worker)))
        world = from_environment()
        needs = {one.job.name: one.job.settings["adapter"] for one in assignments}
        stores, records = dict[str, Store](), dict[str, Callable[[dict[str, Any]], None]]()
        if rank == 0:
            for one in assignments:
                stores[one.job.name] = Store.of_folder(one.attempt.partial)
                before = stores[one.job.name].records()
                records[one.job.name] = stack.enter_context(
                    recorded(run, one.job.name, one.attempt.partial, before=before)
                )

        def record(name: str, line: dict[str, Any]) -> None:
            records[name](line)
            push(line)

        push = pushing(run, assignments)
        paths = {name: None if need is None else run.folder / need / ADAPTER for name, need in needs.items()}
        found = evaluate_all(
            run,
            paths,
            world=world,
            progress=_logged_progress(),
            record=record,
            stores=stores,
            tasks={one.job.name: tuple(one.job.settings["tasks"]) for one in assignments},
        )
        results: dict[str, Any] = {}
        for one in assignments:
            of_model = found[one.job.name]
            if rank == 0:
                one.attempt.check()
                folder.write_json(one.attempt.partial / "evaluation.json", of_model.values)
            results[one.job.name] = {
                "result": {
                    "evaluation": of_model.values,
                    "intervals": of_model.intervals,
                    "test_rows": of_model.rows,
                }
            }
        return results


def _logged_progress() -> Callable[[str, int, int], None]:
    """Says in the job's log what is measured next, and how long all will take."""
    start = time.monotonic()

    def show(what: str, done: int, total: int) -> None:
        seconds = time.monotonic() - start
        left = f", about {(total - done) * seconds / done:.0f} s left" if done else ""
        log.info("%s (%d of %d measurements are done%s)", what, done, total, left)

    return show


@contextlib.contextmanager
def working(assignments: Sequence[Assignment], rank: int) -> Iterator[Run]:
    """The run, while all that this process writes goes to the log of the first job, also what goes wrong. The logs of
    the others say where to look."""
    first = assignments[0]
    output, name = first.tree["output"], first.tree["name"]
    mirror = storage.open(output, name) if storage.is_url(output) else None
    root = mirror.here if mirror else Path(output) / name
    if mirror:
        for one in assignments:
            for prefix in (one.attempt.partial.name, *one.job.needs):
                mirror.pull(prefix)
    with _putting(mirror, assignments, rank), _logged(log_file(root, first.job, rank)):
        try:
            for one in assignments:
                one.attempt.check()
            _refer(root, assignments, rank)
            log.info("%s: attempt %d, rank %d, process %d", first.job.name, first.attempt.number, rank, os.getpid())
            yield config.validate(first.tree)
        except Stopped as stopped:
            log.info("%s", stopped)
            raise
        except BaseException:
            print(redacted(traceback.format_exc()), end="", file=sys.stderr)
            raise


@contextlib.contextmanager
def _putting(mirror: storage.Mirror | None, assignments: Sequence[Assignment], rank: int) -> Iterator[None]:
    """Puts on storage what a process leaves, also when it fails; of a gang's folders only rank 0 does."""
    try:
        yield
    finally:
        if mirror:
            for one in assignments:
                mirror.push(log_file(Path(), one.job, rank).as_posix())
                if rank == 0:
                    _push(mirror, one)


def _push(mirror: storage.Mirror, assignment: Assignment) -> None:
    attempt = assignment.attempt
    mirror.check(f"{attempt.partial.name}/{folder.ATTEMPT}", attempt.number, attempt.token)
    mirror.push(assignment.attempt.partial.name)
    mirror.prune(f"{assignment.attempt.partial.name}/checkpoints")


def pushing(run: Run, assignments: Sequence[Assignment]) -> Callable[[dict[str, Any]], None]:
    """Puts what jobs have measured and saved on storage every few seconds."""
    if not storage.is_url(run.output):
        return lambda record: None
    mirror = storage.open(run.output, run.name)
    last = time.monotonic()

    def push(record: dict[str, Any]) -> None:
        nonlocal last
        if time.monotonic() - last > PUSH_SECONDS:
            for assignment in assignments:
                _push(mirror, assignment)
            last = time.monotonic()

    return push


def _fetching(run: Run, assignment: Assignment, world: "World") -> Callable[[], None]:
    """What brings the checkpoints that rank 0 has written to the machines of all ranks: by the storage that the run's
    output is on, or nothing, where it is a folder that all see."""
    if not storage.is_url(run.output):
        return lambda: None
    mirror = storage.open(run.output, run.name)

    def fetch() -> None:
        import torch.distributed as dist

        from lori_dist.training.world import from_first

        from_first(world, lambda: _push(mirror, assignment))
        if world.rank > 0:
            mirror.pull(f"{assignment.attempt.partial.name}/checkpoints")
        dist.barrier()  # as rank 0 deletes older ones

    return fetch


@contextlib.contextmanager
def _logged(file: Path) -> Iterator[None]:
    """Appends to a file all that this process writes to its standard output and error, from C as well."""
    print_anything()
    file.parent.mkdir(parents=True, exist_ok=True)
    target = os.open(file, os.O_CREAT | os.O_APPEND | os.O_WRONLY, 0o644)
    kept = [(number, os.dup(number)) for number in (1, 2)]
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(Redacting(LOG_FORMAT))
    package = logging.getLogger("lori_dist")
    level, propagate = package.level, package.propagate
    package.addHandler(handler)
    package.setLevel(logging.INFO)
    package.propagate = False  # Ray's handlers would write every line once more
    try:
        for number, _ in kept:
            os.dup2(target, number)
        yield
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        for number, copy in kept:
            os.dup2(copy, number)
            os.close(copy)
        os.close(target)
        package.removeHandler(handler)
        package.setLevel(level)
        package.propagate = propagate
