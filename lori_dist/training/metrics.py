"""metrics.jsonl: what a job measures while it works, a JSON object a line."""

import contextlib
import json
import logging
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

from lori_dist.atomic import append_json, write_text
from lori_dist.config import Run
from lori_dist.folder import read_lines
from lori_dist.training.trackers import forget, tracked

METRICS = "metrics.jsonl"

log = logging.getLogger(__name__)

Record = dict[str, Any]
"""A line. `time`: when it was written, in seconds since 1970.

Of a step of a training: phase, step (steps done), num_steps, steps_left (of all phases), loss, lr, grad_norm, tokens
(of all ranks, no padding), seconds (of the step), tokens_per_second, mfu (model FLOP
utilisation, without what activation checkpointing computes again, of `flops.utilisation`, or null; tasks that share a
base all have that of their step together), memory
(bytes, of rank 0: the peak of its device in this phase, or, without one, the resident set) and data_wait (seconds that
rank 0 made batches).
Of an evaluation: metric, task, value, seconds. Of a merge: kept, total, density, bytes, rank, seconds.
"""


@contextlib.contextmanager
def recorded(run: Run, job: str, folder: Path, *, before: Iterable[Record] = ()) -> Iterator[Callable[[Record], None]]:
    """Gives what writes the records of a job that has no steps: to a new metrics.jsonl and to the run's trackers.

    job: its name. before: records of what an earlier attempt has done, which come first.
    """
    rewrite(folder, [])
    forget(run, job)
    with tracked(run, job) as track:

        def write(record: Record) -> None:
            line = {**record, "time": time.time()}
            append(folder, line)
            track(line)

        for record in before:
            write(record)

        yield write


def append(folder: Path, record: Record) -> None:
    append_json(folder / METRICS, record)


def read(folder: Path, name: str = METRICS) -> list[Record]:
    """The records of a file, but for lines that are not whole, which a log line counts; none where there is no file."""
    records, num_bad = read_lines(folder / name)
    if num_bad:
        log.warning(
            "%s: %d %s not whole, as after a kill or a power cut; dropped",
            folder / name,
            num_bad,
            "line is" if num_bad == 1 else "lines are",
        )
    return records


def steps(folder: Path, name: str = METRICS) -> list[Record]:
    """The records of training steps."""
    return [line for line in read(folder, name) if is_step(line)]


def is_step(record: Record) -> bool:
    return isinstance(record.get("phase"), str) and type(record.get("step")) is int


def rewrite(folder: Path, records: Iterable[Record], name: str = METRICS) -> None:
    """Puts records in place of those that are there, at once."""
    write_text(folder / name, "".join(json.dumps(record) + "\n" for record in records))
