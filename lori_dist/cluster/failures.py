"""Why a rank died, whether its job is tried again, and what the other ranks do.

Under Ray, each rank returns what it raised as a record. The driver picks the failure that caused the others, ends the
gang after a short wait for their errors, and starts the job again unless the next attempt would fail in the same way.

Under a launcher (torchrun, deepspeed, srun) there is no driver: each rank ends by itself, promptly and so that the
cause is what is read first. A rank that fails by itself prints its error at once. A mistake that all ranks make is
printed by rank 0, and the others give it the time to do so. A rank that fails only because another one has ended prints
no more than that. All exit without the interpreter's clean-up, in which the threads of communication libraries may wait
for ranks that are gone. Ranks that are done do so as well: a thread of gloo's that lets go of its last tensor during a
clean-up aborts the process.

How ranks learn that another one has ended is in peers.py, how processes are started and ended in gang.py, the loop over
a job's attempts in attempts.py.
"""

import hashlib
import os
import re
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NoReturn

from lori_dist.cluster.summary import log_file
from lori_dist.config import Run
from lori_dist.errors import JobError, redacted
from lori_dist.jobs import Job
from lori_dist.training.rendezvous import rendezvous

if TYPE_CHECKING:  # they need torch, and a mistake is to be answered before that is loaded
    from lori_dist.cluster.peers import Ended, Peers
    from lori_dist.training.world import World

DIED = "the process died: it was killed, or its machine ran out of memory or was lost"
"""The message for a process that ended without an error of its own."""
CUT_OFF = "cut off with its driver"
STOPPED = "stopped with its run"
"""The `error` of an attempt whose driver was killed, and of one that ended because its run did."""

FINAL = (
    "LoriError",
    "ArithmeticError",
    "AssertionError",
    "AttributeError",
    "ImportError",
    "LookupError",
    "NameError",
    "NotImplementedError",
    "SyntaxError",
    "TypeError",
    "ValueError",
)
"""Errors that the next attempt would meet again: mistakes of the user or of a program."""
CONNECTION = re.compile(r"gloo|nccl|connection (closed|reset|refused)|broken pipe|timed out", re.IGNORECASE)
"""Matches the messages of collectives whose other side is gone."""

BACKOFF_SECONDS = 1.0
"""Seconds before a job is started again."""
MAX_STARTS = 3
"""Number of times that the processes of one attempt may die while they start."""

GRACE_SECONDS = 2.0
"""Seconds that the other ranks of a gang have to report their errors, once one rank has failed."""
HOLD_S = 2.0
"""Seconds for which one rank lets another print first. A launcher looks every second whether one has ended, and then
ends all."""
PASS_ON_S = 0.5
"""Seconds for which a rank that has notified the others stays, so that rank 0 can pass the notice on."""

Explain = Callable[[BaseException], tuple[str, int] | None]


# --- why a rank died --------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True, slots=True)
class Failure:
    """The error with which one process of a job ended."""

    rank: int | None
    """None if it is not known which rank it was."""
    time: float
    """Seconds since the epoch, by the clock of the process."""
    types: tuple[str, ...]
    """Names of the error's class and of its bases; empty if the process died without an error."""
    message: str


class Broken(Exception):
    """A job's processes have ended without its result."""

    def __init__(self, failure: Failure) -> None:
        super().__init__(failure.message)
        self.failure = failure


@dataclass(frozen=True, kw_only=True, slots=True)
class Outcome:
    """The end of a process of a job: what its function returned, or how it failed."""

    result: Any = None
    failure: dict[str, Any] | None = None
    """A record as `record_of` writes it; None if the function returned."""


def outcome_of(rank: int, function: Callable[..., Any], *arguments: Any) -> Outcome:
    """Calls a function. Returns what it raises as data, since Ray would wrap the error and need its class elsewhere."""
    try:
        return Outcome(result=function(*arguments))
    except BaseException as error:
        return Outcome(failure=record_of(error, rank, time.time()))


def record_of(error: BaseException, rank: int | None, time: float) -> dict[str, Any]:
    """A failure as plain JSON, with the whole message of a LoriError and the first line of any other.

    time: seconds since the epoch.
    """
    names = [kind.__name__ for kind in type(error).__mro__]
    text = str(error).strip()
    if "LoriError" not in names or not text:
        text = f"{names[0]}: {text.partition(chr(10))[0]}" if text else names[0]
    return {"rank": rank, "time": time, "types": names, "message": text}


def from_record(record: Mapping[str, Any]) -> Failure:
    """The failure that `record_of` recorded."""
    return Failure(rank=record["rank"], time=record["time"], types=tuple(record["types"]), message=record["message"])


def failure_of(error: Exception) -> Failure:
    """The failure that ended a job, from the error that its driver caught."""
    if isinstance(error, Broken):
        return error.failure
    return from_record(record_of(error, None, time.time()))


def cause(reported: Iterable[Failure], lost: Iterable[Failure]) -> Failure | None:
    """The failure that ended a job; the others are its consequences. None if there is none.

    reported: failures that processes reported. lost: processes that died without an error. If one died, its peers
    report broken connections, unless one of them had found a mistake before.
    """
    by_time = sorted(reported, key=lambda failure: failure.time)
    final = [failure for failure in by_time if is_final(failure)]
    return next(iter([*final, *lost, *by_time]), None)


def cause_of(outcomes: Mapping[int, Outcome | None]) -> Failure | None:
    """The failure that ended a gang. outcomes: rank -> its end, None for a process that died. None if all returned."""
    reported, lost = [], []
    for rank, outcome in sorted(outcomes.items()):
        if outcome is None:
            lost.append(Failure(rank=rank, time=0.0, types=(), message=DIED))
        elif outcome.failure is not None:
            reported.append(from_record(outcome.failure))
    return cause(reported, lost)


def not_started(error: Exception) -> str:
    """The message for a process that did not start. If the program could not be loaded, the last line says why."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"a process of the gang did not start: {lines[-1] if lines else type(error).__name__}"


def is_of_connection(error: BaseException) -> bool:
    """Whether an error, or one that it was raised from, may come from a collective whose other side is gone."""
    before = error.__cause__ or error.__context__
    return _names_connection(error) or (before is not None and is_of_connection(before))


def _names_connection(error: BaseException) -> bool:
    if any(kind.__name__ == "DistError" for kind in type(error).__mro__):
        return True
    return isinstance(error, RuntimeError) and CONNECTION.search(str(error)) is not None


def described(run: Run, job: Job, failure: Failure) -> str:
    """The message for people: what failed, on which rank, and the log to read."""
    where = f" (rank {failure.rank})" if job.is_gang and failure.rank is not None else ""
    return f"{failure.message}{where}; see {log_file(run.folder, job, failure.rank or 0)}"


# --- whether to retry -------------------------------------------------------------------------------------------------


def is_final(failure: Failure) -> bool:
    """Whether another attempt would end in the same way."""
    return not set(FINAL).isdisjoint(failure.types)


def retry(failure: Failure, number: int, retries: int) -> bool:
    """Whether attempt `number`, counted from 1, is followed by another after this failure."""
    return number <= retries and not is_final(failure)


def is_stop(failure: Failure) -> bool:
    """Whether a job that failed while its run ended failed for that reason: it saved, or lost its processes."""
    return "Stopped" in failure.types or not is_final(failure)


# --- what the others do -----------------------------------------------------------------------------------------------


@contextmanager
def member(explain: Explain) -> Iterator[Callable[["World"], None]]:
    """Surrounds all that a rank does. Yields the function that every rank calls once the process group exists.

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
    """One rank of several that a launcher has started, and how it ends."""

    def __init__(self, rank: int, size: int, local_rank: int, explain: Explain) -> None:
        self.rank, self.size, self.local_rank, self.explain = rank, size, local_rank, explain
        self.peers: Peers | None = None
        self.is_ending = False
        self.is_stopped = False
        """Whether the launcher ends this rank, as it does when another one has ended."""
        self._leaving = threading.Lock()

    def watch(self, world: "World") -> None:
        """Makes this rank end from now on if another one ends, whatever it is doing."""
        from lori_dist.cluster.peers import watch

        self.peers = watch(world, self._leave)

    def done(self) -> NoReturn:
        """Exits with code 0, after the others know that this rank is done."""
        if self.peers is not None:
            self.peers.close()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(0)

    def end(self, error: BaseException) -> NoReturn:
        """Prints why this rank ends, unless another rank has printed it, and exits."""
        self.is_ending, code = True, 1
        try:
            for number in (signal.SIGTERM, signal.SIGINT):
                signal.signal(number, self._stop)
            code = self._account_for(error)
        finally:  # also if nobody reads what it says
            os._exit(code)

    def _account_for(self, error: BaseException) -> int:
        """Prints what is to be printed. Returns the exit code."""
        explained = self.explain(error)
        if explained is not None:
            message, code = explained
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
        """Whether an earlier rank has printed the same message. Some ranks may be gone, so the wait is short."""
        self._await_first(self._turn())
        first = self._first()
        if first is not None:
            return first.notice == _digest(message)
        return self.is_stopped  # by the launcher, for a rank that had nobody to wait for

    def _turn(self) -> float:
        """Seconds until it is this rank's turn to print: rank 0, then each machine's first rank, then the others."""
        return 0.0 if self.rank == 0 else HOLD_S if self.local_rank == 0 else 2 * HOLD_S

    def _say(self, text: str, message: str) -> None:
        _print(text)
        if self.peers is not None:
            self.peers.notify(_digest(message))
            time.sleep(PASS_ON_S)

    def _leave(self, first: "Ended") -> None:
        """Ends this rank, in a thread, as its main thread may be deep in a library that never comes back."""
        if first.notice is not None:
            time.sleep(PASS_ON_S)  # for an error of its own that this rank is about to meet as well
        if not self.is_ending:
            try:
                self._follow(first)
            finally:
                os._exit(1)

    def _follow(self, first: "Ended", here: str = "") -> None:
        """Prints for which rank this one ends, and waits until the launcher has seen that end and reports it."""
        if not self._leaving.acquire(blocking=False):  # the other thread is at it, and exits
            time.sleep(2 * HOLD_S)
        elif first.notice is None:  # at once, as the launcher may leave no time, and not name the rank
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
        """Waits until a rank has ended or the launcher ends this one, at most so many seconds."""
        end = time.monotonic() + seconds
        while time.monotonic() < end and not self.is_stopped and self._first() is None:
            time.sleep(0.05)

    def _await_stop(self, seconds: float) -> None:
        """Waits until the launcher ends this rank, at most so many seconds."""
        end = time.monotonic() + seconds
        while time.monotonic() < end and not self.is_stopped:
            time.sleep(0.05)

    def _stop(self, number: int, frame: object) -> None:
        self.is_stopped = True


def _first_line(error: BaseException) -> str:
    return f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0]}"


def _digest(message: str) -> str:
    return hashlib.blake2b(message.encode(), digest_size=8).hexdigest()


def _print(text: str) -> None:
    """Prints a text to stderr in one piece, as all ranks write there, and after what stdout still holds."""
    sys.stdout.flush()
    print(f"{redacted(text)}\n", end="", file=sys.stderr, flush=True)
