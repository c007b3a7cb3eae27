"""Runs side by side."""

import json
import statistics
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml

from lori_dist import config, folder
from lori_dist.cluster import comparison
from lori_dist.errors import ConfigError, JobError, Stopped
from lori_dist.jobs import plan
from tests.cluster.trained import described


@pytest.fixture
def run(tmp_path: Path) -> config.Run:
    """With a second task, that turns the first one around."""
    run = described(tmp_path)
    copy = run.tasks["copy"]
    turned = replace(copy, template=replace(copy.template, prompt="{response}", response="{prompt}"))
    run = replace(run, tasks={"copy": copy, "turn": turned}, train=replace(run.train, steps=3))
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(config.dump(run)))
    return run


@pytest.fixture
def tree(run: config.Run, tmp_path: Path) -> dict[str, Any]:
    return {
        "name": "both",
        "config": str(tmp_path / "run.yaml"),
        "seeds": [0, 3],
        "metric": "loss",
        "variants": {
            "sparse": {"rows": {"alone": "own", "untrained": "base"}},
            "joint": {"settings": ["multitask=joint", "train.lr=1e-3"], "rows": {"together": "joint"}},
        },
    }


def loaded(tree: dict[str, Any], tmp_path: Path) -> comparison.Comparison:
    (tmp_path / "comparison.yaml").write_text(yaml.safe_dump(tree, sort_keys=False))
    return comparison.load(tmp_path / "comparison.yaml")


def test_each_variant_runs_with_each_seed(tree: dict[str, Any], tmp_path: Path) -> None:
    runs = comparison.runs(loaded(tree, tmp_path), ["train.steps=5"])
    assert {key: run.name for key, run in runs.items()} == {
        ("sparse", 0): "both-sparse-0",
        ("sparse", 3): "both-sparse-3",
        ("joint", 0): "both-joint-0",
        ("joint", 3): "both-joint-3",
    }
    assert [(run.adapter.seed, run.train.seed) for run in runs.values()] == [(0, 0), (3, 3)] * 2
    assert {run.train.steps for run in runs.values()} == {5}
    assert runs["joint", 3].multitask.name == "joint"


def test_mistakes_of_all_variants_are_told_at_once(tree: dict[str, Any], tmp_path: Path) -> None:
    tree["metric"] = "los"
    tree["variants"]["sparse"]["rows"]["alone"] = "onw"
    tree["variants"]["joint"]["settings"].append("train.step=3")
    tree["variants"]["other"] = {"settings": ["multitask=joint"], "rows": {"x": "own"}}
    with pytest.raises(ConfigError) as error:
        comparison.runs(loaded(tree, tmp_path))
    lines = str(error.value).split("\n")
    assert [line.partition(": ")[0] for line in lines] == [
        "variants.sparse.rows.alone",
        "metric",
        "variants.joint",
        "variants.other.rows.x",
    ]
    assert "Did you mean 'own'?" in lines[0]
    assert "train.step" in lines[2]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"seeds": []}, "seeds: got a list; wanted at least one$"),
        ({"seed": [1]}, "seed: unknown key; there are name, config, seeds, .* Did you mean 'seeds'"),
        ({"name": "a/b"}, "name: got 'a/b'; names are "),
        ({"variants": {}}, "variants: got a mapping; wanted at least one$"),
        ({"variants": {"x": 1}}, "variants.x: got 1; wanted a mapping"),
        ({"config": None}, "config: got nothing; wanted text$"),
        (
            {"variants": {"x": {"rows": {"r": "own"}, "grid": [[]]}}},
            "variants.x.grid.*: got a list; wanted at least one$",
        ),
    ],
)
def test_a_file_of_another_form_is_refused(
    tree: dict[str, Any], tmp_path: Path, change: dict[str, Any], message: str
) -> None:
    with pytest.raises(ConfigError, match=f"^{message}"):
        loaded({**tree, **change}, tmp_path)


def test_where_a_run_fails_the_others_are_done(tree: dict[str, Any], tmp_path: Path) -> None:
    done = []

    def execute(run: config.Run) -> dict[str, Any]:
        if run.name == "both-sparse-0":
            raise JobError("train-copy: no room")
        done.append(run.name)
        return {"evaluation": {name: {"copy": {"loss": 1.0}} for name in ("base", "copy", "joint")}}

    with pytest.raises(JobError, match=r"^both-sparse-0: train-copy: no room\nthe other runs are done"):
        comparison.compare(loaded(tree, tmp_path), execute=execute)
    assert done == ["both-sparse-3", "both-joint-0", "both-joint-3"]


def test_a_stop_ends_it_at_once(tree: dict[str, Any], tmp_path: Path) -> None:
    begun = []

    def execute(run: config.Run) -> dict[str, Any]:
        begun.append(run.name)
        raise Stopped("both-sparse-0: stopped")

    with pytest.raises(Stopped):
        comparison.compare(loaded(tree, tmp_path), execute=execute)
    assert begun == ["both-sparse-0"]


@pytest.fixture
def tuned(tree: dict[str, Any], tmp_path: Path) -> dict[str, Any]:
    """Sparse adapters with three learning rates, and the best of them with other steps."""
    rows = (tmp_path / "test.jsonl").read_text().splitlines(keepends=True)
    (tmp_path / "validation.jsonl").write_text("".join(rows[:3]))
    described = yaml.safe_load((tmp_path / "run.yaml").read_text())
    for task in described["tasks"].values():
        task["validation"] = str(tmp_path / "validation.jsonl")
    (tmp_path / "run.yaml").write_text(yaml.safe_dump({**described, "merges": {"all": {"method": "concat"}}}))
    grid = [[f"train.lr={lr}", "train.warmup_steps=1"] for lr in ("1e-3", "1e-2", "1e-1")]
    sparse = {"grid": grid, "rows": {"untrained": "base", "merged": "all", "alone": "own"}}
    longer = {"settings": ["train.steps=9"], "tuned_as": "sparse", "seeds": [7], "rows": {"longer": "own"}}
    return {**tree, "metric": "exact_match", "variants": {"sparse": sparse, "longer": longer}}


def test_the_best_of_a_grid_on_validation_rows_is_what_all_seeds_have(tuned: dict[str, Any], tmp_path: Path) -> None:
    done: list[config.Run] = []

    def execute(run: config.Run) -> dict[str, Any]:
        done.append(run)
        run.folder.mkdir(parents=True)
        share = {1e-3: 0.25, 1e-2: 0.75, 1e-1: 0.5}[run.train.lr]
        values = {"copy": {"exact_match": share}, "turn": {"exact_match": share / 2}}
        names = ("base", *run.tasks, *run.merges)
        return {
            "evaluation": {name: values for name in names},
            "intervals": {"copy": {"copy": {"exact_match": [0.0, 1.0]}}},
            "test_rows": {"copy": 100, "turn": 100},
        }

    found = comparison.compare(loaded(tuned, tmp_path), execute=execute)
    grid, seeds = done[:3], done[3:]
    assert [run.name for run in grid] == [f"both-sparse-grid-{number}" for number in range(3)]
    assert [run.name for run in seeds] == ["both-sparse-0", "both-sparse-3", "both-longer-7"]
    assert all(run.merges == {} and run.train.seed == 0 for run in grid)
    assert all(Path(task.test).name == "validation.jsonl" for run in grid for task in run.tasks.values())
    assert all(Path(task.test).name == "test.jsonl" for run in seeds for task in run.tasks.values())
    assert [(run.train.lr, run.train.warmup_steps) for run in seeds] == [(1e-2, 1)] * 3
    assert [run.train.steps for run in seeds] == [3, 3, 9]
    assert found["tuned"] == {
        "sparse": {"settings": ["train.lr=1e-2", "train.warmup_steps=1"], "scores": [0.1875, 0.5625, 0.375]}
    }
    assert found["rows"]["alone"]["interval"] == {"copy": pytest.approx([0.6570, 0.8246], abs=1e-4)}
    assert found["test_rows"] == {"copy": 100, "turn": 100}
    assert len(found["rows"]["longer"]["scores"]) == 1


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"tuned_as": "sparser"},
            "variants.longer.tuned_as: got 'sparser'; wanted an earlier variant with a grid: sparse",
        ),
        ({"grid": [["train.lr=1"]]}, "variants.longer.tuned_as: is given, and so is a grid; set only one of them"),
        ({"tuned_as": None, "grid": [["train.lr=1"]]}, r"variants: their grids differ in size \(sparse 3, longer 1\)"),
        ({"tuned_as": None, "grid": [["train.lrr=1"]] * 3}, "variants.longer: train.lrr"),
        ({"seeds": [7, 7]}, "variants: two of their runs would be called both-longer-7; rename a variant"),
        (
            {"tuned_as": None, "grid": [["train.lr=1"]] * 3, "rows": {"x": "base"}},
            "variants.longer: grid: no row is of",
        ),
        (
            {"tuned_as": None, "grid": [["train.lr=1", "tasks.copy.validation=null"]] * 3},
            "variants.longer: tasks.copy.validation: is not set, and a grid is tried on those rows",
        ),
    ],
)
def test_a_grid_that_cannot_be_tried_is_refused(
    tuned: dict[str, Any], tmp_path: Path, change: dict[str, Any], message: str
) -> None:
    tuned["variants"]["longer"] |= change
    with pytest.raises(ConfigError, match=message):
        comparison.runs(loaded(tuned, tmp_path))


def test_what_another_run_has_finished_is_taken_and_listed(tuned: dict[str, Any], tmp_path: Path) -> None:
    """The first list of the grid is done by hand; a variant with the same settings needs no training then."""
    described = loaded(tuned, tmp_path)
    assert [state for _, state in comparison.states(described)] == ["0 of 5 jobs are finished"] * 3 + [
        "after its grid"
    ] * 3
    done: dict[str, list[str]] = {}

    def execute(run: config.Run) -> dict[str, Any]:
        jobs = plan(run)
        done[run.name] = [job.name for job in jobs if folder.finished(run.folder, job) is None]
        with folder.lock(run.folder):
            for job in jobs:
                if job.name in done[run.name]:
                    folder.open(run.folder, job)
                    folder.publish(run.folder, job, {})
        values = {task: {"exact_match": run.train.lr} for task in run.tasks}
        summary = {"evaluation": {model: values for model in ("base", *run.tasks, *run.merges)}}
        (run.folder / "summary.json").write_text(json.dumps(summary))
        return summary

    comparison.compare(described, execute=execute)
    of_tests = ["merge-all", "evaluate-base", "evaluate-copy", "evaluate-turn", "evaluate-all"]
    assert done["both-sparse-grid-0"] == ["train-copy", "train-turn", "evaluate-base", "evaluate-copy", "evaluate-turn"]
    assert done["both-sparse-grid-1"] == ["train-copy", "train-turn", "evaluate-copy", "evaluate-turn"]
    assert done["both-sparse-0"] == of_tests  # the trainings are those of the grid
    assert done["both-sparse-3"] == [
        "train-copy",
        "train-turn",
        *(name for name in of_tests if name != "evaluate-base"),
    ]
    assert {state for _, state in comparison.states(described)} == {"finished"}


@pytest.mark.ray
@pytest.mark.slow
def test_its_figures_are_those_of_the_runs(tree: dict[str, Any], run: config.Run, tmp_path: Path) -> None:
    loaded(tree, tmp_path)
    command = [sys.executable, "-m", "lori_dist", "compare", str(tmp_path / "comparison.yaml")]
    printed = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    result = json.loads((run.folder.parent / "both.json").read_text())
    assert list(result["rows"]) == ["alone", "untrained", "together"]
    summaries = [json.loads((run.folder.parent / f"both-joint-{seed}" / "summary.json").read_text()) for seed in (0, 3)]
    for task in ("copy", "turn"):
        values = [summary["evaluation"]["joint"][task]["loss"] for summary in summaries]
        assert result["rows"]["together"]["mean"][task] == pytest.approx(statistics.fmean(values))
        assert result["rows"]["together"]["std"][task] == pytest.approx(statistics.stdev(values))
        assert result["rows"]["untrained"]["std"][task] == 0
        assert f"{statistics.fmean(values):.3f} +- {statistics.stdev(values):.3f}" in printed
    of_seed = json.loads((run.folder.parent / "both-sparse-3" / "summary.json").read_text())
    assert result["rows"]["alone"]["scores"][1]["turn"] == of_seed["evaluation"]["turn"]["turn"]["loss"]
    assert result["rows"]["alone"]["trained"] == sum(one["trained"] for one in of_seed["adapters"].values())
    assert 0 < result["rows"]["together"]["bytes"] < result["rows"]["alone"]["bytes"]
    assert result["rows"]["together"]["step_seconds"] > 0
    assert result["rows"]["untrained"]["bytes"] is None
    subprocess.run(command, capture_output=True, check=True)
    again = json.loads((run.folder.parent / "both-sparse-3" / "summary.json").read_text())
    assert all(state["cached"] for state in again["jobs"].values())
