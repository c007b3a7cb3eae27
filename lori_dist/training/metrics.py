"""metrics.jsonl: what a job measures while it works, a JSON object a line."""

import contextlib
import json
import os
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

from lori_dist.config import Run
from lori_dist.training.trackers import forget, tracked

METRICS = "metrics.jsonl"

Record = dict[str, Any]
"""A line. `time`: when it was written, in seconds since 1970.

Of a step of a training: phase, step (steps done), num_steps, steps_left (of all phases), loss, lr, grad_norm, tokens
(of all ranks, no padding), seconds (of the step), tokens_per_second, mfu (model FLOP
utilisation, without what activation checkpointing computes again, of `flops.utilisation`, or null), memory
(bytes, of rank 0: the peak of its device in this phase, or, without one, the resident set) and data_wait (seconds that
rank 0 made batches).
Of an evaluation: metric, task, value, seconds. Of a merge: kept, total, density, bytes, rank, seconds.
"""


@contextlib.contextmanager
def recorded(run: Run, job: str, folder: Path) -> Iterator[Callable[[Record], None]]:
    """Gives what writes the records of a job that is done as a whole: to a new metrics.jsonl and to the run's trackers.

    job: its name.
    """
    rewrite(folder, [])
    forget(run, job)
    with tracked(run, job) as track:

        def write(record: Record) -> None:
            line = {**record, "time": time.time()}
            append(folder, line)
            track(line)

        yield write


def append(folder: Path, record: Record) -> None:
    with (folder / METRICS).open("a", encoding="utf-8") as stream:
        stream.write(json.dumps(record) + "\n")


def read(folder: Path, name: str = METRICS) -> list[Record]:
    """All lines of a file but one that a kill has cut short; none where there is no file."""
    path = folder / name
    lines = path.read_text(encoding="utf-8").splitlines(keepends=True) if path.exists() else []
    return [json.loads(line) for line in lines if line.endswith("\n")]


def rewrite(folder: Path, records: Iterable[Record], name: str = METRICS) -> None:
    """Puts records in place of those that are there, at once."""
    partial = folder / f".{name}.partial"
    partial.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
    os.replace(partial, folder / name)
