"""The adapters that a run trains, and those that it has finished."""

import logging
from collections.abc import Iterator
from pathlib import Path

from lori_dist import config

log = logging.getLogger(__name__)


def trainings_of(run: config.Run) -> Iterator[str]:
    """Yields the names of the adapters that a run trains: its tasks, unless its plan is another one."""
    from lori_dist import jobs

    return (job.settings["task"] for job in jobs.plan(run) if job.kind == "train")


def finished_adapters(run: config.Run) -> dict[str, Path]:
    """Task or merge -> its adapter, for all that a run of this very configuration has finished."""
    from lori_dist import folder, jobs
    from lori_dist.cluster import summary

    making = [job for job in jobs.plan(run) if job.kind in ("train", "merge")]
    made = [job for job in making if folder.finished(run.folder, job)]
    if len(made) < len(making):
        log.warning("%s: %d of %d adapters are finished; only these are evaluated", run.folder, len(made), len(making))
    return {job.name.partition("-")[2]: summary.path(run, job) for job in made}


def is_adapter(word: str) -> bool:
    """Whether a word is the path of a file or folder, or PATH@TASK for a file with an update for each task."""
    return Path(word).exists() or ("@" in word and Path(word.rpartition("@")[0]).is_file())
