"""The time that a run still takes, estimated from its jobs that run or are done."""

import heapq
import statistics
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, kw_only=True, slots=True)
class Left:
    """Time until the end of a run."""

    seconds: float
    is_least: bool
    """Whether there are jobs of which nothing is known yet, such as merges before the first one: these count as 0 s."""


def left(jobs: Sequence[Mapping[str, Any]]) -> Left | None:
    """The time until all jobs are done, if as many run at once as run now. None while no job runs.

    jobs: `name`, `state`, `needs`, `seconds` (that it has taken) and `eta_seconds` of each, as `lori status` has them,
    in the plan's order. A training that runs says itself how long it takes; of others, jobs of the same kind do: the
    median of those that are done, or of those that run.
    """
    running = [job for job in jobs if job["state"] == "running"]
    if not running:
        return None
    durations: dict[str, list[float]] = {}
    for job in jobs:
        if job["state"] == "finished" and job["seconds"] is not None:
            durations.setdefault(kind(job["name"]), []).append(job["seconds"])
    estimates: dict[str, list[float]] = {}
    for job in running:
        if job["eta_seconds"] is not None:
            estimates.setdefault(kind(job["name"]), []).append((job["seconds"] or 0.0) + job["eta_seconds"])
    usual = {of: statistics.median(seconds) for of, seconds in {**estimates, **durations}.items()}

    def remaining(job: Mapping[str, Any]) -> float | None:
        if job["state"] == "running" and job["eta_seconds"] is not None:
            return float(job["eta_seconds"])
        if kind(job["name"]) not in usual:
            return None
        return float(max(0.0, usual[kind(job["name"])] - (job["seconds"] or 0.0)))

    ahead = [job for job in jobs if job["state"] in ("running", "waiting")]
    times = {job["name"]: remaining(job) for job in ahead}
    return Left(seconds=_end(ahead, times), is_least=None in times.values())


def kind(name: str) -> str:
    """`train` of `train-math`."""
    return name.partition("-")[0]


def _end(jobs: Sequence[Mapping[str, Any]], times: Mapping[str, float | None]) -> float:
    """When the last job ends: each starts in the plan's order, once what it needs is done and a place is free."""
    waits = {job["name"]: {need for need in job["needs"] if need in times} for job in jobs}
    dependents: dict[str, list[str]] = {}
    for name, needs in waits.items():
        for need in needs:
            dependents.setdefault(need, []).append(name)
    running = [(times[job["name"]] or 0.0, job["name"]) for job in jobs if job["state"] == "running"]
    heapq.heapify(running)
    places = len(running)
    ready = deque(job["name"] for job in jobs if job["state"] == "waiting" and not waits[job["name"]])
    now = 0.0
    while running or ready:
        while ready and len(running) < places:
            name = ready.popleft()
            heapq.heappush(running, (now + (times[name] or 0.0), name))
        now, done = heapq.heappop(running)
        for name in dependents.get(done, ()):
            waits[name].discard(done)
            if not waits[name]:
                ready.append(name)
    return now
