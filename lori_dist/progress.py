"""The progress of long work: a bar on the last line of a terminal, and lines of a log if stderr is a file or a pipe."""

import logging
import statistics
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from tqdm import tqdm
from tqdm.contrib.logging import logging_redirect_tqdm

from lori_dist.cluster.board import Progress
from lori_dist.cluster.eta import Left

SECONDS_BETWEEN_LINES = 30.0
"""Seconds between two lines in a log."""
STEPS_OF_A_PACE = 32
"""The last steps, whose median time says how long the others will take."""

log = logging.getLogger(__name__)


def duration(seconds: float) -> str:
    """Hours, minutes and seconds: `1:05:09`."""
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02}:{rest:02}"


def until(left: Left) -> str:
    """Time until the end of a run: `about 1:05:09`, or `at least 1:05:09`."""
    return f"{'at least' if left.is_least else 'about'} {duration(left.seconds)}"


@contextmanager
def of_run() -> Iterator[Callable[[Progress], None]]:
    """Gives what `cluster.run.execute` reports to. Shows how many jobs are done, and of each training that runs its
    phase, step, loss, tokens/s and the time that is left, which is also shown of the whole run.

    On a terminal that is a bar. Else it is lines of the log, every `SECONDS_BETWEEN_LINES`; that a job has started or
    ended is in the log in either case.
    """
    running: dict[str, str] = {}
    last = time.monotonic()
    ends = ""

    def show(event: Progress) -> None:
        nonlocal last, ends
        if event.left is not None:
            ends = f", {until(event.left)} left"
        if event.state == "running":
            running[event.job] = _described(event)
        else:
            running.pop(event.job, None)
        bar.total, bar.n = event.num_jobs, event.num_done
        bar.set_description_str(ends + "".join(f" | {text}" for text in running.values()))
        if bar.disable and running and time.monotonic() - last >= SECONDS_BETWEEN_LINES:
            last = time.monotonic()
            done = f"{event.num_done} of {event.num_jobs} jobs are done{ends}"
            log.info("%s; running: %s", done, "; ".join(running.values()))

    with _bar("{n_fmt}/{total_fmt} jobs [{elapsed}]{desc}") as bar:
        yield show


def _described(event: Progress) -> str:
    words = [event.job]
    if event.num_steps:
        words.append(f"{event.phase} {event.step}/{event.num_steps}")
    if event.loss is not None:
        words.append(f"loss {event.loss:.3f}")
    if event.tokens_per_second is not None:
        words.append(f"{event.tokens_per_second:,.0f} tokens/s")
    if event.eta_seconds is not None:
        words.append(f"{duration(event.eta_seconds)} left")
    return " ".join(words)


@contextmanager
def of_training(task: str) -> Iterator[Callable[[Mapping[str, Any]], None]]:
    """Gives what `training.train` reports each step's record to. Shows phase, step, loss, tokens/s and the time that is
    left of all phases.

    On a terminal that is a bar. Else it is a line of the log after a phase's first and last step, and after the first
    step in every `SECONDS_BETWEEN_LINES`.
    """
    gaps: deque[float] = deque(maxlen=STEPS_OF_A_PACE)
    last: dict[str, Any] = {"phase": "", "step": 0, "time": 0.0, "line": float("-inf")}

    def show(record: Mapping[str, Any]) -> None:
        now, phase, step, num_steps = time.monotonic(), record["phase"], record["step"], record["num_steps"]
        is_first = (phase, step - 1) != (last["phase"], last["step"])  # of its phase, or after a restart
        gaps.append(record["seconds"] if is_first else now - last["time"])
        left = duration(record["steps_left"] * statistics.median(gaps))
        loss = "not finite" if record["loss"] is None else f"{record['loss']:.3f}"
        speed = f"{record['tokens_per_second']:,.0f} tokens/s"
        if is_first:
            bar.reset(total=num_steps)
            bar.initial = bar.n = step - 1
        bar.set_description_str(f"{task}: {phase} loss {loss}", refresh=False)
        bar.set_postfix_str(f"{speed}, {left} left", refresh=False)
        bar.update()
        if bar.disable and (is_first or step == num_steps or now - last["line"] >= SECONDS_BETWEEN_LINES):
            log.info("%s: %s step %d of %d, loss %s, %s, %s left", task, phase, step, num_steps, loss, speed, left)
            last["line"] = now
        last.update(phase=phase, step=step, time=now)

    with _bar("{desc} {n_fmt}/{total_fmt} {bar} {postfix}") as bar:
        yield show


@contextmanager
def of_evaluation() -> Iterator[Callable[[str, int, int], None]]:
    """Gives what `evaluation.evaluate_all` reports to. Shows what is measured, how many measurements are done, and how
    long the others will take.

    On a terminal that is a bar. Else it is a line of the log for a measurement, at most one in `SECONDS_BETWEEN_LINES`.
    """
    start = last = time.monotonic()

    def show(what: str, num_done: int, num_measurements: int) -> None:
        nonlocal last
        bar.total, bar.n = num_measurements, num_done
        bar.set_description_str(what)
        now = time.monotonic()
        if bar.disable and num_done and now - last >= SECONDS_BETWEEN_LINES:
            last = now
            left = duration((now - start) / num_done * (num_measurements - num_done))
            log.info("%s: %d of %d measurements are done, %s left", what, num_done, num_measurements, left)

    with _bar("{desc} {n_fmt}/{total_fmt} {bar} {elapsed}<{remaining}") as bar:
        yield show


@contextmanager
def of_rows() -> Iterator[Callable[[str, int, float | None], None]]:
    """Gives what `training.token_cache` reports to. Shows which rows become tokens, and how many have.

    On a terminal that is a bar. Else it is a line of the log every `SECONDS_BETWEEN_LINES`.
    """
    last = time.monotonic()

    def show(what: str, num_rows: int, share: float | None) -> None:
        nonlocal last
        bar.total, bar.n = 100, round(100 * (share or 0.0))
        bar.set_description_str(f"{what}: {num_rows:,} rows are tokens")
        if bar.disable and time.monotonic() - last >= SECONDS_BETWEEN_LINES:
            last = time.monotonic()
            log.info("%s: %s rows are tokens%s", what, f"{num_rows:,}", "" if share is None else f" ({share:.0%})")

    with _bar("{desc} {bar} {elapsed}") as bar:
        yield show


@contextmanager
def _bar(layout: str) -> Iterator[Any]:
    """Log lines appear above it."""
    with logging_redirect_tqdm(), tqdm(disable=None, leave=False, bar_format=layout) as bar:
        yield bar
