"""Stop requests to a training: where they come from, and how all ranks follow them after the same step.

Needs no torch: a run's driver has the same limit."""

import contextlib
import enum
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from lori_dist.errors import Preempted

if TYPE_CHECKING:
    from lori_dist.training.world import World


class Notice(enum.IntEnum):
    """A rank's stop request, if there is one. Of several, the largest counts."""

    NONE = 0
    NODE = 1
    """Saves and continues: its node will be removed, and then training restarts elsewhere."""
    TIME_LIMIT = 2
    SIGNAL = 3
    RUN = 4


StopRequest = Callable[[], Notice]
"""Gives the request to stop that has come, if any. It is called after each step."""

WHY = {
    Notice.TIME_LIMIT: "train.time_limit has passed",
    Notice.SIGNAL: "SIGTERM was received",
    Notice.RUN: "its run ends",
}


def nothing() -> Notice:
    return Notice.NONE


def of_any(own: Notice, world: "World") -> Notice:
    """The stop request of any rank, the same on all of them. A collective."""
    import torch
    import torch.distributed as dist

    if world.size == 1:
        return own
    largest = torch.tensor(own.value, device=world.device)
    dist.all_reduce(largest, dist.ReduceOp.MAX)
    return Notice(int(largest))


def preempted(notice: Notice, saved: Mapping[str, tuple[int, int, str]]) -> Preempted:
    """saved: task -> steps done, of how many, and their phase."""
    where = ", ".join(f"{task} after step {step} of {of} of phase {phase}" for task, (step, of, phase) in saved.items())
    return Preempted(f"{where}: saved and ended, as {WHY[notice]}; the same command resumes from there")


@contextlib.contextmanager
def of_process(limit: float | None) -> Iterator[StopRequest]:
    """The stop requests to this process: SIGTERM, which batch systems and launchers send ahead of the end, or a limit.

    limit: seconds from the start of the process; None: none. SIGTERM does nothing else meanwhile.
    """
    came = threading.Event()

    def stop_request() -> Notice:
        if came.is_set():
            return Notice.SIGNAL
        return Notice.TIME_LIMIT if limit is not None and age() > limit else Notice.NONE

    if threading.current_thread() is not threading.main_thread():  # where no handler can be set
        yield stop_request
        return
    before = signal.signal(signal.SIGTERM, lambda number, frame: came.set())
    try:
        yield stop_request
    finally:
        signal.signal(signal.SIGTERM, signal.SIG_DFL if before is None else before)  # None: one set by C code


class Terminated(KeyboardInterrupt):
    """SIGTERM was received."""


@contextlib.contextmanager
def raised_by_sigterm(where: str) -> Iterator[Callable[[], None]]:
    """Raises Preempted when SIGTERM comes, as Ctrl-C raises KeyboardInterrupt: batch systems end jobs so, and Ray's own
    handler aborts with a dump of its stack. Gives what sets the handler again, where a library has set its own.

    where: begins the message.
    """
    if threading.current_thread() is not threading.main_thread():  # where no handler can be set
        yield lambda: None
        return

    def end(number: int, frame: object) -> None:
        raise Terminated

    def install() -> None:
        signal.signal(signal.SIGTERM, end)

    before = signal.getsignal(signal.SIGTERM)
    install()
    try:
        yield install
    except Terminated:
        raise Preempted(f"{where}ended by SIGTERM; the same command continues from here") from None
    finally:
        signal.signal(signal.SIGTERM, signal.SIG_DFL if before is None else before)  # None: one set by C code


def age() -> float:
    """Seconds since this process began."""
    ticks = int(Path("/proc/self/stat").read_text().rpartition(")")[2].split()[19])
    return time.clock_gettime(time.CLOCK_BOOTTIME) - ticks / os.sysconf("SC_CLK_TCK")
