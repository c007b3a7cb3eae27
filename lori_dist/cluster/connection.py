"""The connection to a run's Ray cluster, and what Ray finds in the environment."""

import contextlib
import logging
import os
import secrets
import signal
import socket
import threading
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from lori_dist.cluster.schedule import Resources
from lori_dist.config import Run
from lori_dist.errors import ConfigError, JobError, Preempted, is_secret

# Ray is imported by functions, after the environment it reads while it is imported has been set.

log = logging.getLogger(__name__)

TOKEN = secrets.token_hex(32)
"""Lets nobody else on this machine into the cluster that we start. Ray reads it once in a process."""

TOKEN_FILE = ".ray-token"
"""In the run's folder while other machines can connect."""

LOOPBACK = "127.0.0.1"

OBJECT_STORE_BYTES = 100 * 2**20
"""Adapters and rows go through files; Ray carries configurations."""

REACH_SECONDS = 10.0


@contextlib.contextmanager
def connected(run: Run) -> Iterator[Callable[[], list[Resources]]]:
    """A connection to the run's cluster. Gives what tells the nodes that it has now."""
    local = run.cluster.address == "local"
    is_open = run.cluster.bind != LOOPBACK
    _check_authentication(run)
    with _environment(_settings(run, os.environ)):
        import ray

        if ray.is_initialized():
            raise JobError("ray is already connected in this process; call ray.shutdown() first")
        if local and is_open != ray._private.ray_constants.ENABLE_RAY_CLUSTER:
            raise JobError(
                f"cluster.bind: ray was imported before the run, and would not listen on {run.cluster.bind} alone; "
                f"import it later, or set RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER={int(is_open)} before"
            )
        _check_address(run.cluster.address)
        # The dashboard's state API is what releases the CPUs of a gang whose controller died.
        own: dict[str, Any] = {"include_dashboard": True, "object_store_memory": OBJECT_STORE_BYTES}
        own = {**own, "dashboard_host": run.cluster.bind} if local else {}
        try:
            context = ray.init(address=run.cluster.address, log_to_driver=False, logging_level=logging.ERROR, **own)
        except (ConnectionError, ray.exceptions.RayError) as error:
            raise JobError(
                f"cluster.address: no Ray cluster answers at {run.cluster.address!r} ({error}); start one with "
                "`ray start --head`, or use `local`. Where it wants a token, set RAY_AUTH_TOKEN_PATH to "
                "the file that has it"
            ) from error
        if context.dashboard_url:
            # That of a cluster which outlives the run is looked up in logs as well.
            log.log(logging.INFO if local else logging.WARNING, "Ray's dashboard: http://%s", context.dashboard_url)
        try:
            with _stopped_by_sigterm(run), _token_file(run) if is_open else contextlib.nullcontext():
                yield _nodes
        finally:
            disconnect()


def _check_authentication(run: Run) -> None:
    mode = os.environ.get("RAY_AUTH_MODE", "token")
    if run.cluster.bind != LOOPBACK and mode != "token":
        raise ConfigError(
            f"cluster.bind: {run.cluster.bind!r} lets other machines connect, and RAY_AUTH_MODE is {mode!r}, so that "
            "they could run anything here; unset it, or set it to token"
        )


@contextlib.contextmanager
def _token_file(run: Run) -> Iterator[None]:
    """For the user's other programs, and nobody else's: what to give as RAY_AUTH_TOKEN_PATH."""
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


def _nodes() -> list[Resources]:
    import ray

    return [
        Resources(cpus=node["Resources"].get("CPU", 0.0), gpus=node["Resources"].get("GPU", 0.0))
        for node in ray.nodes()
        if node["Alive"]
    ]


class _Terminated(KeyboardInterrupt):
    """SIGTERM came."""


@contextlib.contextmanager
def _stopped_by_sigterm(run: Run) -> Iterator[None]:
    """As by Ctrl-C: batch systems end jobs so, and Ray's own handler aborts with a dump of its stack."""
    if threading.current_thread() is not threading.main_thread():  # where no handler can be set
        yield
        return

    def end(number: int, frame: object) -> None:
        raise _Terminated

    before = signal.signal(signal.SIGTERM, end)
    try:
        yield
    except _Terminated:
        raise Preempted(f"{run.folder}: ended by SIGTERM; the same command continues from here") from None
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


def disconnect() -> None:
    """Ends the connection to the cluster, and the cluster if it is our own."""
    import ray

    ray.shutdown()


def _settings(run: Run, environment: Mapping[str, str]) -> dict[str, str]:
    """The variables that Ray needs, apart from those that the user has set."""
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
        mode = environment.get("RAY_AUTH_MODE")
        if mode is None or (mode == "token" and not _has_token(environment)):  # Ray would write one for all to read
            wanted.update(RAY_AUTH_MODE="token", RAY_AUTH_TOKEN=TOKEN)
    else:
        wanted["RAY_AUTH_MODE"] = authentication(environment)
        wanted["RAY_gcs_server_port_wait_time_s"] = "1"  # one try of 40 seconds, not twenty
    return {name: value for name, value in wanted.items() if name not in environment}


def authentication(environment: Mapping[str, str]) -> str:
    """Ray's mode for a cluster that is there: as the user says, or else `token` if the user has one. A cluster that
    wants none takes it as well."""
    return environment.get("RAY_AUTH_MODE") or ("token" if _has_token(environment) else "disabled")


def _has_token(environment: Mapping[str, str]) -> bool:
    """Whether there is one in a place where Ray looks."""
    if environment.get("RAY_AUTH_TOKEN") or environment.get("RAY_AUTH_TOKEN_PATH"):
        return True
    return (Path.home() / ".ray" / "auth_token").is_file()


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


def runtime_env(run: Run) -> dict[str, Any]:
    """What processes on other machines are to find in their environment. Our own cluster inherits all of ours.

    Secrets are left out: Ray shows a job's environment in its logs and its dashboard. How its own processes know each
    other is for the cluster to say, which has started them with its token, or without.
    """
    if run.cluster.address == "local":
        return {}
    names = [name for name in os.environ if name.startswith(FORWARDED) and not is_secret(name)]
    return {"env_vars": {name: os.environ[name] for name in sorted(names)}}
