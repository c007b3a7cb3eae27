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

from lori_dist import config
from lori_dist.cluster import comparison
from lori_dist.errors import ConfigError, JobError
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
