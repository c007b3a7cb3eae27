"""Where a job's results are: a folder that appears at once, complete, by a rename.

`root/JOB` is a finished job: its files, and `job.json` that describes them. Until then they are in `root/.partial-JOB`,
from which a job that was interrupted goes on.
"""

import contextlib
import fcntl
import itertools
import json
import os
import secrets
import shutil
import socket
import time
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lori_dist.errors import JobError, redacted
from lori_dist.jobs import Job, sha256

PARTIAL, REPLACED = ".partial-", ".replaced-"
STARTED, FINISHED, ATTEMPT = "started.json", "job.json", "attempt-"


def finished(root: Path, job: Job) -> dict[str, Any] | None:
    """What job.json says of a finished job, or None if it is not finished or its fingerprint is another one.

    Raises JobError if files of it are missing or have another content than they had.
    """
    place = root / job.name
    record = _read(place / FINISHED)
    if record is None or record.get("fingerprint") != job.fingerprint:
        return None
    sizes = _sizes(place)
    for name, size in record["files"].items():
        if sizes.get(name) != size:
            found = "is missing" if name not in sizes else f"has {sizes[name]} bytes, not {size}"
            raise JobError(f"{place / name}: {found}, though the job was finished; delete {place} to do the job again")
    for name, digest in record["sha256"].items():
        if sha256(place / name) != digest:
            raise JobError(
                f"{place / name}: has changed since the job was finished; delete {place} to do the job again"
            )
    return record


def begun(root: Path, job: Job) -> bool:
    """Whether there is a folder that an earlier attempt at the same job has left."""
    partial = root / f"{PARTIAL}{job.name}"
    record = _read(partial / STARTED) or _read(partial / FINISHED)
    return record is not None and record.get("fingerprint") == job.fingerprint


def open(root: Path, job: Job) -> Path:
    """The folder to work in: as an earlier attempt at the same job left it, or else empty."""
    partial = root / f"{PARTIAL}{job.name}"
    if not begun(root, job):
        _remove(partial)
        partial.mkdir(parents=True)
        write_json(partial / STARTED, {"name": job.name, "fingerprint": job.fingerprint})
    return partial


def publish(root: Path, job: Job, result: Mapping[str, Any], *, scratch: Collection[str] = ()) -> Path:
    """Makes the folder that `open` gave the job's finished one. Returns its new path.

    result: goes into job.json, beside the job's name, settings and fingerprint. scratch: folders in it that nobody
    needs any more. Everything is on disk before the folder appears; a finished folder with another fingerprint stays
    until then. Files whose names begin with a dot are writes that were cut off, and are deleted.
    """
    partial, place, replaced = (root / f"{prefix}{job.name}" for prefix in (PARTIAL, "", REPLACED))
    about = {"name": job.name, "kind": job.kind, "fingerprint": job.fingerprint, "needs": list(job.needs)}
    for stray in list(partial.rglob(".*")):
        _remove(stray)
    sizes = {name: size for name, size in _sizes(partial).items() if name.split("/")[0] not in scratch}
    digests = {name: sha256(partial / name) for name in sizes}
    contents = {"files": sizes, "sha256": digests}
    write_json(partial / FINISHED, {**about, "settings": dict(job.settings), **result, **contents})
    for passing in (partial / STARTED, *partial.glob(f"{ATTEMPT}*")):
        passing.unlink(missing_ok=True)
    for directory, _, names in os.walk(partial):
        for name in names:
            _sync(Path(directory) / name)
        _sync(Path(directory))
    _remove(replaced)
    with contextlib.suppress(FileNotFoundError):
        place.rename(replaced)
    partial.rename(place)
    _sync(root)
    for leftover in (replaced, *(place / name for name in scratch)):
        _remove(leftover)
    return place


def clean(root: Path, *, scratch: Collection[str] = ()) -> None:
    """Removes what a process killed while it published has left: replaced folders, and scratch in finished ones."""
    for leftover in root.glob(f"{REPLACED}*"):
        _remove(leftover)
    for place in root.glob("[!.]*/"):
        for name in scratch:
            _remove(place / name)


# --- attempts --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True, slots=True)
class Attempt:
    """One try at a job. Only the newest may write."""

    partial: Path
    number: int
    """From 1."""
    token: str
    """No other attempt has the same, in whatever folder."""

    def check(self) -> None:
        """Raises JobError if there is a newer attempt, or the folder is no longer there."""
        try:
            mine = (self.partial / f"{ATTEMPT}{self.number}").read_text() == self.token
        except FileNotFoundError:
            mine = False
        if not mine or (self.partial / f"{ATTEMPT}{self.number + 1}").exists():
            raise JobError(
                f"{self.partial}: attempt {self.number} does not own this folder, or no longer; it stops here. If no "
                "newer attempt has taken over, this machine sees another folder: `output` must be on shared storage"
            )


def attempt(partial: Path) -> Attempt:
    """A new attempt at the job of a folder that `open` gave. All earlier ones lose their right to write."""
    while True:
        taken = [int(file.name.removeprefix(ATTEMPT)) for file in partial.glob(f"{ATTEMPT}*")]
        number = max(taken, default=0) + 1
        new = Attempt(partial=partial, number=number, token=secrets.token_hex(8))
        try:
            descriptor = os.open(partial / f"{ATTEMPT}{number}", os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o644)
        except FileExistsError:
            continue
        with os.fdopen(descriptor, "w") as file:
            file.write(new.token)
        return new


LOCK, STOP = ".lock", ".stop"
LOCK_SECONDS = 1.0
"""For which a lock is tried again: whoever asks for the `owner` holds it for a moment."""


@contextlib.contextmanager
def lock(root: Path) -> Iterator[str]:
    """Keeps other processes out of a run's folder; ends with the process, however that ends.

    Gives the owner's name, as `owner` tells it to others: no other process ever has the same. Raises JobError that
    names the process that is in there already, or a link that leads out of the folder.
    """
    root.mkdir(parents=True, exist_ok=True)
    check_links(root)
    descriptor = os.open(root / LOCK, os.O_CREAT | os.O_RDWR | os.O_NOFOLLOW, 0o644)
    try:
        end = time.monotonic() + LOCK_SECONDS
        while not _locked(descriptor, fcntl.LOCK_EX):
            if time.monotonic() > end:
                raise _taken(root, _owner(descriptor))
            time.sleep(0.05)
        name = f"process {os.getpid()} on {socket.gethostname()}, {secrets.token_hex(8)}"
        os.ftruncate(descriptor, 0)
        os.write(descriptor, f"{name}\n".encode())
        (root / STOP).unlink(missing_ok=True)
        yield name
    finally:
        os.close(descriptor)


def owner(root: Path) -> str | None:
    """The process that works on a run, or None if there is none."""
    try:
        descriptor = os.open(root / LOCK, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
    except OSError:
        return None
    try:
        return None if _locked(descriptor, fcntl.LOCK_SH) else _owner(descriptor)
    finally:
        os.close(descriptor)


def check_free(root: Path) -> None:
    """Raises what `lock` would, and leaves no trace."""
    check_links(root)
    name = owner(root)
    if name is not None:
        raise _taken(root, name)


def _taken(root: Path, name: str) -> JobError:
    return JobError(
        f"{root}: {shown_owner(name)} is working on this run; wait for it, or end it with `lori stop {root}`"
    )


def shown_owner(name: str) -> str:
    """For people: without what makes it unique."""
    return name.rpartition(", ")[0] or name


def request_stop(root: Path, name: str) -> None:
    """Asks the owner of that name to end the run. Nobody else takes it for a request."""
    write_json(root / STOP, {"owner": name})


def stop_requested(root: Path, name: str) -> bool:
    """Whether the owner of that name has been asked to end the run."""
    request = _read(root / STOP)
    return request is not None and request.get("owner") == name


def check_links(root: Path) -> None:
    """Raises JobError if a run's folder, or anything in it, is a link out of it: files would be written there."""
    inside = (Path(place) / name for place, folders, files in os.walk(root) for name in (*folders, *files))
    for place in itertools.chain([root], inside):
        if place.is_symlink() and (place == root or not place.resolve().is_relative_to(root.resolve())):
            raise JobError(
                f"{str(place)!r}: is a link to {os.readlink(place)!r}, out of the run's folder, and nothing is written "
                "there; delete it, or make the real folder the `output`"
            )


def _locked(descriptor: int, how: int) -> bool:
    try:
        fcntl.flock(descriptor, how | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _owner(descriptor: int) -> str:
    return os.pread(descriptor, 1000, 0).decode(errors="replace").strip() or "another process"


# --- files -----------------------------------------------------------------------------------------------------------


def write_json(path: Path, tree: Mapping[str, Any]) -> None:
    """Replaces a file at once: whoever reads it finds the old content or the new. Secrets of URLs are left out."""
    text = redacted(json.dumps(tree, indent=1, ensure_ascii=False)) + "\n"
    passing = path.with_name(f".{path.name}.writing")
    passing.unlink(missing_ok=True)  # of a writer that was killed, or a link
    passing.write_text(text, encoding="utf-8")
    _sync(passing)
    passing.replace(path)
    _sync(path.parent)


def _read(path: Path) -> dict[str, Any] | None:
    """None if there is no such file, or it is no JSON object."""
    try:
        tree = json.loads(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError, ValueError):
        return None
    return tree if isinstance(tree, dict) else None


def _sizes(folder: Path) -> dict[str, int]:
    """Of all files in a folder: path relative to it -> bytes. What this module puts there does not count."""
    files = (file for file in sorted(folder.rglob("*")) if file.is_file())
    sizes = {str(file.relative_to(folder)): file.stat().st_size for file in files}
    return {
        name: size for name, size in sizes.items() if name not in (STARTED, FINISHED) and not name.startswith(ATTEMPT)
    }


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)  # where a file is still open, a network file system keeps its folder
    else:
        path.unlink(missing_ok=True)


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
