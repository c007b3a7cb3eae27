"""The search for a merge's weights on the cluster: each evaluation is a Ray task, several run side by side."""

import collections
import dataclasses
import itertools
import logging
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lori_dist import config, storage
from lori_dist.cluster import search
from lori_dist.cluster.gang import first_done, remote, result
from lori_dist.cluster.summary import ADAPTER
from lori_dist.cluster.work import Assignment, merged, working
from lori_dist.config import Run
from lori_dist.jobs import Job

SEARCH, TRIED = "search.jsonl", "tried"
"""The measurements of a search, and the folder with its rows and the merges that it tries."""

log = logging.getLogger(__name__)


def searched(run: Run, assignment: Assignment, stopping: threading.Event) -> Assignment:
    """Returns the assignment of the merge with the best weights found. Ray tasks measure the candidates, several side
    by side.

    Raises Broken if a trial fails, or once `stopping` is set; what was measured by then is in search.jsonl.
    """
    job, partial = assignment.job, assignment.attempt.partial
    settings = job.settings["search"]
    trial = dataclasses.replace(assignment, tree=config.dump(_on_validation_rows(run, job, partial / TRIED)))
    storage.put(run.output, run.name, f"{partial.name}/{TRIED}")
    try_ = remote(run, job, _try)
    along = search.axes(job.settings["tasks"], _projections(run, job) if settings["per"] == "projection" else None)
    is_loss = settings["metric"] == "loss"
    known = search.read(partial / SEARCH)

    def measure(points: list[search.Point]) -> list[float]:
        import ray

        waiting: dict[Any, search.Point] = {}
        for point in points:
            if point not in known and point not in waiting.values():
                weights = list(search.weights(point, along).values())
                waiting[try_(trial, weights, f"{len(known) + len(waiting)}.safetensors")] = point
        try:
            while waiting:
                done = first_done(list(waiting), stopping)
                metrics = result(done)
                point = waiting.pop(done)
                known[point] = search.mean(metrics, lower_is_better=is_loss)
                search.append(partial / SEARCH, point, along, metrics, known[point])
        finally:
            for left in waiting:
                ray.cancel(left)
        return [known[point] for point in points]

    bounds = tuple(settings["bounds"])
    method = search.METHODS[settings["method"]](
        search.start(along, job.settings["weights"][0], bounds),
        bounds=bounds,
        budget=settings["budget"],
        seed=settings["seed"],
    )
    point, score, count = search.best(method, measure)
    found = search.weights(point, along)
    log.info("%s: %s after %d evaluations, %s", job.name, found, count, score)
    more = {
        "weights": [list(map(list, item.items())) if isinstance(item, dict) else item for item in found.values()],
        "found": {"weights": found, "score": score, "evaluations": count},
    }
    return dataclasses.replace(assignment, job=dataclasses.replace(job, settings={**job.settings, **more}))


def _on_validation_rows(run: Run, job: Job, place: Path) -> Run:
    """The run as an evaluation of a search sees it: copies of the search's rows are its only test rows."""
    place.mkdir(exist_ok=True)
    settings = job.settings["search"]
    tasks = {}
    for name, data in settings["tasks"].items():
        copy = place / f"{name}.jsonl"
        copy.write_bytes(_rows(Path(getattr(run.tasks[name], data["part"])), settings["rows"], data["part"]))
        tasks[name] = dataclasses.replace(run.tasks[name], test=str(copy), validation=None)
    evaluate = dataclasses.replace(run.evaluate, metrics=(settings["metric"],), rows=None)
    return dataclasses.replace(run, tasks=tasks, evaluate=evaluate, merges={})


def _rows(file: Path, count: int, part: str) -> bytes:
    """The first rows of a validation file, or the last of a train file."""
    with file.open("rb") as stream:
        rows = (line.rstrip(b"\n") + b"\n" for line in stream if line.strip())
        return b"".join(collections.deque(rows, maxlen=count) if part == "train" else itertools.islice(rows, count))


def _projections(run: Run, job: Job) -> dict[str, list[str]]:
    """Task -> the module kinds that its adapter has."""
    from lori_dist.adapter import targets
    from lori_dist.formats import native

    found = {}
    for task, need in zip(job.settings["tasks"], job.needs, strict=True):
        modules = native.header(run.folder / need / ADAPTER)["modules"]
        found[task] = list(dict.fromkeys(targets.kind(module) for module in modules))
    return found


def _try(assignment: Assignment, weights: Sequence[Any], name: str) -> dict[str, float]:
    """Task -> the search's metric of the merge with these weights, on the rows of the search."""
    with working([assignment], 0) as run:
        import torch

        from lori_dist.evaluation import evaluate
        from lori_dist.training.device import first

        torch.set_num_threads(1)
        out = assignment.attempt.partial / TRIED / name
        merged(run, assignment, weights, out)
        try:
            values = evaluate(run, out, device=first(run.cluster.gpus_per_worker))
        finally:
            out.unlink()
        return {task: value for task, metrics in values.items() for value in metrics.values()}
