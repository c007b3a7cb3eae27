"""A short folder for what Ray and the processes of a run write beside its results: sockets, logs, temporary files."""

import contextlib
import fcntl
import getpass
import os
import shutil
import signal
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

from lori_dist.errors import ConfigError, JobError

PREFIX = "lori-"
LOCK = ".lock"
"""A file in each folder that its process keeps locked, so that the next run knows what a killed process has left."""

LONGEST = 40
"""Bytes of a folder's path. A socket's may have 107, of which Ray needs up to 66 and Python's multiprocessing 32."""

COMMON = ("/tmp", "/var/tmp", "/dev/shm")
"""Places for the folder if TMPDIR is too long."""

END_SECONDS = 3.0
"""Seconds for which the end of processes is awaited, before they are asked to end, and again before they are killed."""
REMOVE_SECONDS = 5.0
"""Seconds for which processes that end may still write while their folder is removed."""


def check() -> None:
    """Raises ConfigError if TMPDIR or RAY_TMPDIR is not a folder in which files can be made: Python would silently use
    another one, and Ray would end with a traceback."""
    for name in ("TMPDIR", "RAY_TMPDIR"):
        place = os.environ.get(name)
        if place and (problem := _problem(Path(place))):
            raise ConfigError(f"{name}: {place!r} {problem}; set it to a folder that you can write to, or unset it")


def _problem(place: Path) -> str | None:
    if not place.exists():
        return "does not exist"
    if not place.is_dir():
        return "is not a folder"
    try:
        tempfile.TemporaryFile(dir=place).close()
    except OSError as error:
        return f"cannot be written ({error.strerror})"
    return None


@contextlib.contextmanager
def folder() -> Iterator[Path]:
    """A new folder of this process's own, removed at the end with all that is in it.

    It is in RAY_TMPDIR or TMPDIR if sockets fit there, or else in /tmp or the like. What killed processes have
    left in these places is removed first. Processes that are started with it as their TMPDIR end with it. Raises
    ConfigError if RAY_TMPDIR or TMPDIR cannot be written, JobError if no place is short enough.
    """
    check()
    places = [place for place in _places() if len(os.fsencode(place)) + 1 + len(PREFIX) + 8 <= LONGEST]
    for place in places:
        _remove_leftovers(place)
    made, descriptor = _made(places)
    try:
        yield made
    finally:
        end_processes(made, wait=True)
        os.close(descriptor)
        _remove(made)


def end_processes(place: Path, *, wait: bool = False) -> None:
    """Asks the processes whose TMPDIR a folder is to end, and kills those that do not. wait: before that, a moment for
    those that end by themselves."""
    for number in (*([0] if wait else []), signal.SIGTERM, signal.SIGKILL):  # 0 does nothing
        end = time.monotonic() + END_SECONDS
        left = _processes(place)
        for process in left:
            with contextlib.suppress(ProcessLookupError):
                os.kill(process, number)
        while left and time.monotonic() < end:
            time.sleep(0.1)
            left = _processes(place)
        if not left:
            return


def _processes(place: Path) -> set[int]:
    """Process ids of this user whose TMPDIR is the folder. Ended processes that wait for their parent have no
    environment."""
    found = set()
    wanted = f"\0TMPDIR={place}\0".encode()
    for path in Path("/proc").glob("[0-9]*/environ"):
        with contextlib.suppress(OSError):  # another user's, or it has just ended
            if wanted in b"\0" + path.read_bytes():
                found.add(int(path.parent.name))
    return found


def remove_empty_cache() -> None:
    """Removes the folder in TMPDIR that torch makes for compiled code when it is imported, if nothing is in it."""
    with contextlib.suppress(OSError, KeyError):  # it is not empty, or was not made; the user has no name
        (Path(tempfile.gettempdir()) / f"torchinductor_{getpass.getuser()}").rmdir()


def _places() -> Iterator[Path]:
    """Absolute paths for the folder, since a relative one means another place to another process."""
    if own := os.environ.get("RAY_TMPDIR"):
        yield Path(own).absolute()
    yield Path(tempfile.gettempdir()).absolute()
    yield from map(Path, COMMON)


def _made(places: list[Path]) -> tuple[Path, int]:
    """A new folder and its lock."""
    for place in places:
        with contextlib.suppress(OSError):
            while True:
                made = Path(tempfile.mkdtemp(prefix=PREFIX, dir=place))
                descriptor = os.open(made / LOCK, os.O_CREAT | os.O_RDWR, 0o600)
                if _locked(descriptor):
                    return made, descriptor
                os.close(descriptor)  # another process took it for a leftover at this very moment
    raise JobError(
        f"TMPDIR: {tempfile.gettempdir()!r} is too long for sockets, whose paths have at most 107 bytes, and none of "
        f"{', '.join(COMMON)} can be written; set RAY_TMPDIR to a folder with a short name, of at most "
        f"{LONGEST - len(PREFIX) - 9} bytes"
    )


def _remove_leftovers(place: Path) -> None:
    for left in place.glob(f"{PREFIX}????????"):
        with contextlib.suppress(OSError):
            if left.is_symlink() or left.stat().st_uid != os.getuid():
                continue
            descriptor = os.open(left / LOCK, os.O_RDWR | os.O_NOFOLLOW)
            try:
                if _locked(descriptor):
                    end_processes(left)
                    shutil.rmtree(left, ignore_errors=True)
            finally:
                os.close(descriptor)


def _locked(descriptor: int) -> bool:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _remove(made: Path) -> None:
    end = time.monotonic() + REMOVE_SECONDS
    while made.exists() and time.monotonic() < end:
        shutil.rmtree(made, ignore_errors=True)
        time.sleep(0.1 if made.exists() else 0.0)
