"""The benchmark of rows, at a size that says nothing."""

import json
from pathlib import Path

import pytest

from lori_dist.__main__ import main

pytestmark = pytest.mark.slow


def test_starts_are_measured_beside_map(tmp_path: Path) -> None:
    assert main(["bench", "data", "rows=1500", "ranks=2", "--out", str(tmp_path / "data.json")]) == 0
    found = json.loads((tmp_path / "data.json").read_text())
    assert [(row["rows"], row["start"]) for row in found["rows"]] == [
        (1000, "first"), (1000, "second"), (1500, "first"), (1500, "second"), (1500, "datasets.map")
    ]  # fmt: skip
    assert all(row["first_step_seconds"] > 0 for row in found["rows"])
    ratios = found["ratios"]
    assert 0 < ratios["idle"]["by_tokens"] < ratios["idle"]["by_rows"] < 1
    assert 1 < ratios["computed"]["by_tokens"] < ratios["computed"]["by_rows"]
    assert 0 <= ratios["data_wait"] < 1
    assert {"tokens_over_map", "first_start_over_map", "second_start_seconds", "memory_bytes"} <= set(ratios)
