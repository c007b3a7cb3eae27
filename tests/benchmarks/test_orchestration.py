"""The benchmark of the orchestration, at its smallest."""

import json
from pathlib import Path

import pytest

from lori_dist.__main__ import main

pytestmark = [
    pytest.mark.ray,
    pytest.mark.slow,
    # Ray Data, which Ray Train sets up unasked, reads options of its own that it has deprecated.
    pytest.mark.filterwarnings(r"ignore:`use_\w+` is deprecated:DeprecationWarning"),
]


def test_every_way_to_start_is_measured(tmp_path: Path) -> None:
    out = tmp_path / "orchestration.json"
    assert (
        main(["bench", "tests.benchmarks.orchestration", "workers=1", "jobs=2", "repetitions=1", "--out", str(out)])
        == 0
    )
    found = json.loads(out.read_text())
    ways = {row["how"]: row["seconds"] for row in found["rows"] if row["what"] == "start"}
    assert set(ways) == {"new", "waiting", "torch_trainer"}
    assert 0 < ways["waiting"] < ways["new"]
    assert found["ratios"]["overhead_seconds"] > 0
    assert found["ratios"]["new_minus_torch_trainer"] == ways["new"] - ways["torch_trainer"]
