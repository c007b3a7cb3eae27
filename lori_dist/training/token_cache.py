"""The cache folder of token files, of bounded size: tokens are made once for all processes of a machine.

Whoever wants tokens that another process is making waits for it; a writer that is killed leaves its place to the next,
as its lock ends with it. A file that is in use is locked too, and is not deleted.
"""

import contextlib
import dataclasses
import fcntl
import hashlib
import importlib.metadata
import inspect
import json
import logging
import os
import re
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import numpy.typing as npt
from transformers import PreTrainedTokenizerBase

from lori_dist import atomic, config, jobs, rows, tables
from lori_dist.errors import ConfigError, JobError
from lori_dist.training import examples, token_files, tokenising, tokens
from lori_dist.training.token_files import HEADER, Damaged, TokenFile, Writer, locked
from lori_dist.training.tokenising import Work

FOLDER, SIZE = "LORI_CACHE", "LORI_CACHE_SIZE"
"""Variables of the environment: the cache folder, and the bytes that it may hold."""
MOST_BYTES = 64 * 10**9
"""Bytes that the folder may hold where SIZE is not set."""
UNITS = {"": 1, "K": 10**3, "M": 10**6, "G": 10**9, "T": 10**12}
WITHOUT_HOME = ("/var/tmp", "/tmp")
"""Places for the folder where the home folder cannot be written. TMPDIR is not among them: that of a run's processes
ends with the run."""

ENDING = ".tokens"
SECONDS_BETWEEN_LINES = 30.0
PATHS = ("_file", "name_or_path")
"""Ends of the names of a tokenizer's settings that say where it is from."""

Show = Callable[[str, int, float | None], None]
"""Gets what is being made, the number of rows that are done, and, if it is known, their share of all."""

log = logging.getLogger(__name__)


# --- the folder ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True, slots=True)
class Entry:
    """A file in the cache folder."""

    path: Path
    num_bytes: int
    used: float
    """When it was opened last, as `time.time` says it."""
    notes: dict[str, Any]
    """What it is of; empty where that cannot be read."""


def cache_folder() -> Path:
    """The folder of token files, which need not be there: LORI_CACHE, or one in the user's cache folder."""
    if own := os.environ.get(FOLDER):
        return Path(own).expanduser().absolute()
    home = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    wanted = Path(home).expanduser() / "lori_dist"
    if _problem(wanted) is None:
        return wanted
    others = [Path(place) / f"lori-{os.getuid()}-cache" for place in WITHOUT_HOME]
    return next((place for place in others if _problem(place, is_own=True) is None), wanted)


def most_bytes() -> int:
    """Bytes that the folder may hold. Raises ConfigError for a LORI_CACHE_SIZE that is not a size."""
    given = os.environ.get(SIZE)
    if given is None:
        return MOST_BYTES
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([KMGT]?)(?:i?B)?\s*", given, re.IGNORECASE)
    if match is None:
        raise ConfigError(f"{SIZE}: got {given!r}; wanted a number of bytes, such as 20GB")
    return int(float(match[1]) * UNITS[match[2].upper()])


def entries() -> list[Entry]:
    """The files in the cache folder, the one that was used last first."""
    found = []
    for path in _files(cache_folder()):
        with contextlib.suppress(OSError):  # another process has just deleted it
            state = path.stat()
            found.append(Entry(path=path, num_bytes=state.st_size, used=state.st_mtime, notes=_notes(path)))
    return sorted(found, key=lambda entry: -entry.used)


def clear(most: int = 0, keep: Path | None = None) -> list[Path]:
    """Deletes the files that were not used for longest until at most so many bytes are left, and what killed processes
    have left. Those in use stay, and so does `keep`. Returns what it deleted. Raises OSError."""
    folder, deleted = cache_folder(), list[Path]()
    if folder.exists() and _has_locks(folder):
        for left in folder.glob(f".*{ENDING}*"):
            _delete(left)
    found = entries()
    total = sum(entry.num_bytes for entry in found)
    for entry in reversed(found):
        if total > most and entry.path != keep and _delete(entry.path):
            deleted.append(entry.path)
            total -= entry.num_bytes
    return deleted


def _files(folder: Path) -> list[Path]:
    return [path for path in folder.glob(f"*{ENDING}") if not path.name.startswith(".")]


def _notes(path: Path) -> dict[str, Any]:
    try:
        with path.open("rb") as file:
            head = file.read(HEADER)
        notes: dict[str, Any] = json.loads(json.loads(head[8:])["__metadata__"]["notes"])
    except (OSError, ValueError, KeyError, TypeError):
        return {}
    return notes


def _delete(path: Path) -> bool:
    """Whether a file was deleted: nobody uses or writes it."""
    try:
        descriptor = os.open(path, os.O_RDWR | os.O_NOFOLLOW | os.O_NONBLOCK)  # NFS locks no others
    except FileNotFoundError:
        return False
    try:
        if not locked(descriptor, fcntl.LOCK_EX):
            return False
        path.unlink(missing_ok=True)
        return True
    finally:
        os.close(descriptor)


def _problem(folder: Path, *, is_own: bool = False) -> str | None:
    """Why nothing can be written into a folder, which is made; None if it can. is_own: whether it must be ours."""
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        if is_own and folder.stat().st_uid != os.getuid():
            return "is another user's"
        tempfile.TemporaryFile(dir=folder).close()
    except OSError as error:
        return f"cannot be written ({error.strerror})"
    return None


# --- what is made ----------------------------------------------------------------------------------------------------


def token_file(
    work: Work,
    *,
    chosen: npt.NDArray[np.int64] | None = None,
    show: Show | None = None,
    num_processes: int | None = None,
) -> TokenFile:
    """The tokens of a source's rows, from the cache folder if they are there, else made by all cores.

    chosen: the rows, ascending, that need tokens, of which the others have none; None: all do. show: called now and
    then while tokens are made; by default lines of the log say it. num_processes: by default one for each core.
    Raises ConfigError that names every row that cannot be used by its line, and JobError where the tokens cannot be
    kept, as on a full disk.
    """
    source, path = work.source, _path(work)
    found = _opened(path)
    if found is None and chosen is not None:
        work = dataclasses.replace(work, chosen=chosen)
        path = _path(work)
        found = _opened(path)
    if found is None:
        folder = path.parent
        if (problem := _problem(folder)) is not None:
            raise JobError(
                f"{folder}: {problem}, and does not have the tokens of {source.path}; set {FOLDER} to a folder that "
                "can be written"
            )
        with _claimed(path, source) as (file, partial):
            found = _opened(path, says=False)  # another process has just made it
            if found is None:
                _write(work, file, partial, path, show or _lines(), num_processes or tokenising.cores())
                found = _opened(path)
        if found is None:
            raise JobError(f"{path}: was deleted or damaged just after it was written; start again")
        with contextlib.suppress(OSError):  # of a file that is another user's
            clear(most_bytes(), keep=path)
    found.warn(source.where)
    return found


def _opened(path: Path, *, says: bool = True) -> TokenFile | None:
    """None if there is no such file, or one that has to be made again. says: whether a damaged one is logged."""
    try:
        return TokenFile(path)
    except OSError:
        return None
    except Damaged as error:
        if says:
            log.warning("%s is damaged (%s); its tokens are made again", path, error)
        return None


@contextlib.contextmanager
def _claimed(path: Path, source: rows.Source) -> Iterator[tuple[BinaryIO, Path]]:
    """A file on the way to `path`, and its name, that no other process writes at the same time."""
    partial = path.with_name(f".{path.name}.partial")
    if not _has_locks(path.parent):
        with atomic.aside(path) as own, own.open("x+b") as file:
            yield file, own
        return
    with contextlib.ExitStack() as stack:
        while True:
            descriptor = os.open(partial, os.O_CREAT | os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW, 0o666)
            file = stack.enter_context(os.fdopen(descriptor, "r+b"))
            if not locked(descriptor, fcntl.LOCK_EX):
                log.info("%sanother process makes tokens of %s; waiting for it", source.prefix, source.path)
                locked(descriptor, fcntl.LOCK_SH, waits=True)  # which whoever reads what it wrote has too
            elif _is_at(state := os.fstat(descriptor), partial):
                break
            file.close()  # it may have got its name, or was deleted
        try:
            yield file, partial
        finally:
            if _is_at(state, partial):
                partial.unlink()


def _has_locks(folder: Path) -> bool:
    with tempfile.TemporaryFile(dir=folder) as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            return False
    return True


def _is_at(state: os.stat_result, path: Path) -> bool:
    try:
        return os.path.samestat(state, path.stat())
    except FileNotFoundError:
        return False


def _write(work: Work, file: BinaryIO, partial: Path, path: Path, show: Show, num_processes: int) -> None:
    source, before = work.source, _state(work.source.path)
    tally, num_bytes = rows.Tally(source), 0
    size = before[0] if before is not None and tables.ending(source.path) == Path(source.path).suffix.lower() else None
    try:
        with contextlib.ExitStack() as stack:
            file.truncate()
            texts = stack.enter_context(tempfile.TemporaryFile(dir=path.parent)) if work.keeps_texts else None
            writer = Writer(file, texts)
            for piece, made in tokenising.made_of(work, rows.pieces(source), num_processes):
                tally.add(len(made.lengths), made.problems, has_tools=made.has_tools)
                writer.add(made)
                lines = sum(len(item) + 1 for _, item in piece if isinstance(item, bytes))
                num_bytes += lines
                show(source.where or source.path, tally.num_rows, num_bytes / size if size and lines else None)
            tally.check()
            if before != _state(source.path):
                raise ConfigError(f"{source.prefix}{source.path}: has changed while it was read; start again")
            name = getattr(work.tokenizer, "name_or_path", "")
            writer.finish(path=source.path, tokenizer=str(name), max_length=work.max_length)
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)
        atomic.flush_folder(path.parent)
        locked(file.fileno(), fcntl.LOCK_SH)  # others may read it
    except OSError as error:
        partial.unlink(missing_ok=True)
        with contextlib.suppress(OSError):  # what is still to be written fails again
            file.close()
        raise JobError(
            f"{path.parent}: cannot hold the tokens of {source.path} ({error.strerror}); free space there, as "
            f"`lori cache --clear` does, or set {FOLDER} to a folder with more room"
        ) from error


def _state(path: str) -> tuple[int, int] | None:
    if tables.is_hub(path):
        return None
    try:
        state = os.stat(path)
    except OSError:  # for whoever reads it to say
        return None
    return state.st_size, state.st_mtime_ns


def _lines() -> Show:
    """Lines of the log, for work that takes long."""
    last = time.monotonic()

    def show(what: str, num_rows: int, share: float | None) -> None:
        nonlocal last
        if time.monotonic() - last >= SECONDS_BETWEEN_LINES:
            last = time.monotonic()
            log.info("%s: %s rows are tokens%s", what, f"{num_rows:,}", "" if share is None else f" ({share:.0%})")

    return show


# --- what tokens depend on -------------------------------------------------------------------------------------------


def _path(work: Work) -> Path:
    """The file for tokens, named by a digest of all that they depend on. Raises ConfigError for a source that cannot be
    read."""
    source = work.source
    with source.naming():
        content = tables.version(source.path) if tables.is_hub(source.path) else jobs.sha256(source.path)
    tree = {
        "content": content,
        "ending": None if tables.is_hub(source.path) else tables.ending(source.path),
        "template": dataclasses.asdict(source.template),
        "labels": source.labels,
        "max_length": work.max_length,
        "texts": work.keeps_texts,
        "chosen": None if work.chosen is None else hashlib.sha256(work.chosen.tobytes()).hexdigest(),
        "tokenizer": _of_tokenizer(work.tokenizer),
        "versions": [importlib.metadata.version(name) for name in ("transformers", "tokenizers")],
        "code": _code(),
    }
    text = json.dumps(tree, sort_keys=True, default=str)
    name = hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()[:32]
    return cache_folder() / f"{name}{ENDING}"


def _of_tokenizer(tokenizer: PreTrainedTokenizerBase) -> list[Any]:
    """What the tokens of a text depend on, whatever folder the tokenizer is from."""
    backend: Any = getattr(tokenizer, "backend_tokenizer", None)
    if backend is not None and hasattr(backend, "to_str"):
        own = hashlib.sha256(backend.to_str().encode("utf-8", "surrogatepass")).hexdigest()
    else:
        files = [Path(file) for file in vars(tokenizer).values() if isinstance(file, str) and os.path.isfile(file)]
        source = inspect.getsourcefile(type(tokenizer))
        digests = [jobs.sha256(file) for file in (*files, *([Path(source)] if source else []))]
        own = json.dumps([sorted(tokenizer.get_vocab().items()), digests])
    special = {name: str(token) for name, token in tokenizer.special_tokens_map.items()}
    added = {token: str(content) for token, content in tokenizer.added_tokens_decoder.items()}
    settings = {name: value for name, value in tokenizer.init_kwargs.items() if not name.endswith(PATHS)}
    return [type(tokenizer).__name__, own, special, added, tokenizer.chat_template, settings]


def _code() -> str:
    """Tokens of another version of this program are not taken for today's."""
    digest = hashlib.sha256()
    for module in (tables, rows, examples, tokens, tokenising, token_files, sys.modules[__name__]):
        digest.update(inspect.getsource(module).encode())
    return digest.hexdigest()


# --- the files of a run ----------------------------------------------------------------------------------------------


def source_of(run: config.Run, task: str, part: str, path: str) -> rows.Source:
    """The source of one file of a task. part: its place in the task's section, as `config.files` gives it."""
    settings = run.tasks[task]
    template = settings.test_template if part == "test" else settings.template
    return rows.Source(path=path, template=template, where=f"tasks.{task}.{part}", labels=settings.labels)


def of_part(
    run: config.Run,
    task: str,
    part: str,
    path: str,
    tokenizer: PreTrainedTokenizerBase,
    *,
    chosen: npt.NDArray[np.int64] | None = None,
    show: Show | None = None,
) -> TokenFile:
    """The tokens of one file of a task, with texts if it is its test file. Arguments and errors as of `token_file`."""
    return token_file(_work(run, task, part, path, tokenizer), chosen=chosen, show=show)


def is_there(run: config.Run, task: str, part: str, path: str, tokenizer: PreTrainedTokenizerBase) -> bool:
    """Whether the tokens of all rows of a file of a task are in the cache folder. Raises ConfigError for a file that
    cannot be read."""
    return _path(_work(run, task, part, path, tokenizer)).exists()


def _work(run: config.Run, task: str, part: str, path: str, tokenizer: PreTrainedTokenizerBase) -> Work:
    return Work(
        source=source_of(run, task, part, path),
        tokenizer=tokenizer,
        max_length=run.train.max_length,
        keeps_texts=part == "test",
    )
