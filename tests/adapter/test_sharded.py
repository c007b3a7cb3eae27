"""Adapters in users' own loops with FSDP2 and DeepSpeed: what one process gives, on two ranks."""

from typing import Any

import pytest
import torch

from tests.adapter import loops
from tests.distributed import run_distributed

TOLERANCE = 5e-6


@pytest.fixture(scope="module")
def alone() -> dict[str, Any]:
    return loops.one_process()


def check(found: list[dict[str, Any]], wanted: dict[str, Any]) -> None:
    for of_rank in found:
        assert torch.equal(of_rank["positions"], wanted["positions"])
        for name in ("norms", "dense", "values") if of_rank["norms"].numel() else ("dense", "values"):
            difference = (of_rank[name] - wanted[name]).norm() / wanted[name].norm()
            assert difference < TOLERANCE, (name, float(difference))


@pytest.mark.parametrize(
    ("order", "how"),
    [
        ("attach first", "blocks"),
        ("attach first", "base ignored"),
        ("attach first", "offloaded"),
        ("shard first", "blocks"),
        ("shard first", "root"),
        ("shard first", "hybrid"),
        ("shard first", "offloaded"),
        ("after a forward pass", "blocks"),
    ],
)
def test_fully_shard_gives_what_one_process_does(order: str, how: str, alone: dict[str, Any]) -> None:
    assert float(alone["norms"].max()) > loops.CLIP > float(alone["norms"].min())
    check(run_distributed(loops.fsdp, order, how, world_size=2), alone)


@pytest.mark.parametrize(
    ("stage", "how"), [(0, "initialize"), (1, "initialize"), (2, "initialize"), (3, "initialize"), (3, "zero.Init")]
)
def test_deepspeed_gives_what_one_process_does(stage: int, how: str, alone: dict[str, Any]) -> None:
    check(run_distributed(loops.zero, stage, how, world_size=2), alone)
