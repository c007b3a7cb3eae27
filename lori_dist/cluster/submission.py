"""A run as a job of a Ray cluster elsewhere: this machine has the configuration, and follows the job's log."""

import asyncio
import logging
import os
import secrets
import shlex
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from lori_dist import config
from lori_dist.cluster.connection import authentication
from lori_dist.errors import ConfigError, JobError

# Ray is imported by functions, as it takes a second.

PACKAGE = Path(__file__).parents[1]

CONFIG = "run.yaml"
"""What the job's working directory holds."""

PATIENCE_SECONDS = 300.0
"""For which the cluster may be out of reach while its job is followed."""
RETRY_SECONDS = 2.0
POLL_SECONDS = 0.2
"""Between two looks at whether Ctrl-C was pressed."""


def submit(path: str, overrides: list[str], address: str, *, dry_run: bool = False) -> int:
    """Runs a configuration on a cluster, and writes what the job writes to stdout. Returns the job's exit code.

    The job gets the configuration and this very package, and runs whatever becomes of this process. address: of the
    cluster's dashboard. Raises ConfigError for a configuration that no other machine can run, and JobError if nothing
    answers there or the job did not start.
    """
    run = config.load(path, overrides, elsewhere=True)
    if problems := list(config.relative_paths(run)):
        raise ConfigError("\n".join(problems))
    if not address.startswith(("http://", "https://")):
        raise ConfigError(f"--address: {address!r} was given; wanted that of Ray's dashboard, http://HOST:8265")
    client = _client(address)
    job = f"lori-{run.name}-{secrets.token_hex(4)}"
    with tempfile.TemporaryDirectory() as place:
        # Overrides are in the file, too: a job's command line is for all to see.
        (Path(place) / CONFIG).write_text(config.text(path, overrides), encoding="utf-8")
        environment = {
            "working_dir": place,
            "py_modules": [str(PACKAGE)],
            "excludes": ["__pycache__"],
        }
        command = f"python -m lori_dist run {CONFIG} cluster.address=auto{' --dry-run' * dry_run}"
        with _told(address):
            client.submit_job(entrypoint=command, submission_id=job, runtime_env=environment)
    print(f"{job}: {address.rstrip('/')}/#/jobs/{job}", flush=True)
    try:
        return _followed(client, job, address)
    except KeyboardInterrupt:
        overridden = f" {shlex.join(overrides)}" if overrides else ""
        print(
            f"\n{job} goes on. See `lori status {shlex.quote(path)}{overridden}`; end it with `lori stop` and the same "
            f"words or, where its output cannot be seen, `ray job stop --address {address} {job}`.",
            file=sys.stderr,
        )
        raise


def _client(address: str) -> Any:
    os.environ["RAY_AUTH_MODE"] = authentication(os.environ)
    from ray.job_submission import JobSubmissionClient

    dashboard = "ray.dashboard.modules"
    for name in (f"{dashboard}.dashboard_sdk", f"{dashboard}.job.sdk", "ray._private.runtime_env.packaging"):
        logging.getLogger(name).setLevel(logging.WARNING)  # what they say of uploads and connections is not the job's
    with _told(address):
        return JobSubmissionClient(address)


@contextmanager
def _told(address: str) -> Iterator[None]:
    from ray.exceptions import RayError

    try:
        yield
    except (RuntimeError, OSError, RayError) as error:  # requests' own are OSErrors
        found = str(error).strip().partition("\n")[0]
        raise JobError(
            f"--address: {address} does not take the job ({found}); give the address of a Ray cluster's dashboard. "
            "Where it wants a token, set RAY_AUTH_MODE=token and RAY_AUTH_TOKEN_PATH"
        ) from error


def _followed(client: Any, job: str, address: str) -> int:
    """The job's exit code, at its end. A lost connection is made again."""
    log = _Log()
    lost = None
    while True:
        try:
            with _interruptions() as interrupted:
                asyncio.run(log.follow(client, job, interrupted))
            state = client.get_job_info(job)
            lost = None
        except Exception as error:  # of requests, aiohttp and Ray: they have no class in common
            lost = lost or time.monotonic()
            if time.monotonic() - lost > PATIENCE_SECONDS:
                raise JobError(
                    f"--address: {address} has not answered for {PATIENCE_SECONDS:g} s ({error}); whether {job} goes "
                    "on, `lori status` tells"
                ) from error
        else:
            if state.status.is_terminal():
                return _code(job, state)
        time.sleep(RETRY_SECONDS)


@contextmanager
def _interruptions() -> Iterator[Callable[[], bool]]:
    """Gives what says whether Ctrl-C was pressed. Raised in the midst of the libraries below, it could get lost there;
    pressed once more, it is raised."""
    pressed: list[int] = []

    def press(number: int, frame: object) -> None:
        pressed.append(number)
        signal.signal(signal.SIGINT, before)

    before = signal.signal(signal.SIGINT, press)
    try:
        yield lambda: bool(pressed)
    finally:
        signal.signal(signal.SIGINT, before)
        if pressed:
            raise KeyboardInterrupt


class _Log:
    """What the job has written, of which some is here already."""

    def __init__(self) -> None:
        self._num_shown = 0

    async def follow(self, client: Any, job: str, interrupted: Callable[[], bool]) -> None:
        """Writes what is new until the job ends, or it is interrupted."""
        writing = asyncio.create_task(self._write(client, job))
        while not writing.done() and not interrupted():
            await asyncio.wait({writing}, timeout=POLL_SECONDS)
        if not writing.done():
            writing.cancel()
            await asyncio.wait({writing}, timeout=POLL_SECONDS)
            return
        await writing

    async def _write(self, client: Any, job: str) -> None:
        """Each connection tells everything from the beginning."""
        place = 0
        async for text in client.tail_job_logs(job):
            new = text[max(0, self._num_shown - place) :]
            place += len(text)
            sys.stdout.write(new)
            sys.stdout.flush()
            self._num_shown = max(self._num_shown, place)


def _code(job: str, state: Any) -> int:
    if state.status.value == "SUCCEEDED":
        return 0
    if state.driver_exit_code:
        return int(state.driver_exit_code) if state.driver_exit_code > 0 else 128 - int(state.driver_exit_code)
    raise JobError(f"{job}: {state.status.value.lower()} ({state.message}); the same run again goes on from there")
