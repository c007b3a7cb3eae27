"""The search for a merge's weights: a gang whose ranks measure several candidates at once on one copy of the base."""

import collections
import dataclasses
import itertools
import logging
import os
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lori_dist import config, storage
from lori_dist.cluster import search
from lori_dist.cluster.summary import ADAPTER
from lori_dist.cluster.work import Assignment, merged, merged_from, pushing, working
from lori_dist.config import Run
from lori_dist.jobs import Job

if TYPE_CHECKING:
    from lori_dist.training.world import World

SEARCH, TRIED = "search.jsonl", "tried"
"""The measurements of a search, and the folder with its rows."""
AT_ONCE = 16
"""Candidates that share a pass at most: each row of a batch meets all of them."""

log = logging.getLogger(__name__)


def trial(run: Run, assignment: Assignment) -> Assignment:
    """The assignment as the ranks of its search get it: copies of the search's rows are the only rows that they see."""
    tree = config.dump(_on_validation_rows(run, assignment.job, assignment.attempt.partial / TRIED))
    storage.put(run.output, run.name, f"{assignment.attempt.partial.name}/{TRIED}")
    return dataclasses.replace(assignment, tree=tree)


def search_rank(assignment: Assignment) -> dict[str, Any]:
    """Does one rank of a merge whose weights are searched. Returns, on rank 0, the result of the merge with the best
    weights; every measurement is in search.jsonl before the next is asked for.

    assignment: as `trial` gives it.
    """
    with working([assignment], int(os.environ.get("RANK", "0"))) as run:
        import torch

        from lori_dist.training.world import from_environment

        torch.set_num_threads(max(1, int(run.cluster.cpus_per_worker)))
        world, job = from_environment(), assignment.job
        settings = job.settings["search"]
        bounds = tuple(settings["bounds"])
        along = search.axes(
            job.settings["tasks"], None if settings["per"] == "task" else _projections(run, job, settings["per"])
        )
        first = search.start(along, job.settings["weights"][0], bounds)
        if settings["method"] == "gradient":
            point, score, count = _descended(run, assignment, world, along, first, bounds)
        else:
            method = search.METHODS[settings["method"]](
                first, bounds=bounds, budget=settings["budget"], seed=settings["seed"]
            )
            point, score, count = _best(run, assignment, world, along, method)
        if world.rank > 0:
            return {}
        found = search.weights(point, along)
        log.info("%s: %s after %d evaluations, %s", job.name, found, count, score)
        result = merged(run, assignment, list(found.values()))
        return {**result, "weights": found, "score": score, "evaluations": count}


def _best(
    run: Run, assignment: Assignment, world: "World", along: Sequence[search.Axis], method: search.Method
) -> tuple[search.Point, float, int]:
    """What `search.best` gives, on every rank."""
    from lori_dist import formats
    from lori_dist.evaluation import measuring
    from lori_dist.merges import merge
    from lori_dist.training.world import from_first

    job, file = assignment.job, assignment.attempt.partial / SEARCH
    settings, options = job.settings["search"], dict(job.settings["method"])
    chosen, is_loss = options.pop("name"), settings["metric"] == "loss"
    adapters = [formats.load(path) for path in merged_from(run, job)]
    known = from_first(world, lambda: search.read(file))
    num_before, start, push = len(known), time.monotonic(), pushing(run, [assignment])
    with measuring(run, world=world) as values_of:

        def measure(points: list[search.Point]) -> list[float]:
            for first in range(0, len(points), AT_ONCE):
                some = points[first : first + AT_ONCE]
                # All or none, so that the figures of a search that was killed are those of one that was not.
                if all(point in known for point in some):
                    continue
                _say(job, known, num_before, settings["budget"], time.monotonic() - start)
                candidates = {
                    str(number): merge(
                        adapters,
                        method=chosen,
                        options=options,
                        weights=list(search.weights(point, along).values()),
                    )
                    for number, point in enumerate(some)
                }
                found = values_of(candidates)
                if world.rank == 0:
                    assignment.attempt.check()
                for point, of_tasks in zip(some, found.values(), strict=True):
                    if point in known:
                        continue
                    metrics = {task: value for task, values in of_tasks.items() for value in values.values()}
                    known[point] = search.mean(metrics, lower_is_better=is_loss)
                    if world.rank == 0:
                        search.append(file, point, along, metrics, known[point])
                if world.rank == 0:
                    push({})
            return [known[point] for point in points]

        return search.best(method, measure)


def _descended(
    run: Run,
    assignment: Assignment,
    world: "World",
    along: Sequence[search.Axis],
    first: search.Point,
    bounds: tuple[float, float],
) -> tuple[search.Point, float, int]:
    """What `search.descend` gives, on every rank."""
    from lori_dist import formats
    from lori_dist.evaluation._descent import descending
    from lori_dist.training.world import from_first

    job, file = assignment.job, assignment.attempt.partial / SEARCH
    settings = job.settings["search"]
    adapters = dict(zip(job.settings["tasks"], map(formats.load, merged_from(run, job)), strict=True))
    known = from_first(world, lambda: search.read_slopes(file))
    num_before, start, push = len(known), time.monotonic(), pushing(run, [assignment])
    places = [(axis.task, axis.projection) for axis in along]
    with descending(run, adapters, places, world) as slope_at:

        def measure(point: search.Point) -> tuple[float, Sequence[float]]:
            if point not in known:
                _say(job, known, num_before, settings["budget"], time.monotonic() - start)
                losses, slope = slope_at(point)
                known[point] = search.mean(losses, lower_is_better=True), slope
                if world.rank == 0:
                    assignment.attempt.check()
                    search.append(file, point, along, losses, known[point][0], slope)
                    push({})
            return known[point]

        lr = settings.get("lr", config.Search().lr)
        return search.descend(first, measure, bounds=bounds, budget=settings["budget"], lr=lr)


def _say(job: Job, known: Mapping[search.Point, Any], num_before: int, budget: int, seconds: float) -> None:
    done = len(known) - num_before
    left = f", about {(budget - len(known)) * seconds / done:.0f} s left" if done else ""
    log.info("%s: %d of at most %d evaluations are done%s", job.name, len(known), budget, left)


def _on_validation_rows(run: Run, job: Job, place: Path) -> Run:
    """The run as an evaluation of a search sees it: copies of the search's rows are its only test rows."""
    place.mkdir(exist_ok=True)
    settings = job.settings["search"]
    tasks = {}
    for name, data in settings["tasks"].items():
        copy = place / f"{name}.jsonl"
        copy.write_bytes(_rows(Path(getattr(run.tasks[name], data["part"])), settings["rows"], data["part"]))
        tasks[name] = dataclasses.replace(run.tasks[name], test=str(copy), validation=None)
    evaluate = dataclasses.replace(
        run.evaluate, metrics=(settings["metric"],), rows=None, lm_eval=None, temperature=0.0, top_p=1.0
    )
    return dataclasses.replace(run, tasks=tasks, evaluate=evaluate, merges={})


def _rows(file: Path, count: int, part: str) -> bytes:
    """The first rows of a validation file, or the last of a train file."""
    with file.open("rb") as stream:
        rows = (line.rstrip(b"\n") + b"\n" for line in stream if line.strip())
        return b"".join(collections.deque(rows, maxlen=count) if part == "train" else itertools.islice(rows, count))


def _projections(run: Run, job: Job, per: str) -> dict[str, list[str]]:
    """Task -> the modules, or module kinds, that its adapter has."""
    from lori_dist.adapter import targets
    from lori_dist.formats import native

    found = {}
    for task, need in zip(job.settings["tasks"], job.needs, strict=True):
        modules = native.header(run.folder / need / ADAPTER)["modules"]
        names = modules if per == "module" else (targets.kind(module) for module in modules)
        found[task] = list(dict.fromkeys(names))
    return found
