"""A run on a Ray cluster: trainings as gangs of Ray Train, merges and evaluations as Ray tasks.

The driver holds the plan and the run's folder; a thread of its own watches over each running job. What a job leaves is
in files, so that nothing is lost with a process, a node or the cluster: the same run again goes on from them.
"""

import collections
import contextlib
import dataclasses
import itertools
import json
import logging
import os
import queue
import secrets
import shutil
import signal
import socket
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lori_dist import config, folder, plugin
from lori_dist.cluster import schedule, search
from lori_dist.cluster.schedule import Failure, Resources
from lori_dist.cluster.summary import ADAPTER, summarize
from lori_dist.config import Run
from lori_dist.errors import ConfigError, JobError
from lori_dist.folder import Attempt
from lori_dist.jobs import Job, check_inputs, dependents, order, ready
from lori_dist.report import write_of_run

# Ray is imported by functions, after the environment it reads while it is imported has been set.

SUMMARY, RESULT, FAILURE = "summary.json", "result.json", "failure-"
METRICS, CHECKPOINTS, RAY = "metrics.jsonl", "checkpoints", ".ray"
SEARCH, TRIED = "search.jsonl", "tried"
"""What a search has measured, and the folder with its rows and the merges it tries."""

TOKEN = secrets.token_hex(32)
"""Lets nobody else on this machine into the cluster that we start. Ray reads it once in a process."""

OBJECT_STORE_BYTES = 100 * 2**20
"""Adapters and rows go through files; Ray carries configurations."""

DIED = "the process died: it was killed, or its machine ran out of memory or was lost"

WITHOUT_A_WORD = frozenset({"RayActorError", "WorkerHealthCheckFailedError", "WorkerHealthCheckTimeoutError"})
"""What Ray says of a process that is gone."""

POLL_SECONDS = 1.0
BACKOFF_SECONDS = 10.0
"""Before a job is started again: what is left of a gang lives up to 6 seconds longer than its controller."""

REACH_SECONDS = 10.0
STOP_SECONDS = 15.0

log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True, slots=True)
class Progress:
    """How far a run is."""

    job: str
    state: str
    """`running`, `finished`, `failed` or `blocked`."""
    seconds: float
    num_done: int
    """Jobs that are finished."""
    num_jobs: int
    phase: str = ""
    """Of a training: `calibrate` or `train`."""
    step: int = 0
    num_steps: int = 0
    loss: float | None = None


def execute(run: Run, *, progress: Callable[[Progress], None] | None = None) -> dict[str, Any]:
    """Does the jobs of a run that are not done yet. Returns the summary, which is also in run.folder/summary.json.

    progress: called whenever a job changes its state, and every second for each training that runs.
    Raises ConfigError before anything is started if a job is larger than the cluster, and JobError if another process
    is working on the run, or when jobs failed, after all others that did not need them are done.
    """
    run = with_absolute_paths(run)
    method = plugin.find("multitask", run.multitask.name, "plan", "multitask")
    jobs = order(method.load()(run, **method.bind(run.multitask.options, "multitask")))
    with folder.lock(run.folder):
        folder.clean(run.folder, scratch=[CHECKPOINTS, TRIED])
        shutil.rmtree(run.folder / RAY, ignore_errors=True)  # of a driver that was killed
        board = _Board(run=run, jobs=jobs, progress=progress or (lambda event: None))
        board.write()
        if board.unfinished():
            with _cluster(run) as nodes:
                schedule.check_room(board.unfinished(), run.cluster, nodes)
                _work(board, nodes)
        board.report = write_of_run(board.summary(), run.folder)
        board.write()
    failed = {name: state["error"] for name, state in board.states.items() if state["state"] == "failed"}
    if failed:
        raise JobError("\n".join(f"{name}: {error}" for name, error in failed.items()))
    return board.summary()


def with_absolute_paths(run: Run) -> Run:
    """The same run for a process that works in another folder."""

    def absolute(name: str) -> str:
        return str(Path(name).absolute())

    tasks = {
        name: dataclasses.replace(
            task,
            train=absolute(task.train),
            test=absolute(task.test),
            validation=None if task.validation is None else absolute(task.validation),
        )
        for name, task in run.tasks.items()
    }
    base = absolute(run.model.path) if Path(run.model.path).exists() else run.model.path
    model = dataclasses.replace(run.model, path=base)
    return dataclasses.replace(run, output=absolute(run.output), model=model, tasks=tasks)


# --- the driver ------------------------------------------------------------------------------------------------------


@dataclass(kw_only=True, slots=True)
class _Board:
    """Where each job stands."""

    run: Run
    jobs: list[Job]
    progress: Callable[[Progress], None]
    states: dict[str, dict[str, Any]] = field(default_factory=dict)
    results: dict[str, dict[str, Any]] = field(default_factory=dict)
    made: dict[str, str] = field(default_factory=dict)
    """Finished job -> digest of its adapter, or nothing where it made none."""
    report: dict[str, str] | None = None
    """Where the run's is, or why there is none."""
    started: dict[str, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.states = {job.name: {"state": "waiting"} for job in self.jobs}
        for job in self.jobs:
            record = folder.finished(self.run.folder, job)
            if record is not None and record["inputs"] == self.inputs(job):
                self.results[job.name] = record["result"]
                self.made[job.name] = record["sha256"].get(ADAPTER, "")
                self._change(job, "finished", cached=True, seconds=record["seconds"])

    def inputs(self, job: Job) -> dict[str, str | None]:
        """What the job reads of others: it is done again where those were, and became something else."""
        return {need: self.made.get(need) for need in job.needs}

    def named(self, state: str) -> list[Job]:
        return [job for job in self.jobs if self.states[job.name]["state"] == state]

    def names(self, state: str) -> set[str]:
        return {job.name for job in self.named(state)}

    def unfinished(self) -> list[Job]:
        return [job for job in self.jobs if self.states[job.name]["state"] != "finished"]

    def startable(self, nodes: Sequence[Resources]) -> list[Job]:
        possible = ready(self.jobs, self.names("finished"), self.names("running") | self.names("failed"))
        return schedule.admit(possible, self.named("running"), self.run.cluster, nodes)

    def start(self, job: Job) -> None:
        self.started[job.name] = time.monotonic()
        self._change(job, "running")

    def finish(self, job: Job, record: Mapping[str, Any]) -> None:
        self.results[job.name] = record["result"]
        self.made[job.name] = record["sha256"].get(ADAPTER, "")
        self._change(job, "finished", seconds=record["seconds"], attempts=record["attempts"])
        self.write()

    def interrupt(self) -> None:
        for job in self.named("running"):
            self._change(job, "waiting")
        with contextlib.suppress(OSError):  # a full disk must not hide what went wrong before
            self.write()

    def fail(self, job: Job, error: str) -> None:
        self._change(job, "failed", seconds=self.seconds(job), error=error)
        for blocked in dependents(self.jobs, self.names("failed")):
            if self.states[blocked.name]["state"] == "waiting":
                out = self.names("failed") | self.names("blocked")
                self._change(blocked, "blocked", seconds=0.0, needs=[name for name in blocked.needs if name in out])
        self.write()

    def seconds(self, job: Job) -> float:
        return round(time.monotonic() - self.started[job.name], 3) if job.name in self.started else 0.0

    def report_steps(self) -> None:
        for job in self.named("running"):
            if job.kind == "train":
                self.progress(self._event(job, **_last_step(self.run.folder, job)))

    def summary(self) -> dict[str, Any]:
        return {**summarize(self.run, self.jobs, self.states, self.results), "report": self.report}

    def write(self) -> None:
        folder.write_json(self.run.folder / SUMMARY, self.summary())

    def _change(self, job: Job, state: str, **more: Any) -> None:
        self.states[job.name] = {"state": state, **more}
        log.info("%s: %s", job.name, _told(self.states[job.name]))
        self.progress(self._event(job))

    def _event(self, job: Job, **more: Any) -> Progress:
        return Progress(
            job=job.name,
            state=self.states[job.name]["state"],
            seconds=self.seconds(job),
            num_done=len(self.named("finished")),
            num_jobs=len(self.jobs),
            **more,
        )


def _told(state: Mapping[str, Any]) -> str:
    match state:
        case {"state": "failed", "error": error}:
            return f"failed: {error}"
        case {"state": "blocked", "needs": needs}:
            return f"not done, as it needs {', '.join(needs)}"
        case {"cached": True}:
            return "was finished before"
        case {"state": "finished", "seconds": seconds}:
            return f"finished in {seconds:.1f} s"
    return str(state["state"])


def _work(board: _Board, nodes: Sequence[Resources]) -> None:
    """Starts what can start, until nothing runs and nothing more can."""
    ended: queue.Queue[tuple[Job, dict[str, Any] | str]] = queue.Queue()
    stopping = threading.Event()
    watchers: list[threading.Thread] = []

    def watch(job: Job) -> None:
        try:
            ended.put((job, _do(board.run, job, board.inputs(job), stopping)))
        except JobError as error:
            ended.put((job, str(error)))
        except BaseException as error:
            log.debug("%s", job.name, exc_info=error)
            ended.put((job, f"{type(error).__name__}: {error}"))

    try:
        while True:
            for job in board.startable(nodes):
                board.start(job)
                watchers.append(threading.Thread(target=watch, args=(job,), name=job.name, daemon=True))
                watchers[-1].start()
            if not board.named("running"):
                return
            try:
                job, outcome = ended.get(timeout=POLL_SECONDS)
            except queue.Empty:
                board.report_steps()
                continue
            if isinstance(outcome, str):
                board.fail(job, outcome)
            else:
                board.finish(job, outcome)
    finally:
        stopping.set()
        if board.named("running"):
            log.warning("%s: stopped; the same command continues from here", board.run.name)
            _disconnect()  # which ends what the watchers wait for
            board.interrupt()
        for watcher in watchers:
            watcher.join(timeout=STOP_SECONDS)


def _do(run: Run, job: Job, inputs: Mapping[str, Any], stopping: threading.Event) -> dict[str, Any]:
    """One job with all its attempts. Returns what its job.json holds. inputs: digests of what it reads of others."""
    start = time.monotonic()
    partial = folder.open(run.folder, job)
    number = 0
    while True:
        number += 1
        attempt = new_attempt(partial)
        assignment = _Assignment(tree=config.dump(run), job=job, attempt=attempt)
        try:
            (_gang if job.kind == "train" else _task)(run, assignment)
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


def _result(assignment: "_Assignment") -> dict[str, Any]:
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
    return f"{failure.message}{where}; see {_log_file(run.folder, job, failure.rank or 0)}"


def _last_step(root: Path, job: Job) -> dict[str, Any]:
    """Where a training is, from the end of its metrics."""
    try:
        with (root / f"{folder.PARTIAL}{job.name}" / METRICS).open("rb") as file:
            file.seek(0, os.SEEK_END)
            file.seek(max(0, file.tell() - 4096))
            *_, last, _ = file.read().split(b"\n")
            record = json.loads(last)
    except (OSError, ValueError):  # none yet, or a line that is being written
        return {}
    return {key: record[key] for key in ("phase", "step", "num_steps", "loss")}


# --- the cluster -----------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def _cluster(run: Run) -> Iterator[list[Resources]]:
    """A connection to the run's cluster: gives its nodes."""
    local = run.cluster.address == "local"
    with _environment(_settings(local, os.environ)):
        import ray

        if ray.is_initialized():
            raise JobError("ray is already connected in this process; call ray.shutdown() first")
        if local and ray._private.ray_constants.ENABLE_RAY_CLUSTER:
            raise JobError(
                "ray was imported before the run, so that its sockets would listen on all interfaces; import it later, "
                "or set RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER=0 before"
            )
        _check_address(run.cluster.address)
        # The dashboard's state API is what releases the CPUs of a gang whose controller died.
        own: dict[str, Any] = {"include_dashboard": True, "object_store_memory": OBJECT_STORE_BYTES} if local else {}
        try:
            ray.init(address=run.cluster.address, log_to_driver=False, logging_level=logging.ERROR, **own)
        except (ConnectionError, ray.exceptions.RayError) as error:
            raise JobError(
                f"cluster.address: no Ray cluster answers at {run.cluster.address!r} ({error}); start one with "
                "`ray start --head`, or use `local`; RAY_AUTH_MODE and the token must be the same here and there"
            ) from error
        try:
            with _stopped_by_sigterm():
                yield [
                    Resources(cpus=node["Resources"].get("CPU", 0.0), gpus=node["Resources"].get("GPU", 0.0))
                    for node in ray.nodes()
                    if node["Alive"]
                ]
        finally:
            _disconnect()


@contextlib.contextmanager
def _stopped_by_sigterm() -> Iterator[None]:
    """As by Ctrl-C: batch systems end jobs so, and Ray's own handler aborts with a dump of its stack."""
    if threading.current_thread() is not threading.main_thread():  # where no handler can be set
        yield
        return
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, signal.SIG_DFL if before is None else before)  # None: one set by C code


def _check_address(address: str) -> None:
    """Ray itself would try for a quarter of an hour."""
    if address in ("local", "auto"):
        return
    host, _, port = address.rpartition(":")
    if not host or not port.isdigit() or "//" in address:
        raise ConfigError(f"cluster.address: {address!r} was given; wanted `local`, `auto` or host:port")
    try:
        socket.create_connection((host.strip("[]"), int(port)), timeout=REACH_SECONDS).close()
    except (OSError, OverflowError) as error:
        raise JobError(
            f"cluster.address: nothing answers at {address!r} ({error}); give the address that `ray start --head` "
            "printed, or use `local`"
        ) from error


def _disconnect() -> None:
    """Ends the connection to the cluster, and the cluster if it is our own."""
    import ray

    ray.shutdown()


def _settings(local: bool, environment: Mapping[str, str]) -> dict[str, str]:
    """The variables that Ray needs, apart from those that the user has set."""
    wanted = {
        "RAY_ENABLE_AUTO_CONNECT": "0",  # or a late call after the shutdown would start another cluster
        "RAY_USAGE_STATS_ENABLED": "0",
        "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
        "RAY_CHDIR_TO_TRIAL_DIR": "0",
        "RAY_TRAIN_METRICS_ENABLED": "0",
        "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.5",
    }
    if local:
        wanted["RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"] = "0"  # despite its name: makes all sockets loopback only
        wanted["RAY_TRAIN_ENABLE_PREEMPTION_WATCHER"] = "0"
        if "RAY_AUTH_MODE" not in environment:
            wanted.update(RAY_AUTH_MODE="token", RAY_AUTH_TOKEN=TOKEN)
    else:
        wanted["RAY_AUTH_MODE"] = "disabled"
        wanted["RAY_gcs_server_port_wait_time_s"] = "1"  # one try of 40 seconds, not twenty
    return {name: value for name, value in wanted.items() if name not in environment}


@contextlib.contextmanager
def _environment(variables: Mapping[str, str]) -> Iterator[None]:
    os.environ.update(variables)
    try:
        yield
    finally:
        for name in variables:
            del os.environ[name]


FORWARDED = (
    "CUBLAS_",
    "CUDA_LAUNCH",
    "DS_",
    "GLOO_",
    "HF_",
    "LORI_",
    "NCCL_",
    "TORCH_",
    "TRANSFORMERS_",
    "TOKENIZERS_",
)


def _runtime_env(run: Run) -> dict[str, Any]:
    """What processes on other machines are to find in their environment. Our own cluster inherits all of ours.

    Tokens are left out: Ray shows a job's environment in its logs and its dashboard.
    """
    if run.cluster.address == "local":
        return {}
    names = [name for name in os.environ if name.startswith(FORWARDED) and "TOKEN" not in name]
    return {"env_vars": {name: os.environ[name] for name in ["RAY_AUTH_MODE", *sorted(names)]}}


def _gang(run: Run, assignment: "_Assignment") -> None:
    """Runs a training on all its ranks and waits for its end."""
    from ray.train import FailureConfig, RunConfig, ScalingConfig
    from ray.train.torch import TorchConfig, TorchTrainer

    _, part = schedule.processes(assignment.job, run.cluster)
    storage = run.folder / RAY
    # A name of its own: one that was used before would bring back what Ray remembers of then.
    name = f"{assignment.job.name}-{assignment.attempt.token}"
    trainer = TorchTrainer(
        _train,
        train_loop_config={"assignment": assignment},
        torch_config=TorchConfig(timeout_s=300),
        scaling_config=ScalingConfig(
            num_workers=run.cluster.workers,
            use_gpu=part.gpus > 0,
            resources_per_worker={"CPU": part.cpus} | ({"GPU": part.gpus} if part.gpus else {}),
        ),
        run_config=RunConfig(
            name=name,
            storage_path=str(storage),
            # Ray would retry mistakes as well as lost nodes: whether to retry is decided here.
            failure_config=FailureConfig(max_failures=0),
            worker_runtime_env=_runtime_env(run),
        ),
    )
    try:
        trainer.fit()
    finally:
        shutil.rmtree(storage / name, ignore_errors=True)


def _task(run: Run, assignment: "_Assignment") -> None:
    """Runs a merge or an evaluation and waits for its end."""
    import ray

    if "search" in assignment.job.settings:
        assignment = _searched(run, assignment)
    function = {"merge": _merge, "evaluate": _evaluate}[assignment.job.kind]
    ray.get(_remote(run, assignment.job, function).remote(assignment))


def _remote(run: Run, job: Job, function: Callable[..., Any]) -> Any:
    """A function as a Ray task, with the room that one process of the job takes."""
    import ray

    _, part = schedule.processes(job, run.cluster)
    options = {"num_cpus": part.cpus, "num_gpus": part.gpus, "max_retries": 0, "runtime_env": _runtime_env(run)}
    return ray.remote(**options)(function)


# --- the search for weights ------------------------------------------------------------------------------------------


def _searched(run: Run, assignment: "_Assignment") -> "_Assignment":
    """The merge with the best of the weights that are tried. Each is measured by a Ray task, several side by side."""
    job, partial = assignment.job, assignment.attempt.partial
    settings = job.settings["search"]
    trial = dataclasses.replace(assignment, tree=config.dump(_on_validation_rows(run, job, partial / TRIED)))
    function = _remote(run, job, _try)
    along = search.axes(job.settings["tasks"], _projections(run, job) if settings["per"] == "projection" else None)
    known = search.read(partial / SEARCH)

    def measure(points: list[search.Point]) -> list[float]:
        import ray

        waiting: dict[Any, search.Point] = {}
        for point in points:
            if point not in known and point not in waiting.values():
                weights = list(search.weights(point, along).values())
                waiting[function.remote(trial, weights, f"{len(known) + len(waiting)}.safetensors")] = point
        try:
            while waiting:
                [done], _ = ray.wait(list(waiting), num_returns=1)
                metrics = ray.get(done)
                point = waiting.pop(done)
                known[point] = search.mean(metrics, lower_is_better=settings["metric"] == "loss")
                search.append(partial / SEARCH, point, along, metrics, known[point])
        finally:
            for left in waiting:
                ray.cancel(left)
        return [known[point] for point in points]

    bounds = tuple(settings["bounds"])
    method = search.METHODS[settings["method"]](
        search.start(along, len(job.settings["tasks"]), bounds),
        bounds=bounds,
        budget=settings["budget"],
        seed=settings["seed"],
    )
    point, score, count = search.best(method, measure)
    found = search.weights(point, along)
    log.info("%s: %s after %d evaluations, %s", job.name, found, count, score)
    more = {
        "weights": [list(map(list, item.items())) if isinstance(item, dict) else item for item in found.values()],
        "found": {"weights": found, "score": score, "evaluations": count},
    }
    return dataclasses.replace(assignment, job=dataclasses.replace(job, settings={**job.settings, **more}))


def _on_validation_rows(run: Run, job: Job, place: Path) -> Run:
    """The run as an evaluation of a search sees it: with copies of its rows as all test rows there are."""
    place.mkdir(exist_ok=True)
    settings = job.settings["search"]
    tasks = {}
    for name, data in settings["tasks"].items():
        copy = place / f"{name}.jsonl"
        copy.write_bytes(_rows(Path(getattr(run.tasks[name], data["part"])), settings["rows"], data["part"]))
        tasks[name] = dataclasses.replace(run.tasks[name], test=str(copy), validation=None)
    evaluate = dataclasses.replace(run.evaluate, metrics=(settings["metric"],), rows=None)
    return dataclasses.replace(run, tasks=tasks, evaluate=evaluate, merges={})


def _rows(file: Path, count: int, part: str) -> bytes:
    """The first rows of a validation file, or the last of a train file."""
    with file.open("rb") as stream:
        rows = (line.rstrip(b"\n") + b"\n" for line in stream if line.strip())
        return b"".join(collections.deque(rows, maxlen=count) if part == "train" else itertools.islice(rows, count))


def _projections(run: Run, job: Job) -> dict[str, list[str]]:
    """Task -> last names of the modules that its adapter has."""
    from lori_dist.adapter import file

    found = {}
    for task, need in zip(job.settings["tasks"], job.needs, strict=True):
        modules = file.header(run.folder / need / ADAPTER)["modules"]
        found[task] = list(dict.fromkeys(module.rpartition(".")[2] for module in modules))
    return found


def _failure(assignment: "_Assignment", error: Exception) -> Failure:
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


# --- the workers -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True, slots=True)
class _Assignment:
    """What a worker is told."""

    tree: dict[str, Any]
    """The run."""
    job: Job
    attempt: Attempt


def _train(settings: dict[str, Any]) -> None:
    """One rank of a training, in a process that Ray Train started."""
    import ray.train

    assignment: _Assignment = settings["assignment"]
    with _working(assignment, ray.train.get_context().get_world_rank()) as run:
        import torch

        from lori_dist.training.train import train
        from lori_dist.training.world import from_environment

        torch.set_num_threads(max(1, int(run.cluster.cpus_per_worker)))
        world = from_environment()
        result = train(
            run,
            assignment.job.settings["task"],
            world,
            assignment.attempt.partial,
            fingerprint=assignment.job.fingerprint,
            still_mine=assignment.attempt.check,
        )
        if world.rank == 0:
            folder.write_json(assignment.attempt.partial / RESULT, result)


def _merge(assignment: _Assignment) -> None:
    with _working(assignment, 0) as run:
        settings = assignment.job.settings
        weights = [dict(weight) if isinstance(weight, list) else weight for weight in settings["weights"]]
        spread = _spread(run, assignment.job)
        result = _merged(run, assignment, weights, assignment.attempt.partial / ADAPTER, **spread)
        del result["path"]  # the folder is about to get another name
        folder.write_json(assignment.attempt.partial / RESULT, {**result, **settings.get("found", {})})


def _merged(run: Run, assignment: _Assignment, weights: Sequence[Any], out: Path, **spread: Any) -> dict[str, Any]:
    from lori_dist.merges import merge_files

    method = dict(assignment.job.settings["method"])
    adapters = [run.folder / need / ADAPTER for need in assignment.job.needs]
    return merge_files(adapters, out, method=method.pop("name"), options=method, weights=weights, **spread)


def _try(assignment: _Assignment, weights: Sequence[Any], name: str) -> dict[str, float]:
    """Task -> what the search's metric says of the merge with these weights, on the rows of the search."""
    with _working(assignment, 0) as run:
        import torch

        from lori_dist.evaluation import evaluate

        torch.set_num_threads(1)
        out = assignment.attempt.partial / TRIED / name
        _merged(run, assignment, weights, out)
        try:
            values = evaluate(run, out, device="cuda" if run.cluster.gpus_per_worker else "cpu")
        finally:
            out.unlink()
        return {task: value for task, metrics in values.items() for value in metrics.values()}


def _spread(run: Run, job: Job) -> dict[str, Any]:
    """How a merge is divided among workers, as `merge_files` takes it. Nothing where it has one."""
    import ray

    count, part = schedule.processes(job, run.cluster)
    if count == 1:
        return {}
    # The task that waits for them gives its own CPU back meanwhile.
    call = ray.remote(num_cpus=part.cpus, max_retries=0, runtime_env=_runtime_env(run))(_call)

    def spread(function: Callable[[Any], Any], items: Iterable[Any]) -> list[Any]:
        try:
            return ray.get([call.remote(function, item) for item in items])
        except ray.exceptions.RayTaskError as error:
            raise error.cause from error

    return {"num_ranges": count, "spread": spread}


def _call(function: Callable[[Any], Any], item: Any) -> Any:
    return function(item)


def _evaluate(assignment: _Assignment) -> None:
    with _working(assignment, 0) as run:
        import torch

        from lori_dist.evaluation import evaluate

        torch.set_num_threads(1)
        name = assignment.job.settings["adapter"]
        adapter = None if name is None else run.folder / name / ADAPTER
        result = evaluate(run, adapter, device="cuda" if run.cluster.gpus_per_worker else "cpu")
        folder.write_json(assignment.attempt.partial / "evaluation.json", result)
        folder.write_json(assignment.attempt.partial / RESULT, {"evaluation": result})


@contextlib.contextmanager
def _working(assignment: _Assignment, rank: int) -> Iterator[Run]:
    """The run, while all that this process writes goes to the job's log. What goes wrong is left for the driver."""
    root = Path(assignment.tree["output"]) / assignment.tree["name"]
    with _logged(_log_file(root, assignment.job, rank)):
        try:
            assignment.attempt.check()
            log.info(
                "%s: attempt %d, rank %d, process %d", assignment.job.name, assignment.attempt.number, rank, os.getpid()
            )
            yield config.validate(assignment.tree)
        except BaseException as error:
            traceback.print_exc()
            record = schedule.record_of(error, rank, time.time())
            file = assignment.attempt.partial / f"{FAILURE}{assignment.attempt.number}-{rank}.json"
            with contextlib.suppress(OSError):  # the folder may be gone, which is then what the error says
                folder.write_json(file, {**record, "attempt": assignment.attempt.number})
            raise


def _log_file(root: Path, job: Job, rank: int) -> Path:
    return root / "logs" / (f"{job.name}.rank{rank}.log" if job.kind == "train" else f"{job.name}.log")


@contextlib.contextmanager
def _logged(file: Path) -> Iterator[None]:
    """All that this process writes to its standard output and error, from C as well, goes to the end of a file."""
    file.parent.mkdir(parents=True, exist_ok=True)
    target = os.open(file, os.O_CREAT | os.O_APPEND | os.O_WRONLY, 0o644)
    kept = [(number, os.dup(number)) for number in (1, 2)]
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(name)s: %(message)s"))
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
