"""The plan of joint training."""

import json
from pathlib import Path
from typing import Any

import pytest

from lori_dist import config
from lori_dist.errors import ConfigError
from lori_dist.jobs import Job
from lori_dist.multitask.joint import plan


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
        "multitask": "joint",
    }


def planned(tree: dict[str, Any]) -> dict[str, Job]:
    run = config.validate(tree)
    return {job.name: job for job in plan(run, **run.multitask.options)}


def with_options(tree: dict[str, Any], **options: Any) -> dict[str, Any]:
    return {**tree, "multitask": {"name": "joint", **options}}


def test_one_adapter_is_trained_and_measured_beside_the_base(tree: dict[str, Any]) -> None:
    jobs = planned(tree)
    assert {name: job.needs for name, job in jobs.items()} == {
        "train-joint": (),
        "evaluate-base": (),
        "evaluate-joint": ("train-joint",),
    }
    assert set(jobs["evaluate-joint"].settings["tasks"]) == {"math", "code", "nlu"}


def test_the_training_knows_how(tree: dict[str, Any]) -> None:
    options = {"projection": "in_place", "granularity": "global", "reduce": "mean", "seed": 4, "weights": {"code": 2.5}}
    settings = planned(with_options(tree, **options))["train-joint"].settings
    assert settings["joint"] == {**options, "tasks": ["math", "code", "nlu"], "weights": [1.0, 2.5, 1.0]}


@pytest.mark.parametrize(
    ("given", "wanted"),
    [
        ({}, {"projection": "original", "granularity": "matrix"}),
        ({"balance": "ortho"}, {"projection": "original", "granularity": "matrix"}),
        ({"balance": {"name": "ortho", "against": "in_place"}}, {"projection": "in_place", "granularity": "matrix"}),
        ({"balance": "none"}, {"projection": "none", "granularity": "matrix"}),
        ({"projection": "none"}, {"projection": "none", "granularity": "matrix"}),
        ({"balance": "pcgrad"}, {"balance": {"name": "pcgrad", "options": {}}, "granularity": "global"}),
        (
            {"balance": {"name": "cagrad", "c": 0.4}, "granularity": "layer"},
            {"balance": {"name": "cagrad", "options": {"c": 0.4}}, "granularity": "layer"},
        ),
        ({"sampling": {"nlu": 3, "math": 1, "code": 2}}, {"sampling": {"shares": [1.0, 2.0, 3.0]}}),
        ({"sampling": "proportional", "cap": 5}, {"sampling": {"temperature": 1.0, "cap": 5}}),
        ({"sampling": "equal"}, {}),
    ],
)
def test_balance_and_sampling_are_settings(tree: dict[str, Any], given: dict[str, Any], wanted: dict[str, Any]) -> None:
    joint = planned(with_options(tree, **given))["train-joint"].settings["joint"]
    assert {key: joint[key] for key in wanted} == wanted
    assert ("balance" in joint) != ("projection" in joint)
    assert ("sampling" in joint) == ("sampling" in wanted)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"balance": "cagard"}, r"^multitask\.balance: unknown 'cagard' in balances; .* Did you mean 'cagrad'\?"),
        ({"balance": {"name": "cagrad", "c": -1}}, r"^multitask\.balance\.c: got -1; it must be in \[0, inf\)"),
        ({"balance": {"c": 1}}, r"^multitask\.balance\.name: got None"),
        ({"balance": "nash", "projection": "none"}, r"^multitask\.projection: .* set only one"),
        ({"balance": "famo", "granularity": "layer"}, r"^multitask\.granularity: got 'layer', and famo takes global"),
        ({"temperature": 2}, r"^multitask\.temperature: got 2, and only sampling proportional has one; remove it"),
        (
            {"sampling": {"math": 1, "cod": 1}},
            r"^multitask\.sampling\.cod: unknown task; .*'code'\?\n.*code, nlu; give",
        ),
        ({"sampling": {"math": 1, "code": 0, "nlu": 1}}, r"^multitask\.sampling\.code: got 0; wanted a finite number"),
    ],
)
def test_a_balance_or_sampling_that_is_wrong_is_refused(
    tree: dict[str, Any], given: dict[str, Any], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        planned(with_options(tree, **given))


@pytest.mark.parametrize(
    "options",
    [
        {"projection": "none"},
        {"balance": "nash"},
        {"sampling": "proportional"},
        {"granularity": "layer"},
        {"reduce": "mean"},
        {"seed": 1},
        {"weights": {"nlu": 2.0}},
    ],
)
def test_another_way_is_another_training(tree: dict[str, Any], options: dict[str, Any]) -> None:
    before, after = planned(tree), planned(with_options(tree, **options))
    assert before["train-joint"].fingerprint != after["train-joint"].fingerprint
    assert before["evaluate-base"].fingerprint == after["evaluate-base"].fingerprint


def test_the_order_of_the_tasks_counts(tree: dict[str, Any]) -> None:
    """It is that of the rows in a batch, and of what the seed draws."""
    before = planned(tree)["train-joint"].fingerprint
    tree["tasks"] = dict(reversed(tree["tasks"].items()))
    assert planned(tree)["train-joint"].fingerprint != before


def test_a_trained_a_is_another_training_and_a_recomputed_one_is_not(tree: dict[str, Any]) -> None:
    prints = {
        projection: planned({**tree, "adapter": {"projection": projection}})["train-joint"].fingerprint
        for projection in ("cached", "recomputed", "trained")
    }
    assert prints["cached"] == prints["recomputed"] != prints["trained"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"merges": {"all": {"method": "concat"}}}, "merges: got all, and joint training makes one adapter"),
        ({"train": {"steps": 1, "batch_size": 2}}, "train.batch_size: got 2 for 3 tasks"),
        ({"multitask": {"name": "joint", "weights": {"cod": 2}}}, r"multitask\.weights\.cod: .* Did you mean 'code'\?"),
    ],
)
def test_what_it_cannot_be_is_refused(tree: dict[str, Any], change: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        planned({**tree, **change})


def test_all_mistakes_are_told_at_once(tree: dict[str, Any]) -> None:
    [task] = {"math"}
    tree["tasks"] = {"joint": {**tree["tasks"][task], "seed": 4}}
    with pytest.raises(ConfigError) as error:
        planned(tree)
    assert [line.partition(":")[0] for line in str(error.value).split("\n")] == [
        "tasks",
        "tasks.joint",
        "tasks.joint.seed",
    ]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"projection": "orignal"},
            r"multitask\.projection: got 'orignal'; it should be 'original', 'in_place' or",
        ),
        ({"granularity": "row"}, r"multitask\.granularity: got 'row'"),
        ({"weights": {"code": 0}}, r"multitask\.weights\.code: got 0; wanted a finite number above 0"),
        ({"weights": {"code": "x"}}, r"multitask\.weights: got "),
        ({"project": "none"}, r"multitask\.project: joint has no such option; .* Did you mean 'projection'\?"),
    ],
)
def test_an_option_that_is_wrong_is_refused_with_the_configuration(
    tree: dict[str, Any], options: dict[str, Any], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        planned(with_options(tree, **options))


def with_form(tree: dict[str, Any], form: Any, **more: Any) -> dict[str, Any]:
    return {**tree, "adapter": {"form": form}, **more}


def test_a_form_is_part_of_the_fingerprint_and_lori_is_as_it_was(tree: dict[str, Any]) -> None:
    plain, lori = planned(tree), planned(with_form(tree, "lori"))
    assert {name: job.fingerprint for name, job in plain.items()} == {n: job.fingerprint for n, job in lori.items()}
    assert "form" not in plain["train-joint"].settings["adapter"]
    mtl, own = (
        planned(with_form(tree, form))["train-joint"] for form in ("mtl_lora", {"name": "mtl_lora", "heads": 2})
    )
    assert len({plain["train-joint"].fingerprint, mtl.fingerprint, own.fingerprint}) == 3
    assert own.settings["adapter"]["form"] == {"name": "mtl_lora", "heads": 2}
    assert "seeds" not in own.settings
    of_tasks = planned(with_form(tree, {"name": "task_lora", "sharing": "none"}))["train-joint"]
    assert set(of_tasks.settings["seeds"]) == {"math", "code", "nlu"}


def test_updates_of_tasks_are_merged_from_one_training(tree: dict[str, Any]) -> None:
    merges = {"all": {"method": "ties"}, "two": {"method": "linear", "tasks": ["math", "nlu"]}}
    jobs = planned(with_form(tree, "mtl_lora", merges=merges))
    assert {name: job.needs for name, job in jobs.items()} == {
        "train-joint": (),
        "merge-all": ("train-joint",),
        "merge-two": ("train-joint",),
        "evaluate-base": (),
        "evaluate-joint": ("train-joint",),
        "evaluate-all": ("merge-all",),
        "evaluate-two": ("merge-two",),
    }
    assert jobs["merge-two"].settings["tasks"] == ["math", "nlu"]


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (
            {"multitask": "independent"},
            "adapter.form: mtl_lora trains the tasks together, and multitask is independent",
        ),
        ({"adapter": {"projection": "recomputed"}}, "adapter.projection: recomputed is for the form lori"),
        ({"adapter": {"form": "mtl_lra"}}, "adapter.form: unknown 'mtl_lra' in forms.*Did you mean 'mtl_lora'"),
        (
            {"adapter": {"form": {"name": "mtl_lora", "heads": 0}}},
            r"adapter.form.heads: got 0; it must be in \[1, inf\)",
        ),
        ({"adapter": {"form": "json.tool"}}, "adapter.form: json.tool has no function `form`"),
        (
            {"adapter": {"form": "thanora"}},
            "multitask.balance: got ortho, and the penalty of adapter.form thanora is no",
        ),
        ({"adapter": {"form": "thanora", "rank": 2}}, "adapter.rank: got 2 for 3 tasks, of which thanora gives each a"),
        (
            {"adapter": {"form": {"name": "mixlora", "experts": 4}, "rank": 8}},
            "adapter.form.experts: got 4, and adapter.rank is 8; give at least that",
        ),
        (
            {"adapter": {"form": {"name": "dac", "keep": 9}, "rank": 8}},
            "adapter.form.keep: got 9, and adapter.rank is 8",
        ),
        (
            {"adapter": {"form": "mixlora"}, "train": {"steps": 1, "sequence_parallel": 2}},
            "train.sequence_parallel: cannot be combined with adapter.form mixlora, which looks at whole rows",
        ),
        (
            {"adapter": {"form": "smora"}, "train": {"steps": 1, "sequence_parallel": 2}},
            "which looks at whole rows; remove it, or set adapter.form.bias to 0",
        ),
        (
            {"adapter": {"form": "mixlora"}, "evaluate": {"lm_eval": {"tasks": ["piqa"]}}},
            "evaluate.lm_eval: cannot be combined with adapter.form mixlora, which looks at the prompt",
        ),
        ({"merges": {"joint": {"method": "ties"}}}, "merges.joint: is the name of the adapter that is trained"),
        (
            {"merges": {"all": {"method": "ties", "search": {}}}},
            "merges.all.search: cannot be combined with adapter.form",
        ),
    ],
)
def test_what_a_form_cannot_be_combined_with_is_refused(tree: dict[str, Any], more: Any, message: str) -> None:
    adapter = {"form": "mtl_lora", **more.get("adapter", {})}
    with pytest.raises(ConfigError, match=message):
        planned({**tree, **more, "adapter": adapter})
