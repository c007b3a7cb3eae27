"""A folder that appears complete or not at all."""

import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from lori_dist.errors import AdapterError


@contextmanager
def complete(folder: Path) -> Iterator[Path]:
    """A folder to write into, which becomes `folder` at the end of the block, or nothing if the block fails.

    Raises AdapterError, before and after the block, where `folder` is a file or holds anything.
    """
    # Beside it: a rename stays within one file system.
    partial = folder.with_name(f".partial-{folder.name}-{secrets.token_hex(4)}")
    try:
        _refuse_used(folder)
        partial.mkdir(parents=True)
    except OSError as error:
        raise AdapterError(f"{folder}: cannot be made: {error.strerror or error}; give another folder") from error
    try:
        yield partial
        _refuse_used(folder)
        partial.replace(folder)
    except BaseException:
        shutil.rmtree(partial)
        raise


def _refuse_used(folder: Path) -> None:
    if folder.exists() and not (folder.is_dir() and not any(folder.iterdir())):
        found = "is not empty" if folder.is_dir() else "is a file"
        raise AdapterError(f"{folder}: {found}; give a new folder, or remove what is there")
