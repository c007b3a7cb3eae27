"""What a run measures before it trains, by the command a user gives: moments, and clusters of rows."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from lori_dist import load_adapter
from lori_dist.config import Choice, Merge, Run
from tests.cluster.trained import described, driven

pytestmark = [pytest.mark.ray, pytest.mark.slow]


def two_tasks(folder: Path) -> Run:
    run = described(folder, workers=2, cpus_per_worker=0.5)
    one = run.tasks["copy"]
    turned = replace(one, template=replace(one.template, prompt="{response}", response="{prompt}"))
    merges = {"all": Merge(method=Choice(name="cp"))}
    return replace(run, tasks={"copy": one, "turn": turned}, merges=merges, train=replace(run.train, steps=4))


def summary_of(run: Run, folder: Path) -> dict[str, Any]:
    with driven(run, folder) as driver:
        assert driver.ends() == 0, driver.said()
    found: dict[str, Any] = json.loads((run.folder / "summary.json").read_text())
    return found


def test_moments_of_all_tasks_are_measured_once_by_one_gang(tmp_path: Path) -> None:
    run = two_tasks(tmp_path)
    run = replace(run, adapter=replace(run.adapter, init="osrm"))
    run = replace(
        run, train=replace(run.train, engine=Choice(name="fsdp")), cluster=replace(run.cluster, packing="auto")
    )
    found = summary_of(run, tmp_path)
    assert list(found["jobs"])[:4] == ["moments-copy", "moments-turn", "train-copy", "train-turn"]
    assert found["needs"]["train-copy"] == ["moments-turn"]
    assert found["jobs"]["moments-copy"]["packed_with"] == ["moments-turn"]
    assert found["jobs"]["train-copy"]["packed_with"] == ["train-turn"]
    assert set(found["evaluation"]) == {"base", "copy", "turn", "all"}
    for task in run.tasks:
        [block] = load_adapter(found["adapters"][task]["path"]).blocks
        assert block.seed is None
        assert found["evaluation"][task][task]["loss"] < found["evaluation"]["base"][task]["loss"]
    again = summary_of(run, tmp_path)
    assert all(state["cached"] for state in again["jobs"].values())


def test_clusters_of_rows_are_trained_merged_and_measured(tmp_path: Path) -> None:
    run = replace(two_tasks(tmp_path), multitask=Choice(name="clustered", options={"clusters": 2}))
    found = summary_of(run, tmp_path)
    assert list(found["jobs"]) == [
        *("cluster-rows", "train-cluster-1", "train-cluster-2", "merge-all"),
        *(f"evaluate-{model}" for model in ("base", "cluster-1", "cluster-2", "all")),
    ]
    assert list(found["adapters"]) == ["cluster-1", "cluster-2"]
    assert [set(values) for values in found["evaluation"].values()] == [{"copy", "turn"}] * 4
    assert json.loads((run.folder / "cluster-rows" / "job.json").read_text())["result"]["sizes"] > [0, 0]
    assert found["report"] == {"path": str(run.folder / "report.html")}
    again = summary_of(run, tmp_path)
    assert all(state["cached"] for state in again["jobs"].values())
