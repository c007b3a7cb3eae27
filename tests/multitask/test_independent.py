"""The plan of independent tasks."""

import json
from pathlib import Path
from typing import Any

import pytest

from lori_dist import config
from lori_dist.jobs import Job, order
from lori_dist.multitask.independent import plan
from tests.multitask import combinations


@pytest.fixture
def tree(tmp_path: Path) -> dict[str, Any]:
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "rows.jsonl").write_text(json.dumps({"prompt": "a", "response": "b"}))
    rows = str(tmp_path / "rows.jsonl")
    return {
        "name": "demo",
        "model": {"path": str(tmp_path)},
        "tasks": {name: {"train": rows, "test": rows} for name in ("math", "code", "nlu")},
        "train": {"steps": 1},
        "merges": {
            "all": {"method": "concat"},
            "two": {"method": "linear", "tasks": ["nlu", "math"], "weights": [1, 2]},
        },
    }


def planned(tree: dict[str, Any]) -> dict[str, Job]:
    return {job.name: job for job in plan(config.validate(tree))}


def test_each_task_is_trained_merged_and_evaluated(tree: dict[str, Any]) -> None:
    assert {name: job.needs for name, job in planned(tree).items()} == {
        "train-math": (),
        "train-code": (),
        "train-nlu": (),
        "merge-all": ("train-math", "train-code", "train-nlu"),
        "merge-two": ("train-nlu", "train-math"),
        "evaluate-base": (),
        "evaluate-math": ("train-math",),
        "evaluate-code": ("train-code",),
        "evaluate-nlu": ("train-nlu",),
        "evaluate-all": ("merge-all",),
        "evaluate-two": ("merge-two",),
    }


def test_models_may_be_measured_on_their_own_tasks_alone(tree: dict[str, Any]) -> None:
    on_all = planned(tree)
    jobs = planned({**tree, "evaluate": {"tasks": "own"}})
    measured = {name: list(job.settings["tasks"]) for name, job in jobs.items() if job.kind == "evaluate"}
    assert measured == {
        "evaluate-base": ["math", "code", "nlu"],
        "evaluate-math": ["math"],
        "evaluate-code": ["code"],
        "evaluate-nlu": ["nlu"],
        "evaluate-all": ["math", "code", "nlu"],
        "evaluate-two": ["math", "nlu"],
    }
    same = {name for name, job in jobs.items() if job.fingerprint == on_all[name].fingerprint}
    assert set(jobs) - same == {"evaluate-math", "evaluate-code", "evaluate-nlu", "evaluate-two"}


def test_the_jobs_say_what_to_do(tree: dict[str, Any]) -> None:
    jobs = planned(tree)
    assert jobs["train-code"].kind == "train"
    assert jobs["train-code"].settings["task"] == "code"
    merge = jobs["merge-two"].settings
    assert (merge["method"], merge["tasks"], merge["weights"]) == ({"name": "linear"}, ["nlu", "math"], [1.0, 2.0])
    assert jobs["evaluate-base"].settings["adapter"] is None
    assert jobs["evaluate-two"].settings["adapter"] == "merge-two"


def test_the_plan_is_in_an_order_that_can_be_done(tree: dict[str, Any]) -> None:
    jobs = plan(config.validate(tree))
    assert order(jobs) == jobs


def test_a_further_task_leaves_the_training_of_the_others_as_it_is(tree: dict[str, Any]) -> None:
    before = planned(tree)
    tree["tasks"] = {"new": tree["tasks"]["math"], **tree["tasks"]}
    after = planned(tree)
    assert all(after[name].fingerprint == before[name].fingerprint for name in before if name.startswith("train-"))
    assert after["merge-two"].fingerprint == before["merge-two"].fingerprint
    assert after["merge-all"].fingerprint != before["merge-all"].fingerprint


def test_without_merges_there_are_trainings_and_evaluations(tree: dict[str, Any]) -> None:
    tree["merges"] = {}
    assert {job.kind for job in plan(config.validate(tree))} == {"train", "evaluate"}


def test_the_table_of_what_combines_is_up_to_date() -> None:
    assert combinations.README.read_text(encoding="utf-8") == combinations.written()
