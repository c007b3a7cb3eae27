"""Files that somebody else names or wrote: only regular ones are opened, read up to a limit, and strictly."""

import errno
import io
import json
import math
import os
import stat
from typing import Any, BinaryIO

MAX_TEXT_BYTES = 64 * 2**20
"""Largest number of bytes that are read of a file that is held in memory whole: parsed, JSON takes many times its
size."""

_KINDS = (
    (stat.S_ISDIR, "a directory"),
    (stat.S_ISFIFO, "a named pipe"),
    (stat.S_ISSOCK, "a socket"),
    (stat.S_ISCHR, "a device"),
    (stat.S_ISBLK, "a device"),
)


def open_regular(path: str | os.PathLike[str]) -> BinaryIO:
    """A regular file, opened to read its bytes; links are followed.

    Whatever else has a path is refused without waiting and without a byte read: a pipe nobody writes to and a device
    such as /dev/zero would be read for ever. Raises OSError, whose `strerror` says what is wrong, for these, for a path
    that no file can have, and where `open` does.
    """
    require_regular(path)  # before it is opened, as to open a device may do something
    descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    try:
        _check(os.fstat(descriptor).st_mode, path)  # again: the path may have become another file's
        os.set_blocking(descriptor, True)
        return io.BufferedReader(io.FileIO(descriptor, "rb"))
    except BaseException:
        os.close(descriptor)
        raise


def require_regular(path: str | os.PathLike[str]) -> None:
    """Raises OSError as `open_regular`: for libraries that open a path by themselves."""
    try:
        mode = os.stat(path).st_mode
    except ValueError as error:  # a NUL or half of a surrogate pair
        raise OSError(errno.EINVAL, f"is not a path of a file ({error})", ascii(os.fspath(path))) from error
    _check(mode, path)


def read_regular(path: str | os.PathLike[str], limit: int = MAX_TEXT_BYTES) -> bytes:
    """All bytes of a regular file of at most `limit`. Raises OSError as `open_regular`, and for a larger file."""
    with open_regular(path) as file:
        data = file.read(limit + 1)
    if len(data) > limit:
        raise OSError(errno.EFBIG, f"has more than the {limit} bytes that are read", os.fspath(path))
    return data


def folder_problem(model_path: str) -> str | None:
    """Why a path is not a model's folder: it has no config.json. None for a folder that has one, and for names on the
    hub."""
    is_hub_name = model_path.count("/") == 1 and not model_path.startswith((".", "/", "~"))
    is_local = not is_hub_name or os.path.isdir(os.path.dirname(model_path))
    if is_local and not os.path.isfile(os.path.join(model_path, "config.json")):
        return f"there is no config.json in {model_path!r}; give a model's folder or its name on the hub"
    return None


def _check(mode: int, path: str | os.PathLike[str]) -> None:
    if not stat.S_ISREG(mode):
        kind = next((name for test, name in _KINDS if test(mode)), "a special file")
        number = errno.EISDIR if stat.S_ISDIR(mode) else errno.EINVAL
        raise OSError(number, f"is {kind}, not a regular file", os.fspath(path))


def parse_json(text: str | bytes) -> Any:
    """JSON that other programs read alike: no key twice, no NaN, no infinite number, no half of a surrogate pair.

    Raises ValueError for other text, with the reason.
    """
    try:
        parsed = json.loads(text, object_pairs_hook=_unique, parse_float=_finite, parse_constant=_finite)
        json.dumps(parsed, ensure_ascii=False).encode()  # escapes can make text that cannot be shown or written again
        return parsed
    except RecursionError as error:
        raise ValueError("it is nested too deeply") from error


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(pairs)
    if len(result) < len(pairs):
        raise ValueError("an object has the same key twice")
    return result


def _finite(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise ValueError(f"{text[:20]} is not a finite number")
    return value
