"""summary.json: what a run did, for programs."""

import contextlib
import itertools
import json
import os
import re
import statistics
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from lori_dist.config import Run
from lori_dist.files import open_regular, read_regular
from lori_dist.jobs import CLUSTERS, MOMENTS, Job, same_merges
from lori_dist.scores import transfer

SUMMARY = "summary.json"
"""File in a run's folder."""
ADAPTER, METRICS, CHECKPOINTS = "adapter.safetensors", "metrics.jsonl", "checkpoints"
"""Names in the folders of trainings. They stand here so that the driver of a run needs no torch."""
START = "start.safetensors"
"""File in an unfinished training's folder: what its layers begin with, if that was computed from data."""
CALIBRATED, CALIBRATE, TRAIN = "calibrated.safetensors", "calibrate", "train"
"""The file that a finished calibration leaves, and the names of a training's phases, in their order."""
ATTEMPTS = "attempts.json"
"""File in an unfinished job's folder: the record of each attempt."""


def summarize(
    run: Run, jobs: Iterable[Job], states: Mapping[str, Mapping[str, Any]], results: Mapping[str, Mapping[str, Any]]
) -> dict[str, Any]:
    """The tree of summary.json.

    states: job -> its entry under "jobs", with at least its "state". results: finished job -> its result. Models are in
    the order base, tasks, other adapters, merges. `transfer`, as `scores.transfer` computes it, is there for tasks that
    were trained one after another; `same_merges`, groups of names, for merges that are the same function; `test_rows`,
    the number of rows that the figures of a task are of, unless an earlier version measured them.
    """
    jobs = list(jobs)
    same = same_merges(run, jobs)
    done = [(job, results[job.name]) for job in jobs if job.name in results]

    def files(kind: str, key: str, names: Iterable[str]) -> dict[str, Any]:
        made = {job.settings[key]: (job, result) for job, result in done if job.kind == kind}
        ordered = dict.fromkeys([*names, *made])
        return {name: {**made[name][1], "path": str(path(run, made[name][0]))} for name in ordered if name in made}

    measured = {job.settings["subject"]: result["evaluation"] for job, result in done if job.kind == "evaluate"}
    adapters, merges = files("train", "task", run.tasks), files("merge", "merge", run.merges)
    evaluation = {name: measured[name] for name in ("base", *adapters, *merges) if name in measured}
    # Results of earlier versions have no intervals.
    limits = {job.settings["subject"]: result.get("intervals", {}) for job, result in done if job.kind == "evaluate"}
    chain = [job.settings["task"] for job in jobs if "sequel" in job.settings]
    numbers: dict[str, int] = {}
    for job, result in done:
        numbers |= result.get("test_rows", {}) if job.kind == "evaluate" else {}
    return {
        "run": run.name,
        "jobs": {job.name: dict(states[job.name]) for job in jobs},
        "needs": {job.name: list(job.needs) for job in jobs},
        "adapters": adapters,
        "merges": merges,
        "evaluation": evaluation,
        "intervals": {name: limits[name] for name in evaluation},
        **({"test_rows": numbers} if numbers else {}),
        **({"transfer": transfer(chain, evaluation)} if chain else {}),
        **({"same_merges": same} if same else {}),
    }


def path(run: Run, job: Job) -> Path:
    """The adapter that a finished training or merge left."""
    return run.folder / job.name / ADAPTER


def made(record: Mapping[str, Any]) -> str:
    """Digest of what a finished job has made for others, an adapter, moments or clusters; empty if it made nothing.
    record: the content of its job.json."""
    digests = record["sha256"]
    return str(next((digests[name] for name in (ADAPTER, MOMENTS, CLUSTERS) if name in digests), ""))


LOG_FORMAT = "%(asctime)s %(levelname)s %(name)s: %(message)s"
"""Format of the lines in a run's logs."""


def log_file(root: Path, job: Job, rank: int) -> Path:
    """The file with the log of a rank of a job."""
    return root / "logs" / (f"{job.name}.rank{rank}.log" if job.kind == "train" or rank else f"{job.name}.log")


def attempts_of(partial: Path) -> list[dict[str, Any]]:
    """The records of the attempts at a job, read from its unfinished folder. Empty if there are none, or the file is
    damaged."""
    try:
        tree = json.loads(read_regular(partial / ATTEMPTS).decode())
    except (OSError, ValueError, RecursionError):  # none yet, or damaged
        return []
    attempts = tree.get("attempts") if isinstance(tree, dict) else None
    return [attempt for attempt in attempts if _is_attempt(attempt)] if isinstance(attempts, list) else []


def _is_attempt(attempt: Any) -> bool:
    """Whether this is a record as `cluster.attempts.History` writes it."""
    return (
        isinstance(attempt, dict)
        and type(attempt.get("number")) is int
        and _is_number(attempt.get("started"))
        and (attempt.get("seconds") is None or _is_number(attempt["seconds"]))
        and isinstance(attempt.get("error"), str | None)
    )


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


LAST_BYTES = 2**16
"""Bytes at the end of a training's metrics that are read: the last fifty steps or so."""


def last_steps(partial: Path) -> list[dict[str, Any]]:
    """The records of the last steps of a training, from the end of its metrics; none before its first step.

    Records of another kind are left out: merges, evaluations and searches write theirs to a file of the same name.
    """
    try:
        with open_regular(partial / METRICS) as file:
            file.seek(0, os.SEEK_END)
            start = max(0, file.tell() - LAST_BYTES)
            file.seek(start)
            *lines, _ = file.read().split(b"\n")  # the last line may be being written
    except OSError:
        return []
    records = []
    for line in lines[1:] if start else lines:
        with contextlib.suppress(ValueError, RecursionError):
            records.append(json.loads(line.decode()))
    return [record for record in records if is_step(record)]


def is_step(record: Any) -> bool:
    """Whether this is a training's record of a step: a line may be damaged."""
    return (
        isinstance(record, dict)
        and isinstance(record.get("phase"), str)
        and all(type(record.get(key)) is int for key in ("step", "num_steps", "steps_left"))
        and "loss" in record
        and (record["loss"] is None or _is_number(record["loss"]))
        and _is_number(record.get("time"))
        and ("tokens" not in record or _is_number(record["tokens"]))
    )


def speed(records: list[dict[str, Any]]) -> dict[str, Any]:
    """The progress and speed of a training, by the median time from one step to the next, so that a restart or a
    checkpoint among the last steps does not count."""
    if not records:
        return {}
    last = records[-1]
    found: dict[str, Any] = {key: last[key] for key in ("phase", "step", "num_steps")}
    steps = [record for record in records if record["phase"] == last["phase"]]
    gaps = [after["time"] - before["time"] for before, after in itertools.pairwise(steps)]
    pace = statistics.median(gaps) if gaps else 0.0
    if pace > 0.0:
        found["steps_per_second"] = 1 / pace
        found["eta_seconds"] = round(last["steps_left"] * pace, 1)
        if all("tokens" in record for record in steps):
            found["tokens_per_second"] = statistics.fmean(record["tokens"] for record in steps) / pace
    return found


def last_saved(partial: Path) -> dict[str, Any]:
    """The step from which a training resumes: `phase`, `step` and `num_steps`, None if its records do not say. Empty if
    nothing is saved. The names of its files suffice: no checkpoint is read."""
    num_steps = {step["phase"]: step["num_steps"] for step in last_steps(partial)}
    names = sorted(path.name for path in (partial / CHECKPOINTS).glob("[!.]*"))
    found = [match for name in names if (match := re.fullmatch(r"(\w+)-(\d+)\.safetensors", name))]
    steps: dict[str, int | None] = {match[1]: int(match[2]) for match in found}
    if TRAIN not in steps and (partial / CALIBRATED).exists():
        steps = {CALIBRATE: num_steps.get(CALIBRATE)}
    for phase in (TRAIN, CALIBRATE):
        if phase in steps:
            return {"phase": phase, "step": steps[phase], "num_steps": num_steps.get(phase)}
    return {}
