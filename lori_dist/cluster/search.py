"""The search for the weights of a merge: the points to try next, and what was measured so far.

A method is a generator: it yields points to measure side by side, and is sent their scores, of which lower is better.
It follows from its arguments and the scores alone, so a search that was killed asks for the same points again, and what
is in its file is not measured twice.
"""

import json
import logging
import math
import warnings
from collections.abc import Callable, Generator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lori_dist.atomic import append_json, write_text
from lori_dist.errors import ConfigError
from lori_dist.folder import is_sealed, read_lines, sealed

log = logging.getLogger(__name__)

Point = tuple[float, ...]
Method = Generator[list[Point], list[float], None]

DIGITS = 6
"""Digits after a weight's decimal point: the weight that is written is the one that was measured."""

HUGE = 1e12
"""The score that replaces an infinite one, whose differences would not be numbers."""

SMALLEST = 1 / 128
"""Smallest step as a share of the bounds' width: shorter ones are not worth an evaluation."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Axis:
    """One weight that the search varies."""

    task: str
    projection: str | None = None
    """The module, or the module kind, whose weight it is; None: all modules."""


def axes(tasks: Sequence[str], projections: Mapping[str, Sequence[str]] | None) -> list[Axis]:
    """One axis for each task, or for each module or module kind of a task. projections: task -> these, or None."""
    if projections is None:
        return [Axis(task=task) for task in tasks]
    return [Axis(task=task, projection=name) for task in tasks for name in projections[task]]


def weights(point: Point, along: Sequence[Axis]) -> dict[str, Any]:
    """Task -> its weight, a number, or module or module kind -> number."""
    made: dict[str, Any] = {}
    for axis, number in zip(along, point, strict=True):
        if axis.projection is None:
            made[axis.task] = number
        else:
            made.setdefault(axis.task, {})[axis.projection] = number
    return made


def start(along: Sequence[Axis], share: float, bounds: tuple[float, float]) -> Point:
    """The weights that the merge has by default, `share` each, as far as the bounds let them."""
    return tuple(_within(share, bounds) for _ in along)


def coordinate(first: Point, *, bounds: tuple[float, float], budget: int, seed: int = 0) -> Method:
    """A step up and down along every axis, all side by side; the best is the next centre, or the steps are halved."""
    width = bounds[1] - bounds[0]
    [score] = yield [first]
    seen, centre, step = {first: score}, first, width / 4
    while len(seen) < budget and step >= SMALLEST * width:
        around = [_moved(centre, place, change, bounds) for place in range(len(first)) for change in (-step, step)]
        new = list(dict.fromkeys(point for point in around if point not in seen))[: budget - len(seen)]
        if new:
            seen.update(zip(new, (yield new), strict=True))
        best = min((point for point in around if point in seen), key=seen.__getitem__, default=centre)
        if seen[best] < seen[centre]:
            centre = best
        else:
            step /= 2


def cma(first: Point, *, bounds: tuple[float, float], budget: int, seed: int = 0) -> Method:
    """CMA-ES (Hansen) by the package `cma`; a generation is measured side by side. Takes two axes or more."""
    if len(first) < 2:
        raise ConfigError("search.method: cma needs two weights, there is one; use coordinate")
    import numpy as np

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # it tells that it cannot plot without matplotlib
        from cma import CMAEvolutionStrategy

    size = 4 + int(3 * math.log(len(first)))
    random = np.random.RandomState(seed)  # of its own: other threads draw from the global one
    options = {"bounds": list(bounds), "popsize": size, "randn": random.randn, "seed": np.nan, "verbose": -9}
    # A generation of equal scores, as of no exact match, is not a reason to stop.
    options.update({"tolfun": 0, "tolfunhist": 0, "tolflatfitness": math.inf})
    strategy = CMAEvolutionStrategy(list(first), (bounds[1] - bounds[0]) / 4, options)
    yield [first]
    used = 1
    while used < budget and not strategy.stop():
        asked = strategy.ask()
        points = [tuple(_within(float(number), bounds) for number in point) for point in asked][: budget - used]
        scores = yield points
        used += len(points)
        if len(points) == size:
            strategy.tell(asked, [min(score, HUGE) for score in scores])


METHODS: Mapping[str, Callable[..., Method]] = {"coordinate": coordinate, "cma": cma}


def best(method: Method, measure: Callable[[list[Point]], list[float]]) -> tuple[Point, float, int]:
    """The point with the lowest score that a method has asked for, its score, and how many points were measured."""
    found: dict[Point, float] = {}
    points = next(method)
    while True:
        scores = [score if math.isfinite(score) else math.inf for score in measure(points)]
        for point, score in zip(points, scores, strict=True):
            found.setdefault(point, score)
        try:
            points = method.send(scores)
        except StopIteration:
            chosen = min(found, key=found.__getitem__)
            return chosen, found[chosen], len(found)


def descend(
    first: Point,
    measure: Callable[[Point], tuple[float, Sequence[float]]],
    *,
    bounds: tuple[float, float],
    budget: int,
    lr: float,
) -> tuple[Point, float, int]:
    """The point with the lowest score on the way of Adam along the gradient, its score, and how many were measured.

    measure: the score of a point, and its derivatives. Ends after `budget` points, where one comes again, or where a
    derivative is not a number.
    """
    found: dict[Point, float] = {}
    point, mean_of, squares = first, [0.0] * len(first), [0.0] * len(first)
    for step in range(1, budget + 1):
        score, slope = measure(point)
        found[point] = score if math.isfinite(score) else math.inf
        if not all(map(math.isfinite, slope)):
            break
        mean_of = [0.9 * m + 0.1 * g for m, g in zip(mean_of, slope, strict=True)]
        squares = [0.999 * v + 0.001 * g * g for v, g in zip(squares, slope, strict=True)]
        steps = [
            lr * (m / (1 - 0.9**step)) / (math.sqrt(v / (1 - 0.999**step)) + 1e-8)
            for m, v in zip(mean_of, squares, strict=True)
        ]
        point = tuple(_within(x - change, bounds) for x, change in zip(point, steps, strict=True))
        if point in found:
            break
    chosen = min(found, key=found.__getitem__)
    return chosen, found[chosen], len(found)


def _moved(point: Point, place: int, change: float, bounds: tuple[float, float]) -> Point:
    return (*point[:place], _within(point[place] + change, bounds), *point[place + 1 :])


def _within(number: float, bounds: tuple[float, float]) -> float:
    return round(min(max(number, bounds[0]), bounds[1]), DIGITS)


# --- what was measured -----------------------------------------------------------------------------------------------


def read(file: Path) -> dict[Point, float]:
    """The scores in a file of JSON lines. Damaged or changed lines are removed; their points are measured again."""
    records, num_bad = read_lines(file)
    whole = [record for record in records if is_sealed(record) and _is_whole(record)]
    num_bad += len(records) - len(whole)
    if num_bad:
        log.warning("%s: %d lines are damaged; the points in them are measured again", file, num_bad)
        write_text(file, "".join(json.dumps(record) + "\n" for record in whole))
    return {tuple(record["point"]): _score(record["score"]) for record in whole}


def read_slopes(file: Path) -> dict[Point, tuple[float, list[float]]]:
    """The scores and derivatives in a file, as `read`."""
    scores = read(file)
    records, _ = read_lines(file)
    slopes = {tuple(record["point"]): record["slope"] for record in records if "slope" in record}
    return {point: (score, slopes[point]) for point, score in scores.items() if point in slopes}


def _is_whole(record: Mapping[str, Any]) -> bool:
    point, score = record.get("point"), record.get("score", "")
    numbers = [*point, *([] if score is None else [score])] if isinstance(point, list) else [None]
    return all(isinstance(number, int | float) for number in numbers)


def append(
    file: Path,
    point: Point,
    along: Sequence[Axis],
    metrics: Mapping[str, float],
    score: float,
    slope: Sequence[float] | None = None,
) -> None:
    """Appends a measurement to the file and flushes it, before the next one is asked for. slope: its derivatives."""
    finite = score if math.isfinite(score) else None
    shown = {task: value if math.isfinite(value) else None for task, value in metrics.items()}
    record: dict[str, Any] = {"point": list(point), "metrics": shown, "score": finite}
    if slope is None:
        record = {"point": list(point), "weights": weights(point, along), "metrics": shown, "score": finite}
    else:  # the weights of many modules would be their names above all
        record["slope"] = list(slope)
    append_json(file, sealed(record), flush=True)


def _score(value: float | None) -> float:
    return math.inf if value is None else value


def mean(metrics: Mapping[str, float], *, lower_is_better: bool) -> float:
    """The mean over the tasks as a score, of which lower is better."""
    average = sum(metrics.values()) / len(metrics)
    return average if lower_is_better else -average
