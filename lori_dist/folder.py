"""The folder of a job's results, which appears complete, by one rename.

`root/JOB` is a finished job: its files, and `job.json` that describes them. Until then they are in `root/.partial-JOB`,
from which an interrupted job resumes.
"""

import contextlib
import fcntl
import hashlib
import itertools
import json
import logging
import os
import re
import secrets
import shutil
import socket
import stat
import time
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lori_dist import atomic, jobs
from lori_dist.errors import JobError, redacted
from lori_dist.files import open_regular, read_regular
from lori_dist.jobs import Job, sha256

PARTIAL, REPLACED = ".partial-", ".replaced-"
STARTED, FINISHED, ATTEMPT = "started.json", "job.json", "attempt-"

log = logging.getLogger(__name__)


def finished(root: Path, job: Job) -> dict[str, Any] | None:
    """The content of job.json of a finished job; None if the job is not finished or its fingerprint is another one.

    Raises JobError if job.json has been changed, or if files that it names are missing or have another content.
    """
    place = root / job.name
    record = _read(place / FINISHED)
    if record is None or record.get("fingerprint") != job.fingerprint:
        return None
    again = f"delete {place} to do the job again"
    if not is_sealed(record) or not all(isinstance(record.get(key), dict) for key in ("files", "sha256")):
        raise JobError(f"{place / FINISHED}: was changed after the job finished; restore it, or {again}")
    if record["sha256"].keys() != record["files"].keys():
        raise JobError(f"{place / FINISHED}: was changed after the job finished; restore it, or {again}")
    sizes = _sizes(place)
    for name, size in record["files"].items():
        if sizes.get(name) != size:
            found = "is missing" if name not in sizes else f"has {sizes[name]} bytes, not {size}"
            raise JobError(f"{place / name}: {found}, though the job was finished; {again}")
    for name, digest in record["sha256"].items():
        if sha256(place / name) != digest:
            raise JobError(f"{place / name}: has changed since the job was finished; {again}")
    return record


def has_finished(root: Path, job: Job) -> bool:
    """As `finished`, but a result that is damaged or was changed counts as none."""
    try:
        return finished(root, job) is not None
    except JobError:
        return False


def take(root: Path, job: Job, other: Path) -> None:
    """Copies a job's folder from that of another run, which has finished it with the same fingerprint. The caller holds
    the lock, and there is none of that name."""
    copy = root / f"{REPLACED}{job.name}"  # which `clean` removes where this process is killed
    _remove(copy)
    shutil.copytree(other / job.name, copy)
    copy.rename(root / job.name)


def superseded(root: Path, job: Job) -> str | None:
    """Describes what stands in the folder of a job's name without being its result, such as a result of other settings:
    what differs, and what becomes of it. Returns None if there is nothing."""
    place = root / job.name
    if not os.path.lexists(place):
        return None
    kept = f"it is done again, and what is there is kept as {next_kept(place).name}"
    record = _read(place / FINISHED)
    if record is None or not isinstance(record.get("settings"), dict):
        return f"{job.name}: {place / FINISHED} is missing or cannot be read; {kept}"
    if changes := jobs.differences(job.kind, record["settings"], _as_written(dict(job.settings))):
        return f"{job.name}: settings changed since it finished: {', '.join(changes)}; {kept}"
    if job.needs:
        return f"{job.name}: what it is made of has changed since it finished ({', '.join(job.needs)}); {kept}"
    return f"{job.name}: was finished by another version of this program, or its {FINISHED} was edited; {kept}"


def begun(root: Path, job: Job) -> bool:
    """Whether there is a folder that an earlier attempt at the same job has left."""
    return _is_of(root / f"{PARTIAL}{job.name}", job)


def _is_of(partial: Path, job: Job) -> bool:
    record = _read(partial / STARTED) or _read(partial / FINISHED)
    return record is not None and record.get("fingerprint") == job.fingerprint


def open(root: Path, job: Job) -> Path:
    """The folder to work in: as an earlier attempt at the same job left it, or else empty.

    What an attempt with other settings has left is kept beside it, and comes back with its settings.
    """
    partial = root / f"{PARTIAL}{job.name}"
    if begun(root, job):
        return partial
    earlier = next((place for place in sorted(root.glob(f"{PARTIAL}{job.name}.*")) if _is_of(place, job)), None)
    if os.path.lexists(partial):
        if any(partial.rglob("*.safetensors")):
            kept = next_kept(partial)
            partial.rename(kept)
            log.warning(
                "%s: %s was begun with other settings, or its %s cannot be read; it is kept as %s, and the job begins "
                "from its start; delete that folder if nobody needs it",
                job.name,
                partial,
                STARTED,
                kept.name,
            )
        else:
            _remove(partial)
    if earlier is not None:
        log.warning("%s: resumes from %s, which was begun with these settings", job.name, earlier)
        earlier.rename(partial)
        return partial
    partial.mkdir(parents=True)
    write_json(partial / STARTED, {"name": job.name, "fingerprint": job.fingerprint})
    return partial


def publish(root: Path, job: Job, result: Mapping[str, Any], *, scratch: Collection[str] = ()) -> Path:
    """Makes the folder that `open` gave the job's finished one. Returns its new path.

    result: goes into job.json, beside the job's name, settings and fingerprint. scratch: folders in it that nobody
    needs any more. Everything is on disk before the folder appears; a finished folder with another fingerprint stays
    until then, and is kept under its name and a number. Files whose names begin with a dot are writes that were cut
    off, and are deleted.
    """
    partial, place = root / f"{PARTIAL}{job.name}", root / job.name
    about = {"name": job.name, "kind": job.kind, "fingerprint": job.fingerprint, "needs": list(job.needs)}
    for stray in list(partial.rglob(".*")):
        _remove(stray)
    sizes = {name: size for name, size in _sizes(partial).items() if name.split("/")[0] not in scratch}
    digests = {name: sha256(partial / name) for name in sizes}
    contents = {"files": sizes, "sha256": digests}
    write_json(partial / FINISHED, sealed({**about, "settings": dict(job.settings), **result, **contents}))
    for passing in (partial / STARTED, *partial.glob(f"{ATTEMPT}*")):
        _remove(passing)
    atomic.flush_tree(partial)
    if os.path.lexists(place):
        kept = next_kept(place)
        place.rename(kept)
        log.info("%s: the one finished before is kept as %s", job.name, kept)
    partial.rename(place)
    atomic.flush_folder(root)
    for name in scratch:
        _remove(place / name)
    return place


def kept(root: Path, name: str) -> list[Path]:
    """The folders of a job's earlier results, oldest first."""
    found = [path for path in root.glob(f"{name}.*") if path.suffix[1:].isdecimal()]
    return sorted(found, key=lambda path: int(path.suffix[1:]))


def set_aside(root: Path, names: Iterable[str]) -> list[str]:
    """Renames files of a run, those of them that are there, so that NAME.EXT becomes NAME.1.EXT, or the next number
    that none of them has. Returns their new names."""
    there = [name for name in names if os.path.lexists(root / name)]

    def numbered(name: str, number: int) -> str:
        stem, dot, ending = name.partition(".")
        return f"{stem}.{number}{dot}{ending}"

    def is_free(number: int) -> bool:
        return not any(os.path.lexists(root / numbered(name, number)) for name in there)

    number = next(filter(is_free, itertools.count(1)))
    for name in there:
        (root / name).rename(root / numbered(name, number))
    return [numbered(name, number) for name in there]


def next_kept(place: Path) -> Path:
    """Under which name what is at a path will be kept: with the first number that is free."""
    places = (place.with_name(f"{place.name}.{number}") for number in itertools.count(1))
    return next(path for path in places if not os.path.lexists(path))


def is_finished(place: Path) -> bool:
    """Whether a folder holds a job that finished, with whatever settings."""
    return (place / FINISHED).is_file()


def clean(root: Path, *, scratch: Collection[str] = ()) -> None:
    """Removes what a process killed while it published has left: scratch in finished folders, and what earlier versions
    called replaced."""
    for leftover in root.glob(f"{REPLACED}*"):
        _remove(leftover)
    for place in root.glob("[!.]*/"):
        if is_finished(place):
            for name in scratch:
                _remove(place / name)


# --- attempts --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True, slots=True)
class Attempt:
    """One try at a job. Only the newest may write."""

    partial: Path
    number: int
    """Attempts count from 1."""
    token: str
    """A text that no other attempt has, in whatever folder."""

    def check(self) -> None:
        """Raises JobError if there is a newer attempt, or the folder is no longer there."""
        try:
            mine = read_regular(self.partial / f"{ATTEMPT}{self.number}") == self.token.encode()
        except OSError:
            mine = False
        if not mine or (self.partial / f"{ATTEMPT}{self.number + 1}").exists():
            raise JobError(
                f"{self.partial}: attempt {self.number} does not own this folder, or no longer; it stops here. If no "
                "newer attempt has taken over, this machine sees another folder: `output` must be on shared storage"
            )


def attempt(partial: Path) -> Attempt:
    """A new attempt at the job of a folder that `open` gave. All earlier ones lose their right to write."""
    while True:
        names = (file.name.removeprefix(ATTEMPT) for file in partial.glob(f"{ATTEMPT}*"))
        number = max((int(name) for name in names if name.isdecimal()), default=0) + 1
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
"""Seconds for which a busy lock is tried again; whoever asks for the `owner` holds it for a moment."""


@contextlib.contextmanager
def lock(root: Path) -> Iterator[str]:
    """Keeps other processes out of a run's folder; ends with the process, however that ends.

    Gives the owner's name, as `owner` tells it to others: no other process ever has the same. Raises JobError that
    names the process that is in there already, or a link that leads out of the folder.
    """
    root.mkdir(parents=True, exist_ok=True)
    check_entries(root)
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
    check_entries(root)
    name = owner(root)
    if name is not None:
        raise _taken(root, name)


def _taken(root: Path, name: str) -> JobError:
    return JobError(
        f"{root}: {shown_owner(name)} is working on this run; wait for it, or end it with `lori stop {root}`"
    )


def shown_owner(name: str) -> str:
    """The owner's name for people, without the part that makes it unique."""
    return name.rpartition(", ")[0] or name


def request_stop(root: Path, name: str) -> None:
    """Asks the owner of that name to end the run. Nobody else takes it for a request."""
    write_json(root / STOP, {"owner": name})


def stop_requested(root: Path, name: str) -> bool:
    """Whether the owner of that name has been asked to end the run."""
    request = _read(root / STOP)
    return request is not None and request.get("owner") == name


FILES = re.compile(
    rf"{re.escape(STARTED)}|{re.escape(FINISHED)}|{ATTEMPT}.*|{re.escape(LOCK)}|{re.escape(STOP)}"
    r"|[^/]*\.(jsonl|json|safetensors|log)|\.ray-token"
)
FOLDERS = ("logs", "checkpoints", "tried")
"""Files and folders that a run's folder may hold, by name."""


def check_entries(root: Path) -> None:
    """Raises JobError, naming it, for what a run would write through or wait for: a link out of its folder, a named
    pipe, a socket or a device, a folder where a file belongs, a file where a folder does."""
    inside = (Path(place) / name for place, folders, files in os.walk(root) for name in (*folders, *files))
    for place in itertools.chain([root], inside):
        if place.is_symlink() and (place == root or not _leads_inside(place, root)):
            raise JobError(
                f"{str(place)!r}: is a link to {os.readlink(place)!r}, out of the run's folder, and nothing is written "
                "there; delete it, or make the real folder the `output`"
            )
        if place != root and _is_own(place.relative_to(root)):
            _check_kind(place)


def _leads_inside(link: Path, root: Path) -> bool:
    try:
        return link.resolve().is_relative_to(root.resolve())
    except (OSError, RuntimeError):  # links in a circle
        return False


def _is_own(name: Path) -> bool:
    """Whether something in a run's folder is the run's, not a tracker's."""
    top = name.parts[0]
    return (
        len(name.parts) == 1
        or top == "logs"
        or top.startswith((PARTIAL, "moments-", "cluster-", "train-", "merge-", "evaluate-"))
    )


def _check_kind(place: Path) -> None:
    try:
        mode = place.stat().st_mode
    except OSError:  # a link to nothing, or what another process has just deleted
        return
    if stat.S_ISREG(mode):
        if place.name in FOLDERS:
            raise JobError(f"{place}: is a file, and a folder belongs there; remove it")
    elif not stat.S_ISDIR(mode):
        raise JobError(f"{place}: is a named pipe, a socket or a device, where a file belongs; remove it")
    elif FILES.fullmatch(place.name):
        raise JobError(f"{place}: is a directory, and a file belongs there; remove it")


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
    """Replaces a file at once: whoever reads it finds the old content or the new. Secrets are left out."""
    atomic.write_text(path, json.dumps(_public(tree), indent=1, ensure_ascii=False) + "\n")


def read_lines(path: Path) -> tuple[list[dict[str, Any]], int]:
    """The objects in a file of JSON lines, and how many lines hold none: cut short by a kill, or NULs, as a power cut
    leaves them. Nothing where there is no file. Raises JobError for what is not a regular file."""
    try:
        with open_regular(path) as file:
            *lines, last = file.read().split(b"\n")
    except FileNotFoundError:
        return [], 0
    except OSError as error:
        raise _unreadable(path, error) from error
    found = [_object(line) for line in lines if line.strip()]
    whole = [tree for tree in found if tree is not None]
    return whole, len(found) - len(whole) + bool(last)


def _read(path: Path) -> dict[str, Any] | None:
    """The JSON object in a file; None if there is no such file, or it has something else. Raises JobError for what is
    not a regular file."""
    try:
        return _object(read_regular(path))
    except (FileNotFoundError, NotADirectoryError):
        return None
    except OSError as error:
        raise _unreadable(path, error) from error


def _object(text: bytes) -> dict[str, Any] | None:
    try:
        tree = json.loads(text.decode())
    except (ValueError, RecursionError):
        return None
    return tree if isinstance(tree, dict) else None


def _unreadable(path: Path, error: OSError) -> JobError:
    return JobError(f"{path}: cannot be read ({error.strerror or error}); remove it, and give the same command again")


def _public(tree: Any) -> Any:
    """A tree without secrets. Texts alone are looked through: of a number, half would be no JSON."""
    if isinstance(tree, str):
        return redacted(tree)
    if isinstance(tree, Mapping):
        return {redacted(str(key)): _public(item) for key, item in tree.items()}
    return [_public(item) for item in tree] if isinstance(tree, list | tuple) else tree


def _as_written(tree: Mapping[str, Any]) -> dict[str, Any]:
    """The content of the file as a reader of its JSON gets it."""
    found: dict[str, Any] = json.loads(json.dumps(_public(tree)))
    return found


SEAL = "digest"


def sealed(tree: Mapping[str, Any]) -> dict[str, Any]:
    """A record with a digest of itself, so that a figure that was changed is noticed. Without secrets."""
    plain = _as_written(tree)
    return {**plain, SEAL: _digest(plain)}


def is_sealed(record: Mapping[str, Any]) -> bool:
    """Whether a record is what was written. Those of earlier versions have no seal."""
    return SEAL not in record or record[SEAL] == _digest({key: item for key, item in record.items() if key != SEAL})


def _digest(tree: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(tree, sort_keys=True).encode()).hexdigest()


def _sizes(folder: Path) -> dict[str, int]:
    """Bytes of all files in a folder by their path in it, without the files that this module writes."""
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
