"""The search for weights, on functions whose lowest point is known; and what it keeps in its file."""

import math
from pathlib import Path

import pytest

from lori_dist.cluster import search
from lori_dist.cluster.search import Axis, Method, Point

BOUNDS = (0.0, 1.0)
LOWEST = (0.3, 0.8, 0.5)


def score(point: Point) -> float:
    """A bowl, steeper along the first axis."""
    return sum((4 if place == 0 else 1) * (at - LOWEST[place]) ** 2 for place, at in enumerate(point))


def method(name: str, first: Point, budget: int, bounds: tuple[float, float] = BOUNDS, seed: int = 0) -> Method:
    if name == "cma":
        pytest.importorskip("cma", reason="the extra `search` is not installed")
    return search.METHODS[name](first, bounds=bounds, budget=budget, seed=seed)


def run(name: str, first: Point, budget: int, **more: object) -> tuple[Point, float, list[list[Point]]]:
    """The best point and score, and the batches that were asked for."""
    batches: list[list[Point]] = []

    def measure(points: list[Point]) -> list[float]:
        batches.append(points)
        return [score(point) for point in points]

    point, found, _ = search.best(method(name, first, budget, **more), measure)  # type: ignore[arg-type]
    return point, found, batches


@pytest.mark.parametrize("name", search.METHODS)
@pytest.mark.parametrize("num_axes", [2, 3])
def test_the_lowest_point_is_found(name: str, num_axes: int) -> None:
    point, found, _ = run(name, (1 / num_axes,) * num_axes, 150)
    assert found < 1e-3
    assert all(abs(at - wanted) < 0.05 for at, wanted in zip(point, LOWEST, strict=False))


def test_coordinate_takes_one_axis_and_cma_does_not() -> None:
    assert abs(run("coordinate", (1.0,), 40)[0][0] - 0.3) < 0.02
    with pytest.raises(ValueError, match="cma needs two weights, there is one; use coordinate"):
        next(search.cma((1.0,), bounds=BOUNDS, budget=9))


@pytest.mark.parametrize("name", search.METHODS)
@pytest.mark.parametrize("budget", [1, 2, 7, 20])
def test_no_more_than_the_budget_is_measured(name: str, budget: int) -> None:
    _, _, batches = run(name, (0.5, 0.5), budget)
    assert sum(map(len, batches)) <= budget
    assert batches[0] == [(0.5, 0.5)]  # so that the result is never worse than equal weights


@pytest.mark.parametrize("name", search.METHODS)
def test_points_stay_within_the_bounds_and_what_is_measured_is_what_is_written(name: str) -> None:
    _, _, batches = run(name, (-0.5, -0.5), 60, bounds=(-0.7, 0.1))
    for point in (point for batch in batches for point in batch):
        assert all(-0.7 <= at <= 0.1 and round(at, search.DIGITS) == at for at in point)
    point, _, _ = run(name, (-0.5, -0.5), 200, bounds=(-0.7, 0.1))
    assert point == pytest.approx((0.1, 0.1), abs=0.01)


@pytest.mark.parametrize("name", search.METHODS)
def test_the_same_search_asks_for_the_same_points(name: str) -> None:
    assert run(name, (0.5, 0.5), 40) == run(name, (0.5, 0.5), 40)


def test_cma_follows_its_seed_and_nobody_else_s_generator() -> None:
    import numpy as np

    first = run("cma", (0.5, 0.5), 40, seed=1)
    np.random.seed(7)
    assert run("cma", (0.5, 0.5), 40, seed=1) == first
    assert run("cma", (0.5, 0.5), 40, seed=2) != first


@pytest.mark.parametrize("name", search.METHODS)
def test_several_points_are_measured_side_by_side(name: str) -> None:
    _, _, batches = run(name, (0.5, 0.5), 40)
    assert max(map(len, batches)) >= 4


@pytest.mark.parametrize("name", search.METHODS)
def test_scores_that_are_not_finite_are_the_worst(name: str) -> None:
    def measure(points: list[Point]) -> list[float]:
        return [math.nan if point[0] > 0.4 else score(point) for point in points]

    point, found, _ = search.best(method(name, (0.5, 0.5), 60), measure)
    assert point[0] <= 0.4
    assert math.isfinite(found)


def test_axes_and_weights() -> None:
    tasks = search.axes(["math", "code"], None)
    assert search.weights((0.5, 0.25), tasks) == {"math": 0.5, "code": 0.25}
    along = search.axes(["math", "code"], {"math": ["q_proj", "up_proj"], "code": ["q_proj"]})
    assert search.weights((0.5, 0.25, 1.0), along) == {
        "math": {"q_proj": 0.5, "up_proj": 0.25},
        "code": {"q_proj": 1.0},
    }
    assert search.start(along, 1 / 3, (0.0, 1.0)) == (0.333333,) * 3
    assert search.start(tasks, 0.5, (0.6, 1.0)) == (0.6, 0.6)
    assert search.start(tasks, 1.0, (0.0, 1.0)) == (1.0, 1.0)


@pytest.mark.parametrize("name", search.METHODS)
@pytest.mark.parametrize("num_lines", [0, 1, 9])
def test_a_search_goes_on_from_its_file(tmp_path: Path, name: str, num_lines: int) -> None:
    along = [Axis(task="a"), Axis(task="b")]

    def through(file: Path) -> tuple[tuple[Point, float, int], list[Point]]:
        known, measured = search.read(file), []

        def measure(points: list[Point]) -> list[float]:
            for point in points:
                if point not in known:
                    measured.append(point)
                    known[point] = score(point)
                    search.append(file, point, along, {"a": known[point]}, known[point])
            return [known[point] for point in points]

        return search.best(method(name, (0.5, 0.5), 30), measure), measured

    whole, every = through(tmp_path / "whole")
    lines = (tmp_path / "whole").read_bytes().splitlines(keepends=True)
    (tmp_path / "cut").write_bytes(b"".join(lines[:num_lines]) + b'{"point": [0.1,')  # killed while it wrote a line
    again, rest = through(tmp_path / "cut")
    assert again == whole
    assert rest == every[num_lines:]
    assert (tmp_path / "cut").read_bytes() == (tmp_path / "whole").read_bytes()


def test_scores_that_are_not_finite_are_read_back(tmp_path: Path) -> None:
    search.append(tmp_path / "file", (0.5,), [Axis(task="a")], {"a": math.nan}, math.nan)
    assert search.read(tmp_path / "file") == {(0.5,): math.inf}
    assert "NaN" not in (tmp_path / "file").read_text()


def test_the_mean_is_a_score() -> None:
    assert search.mean({"a": 1.0, "b": 2.0}, lower_is_better=True) == 1.5
    assert search.mean({"a": 1.0, "b": 2.0}, lower_is_better=False) == -1.5
