"""The benchmark of evaluation, at a size that says nothing."""

import json
from pathlib import Path

from lori_dist.__main__ import main

RATIOS = ("together_over_in_turn", "shared_over_apart", "written_over_generate")


def test_rows_and_ratios(tmp_path: Path) -> None:
    sizes = ["layers=1", "hidden=32", "vocabulary=64", "models=2", "tasks=2", "rows=3", "length=8", "new_tokens=3"]
    out = tmp_path / "evaluate.json"
    assert main(["bench", "evaluate", *sizes, "labels=2", "repetitions=1", "batch_size=2", "--out", str(out)]) == 0
    measured = json.loads(out.read_text())
    assert all(measured["ratios"][name] > 0 for name in RATIOS)
    ways = ["together", "in turn", "choice, shared", "choice, apart", "written", "generate"]
    assert [row["way"] for row in measured["rows"]] == ways
    assert all(row["rows_per_second"] > 0 for row in measured["rows"])
