"""A run that trains tasks together, by the command a user gives."""

import json
from dataclasses import replace
from pathlib import Path

import pytest

from lori_dist import load_adapter
from lori_dist.config import Choice
from tests.cluster.trained import described, driven

pytestmark = [pytest.mark.ray, pytest.mark.slow]


def test_one_adapter_is_trained_and_measured_on_every_task(tmp_path: Path) -> None:
    run = described(tmp_path, workers=2)
    tasks = {
        "copy": run.tasks["copy"],
        "turn": replace(
            run.tasks["copy"], template=replace(run.tasks["copy"].template, prompt="{response}", response="{prompt}")
        ),
    }
    run = replace(run, tasks=tasks, multitask=Choice(name="joint"), train=replace(run.train, steps=4))
    with driven(run, tmp_path) as driver:
        assert driver.ends() == 0, driver.said()
    summary = json.loads((run.folder / "summary.json").read_text())
    assert list(summary["jobs"]) == ["train-joint", "evaluate-base", "evaluate-joint"]
    assert list(summary["adapters"]) == ["joint"]
    assert list(summary["evaluation"]) == ["base", "joint"]
    for model in summary["evaluation"].values():
        assert set(model) == {"copy", "turn"}
    for task, values in summary["evaluation"]["joint"].items():
        assert values["loss"] < summary["evaluation"]["base"][task]["loss"]
    [pair] = summary["adapters"]["joint"]["conflicts"]["pairs"]
    assert pair["tasks"] == ["copy", "turn"]
    assert load_adapter(summary["adapters"]["joint"]["path"]).blocks[0].name == "joint"
    assert (run.folder / "report-conflicts-1.png").exists()
    assert summary["report"] == {"path": str(run.folder / "report.html")}
    metrics = (run.folder / "train-joint" / "metrics.jsonl").read_text().splitlines()
    assert set(json.loads(metrics[-1])["task_losses"]) == {"copy", "turn"}
    with driven(run, tmp_path) as driver:
        assert driver.ends() == 0, driver.said()
    again = json.loads((run.folder / "summary.json").read_text())
    assert all(state["cached"] for state in again["jobs"].values())
