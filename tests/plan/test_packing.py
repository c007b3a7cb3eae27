"""What `cluster.packing: auto` means for a run."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from lori_dist import config
from lori_dist.cluster import fitting
from lori_dist.cluster.schedule import Resources
from lori_dist.gpus import DEVICES, known
from lori_dist.jobs import plan as planned
from lori_dist.plan import Hardware, plan
from lori_dist.plan.packing import chosen
from lori_dist.plan.rows import Counter
from tests.models import _of_kind, tiny_llama
from tests.tokenizers import save

SLOW = Hardware(gpus=2, nodes=1, gpu_memory=80e9, tflops=1000.0, link=0.01, network=0.01)
"""Devices for which sending the base is all that counts."""
FAST = replace(SLOW, tflops=0.05, link=1000.0)


def granite() -> Any:
    """A model whose attention is not known to keep rows apart that share a sequence."""
    return _of_kind("granite")


def run_of(folder: Path, model: Any, lengths: tuple[int, int]) -> config.Run:
    """Two tasks, each with rows of one length."""
    tasks = {}
    for name, length in zip(("one", "other"), lengths, strict=True):
        path = folder / f"{name}.jsonl"
        path.write_text(16 * (json.dumps({"prompt": "a" * length, "response": "b"}) + "\n"))
        tasks[name] = {"train": str(path), "test": str(path)}
    return config.validate(
        {
            "name": "run",
            "output": str(folder / "runs"),
            "model": {"path": str(save(model, folder / "model"))},
            "tasks": tasks,
            "adapter": {"rank": 4, "alpha": 8},
            "train": {"steps": 4, "batch_size": 8, "max_length": 48, "engine": "fsdp"},
            "evaluate": {"max_new_tokens": 4},
            "cluster": {"packing": "auto", "workers": 2},
        }
    )


@pytest.mark.parametrize(
    ("model", "lengths", "hardware", "is_apart"),
    [
        (granite, (2, 40), FAST, True),
        (granite, (2, 40), SLOW, False),  # the base is sent once for both
        (granite, (20, 20), FAST, False),
        (tiny_llama, (2, 40), FAST, False),  # whose rows share sequences
    ],
    ids=["unlike rows", "unlike rows, slow links", "equal rows", "shared sequences"],
)
def test_one_after_another_where_padding_costs_more_than_the_base(
    model: Any, lengths: tuple[int, int], hardware: Hardware, is_apart: bool, tmp_path: Path
) -> None:
    run = run_of(tmp_path, model(), lengths)
    settled, said = chosen(run, hardware, Counter(run))
    assert settled.cluster.packing == ("off" if is_apart else "auto")
    assert (said is not None) == is_apart


def test_a_plan_is_of_what_a_run_does(tmp_path: Path) -> None:
    run = run_of(tmp_path, granite(), (2, 40))
    fixed = replace(run, cluster=replace(run.cluster, packing=2))
    apart, at_once = (plan(one, FAST) for one in (run, fixed))
    assert apart["training"]["gangs"] == [["one"], ["other"]]
    assert any("one after another" in note for note in apart["notes"])
    assert at_once["training"]["gangs"] == [["one", "other"]]
    own, other = (
        next(one["training_seconds"] for one in found["placements"] if one["name"] == "fsdp")
        for found in (apart, at_once)
    )
    assert own < 0.97 * other


def test_a_run_asks_the_plan(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO")
    run = run_of(tmp_path, granite(), (2, 40))
    run = replace(run, train=replace(run.train, engine=config.Choice(name="ddp")))
    nodes = [Resources(cpus=4.0)]
    assert fitting.packing(run, planned(run), nodes) == "off"
    assert "one after another, which takes 0." in caplog.text
    assert fitting.packing(run, planned(run)[:1], nodes) == "auto"  # which is one training
    assert fitting.packing(replace(run, cluster=replace(run.cluster, packing=2)), planned(run), nodes) == 2


@pytest.mark.parametrize(
    ("said", "name"),
    [
        ("NVIDIA H100 80GB HBM3", "h100"),
        ("NVIDIA H100 PCIe", "h100-pcie"),
        ("NVIDIA A100-SXM4-80GB", "a100"),
        ("NVIDIA GeForce RTX 4090", "rtx-4090"),
        ("Tesla T4", "t4"),
        ("AMD Instinct MI300X", "mi300x"),
        ("NVIDIA GeForce GT 710", None),
    ],
)
def test_gpus_are_known_by_what_their_driver_calls_them(said: str, name: str | None) -> None:
    assert known(said) == name
    assert name is None or name in DEVICES
