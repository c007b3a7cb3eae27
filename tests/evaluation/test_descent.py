"""The loss of a weighted sum of adapters and its gradient by the weights, and what goes down along it."""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from lori_dist import config
from lori_dist.adapter.adapter import Adapter
from lori_dist.cluster import search
from lori_dist.config import Choice, Run
from lori_dist.errors import ConfigError
from lori_dist.evaluation._descent import Slope, descending
from lori_dist.training import data
from lori_dist.training.model import load_model, load_tokenizer
from lori_dist.training.world import from_environment
from tests.distributed import run_distributed
from tests.integrations.made import trained
from tests.models import tiny_llama
from tests.tokenizers import save

TASKS = ("copy", "turn")
ENGINES = [
    pytest.param(Choice(name="ddp"), 1, id="ddp", marks=pytest.mark.slow),
    pytest.param(Choice(name="fsdp"), 2, id="fsdp"),
    pytest.param(Choice(name="deepspeed", options={"stage": 3}), 2, id="deepspeed", marks=pytest.mark.slow),
]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Run:
    place = tmp_path_factory.mktemp("descent")
    save(tiny_llama(), place / "model")
    tasks = {}
    for task in TASKS:
        rows = place / f"{task}.jsonl"
        lines = [{"prompt": f"{task} {n}" + "x" * (n % 4), "response": f"{n * 7 % 10}" * (1 + n % 2)} for n in range(5)]
        rows.write_text("".join(json.dumps(line) + "\n" for line in lines))
        tasks[task] = {"train": str(rows), "test": str(rows)}
    tree = {"name": "t", "model": {"path": str(place / "model")}, "tasks": tasks, "train": {"steps": 1}}
    return config.validate({**tree, "evaluate": {"batch_size": 2}})


def adapters() -> dict[str, Adapter]:
    """The first has no update of one kind of module."""
    targets = ("q_proj", "o_proj", "up_proj")
    return {
        "copy": trained(tiny_llama(), "copy", seed=1, density=0.3, targets=targets[:2]),
        "turn": trained(tiny_llama(), "turn", seed=2, density=0.3, targets=targets, rank=3),
    }


def places(made: Mapping[str, Adapter]) -> list[tuple[str, str | None]]:
    """A weight for each module of the first task, and one for all of the second."""
    return [*(("copy", module) for module in made["copy"].shapes), ("turn", None)]


def measured(run: Run, points: Sequence[Sequence[float]]) -> list[Slope]:
    made = adapters()
    with descending(run, made, places(made), from_environment()) as slope_at:
        return [slope_at(point) for point in points]


def plain(run: Run, point: Sequence[float]) -> tuple[list[float], Tensor]:
    """The same, of a model whose weights are the base's plus the updates', row by row in one process."""
    made, model, tokenizer = adapters(), load_model(run.model), load_tokenizer(run.model)
    along, weights = places(made), torch.tensor(point, requires_grad=True)
    changed = {name: parameter.detach() for name, parameter in model.named_parameters()}
    for number, (task, only) in enumerate(along):
        for module in made[task].shapes:
            if only in (module, None):
                name = f"{module}.weight"
                changed[name] = changed[name] + weights[number] * made[task].delta(module)
    losses = []
    for task in TASKS:
        given, total, count = run.tasks[task], torch.zeros(()), 0
        for example in data.encode(data.read(given.test, given.template), tokenizer, run.train.max_length):
            ids = torch.tensor([example.prompt_ids + example.response_ids])
            logits = torch.func.functional_call(model, changed, (ids,)).logits[0]
            first = len(example.prompt_ids)
            total = total + functional.cross_entropy(logits[first - 1 : -1], ids[0, first:], reduction="sum")
            count += len(example.response_ids)
        losses.append(total / count)
    [slope] = torch.autograd.grad(torch.stack(losses).mean(), weights)
    return [float(loss.detach()) for loss in losses], slope


@pytest.mark.parametrize(("engine", "num_ranks"), ENGINES)
def test_the_gradient_is_that_of_one_process(run: Run, engine: Choice, num_ranks: int) -> None:
    placed = replace(run, evaluate=replace(run.evaluate, engine=engine))
    points = [[0.5, 0.1, -0.3, 0.7, 0.4], [0.0, 1.0, 0.2, 0.3, -0.2]]
    of_ranks = run_distributed(measured, placed, points, world_size=num_ranks)
    assert all(found == of_ranks[0] for found in of_ranks)
    for point, (losses, slope) in zip(points, of_ranks[0], strict=True):
        wanted, wanted_slope = plain(run, point)
        assert list(losses.values()) == pytest.approx(wanted, rel=1e-5)
        assert float((torch.tensor(slope) - wanted_slope).norm()) <= 1e-4 * float(wanted_slope.norm())
        assert all(abs(one) > 1e-4 for one in slope)


def test_what_descends_ends_near_the_lowest_point_within_its_bounds() -> None:
    seen: list[search.Point] = []

    def measure(point: search.Point) -> tuple[float, list[float]]:
        seen.append(point)
        return (point[0] - 0.7) ** 2 + (point[1] - 3) ** 2, [2 * (point[0] - 0.7), 2 * (point[1] - 3)]

    point, score, count = search.descend((0.5, 0.5), measure, bounds=(0.0, 1.0), budget=60, lr=0.05)
    assert seen[0] == (0.5, 0.5)
    assert seen[1] == (0.55, 0.55)  # Adam's first step is as long as its rate
    assert count == len(seen) <= 60
    assert point[1] == 1.0
    assert point[0] == pytest.approx(0.7, abs=0.02)
    assert score == min(measure(one)[0] for one in seen[:count])


def test_what_is_not_a_number_ends_it_with_the_best_before() -> None:
    def measure(point: search.Point) -> tuple[float, list[float]]:
        return (1.0, [1.0]) if point[0] > 0.4 else (math.nan, [math.nan])

    assert search.descend((0.5,), measure, bounds=(0.0, 1.0), budget=9, lr=0.1) == ((0.5,), 1.0, 2)


def test_what_was_measured_is_read_again(tmp_path: Path) -> None:
    along = search.axes(["copy"], {"copy": ["a.q_proj"]})
    assert search.weights((0.25,), along) == {"copy": {"a.q_proj": 0.25}}
    for point, slope in (((0.25,), [0.1 + 0.2]), ((0.5,), [-1e-17])):
        search.append(tmp_path / "s", point, along, {"copy": 2.0}, 2.0, slope)
    assert search.read_slopes(tmp_path / "s") == {(0.25,): (2.0, [0.1 + 0.2]), (0.5,): (2.0, [-1e-17])}


@pytest.mark.parametrize(
    ("merge", "message"),
    [
        ({"method": "ties", "search": {"method": "gradient"}}, "gradient is for merges that are a weighted sum, con"),
        ({"search": {"method": "gradient", "metric": "exact_match"}}, "got exact_match, which has no gradient; use lo"),
        ({"search": {"per": "module"}}, "module is for search.method gradient, got coordinate"),
        ({"search": {"lr": 0.1}}, "lr: is for search.method gradient, got coordinate; remove it"),
    ],
)
def test_what_has_no_gradient_is_refused(run: Run, merge: dict[str, Any], message: str) -> None:
    merge = {"method": "concat", **merge, "search": {"rows": 2, **merge["search"]}}
    with pytest.raises(ConfigError, match=message):
        config.validate({**config.dump(run), "merges": {"all": merge}})
