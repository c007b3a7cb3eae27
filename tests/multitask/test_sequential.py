"""The plan of trainings one after another."""

import json
from pathlib import Path
from typing import Any

import pytest

from lori_dist import config
from lori_dist.errors import ConfigError
from lori_dist.jobs import Job
from lori_dist.multitask.sequential import plan


@pytest.fixture
def tree(tmp_path: Path) -> dict[str, Any]:
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "rows.jsonl").write_text(json.dumps({"prompt": "a", "response": "b"}))
    rows = str(tmp_path / "rows.jsonl")
    return {
        "name": "demo",
        "model": {"path": str(tmp_path)},
        "tasks": {name: {"train": rows, "test": rows} for name in ("safety", "math", "code")},
        "adapter": {"share_projection": True},
        "train": {"steps": 1},
        "multitask": "sequential",
    }


def planned(tree: dict[str, Any]) -> dict[str, Job]:
    run = config.validate(tree)
    return {job.name: job for job in plan(run, **run.multitask.options)}


def test_it_is_a_chain_with_an_evaluation_after_each_training(tree: dict[str, Any]) -> None:
    jobs = planned(tree)
    assert {name: job.needs for name, job in jobs.items()} == {
        "train-safety": (),
        "train-math": ("train-safety",),
        "train-code": ("train-math",),
        "evaluate-base": (),
        "evaluate-safety": ("train-safety",),
        "evaluate-math": ("train-math",),
        "evaluate-code": ("train-code",),
    }
    assert len({jobs[f"train-{task}"].settings["seed"] for task in tree["tasks"]}) == 1
    assert jobs["train-code"].settings["sequel"] == {"before": ["safety", "math"], "masks": "independent"}
    assert set(jobs["evaluate-safety"].settings["tasks"]) == {"safety", "math", "code"}


def test_what_comes_before_is_part_of_a_job_and_what_comes_after_is_not(tree: dict[str, Any]) -> None:
    before = planned(tree)
    tree["tasks"] = {name: tree["tasks"][name] for name in ("safety", "code")}
    after = planned(tree)
    assert before["train-safety"].fingerprint == after["train-safety"].fingerprint
    assert before["train-code"].fingerprint != after["train-code"].fingerprint


def test_the_order_can_be_another_one(tree: dict[str, Any]) -> None:
    order = ["code", "safety", "math"]
    jobs = planned({**tree, "multitask": {"name": "sequential", "order": order}})
    assert [job.settings["task"] for job in jobs.values() if job.kind == "train"] == order
    tree["tasks"] = {name: tree["tasks"][name] for name in order}
    assert jobs == planned(tree)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"adapter": {}}, "adapter.share_projection: is false, and tasks in sequence have one A; set it to true"),
        ({"merges": {"all": {"method": "concat"}}}, "merges: got all"),
        (
            {
                "adapter": {"share_projection": True, "density": 0.4},
                "multitask": {"name": "sequential", "masks": "disjoint"},
            },
            "adapter.density: got 0.4, and masks that have no entry in common are at most 2 then; give 0.333 or",
        ),
        (
            {"adapter": {"share_projection": True, "form": "mtl_lora"}},
            "adapter.form: mtl_lora trains the tasks together, and multitask is sequential; set that to joint, or use",
        ),
        (
            {
                "adapter": {"share_projection": True, "form": "dac"},
                "multitask": {"name": "sequential", "masks": "disjoint"},
            },
            "multitask.masks: got disjoint, which is for the form lori, and adapter.form is dac; set it to independent",
        ),
        ({"multitask": {"name": "sequential", "masks": "apart"}}, r"multitask\.masks: got 'apart'"),
        (
            {"multitask": {"name": "sequential", "order": ["math", "safety", "math"]}},
            "multitask.order: got math, safety, math; wanted each of safety, math, code once",
        ),
        ({"evaluate": {"tasks": "own"}}, "evaluate.tasks: got own, and what a sequence did to its tasks is known from"),
    ],
)
def test_what_it_cannot_be_is_refused(tree: dict[str, Any], change: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        planned({**tree, **change})


@pytest.mark.parametrize(("density", "num_tasks"), [(1 / 3, 3), (0.1, 10), (0.2, 5), (0.5, 2)])
def test_masks_may_fill_all_of_b(tree: dict[str, Any], density: float, num_tasks: int) -> None:
    [task, *_] = tree["tasks"].values()
    tree["tasks"] = {f"task{number}": task for number in range(num_tasks)}
    tree["adapter"]["density"] = density
    assert planned({**tree, "multitask": {"name": "sequential", "masks": "disjoint"}})


def test_a_form_for_it_may_be_trained_together_or_one_after_the_other(tree: dict[str, Any]) -> None:
    tree["adapter"]["form"] = "dac"
    assert planned(tree)["train-code"].settings["adapter"]["form"] == {"name": "dac"}
    with pytest.raises(ConfigError, match="dac trains the tasks together, or one after the other, and multitask is in"):
        config.validate({**tree, "multitask": "independent"})
