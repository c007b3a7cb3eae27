"""The state of each job of a run, written to the run's folder and reported to whoever shows progress."""

import contextlib
import json
import logging
import re
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lori_dist import folder, storage
from lori_dist.cluster import schedule
from lori_dist.cluster.eta import Left, left
from lori_dist.cluster.schedule import Resources
from lori_dist.cluster.summary import SUMMARY, attempts_of, last_saved, last_steps, made, speed, summarize
from lori_dist.config import Run
from lori_dist.errors import JobError
from lori_dist.files import read_regular
from lori_dist.jobs import Job, dependents, path_lengths, ready

EVALUATION = "evaluation.json"

ENDING = re.compile(r": ending, as (`lori stop` was called|SIGTERM was received|train\.time_limit has passed)")
"""Matches what a driver that was asked to end writes before it leaves its cluster."""

log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True, slots=True)
class Progress:
    """The progress of a run."""

    job: str
    state: str
    """`running`, `interrupted`, `finished`, `failed` or `blocked`."""
    seconds: float
    num_done: int
    """Number of finished jobs."""
    num_jobs: int
    phase: str = ""
    """The phase of a training: `calibrate` or `train`."""
    step: int = 0
    num_steps: int = 0
    loss: float | None = None
    tokens_per_second: float | None = None
    eta_seconds: float | None = None
    """Seconds until the end of the training."""
    left: Left | None = None
    """Time until the end of the run."""


@dataclass(kw_only=True, slots=True)
class Board:
    """The state of each job."""

    run: Run
    jobs: list[Job]
    progress: Callable[[Progress], None]
    states: dict[str, dict[str, Any]] = field(default_factory=dict)
    results: dict[str, dict[str, Any]] = field(default_factory=dict)
    made: dict[str, str] = field(default_factory=dict)
    """Finished job -> digest of its adapter or moments, empty if it made none."""
    report: dict[str, str] | None = None
    """Paths of the run's report, or the reason why there is none."""
    started: dict[str, float] = field(default_factory=dict)
    leaders: dict[str, str] = field(default_factory=dict)
    """Job that shares a gang with others -> the first of these."""
    packing: str | int = field(init=False)
    """Trainings that share a base: `cluster.packing`, or what `auto` means here."""

    def __post_init__(self) -> None:
        self.packing = self.run.cluster.packing
        self.states = {job.name: {"state": "waiting", **self._begun(job)} for job in self.jobs}
        for job in self.jobs:
            record = folder.finished(self.run.folder, job)
            if record is not None:
                check_record(self.run.folder / job.name, job, record)
            if record is not None and record["inputs"] == self.inputs(job):
                self.results[job.name] = record["result"]
                self.made[job.name] = made(record)
                self._change(job, "finished", cached=True, seconds=record["seconds"], attempts=record["attempts"])

    def keep_report(self) -> list[str]:
        """Renames the summary and the report of an earlier run of this name if they describe other results. Returns
        their new names."""
        root = self.run.folder
        try:
            summary = json.loads(read_regular(root / SUMMARY).decode())
            states = {name: state["state"] for name, state in summary["jobs"].items()}
        except (OSError, ValueError, LookupError, TypeError, AttributeError, RecursionError):  # there is none to keep
            return []
        finished = [name for name, state in states.items() if state == "finished"]
        mine, before = {job.name: job.fingerprint for job in self.jobs}, summary.get("fingerprints")
        if isinstance(before, dict):
            is_mine = all(mine.get(name) == before.get(name) for name in finished)
        else:  # of an earlier version
            is_mine = set(finished) <= set(mine) and not self.superseded()
        report = ["report.html", "report.json", *sorted(path.name for path in root.glob("report-*.png"))]
        return [] if is_mine or not finished else folder.set_aside(root, [SUMMARY, *report])

    def superseded(self) -> list[str]:
        """Sentences about unfinished jobs whose folders hold results of other settings: what differs, and what happens
        to them."""
        found = (folder.superseded(self.run.folder, job) for job in self.unfinished())
        return [text for text in found if text is not None]

    def _begun(self, job: Job) -> dict[str, bool]:
        """Whether the job's folder was left by an attempt at this very job, as `lori status` asks."""
        return {"begun": True} if folder.begun(self.run.folder, job) else {}

    def inputs(self, job: Job) -> dict[str, str | None]:
        """Digests of the results that the job reads. The job is done again if those were done again and have
        changed."""
        return {need: self.made.get(need) for need in job.needs}

    def named(self, state: str) -> list[Job]:
        """The jobs in a state, in the plan's order."""
        return [job for job in self.jobs if self.states[job.name]["state"] == state]

    def names(self, state: str) -> set[str]:
        """The names of the jobs in a state."""
        return {job.name for job in self.named(state)}

    def unfinished(self) -> list[Job]:
        """The jobs that are not finished, in the plan's order."""
        return [job for job in self.jobs if self.states[job.name]["state"] != "finished"]

    def ready(self) -> list[Job]:
        """The jobs that could start now: those on which the longest chain of jobs waits come first, else the plan's
        order counts."""
        lengths = path_lengths(self.jobs)
        possible = ready(self.jobs, self.names("finished"), self.names("running") | self.names("failed"))
        return sorted(possible, key=lambda job: -lengths[job.name])

    def startable(self, nodes: Sequence[Resources]) -> list[tuple[Job, ...]]:
        """The jobs to start now; those that one gang does together are in one tuple.

        Evaluations wait for each other: all models are evaluated in one pass over the base. Trainings wait for all
        moments that are measured, so that those which share a base can start together.
        """
        found = self.ready()
        if any(job.kind == "moments" for job in self.named("waiting") + self.named("running")):
            found = [job for job in found if job.kind != "train"]
        if any(job.kind == "evaluate" and job not in found for job in self.named("waiting")):
            found = [job for job in found if job.kind != "evaluate"]
        packs = {jobs[0].name: jobs for jobs in schedule.packs(found, self.packing)}
        running = {self.leaders.get(job.name, job.name): job for job in self.named("running")}
        leaders = [jobs[0] for jobs in packs.values()]
        admitted = schedule.admit(leaders, list(running.values()), self.run.cluster, nodes)
        return [packs[job.name] for job in admitted]

    def start(self, jobs: Sequence[Job]) -> None:
        """Marks jobs that one gang does together as running."""
        together = {"packed_with": [job.name for job in jobs]} if len(jobs) > 1 else {}
        for job in jobs:
            self.leaders[job.name] = jobs[0].name
            self.started[job.name] = time.monotonic()
            others = {key: [name for name in names if name != job.name] for key, names in together.items()}
            saved = _saved(self.run, job) if self._begun(job) else {}
            self._change(job, "running", started=time.time(), **others, **saved)
        self.write()

    def finish(self, job: Job, record: Mapping[str, Any]) -> None:
        """Marks a job as finished. record: the content of its job.json."""
        self.results[job.name] = record["result"]
        self.made[job.name] = made(record)
        self._change(job, "finished", **self._started(job), seconds=record["seconds"], attempts=record["attempts"])
        self.write()

    def interrupt(self) -> None:
        """Marks the running jobs as interrupted, at the end of the run."""
        for job in self.named("running"):
            self._change(job, "interrupted", **_saved(self.run, job))
        with contextlib.suppress(OSError):  # a full disk must not hide what went wrong before
            self.write()

    def fail(self, job: Job, error: str) -> None:
        """Marks a job as failed with a message, and the jobs that need it as blocked."""
        more = {**self._started(job), "seconds": self.seconds(job), "error": error, **self._attempts(job)}
        self._change(job, "failed", **more)
        for blocked in dependents(self.jobs, self.names("failed")):
            if self.states[blocked.name]["state"] == "waiting":
                out = self.names("failed") | self.names("blocked")
                self._change(blocked, "blocked", seconds=0.0, needs=[name for name in blocked.needs if name in out])
        self.write()

    def _attempts(self, job: Job) -> dict[str, Any]:
        return {"attempts": attempts_of(self.run.folder / f"{folder.PARTIAL}{job.name}")}

    def _started(self, job: Job) -> dict[str, Any]:
        """The job's start in seconds since the epoch and the jobs that share its gang, for the run's timeline."""
        return {key: value for key, value in self.states[job.name].items() if key in ("started", "packed_with")}

    def seconds(self, job: Job) -> float:
        """Seconds since the job started here; 0 if it has not."""
        return round(time.monotonic() - self.started[job.name], 3) if job.name in self.started else 0.0

    def has_steps(self, job: Job) -> bool:
        """Whether a training may have done steps since it started. If `output` is a URL, this machine sees none."""
        if storage.is_url(self.run.output):
            return True
        steps = last_steps(self.run.folder / f"{folder.PARTIAL}{job.name}")
        return bool(steps) and steps[-1].get("time", 0.0) >= self.states[job.name]["started"]

    def report_steps(self) -> None:
        """Reports the last step of each running training."""
        steps = {job.name: _last_step(self.run.folder, job) for job in self.named("running") if job.kind == "train"}
        until_end = left(
            [
                {
                    "name": job.name,
                    "state": self.states[job.name]["state"],
                    "needs": job.needs,
                    "seconds": self.states[job.name].get("seconds", self.seconds(job)),
                    "eta_seconds": steps.get(job.name, {}).get("eta_seconds"),
                }
                for job in self.jobs
            ]
        )
        for job in self.named("running"):
            if job.kind == "train":
                self.progress(self._event(job, left=until_end, **steps[job.name]))

    def summary(self) -> dict[str, Any]:
        """The tree of summary.json."""
        return {
            **summarize(self.run, self.jobs, self.states, self.results),
            "fingerprints": {job.name: job.fingerprint for job in self.named("finished")},
            "report": self.report,
        }

    def write(self) -> None:
        """Writes summary.json."""
        folder.write_json(self.run.folder / SUMMARY, self.summary())

    def _change(self, job: Job, state: str, **more: Any) -> None:
        self.states[job.name] = {"state": state, **more}
        log.info("%s: %s", job.name, _described(self.states[job.name]))
        self.progress(self._event(job))

    def _event(self, job: Job, **more: Any) -> Progress:
        return Progress(
            job=job.name,
            state=self.states[job.name]["state"],
            seconds=self.seconds(job),
            num_done=len(self.named("finished")),
            num_jobs=len(self.jobs),
            **more,
        )


def check_record(place: Path, job: Job, record: Mapping[str, Any]) -> None:
    """Raises JobError if a finished job's job.json differs from what the run wrote. Earlier versions did not seal it,
    but what an evaluation found has a file of its own."""
    problem = None
    kinds = {"inputs": dict, "result": dict, "seconds": int | float, "attempts": list}
    if not all(isinstance(record.get(key), kind) for key, kind in kinds.items()):
        problem = "lacks fields that a run writes for a finished job"
    elif job.kind == "evaluate":
        try:
            measured = json.loads(read_regular(place / EVALUATION).decode())
        except FileNotFoundError:
            measured = record["result"].get("evaluation")
        if json.dumps(measured) != json.dumps(record["result"].get("evaluation")):  # where NaN is NaN
            problem = f"does not agree with {EVALUATION} beside it"
    if problem:
        raise JobError(f"{place / folder.FINISHED}: {problem}; restore it, or delete {place} to do the job again")


def _saved(run: Run, job: Job) -> dict[str, str]:
    """The step from which a training resumes, for people."""
    found = last_saved(run.folder / f"{folder.PARTIAL}{job.name}") if job.kind == "train" else {}
    if not found or found["step"] is None:
        return {}
    of = "" if found["num_steps"] is None else f" of {found['num_steps']}"
    return {"saved": f"step {found['step']}{of} of phase {found['phase']}"}


def _described(state: Mapping[str, Any]) -> str:
    match state:
        case {"state": "failed", "error": error}:
            return f"failed: {error}"
        case {"state": "blocked", "needs": needs}:
            return f"not done, as it needs {', '.join(needs)}"
        case {"cached": True}:
            return "was finished before"
        case {"state": "finished", "seconds": seconds}:
            return f"finished in {seconds:.1f} s"
        case {"state": "running"}:
            packed = f", packed with {', '.join(state['packed_with'])}" if "packed_with" in state else ""
            return f"running{packed}" + (f", resuming from {state['saved']}" if "saved" in state else "")
        case {"state": "interrupted", "saved": saved}:
            return f"interrupted; {saved} is saved"
    return str(state["state"])


def _last_step(root: Path, job: Job) -> dict[str, Any]:
    """The last step of a training, and its speed."""
    steps = last_steps(root / f"{folder.PARTIAL}{job.name}")
    if not steps:
        return {}
    found = speed(steps)
    shown = ("phase", "step", "num_steps", "tokens_per_second", "eta_seconds")
    return {"loss": steps[-1]["loss"], **{key: found[key] for key in shown if key in found}}
