"""The benchmark of merges, at a size that says nothing."""

import json
from pathlib import Path

import pytest

from lori_dist.__main__ import main
from lori_dist.benchmarks import merge

pytestmark = pytest.mark.slow


def test_every_method_is_measured_on_both_sides(tmp_path: Path) -> None:
    words = ["layers=2", "peft_layers=1", "hidden=64", "ffn=96", "kv=32", "rank=4", "repetitions=1"]
    assert main(["bench", "merge", *words, "--out", str(tmp_path / "merge.json")]) == 0
    found = json.loads((tmp_path / "merge.json").read_text())
    assert [(row["name"], row["method"], row["layers"]) for row in found["rows"]] == [
        (name, method, layers) for method in merge.METHODS for name, layers in (("ours", 2), ("ours", 1), ("peft", 1))
    ]
    assert all(row["seconds"] > 0 and row["peak_mb"] > 100 for row in found["rows"])
    assert all(row["load_seconds"] > 0 and row["save_seconds"] > 0 for row in found["rows"] if row["name"] == "peft")
    assert {method: set(ratios) for method, ratios in found["ratios"].items()} == {
        method: {"seconds", "file_to_file", "peak_bytes"} for method in merge.METHODS
    }
