"""How one rank of several ends when something goes wrong: promptly, and so that the cause is what is read first.

A rank that fails by itself speaks at once. A mistake that all ranks make is reported by rank 0, which the others give
the time to do so. A rank that fails only because another one has ended says no more than that. All exit without the
interpreter's clean-up, in which the threads of communication libraries may wait for ranks that are gone. Those that are
done do so as well: a thread of gloo's that lets go of its last tensor in the midst of a clean-up aborts the process.
"""

import hashlib
import os
import re
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, NoReturn

from lori_dist.errors import JobError, redacted
from lori_dist.training.rendezvous import rendezvous

if TYPE_CHECKING:  # they need torch, and a mistake is to be answered before that is loaded
    from lori_dist.cluster.peers import Ended, Peers
    from lori_dist.training.world import World

HOLD_S = 2.0
"""For which one rank lets another go first. A launcher looks every second whether one has ended, and then ends all."""
PASS_ON_S = 0.5
"""For which a rank that has reported to the others why it ends stays, so that rank 0 can pass it on."""
CONNECTION = re.compile(r"gloo|nccl|connection (closed|reset|refused)|broken pipe|timed out", re.IGNORECASE)
"""What errors of collectives speak of, when the other side is gone."""

Explain = Callable[[BaseException], tuple[str, int] | None]


@contextmanager
def member(explain: Explain) -> Iterator[Callable[["World"], None]]:
    """Surrounds all that a rank does. Gives what every rank calls when the process group is there.

    explain: the message and the exit code for an error raised on purpose, None for any other. Where a launcher has
    started several ranks, nothing leaves this: the process ends here, well or not. A single process sees nothing of it.
    """
    try:
        place = rendezvous(os.environ)
    except JobError:  # which is raised again when the group is made
        place = None
    if place is None or place["WORLD_SIZE"] == "1":
        yield lambda world: None
        return
    own = Member(int(place["RANK"]), int(place["WORLD_SIZE"]), int(place["LOCAL_RANK"]), explain)
    try:
        yield own.watch
    except BaseException as error:
        own.end(error)
    own.done()


class Member:
    """This rank among the others."""

    def __init__(self, rank: int, size: int, local_rank: int, explain: Explain) -> None:
        self.rank, self.size, self.local_rank, self.explain = rank, size, local_rank, explain
        self.peers: Peers | None = None
        self.is_ending = False
        self.is_stopped = False
        """Whether the launcher ends this rank, as it does when another one has ended."""
        self._leaving = threading.Lock()

    def watch(self, world: "World") -> None:
        """From here on this rank ends if another one does, whatever it is doing."""
        from lori_dist.cluster.peers import watch

        self.peers = watch(world, self._leave)

    def done(self) -> NoReturn:
        if self.peers is not None:
            self.peers.close()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(0)

    def end(self, error: BaseException) -> NoReturn:
        """Says why, unless another has said it, and exits."""
        self.is_ending, code = True, 1
        try:
            for number in (signal.SIGTERM, signal.SIGINT):
                signal.signal(number, self._stop)
            code = self._account_for(error)
        finally:  # also if nobody reads what it says
            os._exit(code)

    def _account_for(self, error: BaseException) -> int:
        """Returns the exit code."""
        said = self.explain(error)
        if said is not None:
            message, code = said
            if self._was_said(message):
                self._await_stop(HOLD_S)
            else:
                self._say(message if self.rank == 0 else f"rank {self.rank}: {message}", message)
            return code
        if self._first() is None and is_of_connection(error):
            self._await_first(HOLD_S + self._turn())
        first = self._first()
        if first is not None:
            self._follow(first, "" if is_of_connection(error) else f" Here: {_first_line(error)}")
        elif self.peers is None and is_of_connection(error):
            _print(
                f"rank {self.rank}: lost the connection to another rank ({_first_line(error)}). Its message is "
                "printed above; if there is none, it was killed (out of memory, kill -9) or its machine is lost."
            )
        else:
            message = "".join(traceback.format_exception(error)).rstrip()
            self._say(f"rank {self.rank} of {self.size} failed:\n{message}", message)
        return 1

    def _was_said(self, message: str) -> bool:
        """Whether an earlier rank has said the same. Not every rank that could need be there, so the wait is short."""
        self._await_first(self._turn())
        first = self._first()
        if first is not None:
            return first.said == _digest(message)
        return self.is_stopped  # by the launcher, for a rank that had nobody to wait for

    def _turn(self) -> float:
        """Seconds until it is this rank's turn to speak: the first of all, the first of each machine, the others."""
        return 0.0 if self.rank == 0 else HOLD_S if self.local_rank == 0 else 2 * HOLD_S

    def _say(self, text: str, message: str) -> None:
        _print(text)
        if self.peers is not None:
            self.peers.tell(_digest(message))
            time.sleep(PASS_ON_S)

    def _leave(self, first: "Ended") -> None:
        """Ends this rank, in a thread, as its main thread may be deep in a library that never comes back."""
        if first.said is not None:
            time.sleep(PASS_ON_S)  # for an error of its own that this rank is about to meet as well
        if not self.is_ending:
            try:
                self._follow(first)
            finally:
                os._exit(1)

    def _follow(self, first: "Ended", here: str = "") -> None:
        """Says for which rank this one ends, and stays until the launcher has seen that end, which it then reports."""
        if not self._leaving.acquire(blocking=False):  # the other thread is at it, and exits
            time.sleep(2 * HOLD_S)
        elif first.said is None:  # at once, as the launcher may leave no time, and not name the rank
            _print(
                f"rank {self.rank}: ends because rank {first.rank} ended without a message: it was killed (out of "
                "memory, "
                f"kill -9) or its machine is lost.{here}"
            )
            self._await_stop(HOLD_S)
        else:
            self._await_stop(HOLD_S)
            _print(f"rank {self.rank}: ends because rank {first.rank} failed; its message is printed above.{here}")

    def _first(self) -> "Ended | None":
        return self.peers.first if self.peers is not None else None

    def _await_first(self, seconds: float) -> None:
        """Until a rank has ended, or the launcher ends this one."""
        end = time.monotonic() + seconds
        while time.monotonic() < end and not self.is_stopped and self._first() is None:
            time.sleep(0.05)

    def _await_stop(self, seconds: float) -> None:
        """Until the launcher ends this rank."""
        end = time.monotonic() + seconds
        while time.monotonic() < end and not self.is_stopped:
            time.sleep(0.05)

    def _stop(self, number: int, frame: object) -> None:
        self.is_stopped = True


def is_of_connection(error: BaseException) -> bool:
    """Whether an error, or one it came of, may be that of a collective whose other side is gone."""
    before = error.__cause__ or error.__context__
    return _names_connection(error) or (before is not None and is_of_connection(before))


def _names_connection(error: BaseException) -> bool:
    if any(kind.__name__ == "DistError" for kind in type(error).__mro__):
        return True
    return isinstance(error, RuntimeError) and CONNECTION.search(str(error)) is not None


def _first_line(error: BaseException) -> str:
    return f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0]}"


def _digest(message: str) -> str:
    return hashlib.blake2b(message.encode(), digest_size=8).hexdigest()


def _print(text: str) -> None:
    """In one piece, as all ranks write to the same place, and after what has been printed before."""
    sys.stdout.flush()
    print(f"{redacted(text)}\n", end="", file=sys.stderr, flush=True)
