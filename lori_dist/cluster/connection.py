"""The connection to a run's Ray cluster, and what Ray finds in the environment."""

import contextlib
import getpass
import logging
import os
import secrets
import socket
import tempfile
import threading
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from lori_dist import storage
from lori_dist.cluster import scratch
from lori_dist.cluster.schedule import Resources
from lori_dist.config import Run
from lori_dist.errors import ConfigError, JobError, is_secret
from lori_dist.training import preemption

# Ray is imported by functions, after the environment it reads while it is imported has been set.

log = logging.getLogger(__name__)

TOKEN = secrets.token_hex(32)
"""The token of the cluster that this process starts, which keeps others on this machine out. Ray reads it once in a
process."""

TOKEN_FILE = ".ray-token"
"""The file in the run's folder that holds the token while other machines can connect."""

LOOPBACK = "127.0.0.1"

OBJECT_STORE_BYTES = 100 * 2**20
"""Adapters and rows go through files; Ray carries configurations."""

NO_METRICS = {"RAY_enable_metrics_collection": "0", "DASHBOARD_METRIC_PORT": "-1", "AUTOSCALER_METRIC_PORT": "-1"}
"""Ray's metrics answer whoever asks, with a token or without. No process can listen on port -1, which is why it is set:
Ray notes that in its logs, and has no other way to turn these two off."""

RAY = "r"
"""Ray's folder inside the folder for temporary files. Ray opens its own to everybody; the one above is the user's
alone."""

REACH_SECONDS = 10.0
WATCH_SECONDS = 1.0

_open = contextlib.ExitStack()
"""Closes the connection of this process and removes its token file. Ray has one connection in a process."""


@contextlib.contextmanager
def connected(run: Run) -> Iterator[Callable[[], list[Resources]]]:
    """Connects to the run's cluster. Yields a function that returns the nodes which the cluster has now.

    The function raises JobError once a local cluster has lost its own processes: no node can come back to it.
    """
    local = run.cluster.address == "local"
    is_open = run.cluster.bind != LOOPBACK
    _check_authentication(run)
    with (
        scratch.folder() if local else contextlib.nullcontext() as place,
        _environment(_settings(run, os.environ, place)),
    ):
        import ray

        if ray.is_initialized():
            raise JobError("ray is already connected in this process; call ray.shutdown() first")
        if local and is_open != ray._private.ray_constants.ENABLE_RAY_CLUSTER:
            raise JobError(
                f"cluster.bind: ray was imported before the run, and would not listen on {run.cluster.bind} alone; "
                f"import it later, or set RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER={int(is_open)} before"
            )
        _check_address(run.cluster.address)
        try:
            with preemption.raised_by_sigterm(f"{run.folder}: ") as raise_again:
                url = _connect(run, place)
                raise_again()  # in place of Ray's own handler
                _open.callback(ray.shutdown)
                if url:
                    # That of a cluster which outlives the run is looked up in logs as well.
                    log.log(logging.INFO if local else logging.WARNING, "Ray's dashboard: http://%s", url)
                if is_open:
                    _open.enter_context(_token_file(run))
                with _watched(run, place) if place is not None else contextlib.nullcontext():
                    yield _nodes_of_own if local else _nodes
        finally:
            disconnect()


def _connect(run: Run, place: Path | None) -> str | None:
    """Connects this process. Returns the dashboard's URL, if there is one. place: the folder for a cluster that is
    started here."""
    if place is not None:
        try:
            return _init(run, place)
        except JobError as error:  # Ray's limits for its own start are half a minute and less
            log.warning("%s: trying once more", error)
    return _init(run, place)


def _init(run: Run, place: Path | None) -> str | None:
    import ray

    # The dashboard's state API is what releases the CPUs of a gang whose controller died.
    own: dict[str, Any] = {"include_dashboard": True, "object_store_memory": OBJECT_STORE_BYTES}
    own = {**own, "dashboard_host": run.cluster.bind, "_temp_dir": str(place / RAY)} if place else {}
    with _raising(run):
        try:
            context = ray.init(address=run.cluster.address, log_to_driver=False, logging_level=logging.ERROR, **own)
        except BaseException:
            ray.shutdown()
            if place is not None:
                scratch.end_processes(place)  # which Ray would leave to the end of this process
            raise
    url: str | None = context.dashboard_url
    return url


@contextlib.contextmanager
def _raising(run: Run) -> Iterator[None]:
    """Raises the errors that Ray has while it starts or connects as ours, each with its remedy."""
    import ray

    try:
        yield
    except SystemExit as error:  # how Ray's own handler of SIGTERM ends a process
        raise preemption.Terminated from error
    except Exception as error:
        found = str(error).strip().partition("\n")[0] or type(error).__name__
        if run.cluster.address == "local":
            raise JobError(
                f"cluster.address: Ray did not start on this machine ({found}); its processors, memory or disk may be "
                "too busy or too full: try again when they are less so, or start a cluster with `ray start --head`, "
                "and set cluster.address=auto"
            ) from error
        if not isinstance(error, ConnectionError | ray.exceptions.RayError | TimeoutError | RuntimeError):
            raise
        raise JobError(
            f"cluster.address: no Ray cluster answers at {run.cluster.address!r} ({found}); start one with "
            "`ray start --head`, or use `local`. If it requires a token, set RAY_AUTH_TOKEN_PATH to "
            "the file that has it"
        ) from error


def _check_authentication(run: Run) -> None:
    mode = os.environ.get("RAY_AUTH_MODE", "token")
    if run.cluster.bind != LOOPBACK and mode != "token":
        raise ConfigError(
            f"cluster.bind: {run.cluster.bind!r} lets other machines connect, and RAY_AUTH_MODE is {mode!r}, so that "
            "they could run anything here; unset it, or set it to token"
        )


@contextlib.contextmanager
def _token_file(run: Run) -> Iterator[None]:
    """Keeps the token in a file that only the user can read, for RAY_AUTH_TOKEN_PATH of the user's other programs."""
    if os.environ.get("RAY_AUTH_TOKEN") != TOKEN:  # the user has one
        yield
        return
    run.folder.mkdir(parents=True, exist_ok=True)
    path = run.folder / TOKEN_FILE
    path.unlink(missing_ok=True)
    with os.fdopen(os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o600), "w") as file:
        file.write(TOKEN)
    try:
        yield
    finally:
        path.unlink(missing_ok=True)


def _nodes_of_own() -> list[Resources]:
    if dead := _dead_processes():
        raise JobError(_has_ended(dead[0]))
    return _nodes()


def _dead_processes() -> list[str]:
    """Those of the cluster that this process has started without which it cannot go on."""
    import ray

    node = ray._private.worker._global_node
    return [name for name, _ in node.dead_processes() if name in ("gcs_server", "raylet")] if node else []


def _has_ended(name: str) -> str:
    return (
        f"cluster.address: Ray's {name} on this machine has ended: it was killed, or memory ran out. What was saved is "
        "kept, and the same command resumes from there; if it happens again, lower cluster.workers or what a worker "
        "takes"
    )


@contextlib.contextmanager
def _watched(run: Run, place: Path) -> Iterator[None]:
    """Ends this process with 1, and says why, if Ray's head process does: calls of Ray wait for it for a minute, and
    then Ray ends the process without a word of ours. place: the folder of the cluster."""
    ended = threading.Event()

    def watch() -> None:
        while not ended.wait(WATCH_SECONDS):
            if "gcs_server" in _dead_processes() and not ended.is_set():
                log.error("%s", _has_ended("gcs_server"))
                scratch.end_processes(place)
                (run.folder / TOKEN_FILE).unlink(missing_ok=True)
                os._exit(1)

    threading.Thread(target=watch, daemon=True, name="ray's head").start()
    try:
        yield
    finally:
        ended.set()


def _nodes() -> list[Resources]:
    import ray

    return [
        Resources(cpus=node["Resources"].get("CPU", 0.0), gpus=node["Resources"].get("GPU", 0.0))
        for node in ray.nodes()
        if node["Alive"]
    ]


def _check_address(address: str) -> None:
    """Raises JobError for an address that does not answer, since Ray itself would try for a quarter of an hour."""
    if address in ("local", "auto"):
        return
    host, _, port = address.rpartition(":")
    if not host or not port.isdigit() or "//" in address:
        raise ConfigError(f"cluster.address: got {address!r}; wanted `local`, `auto` or host:port")
    try:
        socket.create_connection((host.strip("[]"), int(port)), timeout=REACH_SECONDS).close()
    except (OSError, OverflowError) as error:
        raise JobError(
            f"cluster.address: nothing answers at {address!r} ({error}); give the address that `ray start --head` "
            "printed, or use `local`"
        ) from error


def disconnect() -> None:
    """Closes the connection to the cluster, and ends the cluster if this process started it."""
    _open.close()


def _settings(run: Run, environment: Mapping[str, str], place: Path | None) -> dict[str, str]:
    """The variables that Ray needs, apart from those that the user has set. place: the folder of a cluster started
    here."""
    wanted = {
        "RAY_ENABLE_AUTO_CONNECT": "0",  # or a late call after the shutdown would start another cluster
        "RAY_USAGE_STATS_ENABLED": "0",
        "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
        "RAY_CHDIR_TO_TRIAL_DIR": "0",
        "RAY_TRAIN_METRICS_ENABLED": "0",
        "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.5",
    }
    if run.cluster.address == "local":
        # Despite its name: without it, all sockets are loopback only.
        wanted["RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"] = "0" if run.cluster.bind == LOOPBACK else "1"
        wanted["RAY_TRAIN_ENABLE_PREEMPTION_WATCHER"] = "0"
        wanted |= NO_METRICS
        mode = environment.get("RAY_AUTH_MODE")
        if mode is None or (mode == "token" and not _has_token(environment)):  # Ray would write one for all to read
            wanted.update(RAY_AUTH_MODE="token", RAY_AUTH_TOKEN=TOKEN)
    else:
        wanted["RAY_AUTH_MODE"] = authentication(environment)
        wanted["RAY_gcs_server_port_wait_time_s"] = "1"  # one try of 40 seconds, not twenty
    kept = {name: value for name, value in wanted.items() if name not in environment}
    if place is not None:
        kept |= {storage.MIRRORS: os.environ.get(storage.MIRRORS) or tempfile.gettempdir()}
        kept |= {"TMPDIR": str(place)}  # processes that are ended by a signal leave what they have there
        if run.train.compile and "TORCHINDUCTOR_CACHE_DIR" not in environment:  # kept, as it saves the next run minutes
            kept |= {"TORCHINDUCTOR_CACHE_DIR": f"{tempfile.gettempdir()}/torchinductor_{getpass.getuser()}"}
    return kept


def authentication(environment: Mapping[str, str]) -> str:
    """Ray's mode for an existing cluster: the one that the user sets, else `token` if the user has one. A cluster that
    wants no token accepts one as well."""
    return environment.get("RAY_AUTH_MODE") or ("token" if _has_token(environment) else "disabled")


def _has_token(environment: Mapping[str, str]) -> bool:
    """Whether the user has a token where Ray looks for one."""
    if environment.get("RAY_AUTH_TOKEN") or environment.get("RAY_AUTH_TOKEN_PATH"):
        return True
    return (Path.home() / ".ray" / "auth_token").is_file()


@contextlib.contextmanager
def _environment(variables: Mapping[str, str]) -> Iterator[None]:
    before = {name: os.environ.get(name) for name in variables}
    os.environ.update(variables)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


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


def runtime_env(run: Run) -> dict[str, Any]:
    """The environment that processes on other machines get. A cluster that this process starts inherits all of its own.

    Secrets are left out: Ray shows a job's environment in its logs and its dashboard. The cluster has started its own
    processes with its token, or without one.
    """
    if run.cluster.address == "local":
        return {}
    names = [name for name in os.environ if name.startswith(FORWARDED) and not is_secret(name)]
    return {"env_vars": {name: os.environ[name] for name in sorted(names)}}
