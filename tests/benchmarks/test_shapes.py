"""A block of 70B width is trained for real, and the shapes around it are those of the model."""

from pathlib import Path

import pytest

from tests.benchmarks.shapes import run

ROOT = Path(__file__).parents[2]


@pytest.mark.slow
def test_a_block_of_seventy_billion_is_trained_by_both_engines_that_shard_it() -> None:
    rows = {row["what"]: row for row in run(model=str(ROOT / "configs" / "models" / "llama-3-70b"))["rows"]}
    assert rows["mask"]["kept"] == 21_495_808
    assert rows["mask, 2 ranks"]["digest"] == rows["mask"]["digest"]
    one, other = rows["block, fsdp"], rows["block, zero3"]
    assert one["last_loss"] < one["first_loss"] - 0.1
    assert other["first_loss"] == pytest.approx(one["first_loss"], rel=1e-3)
    assert other["last_loss"] == pytest.approx(one["last_loss"], rel=1e-3)
