"""A run's folder on storage that is reached by URL: each machine works in a copy of it, its mirror.

Any URL that fsspec knows will do. Files are put whole; the one that says a folder is complete, job.json, goes last.
Such storage has neither locks nor renames: an attempt's marker and a driver's lease are files that are read before
each write, so that one which wakes up late stops there. What it was putting at that very moment it still puts.
"""

import contextlib
import fcntl
import hashlib
import json
import logging
import os
import secrets
import socket
import stat
import tempfile
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lori_dist import atomic
from lori_dist.errors import ConfigError, JobError
from lori_dist.files import read_regular

LEASE, KNOWN = ".lease.json", ".known.json"
LAST = "job.json"

log = logging.getLogger(__name__)
BEAT_SECONDS = 10.0
STALE_SECONDS = 60.0
"""Seconds after which a silent driver is taken for dead, by the clocks of both."""


def is_url(output: str) -> bool:
    """Whether `output` names storage by URL, not a folder."""
    return "://" in output


MIRRORS = "LORI_MIRRORS"
"""Environment variable with the folder of mirrors, for processes that have a TMPDIR of their own."""


def mirror_folder(output: str, name: str) -> Path:
    """Folder of this machine's and this user's copy of a run, which is the same in every process."""
    digest = hashlib.blake2b(output.rstrip("/").encode(), digest_size=8).hexdigest()
    return Path(os.environ.get(MIRRORS) or tempfile.gettempdir()) / f"lori-{os.getuid()}" / digest / name


@dataclass(frozen=True, kw_only=True, slots=True)
class Mirror:
    """A run's folder on storage, and its copy on this machine."""

    files: Any
    """fsspec's file system."""
    there: str
    here: Path

    def pull(self, prefix: str = "") -> None:
        """Fetches files that have changed on the storage since they were last fetched or put. prefix: a file or a
        folder of the run's."""
        self.here.mkdir(parents=True, exist_ok=True)
        with self._known() as known:
            listed = self._listed(prefix)
            for name in [name for name in known if _is_in(name, prefix) and name not in listed]:
                with contextlib.suppress(FileNotFoundError):
                    if _state(self.here / name) == known.pop(name)["here"]:
                        (self.here / name).unlink()  # it was deleted there
            for name, about in listed.items():
                if known.get(name, {}).get("there") == _version(about) and (self.here / name).exists():
                    continue
                path = self.here / name
                path.parent.mkdir(parents=True, exist_ok=True)
                with atomic.aside(path) as passing:
                    try:
                        self.files.get_file(f"{self.there}/{name}", str(passing))
                    except FileNotFoundError:  # deleted since it was listed
                        continue
                    if passing.stat().st_size != about["size"]:
                        raise JobError(f"{self.there}/{name}: was cut short or changed while it was fetched; try again")
                    atomic.put(passing, path)
                known[name] = {"there": _version(about), "here": _state(path)}

    def push(self, prefix: str = "") -> None:
        """Puts files that have changed here. Files whose names begin with a dot, writes that were cut off, stay
        here."""
        with self._known() as known:
            for path in sorted(self._local(prefix), key=lambda path: path.name == LAST):
                name = path.relative_to(self.here).as_posix()
                with contextlib.suppress(FileNotFoundError):  # a checkpoint that has been replaced meanwhile
                    state = _state(path)
                    if known.get(name, {}).get("here") != state:
                        self._put(path, name)
                        known[name] = {"there": _version(self.files.info(f"{self.there}/{name}")), "here": state}

    def prune(self, prefix: str) -> None:
        """Deletes files on the storage that are not here."""
        with self._known() as known:
            for name in self._listed(prefix):
                if not (self.here / name).exists():
                    known.pop(name, None)
                    with contextlib.suppress(FileNotFoundError):
                        self.files.rm_file(f"{self.there}/{name}")

    def check(self, markers: str, number: int, token: str) -> None:
        """Raises JobError if the storage has a newer attempt, or not this one. markers: path without number."""
        place = f"{self.there}/{markers}"
        self.files.invalidate_cache()
        try:
            mine = self.files.cat_file(f"{place}{number}").decode() == token
        except FileNotFoundError:
            mine = False
        if not mine or self.files.exists(f"{place}{number + 1}"):
            raise JobError(f"{place}{number}: this attempt does not own the folder, or no longer; it stops here")

    def delete(self, prefix: str) -> None:
        """Deletes a folder on the storage."""
        with contextlib.suppress(FileNotFoundError):
            self.files.rm(f"{self.there}/{prefix}", recursive=True)

    @contextlib.contextmanager
    def lease(self) -> Iterator[None]:
        """Keeps other drivers out. Raises JobError that names the one that is there.

        One that has said nothing for STALE_SECONDS is taken for dead.
        """
        mine = {"owner": f"process {os.getpid()} on {socket.gethostname()}", "token": secrets.token_hex(8)}
        self._refuse(mine)
        self._beat(mine)
        self._refuse(mine)  # of two that came at once, the one that wrote last stays
        ended = threading.Event()

        def beat() -> None:
            while not ended.wait(BEAT_SECONDS):
                with contextlib.suppress(OSError):
                    if self._holder().get("token") == mine["token"]:
                        self._beat(mine)

        thread = threading.Thread(target=beat, name="lease", daemon=True)
        thread.start()
        try:
            yield
        finally:
            ended.set()
            thread.join()
            if self._holder().get("token") == mine["token"]:
                self.files.rm(f"{self.there}/{LEASE}")

    def _refuse(self, mine: dict[str, str]) -> None:
        holder = self._holder()
        silent = time.time() - holder.get("beat", 0.0)
        if holder and holder["token"] != mine["token"] and silent < STALE_SECONDS:
            raise JobError(
                f"{self.there}: {holder['owner']} is working on this run, and said so {silent:.0f} s ago; wait for it "
                f"or end it (one that was killed is taken for dead after {STALE_SECONDS:.0f} s)"
            )

    def _holder(self) -> dict[str, Any]:
        try:
            found = json.loads(self.files.cat_file(f"{self.there}/{LEASE}"))
        except (FileNotFoundError, ValueError, RecursionError):
            return {}
        wanted = {"owner": str, "token": str, "beat": int | float}
        is_whole = isinstance(found, dict) and all(isinstance(found.get(key), kind) for key, kind in wanted.items())
        return found if is_whole else {}

    def _beat(self, mine: dict[str, str]) -> None:
        self.files.makedirs(self.there, exist_ok=True)
        self.files.pipe_file(f"{self.there}/{LEASE}", json.dumps({**mine, "beat": time.time()}).encode())

    def _listed(self, prefix: str) -> dict[str, dict[str, Any]]:
        self.files.invalidate_cache()
        root = f"{self.there}/{prefix}".rstrip("/")
        found = self.files.find(root, detail=True)
        names = {path[len(self.there) + 1 :]: about for path, about in found.items()}
        return {name: about for name, about in names.items() if not name.rpartition("/")[2].startswith(".")}

    def _local(self, prefix: str) -> list[Path]:
        root = self.here / prefix
        found = [root] if root.is_file() else [path for path in root.rglob("*") if path.is_file()]
        return [path for path in found if not path.name.startswith(".")]

    def _put(self, path: Path, name: str) -> None:
        target = f"{self.there}/{name}"
        self.files.makedirs(target.rpartition("/")[0], exist_ok=True)
        self.files.put_file(str(path), target)

    @contextlib.contextmanager
    def _known(self) -> Iterator[dict[str, Any]]:
        """File -> its version on the storage and its state here when both were the same. One process at a time may be
        inside."""
        with (self.here / f"{KNOWN}.lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            path = self.here / KNOWN
            known = _read_known(path)
            try:
                yield known
            finally:
                atomic.write_text(path, json.dumps(known))


def open(output: str, name: str) -> Mirror:
    """The mirror of a run. Raises ConfigError, by the path `output`, if the storage cannot be reached."""
    import fsspec  # type: ignore[import-untyped]

    try:
        files, root = fsspec.core.url_to_fs(output)
        files.makedirs(f"{root.rstrip('/')}/{name}", exist_ok=True)
        files.invalidate_cache()
        files.find(f"{root.rstrip('/')}/{name}")
    except ImportError as error:
        raise ConfigError(
            f"output: {output!r} needs a package that is not here ({error}); install it on all machines"
        ) from error
    except Exception as error:  # each file system has errors of its own
        raise ConfigError(
            f"output: {output!r} cannot be used ({type(error).__name__}: {error}); give a path, or a URL of storage "
            "that fsspec knows and that this user may write to"
        ) from error
    here = mirror_folder(output, name)
    _make_private(here)
    return Mirror(files=files, there=f"{root.rstrip('/')}/{name}", here=here)


def put(output: str, name: str, prefix: str) -> None:
    """Puts a file or folder of a run where other machines find it. Does nothing if `output` is a path."""
    if is_url(output):
        open(output, name).push(prefix)


def _make_private(here: Path) -> None:
    """Raises ConfigError if another user has made the folder first: its content could be theirs."""
    top = here.parent.parent
    top.mkdir(mode=0o700, exist_ok=True)
    found = top.lstat()
    if not stat.S_ISDIR(found.st_mode) or found.st_uid != os.getuid() or found.st_mode & 0o077:
        raise ConfigError(f"output: {str(top)!r} is not this user's alone; delete it, or set TMPDIR to another folder")
    here.mkdir(parents=True, exist_ok=True)


@contextlib.contextmanager
def driving(output: str, name: str) -> Iterator[None]:
    """Surrounds a driver's work on a run: with a URL, the mirror is filled at the start and put back at the end."""
    if not is_url(output):
        yield
        return
    mirror = open(output, name)
    with mirror.lease():
        mirror.pull()
        try:
            yield
        finally:
            mirror.push()


def _read_known(path: Path) -> dict[str, Any]:
    """The record of files that were fetched and stored. It is empty if the file is damaged; then all is fetched
    again."""
    try:
        tree = json.loads(read_regular(path).decode())
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, RecursionError) as error:
        log.warning("%s: cannot be read (%s); all files of the run are fetched again", path, error)
        return {}
    items = tree.items() if isinstance(tree, dict) else ()
    return {name: item for name, item in items if isinstance(item, dict) and {"there", "here"} <= set(item)}


def _is_in(name: str, prefix: str) -> bool:
    return not prefix or name == prefix or name.startswith(f"{prefix}/")


def _version(about: dict[str, Any]) -> str:
    keys = ("size", "ETag", "etag", "mtime", "LastModified", "modified", "created")
    return json.dumps([str(about.get(key)) for key in keys])


def _state(path: Path) -> list[int]:
    found = path.stat()
    return [found.st_size, found.st_mtime_ns]
