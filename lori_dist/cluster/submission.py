"""A run as a job of a Ray cluster elsewhere: this machine has the configuration, and follows the job's log."""

import asyncio
import logging
import os
import re
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
from lori_dist.cluster.board import ENDING
from lori_dist.cluster.connection import authentication
from lori_dist.errors import ConfigError, JobError, Stopped

# Ray is imported by functions, as it takes a second.

log = logging.getLogger(__name__)

PACKAGE = Path(__file__).parents[1]

CONFIG = "run.yaml"
"""The configuration in the job's working directory."""

PATIENCE_SECONDS = 300.0
"""Seconds for which the cluster may be out of reach while its job is followed."""
RETRY_SECONDS = 2.0
SUBMIT_SECONDS = 60.0
"""Seconds for which a job that the cluster cannot take yet is submitted again."""
STOPPED_CODE = 3
TAIL = 4000
"""Characters of a job's log, in which its last message stands."""
POLL_SECONDS = 0.2
"""Seconds between two checks whether Ctrl-C was pressed."""


def submit(path: str, overrides: list[str], address: str, *, dry_run: bool = False) -> int:
    """Runs a configuration on a cluster, and writes what the job writes to stdout. Returns the job's exit code.

    The job gets the configuration and this very package, and runs on even if this process ends. address: the URL of the
    cluster's dashboard. Raises ConfigError for a configuration that no other machine can run, and JobError if nothing
    answers there or the job did not start.
    """
    run = config.load(path, overrides, elsewhere=True)
    if problems := list(config.relative_paths(run)):
        raise ConfigError("\n".join(problems))
    if not address.startswith(("http://", "https://")):
        raise ConfigError(f"--address: got {address!r}; wanted that of Ray's dashboard, http://HOST:8265")
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
        _submitted(client, address, entrypoint=command, submission_id=job, runtime_env=environment)
    print(f"{job}: {address.rstrip('/')}/#/jobs/{job}", flush=True)
    try:
        return _followed(client, job, address)
    except KeyboardInterrupt:
        overridden = f" {shlex.join(overrides)}" if overrides else ""
        print(
            f"\n{job} continues. See `lori status {shlex.quote(path)}{overridden}`; stop it with `lori stop` and "
            "the same "
            f"arguments or, where its output is not visible, `ray job stop --address {address} {job}`.",
            file=sys.stderr,
        )
        raise


def _client(address: str) -> Any:
    os.environ["RAY_AUTH_MODE"] = authentication(os.environ)
    from ray.job_submission import JobSubmissionClient

    dashboard = "ray.dashboard.modules"
    for name in (f"{dashboard}.dashboard_sdk", f"{dashboard}.job.sdk", "ray._private.runtime_env.packaging"):
        logging.getLogger(name).setLevel(logging.WARNING)  # what they say of uploads and connections is not the job's
    with _explained(address):
        return JobSubmissionClient(address)


def _submitted(client: Any, address: str, **job: Any) -> None:
    """Submits a job, again while the cluster says that it cannot take one yet."""
    end = time.monotonic() + SUBMIT_SECONDS
    while True:
        with _explained(address):
            try:
                client.submit_job(**job)
            except RuntimeError as error:
                if "try again later" not in str(error).lower() or time.monotonic() > end:
                    raise
                log.info("--address: %s cannot accept the job yet (%s)", address, _found(error))
            else:
                return
        time.sleep(RETRY_SECONDS)


@contextmanager
def _explained(address: str) -> Iterator[None]:
    from ray.exceptions import RayError

    try:
        yield
    except (RuntimeError, OSError, RayError) as error:  # requests' own are OSErrors
        found = _found(error)
        if re.search(r"try again later", found, re.IGNORECASE):
            remedy = "its nodes may still be starting, or the port of its agents is taken; see `ray status` there"
        elif re.search(r"auth|token|\b40[13]\b", found, re.IGNORECASE):
            remedy = "set RAY_AUTH_MODE=token and RAY_AUTH_TOKEN_PATH to the file that has its token"
        else:
            remedy = "give the address of a Ray cluster's dashboard, as `ray start --head` prints it"
        raise JobError(f"--address: {address} does not accept the job ({found}); {remedy}") from error


def _found(error: Exception) -> str:
    """The line of an error that says what is wrong. Ray's errors may begin with lines that only lead to a traceback."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    last = next((line for line in lines if "try again later" in line.lower()), None)
    return (last or lines[0] if lines else type(error).__name__)[:300]


def _followed(client: Any, job: str, address: str) -> int:
    """Follows a job and returns its exit code. A lost connection is made again."""
    output = _Log()
    lost = None
    while True:
        try:
            with _interruptions() as interrupted:
                asyncio.run(output.follow(client, job, interrupted))
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
                return _code(job, state, output.tail)
        time.sleep(RETRY_SECONDS)


@contextmanager
def _interruptions() -> Iterator[Callable[[], bool]]:
    """Yields a function that says whether Ctrl-C was pressed. A KeyboardInterrupt raised inside the libraries below
    could get lost there; pressed once more, it is raised."""
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
    """The job's output, of which a part has been written here already."""

    def __init__(self) -> None:
        self._num_shown = 0
        self.tail = ""
        """The last TAIL characters of the output."""

    async def follow(self, client: Any, job: str, interrupted: Callable[[], bool]) -> None:
        """Writes new output until the job ends or the user interrupts."""
        writing = asyncio.create_task(self._write(client, job))
        while not writing.done() and not interrupted():
            await asyncio.wait({writing}, timeout=POLL_SECONDS)
        if not writing.done():
            writing.cancel()
            await asyncio.wait({writing}, timeout=POLL_SECONDS)
            return
        await writing

    async def _write(self, client: Any, job: str) -> None:
        """Writes the part that is new, since each connection sends everything from the beginning."""
        place = 0
        async for text in client.tail_job_logs(job):
            new = text[max(0, self._num_shown - place) :]
            place += len(text)
            sys.stdout.write(new)
            sys.stdout.flush()
            self._num_shown = max(self._num_shown, place)
            self.tail = (self.tail + new)[-TAIL:]


def _code(job: str, state: Any, tail: str) -> int:
    """The job's exit code. tail: the end of its output. Raises Stopped, whose exit code is 3, if the job was stopped:
    Ray may end a driver that has left its cluster before that has an exit code of its own."""
    if state.status.value == "SUCCEEDED":
        return 0
    code = int(state.driver_exit_code or 0)
    if code != STOPPED_CODE and (state.status.value == "STOPPED" or (code != 2 and ENDING.search(tail))):
        raise Stopped(f"{job}: was stopped; the same command continues from there")
    if code:
        return code if code > 0 else 128 - code
    raise JobError(f"{job}: {state.status.value.lower()} ({state.message}); the same command continues from there")
