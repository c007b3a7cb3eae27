"""A start of DeepSpeed, for scripts of one's own, that no build of an extension delays or blocks.

DeepSpeed compiles some of its parts at their first use, into torch's folder for extensions (TORCH_EXTENSIONS_DIR, or
~/.cache/torch_extensions). A build that is killed leaves a file `lock` there, for which every later start waits, for
ever and without a word.
"""

import contextlib
import logging
import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

log = logging.getLogger(__name__)

LOCK = "lock"
"""The name that torch gives the file of a build. Its process has it open until it is done."""

NETWORKS = ("9p", "afs", "beegfs", "ceph", "cifs", "fuse", "glusterfs", "gpfs", "lustre", "nfs", "smb", "virtiofs")
"""The beginnings of the names of file systems on which another machine may be building."""

QUIET_SECONDS = 3600.0
"""Without a change in a folder of such a file system, nobody is building there any more."""


def init_distributed(backend: str | None = None, **options: Any) -> None:
    """`deepspeed.init_distributed` that waits for no build.

    On CPUs nothing is compiled, as gloo needs nothing of it. Locks that killed builds have left are removed first, so
    that what DeepSpeed compiles later, such as its own optimizers, does not wait for them. Call it before
    `TrainingArguments`, which calls DeepSpeed's.

    backend: "nccl" or "gloo"; None: the accelerator's. options: those of `deepspeed.init_distributed`.
    """
    release_locks()
    from lori_dist.engines import deepspeed as engine

    engine.init_distributed(backend, **options)


def release_locks() -> list[Path]:
    """Removes the locks that builds have left in torch's folder for extensions when they were killed. Returns them.

    A lock that a process on this machine has open is left alone. So is one on a network file system, where another
    machine may be building, until nothing has changed beside it for an hour: a warning names it.
    """
    removed = []
    held = None
    for lock in _locks():
        held = _open_files() if held is None else held
        with contextlib.suppress(OSError):  # it is another user's, or has just gone
            found = lock.stat()
            if (found.st_dev, found.st_ino) in held or found.st_uid != os.getuid():
                continue
            if _is_on_a_network(lock) and time.time() - _last_change(lock.parent) < QUIET_SECONDS:
                log.warning(
                    "%s: no process on this machine is building there, and another machine may be; if none is, delete "
                    "the file, or DeepSpeed waits for it for ever",
                    lock,
                )
                continue
            lock.unlink()
            removed.append(lock)
            log.warning("%s: removed; the build that had made it was killed", lock)
    return removed


def _locks() -> Iterator[Path]:
    root = os.environ.get("TORCH_EXTENSIONS_DIR")
    if not root:
        from torch.utils import cpp_extension  # it looks for compilers

        root = cpp_extension.get_default_build_root()
    for pattern in (f"*/{LOCK}", f"*/*/{LOCK}"):  # without the variable, torch has a folder for each of its versions
        yield from Path(root).glob(pattern)


def _open_files() -> set[tuple[int, int]]:
    """Device and inode of all files named as a lock that processes of this user have open."""
    found = set()
    for link in Path("/proc").glob("[0-9]*/fd/*"):
        with contextlib.suppress(OSError):  # another user's, or it has just ended
            if os.readlink(link).rpartition("/")[2] == LOCK:
                status = link.stat()
                found.add((status.st_dev, status.st_ino))
    return found


def _last_change(folder: Path) -> float:
    return max(path.stat().st_mtime for path in (folder, *folder.iterdir()))


def _is_on_a_network(path: Path) -> bool:
    mounts = [line.split() for line in Path("/proc/mounts").read_text().splitlines()]
    over = [(mount[1], mount[2]) for mount in mounts if path.resolve().is_relative_to(mount[1])]
    _, kind = max(over, key=lambda mount: len(mount[0]))
    return kind.startswith(NETWORKS)
