"""Evaluation on several ranks gives the figures of one process, and gathers each weight once for all models."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from lori_dist import config
from lori_dist.adapter import attach, file
from lori_dist.adapter.adapter import Spec
from lori_dist.benchmarks._traffic import Traffic
from lori_dist.evaluation import Found, Store, evaluate_all
from lori_dist.training.model import identity, load_model
from lori_dist.training.world import from_environment
from tests.distributed import run_distributed
from tests.models import tiny_llama
from tests.tokenizers import save

ENGINES: dict[str, Any] = {
    "ddp": "ddp",
    "fsdp": "fsdp",
    "fsdp, hybrid": {"name": "fsdp", "replicas": 2},
    "fsdp, offloaded": {"name": "fsdp", "offload": True},
    "deepspeed-3": {"name": "deepspeed", "stage": 3},
    "deepspeed-3, hpz": {"name": "deepspeed", "stage": 3, "hpz": 2},
}
SHARDED = ("fsdp", "fsdp, offloaded", "deepspeed-3", "deepspeed-3, hpz")
ROWS = {
    "sums": [(f"{a}+{b}=", str(a + b)) for a in range(4) for b in (1, 22)] + [("two and two and one: ", "five")],
    "films": [("a fine film", "good"), ("a dull film", "bad"), ("film", "good"), ("no film at all", "bad")],
}


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Any], dict[str, Path | None]]:
    """A run of two tasks, and its models: the base, adapters of different layers, and one with a trained head."""
    folder = tmp_path_factory.mktemp("gang")
    model = tiny_llama()
    with torch.no_grad():
        model.lm_head.weight.mul_(20)
    tree: dict[str, Any] = {
        "name": "run",
        "model": {"path": str(save(model, folder / "tiny"))},
        "tasks": {},
        "train": {"steps": 1, "max_length": 40},
        "evaluate": {"batch_size": 3, "max_new_tokens": 5},
    }
    for name, rows in ROWS.items():
        path = folder / f"{name}.jsonl"
        path.write_text("".join(json.dumps({"prompt": prompt, "response": text}) + "\n" for prompt, text in rows))
        tree["tasks"][name] = {"train": str(path), "test": str(path)}
    tree["tasks"]["films"]["labels"] = ["good", "bad"]
    run = config.validate(tree)
    specs = {
        "all": Spec(rank=4, alpha=8.0, seed=3),
        "some": Spec(rank=2, alpha=8.0, seed=4, targets=("q_proj", "down_proj")),
        "head": Spec(rank=4, alpha=8.0, seed=5, modules_to_save=("lm_head",)),
    }
    return tree, {"base": None, **{name: _adapter(folder / name, run, spec) for name, spec in specs.items()}}


def _adapter(path: Path, run: config.Run, spec: Spec) -> Path:
    model = load_model(run.model)
    attach.attach(model, spec)
    generator = torch.Generator().manual_seed(0)
    for values in model.parameters():
        if values.requires_grad:
            values.data.add_(torch.randn(values.shape, generator=generator), alpha=0.5)
    file.save(attach.extract(model, name="t", base=identity(run.model)), path)
    return path


def measured(tree: dict[str, Any], models: dict[str, Path | None], engines: dict[str, Any]) -> dict[str, Any]:
    """On a rank: engine -> figures, intervals and gathered bytes."""
    from lori_dist.engines.deepspeed import forget_groups

    world, found = from_environment(), {}
    for name, engine in engines.items():
        run = config.validate({**tree, "evaluate": {**tree["evaluate"], "engine": engine}})
        with Traffic() as traffic:
            of_models = evaluate_all(run, models, world=world)
        found[name] = {
            "values": {model: one.values for model, one in of_models.items()},
            "intervals": {model: one.intervals for model, one in of_models.items()},
            "gathered": traffic.gathered,
        }
        forget_groups()
    return found


def assert_equal(found: dict[str, Found], expected: dict[str, Found]) -> None:
    """Losses to rounding, all else exactly."""
    for model, of_model in expected.items():
        for task, values in of_model.values.items():
            assert list(found[model].values[task]) == list(values)
            for metric, value in values.items():
                tolerance = 1e-6 if metric == "loss" else 0.0
                assert found[model].values[task][metric] == pytest.approx(value, rel=tolerance), (model, task, metric)
        assert found[model].intervals == of_model.intervals


@pytest.mark.parametrize("world_size", [2, pytest.param(4, marks=pytest.mark.slow)])
def test_ranks_give_the_figures_of_one_process(
    made: tuple[dict[str, Any], dict[str, Path | None]], world_size: int
) -> None:
    tree, models = made
    expected = evaluate_all(config.validate(tree), models)
    assert len({json.dumps(found.values) for found in expected.values()}) == len(models)
    assert any(0 < value < 1 for value in (found.values["films"]["choice"] for found in expected.values()))
    for rank in run_distributed(measured, tree, models, ENGINES, world_size=world_size):
        for engine in ENGINES:
            values, intervals = rank[engine]["values"], rank[engine]["intervals"]
            found = {name: Found(values=values[name], intervals=intervals[name]) for name in models}
            assert_equal(found, expected)


def test_one_process_gives_the_same_for_any_batch_and_alone(
    made: tuple[dict[str, Any], dict[str, Path | None]],
) -> None:
    tree, models = made
    expected = evaluate_all(config.validate(tree), models)
    wide = config.validate({**tree, "evaluate": {**tree["evaluate"], "batch_size": 32}})
    assert_equal(evaluate_all(wide, models), expected)
    assert_equal(evaluate_all(wide, {"some": models["some"]}), {"some": expected["some"]})


def test_a_model_of_several_gathers_as_much_as_one(made: tuple[dict[str, Any], dict[str, Path | None]]) -> None:
    """Counted at the collectives: three models in one pass, and one after another."""
    tree, models = made
    routed: dict[str, Path | None] = {name: models[name] for name in ("base", "all", "some")}
    engines = {name: ENGINES[name] for name in ("fsdp", "deepspeed-3")}
    for rank in run_distributed(gathered, tree, routed, engines, world_size=2):
        for engine, (together, in_turn) in rank.items():
            assert together == pytest.approx(in_turn / 3, rel=0.1), engine


def gathered(tree: dict[str, Any], models: dict[str, Path | None], engines: dict[str, Any]) -> dict[str, Any]:
    """On a rank: engine -> bytes that the models gather together and in turn."""
    together = measured(tree, models, engines)
    in_turn = [measured(tree, {name: path}, engines) for name, path in models.items()]
    return {name: (together[name]["gathered"], sum(one[name]["gathered"] for one in in_turn)) for name in engines}


def test_what_was_measured_before_a_kill_is_not_measured_again(
    made: tuple[dict[str, Any], dict[str, Path | None]], tmp_path: Path
) -> None:
    tree, models = made
    run = config.validate(tree)
    names = ("base", "all")
    stores = {name: Store(measured=tmp_path / "m", predictions=tmp_path / "p", label={"model": name}) for name in names}
    some: dict[str, Path | None] = {name: models[name] for name in names}
    expected = evaluate_all(run, some)
    seen: list[tuple[str, str, str]] = []

    def record(name: str, line: dict[str, Any]) -> None:
        seen.append((name, line["task"], line["metric"]))
        if len(seen) == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        evaluate_all(run, some, record=record, stores=stores)
    with (tmp_path / "p").open("a") as file:
        file.write('{"model": "base", "task": "films", "metric": "choice", "row": 1, "score": 9.0}\n{"model": "ba')
    again: list[tuple[str, str, str]] = []
    found = evaluate_all(
        run, some, record=lambda name, line: again.append((name, line["task"], line["metric"])), stores=stores
    )
    assert found == expected
    assert not set(again) & set(seen)
    assert len(again) + len(seen) == sum(len(values) for one in expected.values() for values in one.values.values())
    lines = [json.loads(line) for line in (tmp_path / "p").read_text().splitlines()]
    assert len(lines) == 2 * (2 * len(ROWS["sums"]) + 3 * len(ROWS["films"]))
    of_choice = [line for line in lines if (line["model"], line["metric"]) == ("all", "choice")]
    assert [line["prompt"] for line in of_choice] == [prompt for prompt, _ in ROWS["films"]]
    assert all(line["score"] == float(line["response"] == line["answer"]) for line in of_choice)
    share = sum(line["score"] for line in of_choice) / len(of_choice)
    assert share == found["all"].values["films"]["choice"]
    low, high = found["all"].intervals["films"]["choice"]
    assert low <= share <= high
    assert "loss" not in found["all"].intervals["films"]
