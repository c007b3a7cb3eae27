"""The state of a run, and its end on request, from its files alone: from any machine that sees them, and without
Ray."""

import json
import re
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lori_dist import config, folder
from lori_dist.cluster.eta import left
from lori_dist.cluster.summary import SUMMARY, attempts_of, last_saved, last_steps, speed
from lori_dist.describe import printable
from lori_dist.errors import ConfigError, JobError
from lori_dist.files import read_regular

POLL_SECONDS = 0.2

JOB_NAME = r"[A-Za-z0-9][A-Za-z0-9_-]*"
"""Pattern of job names: any other name in a damaged file could lead out of the run's folder."""


def folder_of(run: str, overrides: list[str]) -> Path:
    """A run's folder, given its configuration or the folder itself. Raises ConfigError for anything else."""
    if not Path(run).is_dir():
        return config.load(run, overrides, elsewhere=True).folder
    if overrides:
        raise ConfigError(f"{overrides[0]}: changes a configuration, and {run!r} is a folder; remove it")
    return Path(run).resolve()


def status(root: Path) -> dict[str, Any]:
    """Returns the state of the run in a folder as plain JSON.

    `run`, `folder`, `driver` (the process that works on it, or None), `stopping` (whether it has been asked to end),
    `eta_seconds` until its end (None if it is not known), `eta_is_least` (whether there are jobs of which nothing is
    known yet), `by_train` (whether the folder has training jobs of `lori train` alone, and no run) and `jobs`. Each
    job, in the plan's order, has `name`, `state` (waiting, running, finished, failed, blocked, or interrupted: it ran,
    and its driver has gone), `needs`, `seconds`, `attempts` (their number; 0 if another run finished it) and `error`
    (the last one, while the job is not finished). A training has its last step, as `phase`, `step` and `num_steps`;
    while it does not run, `saved_step`, the step of that phase from which it resumes; while it runs,
    `steps_per_second`, `tokens_per_second` and `eta_seconds`. What is not known is None. Raises JobError if there is
    no run in the folder.
    """
    driver = folder.owner(root)  # before the summary, which a driver writes before it goes
    summary = _summary(root)
    by_train = summary is None
    if summary is None:
        summary = _of_trainings(root)
    states = {str(name): state for name, state in summary["jobs"].items()}
    for name in states:
        if re.fullmatch(JOB_NAME, name) is None:
            raise JobError(f"{root / SUMMARY}: {name!r} is not a job's name; the file is not one that `lori run` wrote")
    folder.check_entries(root)
    jobs = [
        _job(root, name, state, summary.get("needs", {}).get(name, []), is_alive=by_train or driver is not None)
        for name, state in states.items()
    ]
    until_end = left(jobs)
    return {
        "run": str(summary.get("run")),
        "folder": str(root),
        "driver": None if driver is None else folder.shown_owner(driver),
        "stopping": driver is not None and folder.stop_requested(root, driver),
        "eta_seconds": None if until_end is None else round(until_end.seconds, 1),
        "eta_is_least": until_end is not None and until_end.is_least,
        "by_train": by_train,
        "jobs": jobs,
    }


QUIET_SECONDS = 60.0
"""After so long without a step, or ten steps' time, a training of `lori train` counts as interrupted: no process is
known that works on it."""


def _of_trainings(root: Path) -> dict[str, Any]:
    """The summary of a folder in which only `lori train` has worked. Raises JobError if there is nothing of it."""
    states: dict[str, dict[str, Any]] = {}
    for place in sorted(root.iterdir()) if root.is_dir() else ():
        name = place.name.removeprefix(folder.PARTIAL)
        if not name.startswith("train-") or re.fullmatch(JOB_NAME, name) is None:
            continue
        if place.name != name:
            states[name] = _of_training(place)
        elif name not in states and (record := _finished(place)) is not None:
            states[name] = {"state": "finished", **record}
    if not states:
        raise JobError(f"{root}: no run was started here; start one with `lori run`")
    return {"run": root.name, "jobs": states}


def _finished(place: Path) -> dict[str, Any] | None:
    try:
        record = json.loads(read_regular(place / folder.FINISHED).decode())
        return {"seconds": float(record["seconds"]), "attempts": list(record["attempts"])}
    except (OSError, ValueError, LookupError, TypeError, RecursionError):  # not one that a training has published
        return None


def _of_training(partial: Path) -> dict[str, Any]:
    attempts, records = attempts_of(partial), last_steps(partial)
    if not attempts:
        return {"state": "interrupted"}
    last = attempts[-1]
    pace = speed(records).get("steps_per_second")
    quiet = time.time() - max(last["started"], records[-1]["time"] if records else 0.0)
    is_running = last["seconds"] is None and quiet < max(QUIET_SECONDS, 10 / pace if pace else 0.0)
    return {"state": "running" if is_running else "interrupted", "begun": True, "started": last["started"]}


def _summary(root: Path) -> dict[str, Any] | None:
    """The summary that a run has written; None if there is none."""
    try:
        tree = json.loads((root / SUMMARY).read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        raise JobError(f"{root / SUMMARY}: cannot be read ({error}); run it again") from error
    if not isinstance(tree, dict) or not _is_mapping_of_mappings(tree.get("jobs")):
        raise JobError(f"{root / SUMMARY}: has no jobs; the file is not one that `lori run` wrote")
    return tree


def _is_mapping_of_mappings(tree: Any) -> bool:
    return isinstance(tree, dict) and all(isinstance(item, dict) for item in tree.values())


def _job(root: Path, name: str, state: Mapping[str, Any], needs: list[str], *, is_alive: bool) -> dict[str, Any]:
    partial = root / f"{folder.PARTIAL}{name}"
    attempts = state.get("attempts") or ([] if state.get("cached") else attempts_of(partial))
    errors = [attempt["error"] for attempt in attempts if attempt.get("error")]
    now = str(state.get("state"))
    if now == "running" and not is_alive:
        now = "interrupted"
    if now == "running":
        steps = speed(last_steps(partial))
    elif now == "interrupted" or state.get("begun"):  # else the folder may be that of other settings
        steps = _reached(partial)
    else:
        steps = {}
    began = state.get("started")
    passed = round(time.time() - began, 3) if now == "running" and isinstance(began, int | float) else None
    return {
        "name": name,
        "state": now,
        "needs": list(needs),
        "seconds": state.get("seconds", passed),
        "attempts": len(attempts),
        "error": state.get("error") or (errors[-1] if errors and now != "finished" else None),
        **dict.fromkeys(STEP_KEYS),
        **steps,
    }


STEP_KEYS = (
    *("phase", "step", "num_steps", "saved_step"),
    *("steps_per_second", "tokens_per_second", "eta_seconds"),
)


def _reached(partial: Path) -> dict[str, Any]:
    """The last step of an interrupted training, and the step from which it resumes."""
    saved = last_saved(partial)
    records = last_steps(partial)
    if not records:
        return {**saved, "saved_step": saved["step"]} if saved else {}
    last = {key: records[-1][key] for key in ("phase", "step", "num_steps")}
    return {**last, "saved_step": saved["step"] if saved.get("phase") == last["phase"] else 0}


# --- for people ------------------------------------------------------------------------------------------------------


def rows(found: Mapping[str, Any]) -> list[tuple[str, ...]]:
    """One line for each job, under TITLES."""
    return [tuple(printable(cell) for cell in _row(job)) for job in found["jobs"]]


TITLES = ("job", "state", "progress", "time", "eta", "speed", "attempts", "needs", "error")


def _row(job: Mapping[str, Any]) -> tuple[str, ...]:
    speed = ""
    if job["tokens_per_second"] is not None:
        speed = f"{job['tokens_per_second']:.0f} tokens/s"
    elif job["steps_per_second"] is not None:
        speed = f"{job['steps_per_second']:.2f} steps/s"
    return (
        job["name"],
        job["state"],
        _progress(job),
        duration(job["seconds"]),
        duration(job["eta_seconds"]),
        speed,
        str(job["attempts"] or ""),
        ", ".join(job["needs"]),
        (job["error"] or "").partition("\n")[0],
    )


def _progress(job: Mapping[str, Any]) -> str:
    if job["step"] is None:
        return ""
    of = "" if job["num_steps"] is None else f"/{job['num_steps']}"
    done = f"{job['phase']} {job['step']}{of}"
    if job["saved_step"] is None:
        return done
    return f"{done}, saved" if job["saved_step"] == job["step"] else f"{done}, {job['saved_step'] or 'none'} saved"


def duration(seconds: float | None) -> str:
    """Hours, minutes and seconds; nothing where they are not known."""
    if seconds is None:
        return ""
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02}:{rest:02}"


# --- stopping --------------------------------------------------------------------------------------------------------


def stop(root: Path, *, timeout: float) -> str | None:
    """Asks the process that works on a run to end, and waits until it has. Returns its name, or None if there is none.

    What the run has done is kept, and the same command resumes it. timeout: in seconds. Raises JobError if the process
    has not ended by then; it has been asked all the same.
    """
    driver = folder.owner(root)
    if driver is None:
        return None
    folder.check_entries(root)
    folder.request_stop(root, driver)
    end = time.monotonic() + timeout
    while folder.owner(root) == driver:
        if time.monotonic() > end:
            raise JobError(
                f"{root}: {printable(folder.shown_owner(driver))} has not stopped within {timeout:g} s. It was "
                "asked to, so wait longer with --timeout, or end that process"
            )
        time.sleep(POLL_SECONDS)
    return printable(folder.shown_owner(driver))
