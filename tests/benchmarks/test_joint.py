"""The benchmark of joint training, at a size that says nothing."""

import json
from pathlib import Path

import pytest

from lori_dist.__main__ import main
from lori_dist.benchmarks.joint import METHODS, run
from lori_dist.errors import ConfigError
from tests.distributed import run_distributed


def measure(out: Path) -> int:
    sizes = ["layers=1", "hidden=32", "rows=4", "length=8", "rank=2", "steps=2", "tasks=[2, 3]"]
    return main(["bench", "joint", *sizes, "--out", str(out)])


def test_rows_and_ratios(tmp_path: Path) -> None:
    assert run_distributed(measure, tmp_path / "joint.json", world_size=1) == [0]
    measured = json.loads((tmp_path / "joint.json").read_text())
    assert list(measured["ratios"]) == list(METHODS)
    assert [(row["method"], row["tasks"], row["way"]) for row in measured["rows"]] == [
        (method, tasks, way) for method in METHODS for tasks in (2, 3) for way in ("plain", "joint", "loop")
    ]
    for ratios in measured["ratios"].values():
        for of_tasks in ratios.values():
            assert all(of_tasks[name] > 0 for name in ("joint_over_plain", "loop_over_plain", "loop_over_joint"))


def test_more_tasks_than_rows_are_refused() -> None:
    with pytest.raises(ConfigError, match="bench joint: rows: got 4 for 8 tasks"):
        run(rows=4)
