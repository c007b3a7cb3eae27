"""Files and folders that appear at once, complete: the one way in which what lasts is written."""

import errno
import json
import os
import secrets
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, BinaryIO

from lori_dist.errors import AdapterError

_CANNOT_FLUSH = (errno.EINVAL, errno.ENOTSUP, errno.ENOSYS, errno.EBADF)
"""Errors of file systems that cannot flush a folder; some network file systems cannot, and need not."""


@contextmanager
def replacing(path: Path) -> Iterator[BinaryIO]:
    """A new file to write into, which takes the place of `path` at the end of the block, when all of it is on disk.

    A kill at any byte leaves what was there before, and so does an error in the block; nothing else stays behind. The
    file has the mode of any new file (the umask's). Raises OSError that names `path` if it cannot be written.
    """
    with aside(path) as partial:
        with naming(path, partial), partial.open("xb") as file:
            yield file
            file.flush()
            _flush(file.fileno())
        _rename(partial, path)


def put(made: Path, path: Path) -> None:
    """Renames a file that is complete, such as a download, to where it belongs, when it is on disk."""
    flush(made)
    _rename(made, path)


def _rename(made: Path, path: Path) -> None:
    with naming(path, made):
        os.replace(made, path)
    flush_folder(path.parent)


def write_text(path: Path, text: str) -> None:
    """Replaces a file as `replacing`, with a text in UTF-8. Undecodable bytes of file names appear escaped, which in
    JSON reads back as they are."""
    with replacing(path) as file:
        file.write(text.encode("utf-8", errors="backslashreplace"))


def append_json(path: Path, record: Mapping[str, Any], *, flush: bool = False) -> None:
    """Adds a line of JSON to a file. flush: returns when it is on disk. Raises OSError that names `path`."""
    with naming(path), path.open("ab") as file:
        file.write(f"{json.dumps(record)}\n".encode())
        if flush:
            file.flush()
            _flush(file.fileno())


@contextmanager
def aside(path: Path) -> Iterator[Path]:
    """A name beside `path` for a file on the way to it. What is still there at the end of the block is removed."""
    partial = path.with_name(f".{path.name}.{secrets.token_hex(4)}.partial")
    try:
        yield partial
    finally:
        with suppress(OSError):
            partial.unlink(missing_ok=True)


@contextmanager
def complete(folder: Path) -> Iterator[Path]:
    """A folder to write into, which becomes `folder` at the end of the block, or nothing if the block fails.

    Raises AdapterError, before and after the block, where `folder` is a file or holds anything, and where it cannot be
    written: a full disk leaves nothing behind.
    """
    # Beside it: a rename stays within one file system.
    partial = folder.with_name(f".partial-{folder.name}-{secrets.token_hex(4)}")
    try:
        _refuse_used(folder)
        partial.mkdir(parents=True)
    except OSError as error:
        raise AdapterError(f"{folder}: cannot be made: {error.strerror or error}; give another folder") from error
    try:
        try:
            yield partial
            flush_tree(partial)
            _refuse_used(folder)
            partial.replace(folder)
            flush_folder(folder.parent)
        except OSError as error:
            raise AdapterError(_not_written(error, partial, folder)) from error
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise


def _not_written(error: OSError, partial: Path, folder: Path) -> str:
    where, remedy = Path(str(error.filename or partial)), "check it and try again"
    if where.is_relative_to(partial):
        where, remedy = folder / where.relative_to(partial), "free space there, or give another folder"
    reason = error.strerror or str(error)
    return f"{where}: {reason[:1].lower()}{reason[1:]}; {folder} was not written, nothing of it is left; {remedy}"


def _refuse_used(folder: Path) -> None:
    if folder.exists() and not (folder.is_dir() and not any(folder.iterdir())):
        found = "is not empty" if folder.is_dir() else "is a file"
        raise AdapterError(f"{folder}: {found}; give a new folder, or remove what is there")


@contextmanager
def naming(path: Path, partial: Path | None = None) -> Iterator[None]:
    """Gives the errors of a write the path of the file that was to be written: a full disk names none."""
    try:
        yield
    except OSError as error:
        if error.errno is None or error.filename not in (None, *([str(partial)] if partial else [])):
            raise
        raise OSError(error.errno, error.strerror, str(path)) from error


def flush_tree(folder: Path) -> None:
    """Puts all files of a folder, and itself, on disk."""
    for place, _, names in os.walk(folder):
        for name in names:
            flush(Path(place) / name)
        flush_folder(Path(place))


def flush_folder(folder: Path) -> None:
    """Puts a rename where a power cut leaves it."""
    with suppress(PermissionError):  # a folder that may be written into and not be read
        flush(folder)


def flush(path: Path) -> None:
    """Puts a file or a folder on disk, as far as its file system can."""
    descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
    try:
        with naming(path):
            _flush(descriptor)
    finally:
        os.close(descriptor)


def _flush(descriptor: int) -> None:
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in _CANNOT_FLUSH:
            raise
