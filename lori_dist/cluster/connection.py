"""The connection to a run's Ray cluster, and what Ray finds in the environment."""

import contextlib
import logging
import os
import secrets
import signal
import socket
import threading
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from lori_dist.cluster.schedule import Resources
from lori_dist.config import Run
from lori_dist.errors import ConfigError, JobError

# Ray is imported by functions, after the environment it reads while it is imported has been set.

TOKEN = secrets.token_hex(32)
"""Lets nobody else on this machine into the cluster that we start. Ray reads it once in a process."""

OBJECT_STORE_BYTES = 100 * 2**20
"""Adapters and rows go through files; Ray carries configurations."""

REACH_SECONDS = 10.0


@contextlib.contextmanager
def connected(run: Run) -> Iterator[Callable[[], list[Resources]]]:
    """A connection to the run's cluster. Gives what tells the nodes that it has now."""
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
                yield _nodes
        finally:
            disconnect()


def _nodes() -> list[Resources]:
    import ray

    return [
        Resources(cpus=node["Resources"].get("CPU", 0.0), gpus=node["Resources"].get("GPU", 0.0))
        for node in ray.nodes()
        if node["Alive"]
    ]


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


def disconnect() -> None:
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


def runtime_env(run: Run) -> dict[str, Any]:
    """What processes on other machines are to find in their environment. Our own cluster inherits all of ours.

    Tokens are left out: Ray shows a job's environment in its logs and its dashboard.
    """
    if run.cluster.address == "local":
        return {}
    names = [name for name in os.environ if name.startswith(FORWARDED) and "TOKEN" not in name]
    return {"env_vars": {name: os.environ[name] for name in ["RAY_AUTH_MODE", *sorted(names)]}}
