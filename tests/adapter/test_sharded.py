"""Adapters in users' own loops with FSDP2 and DeepSpeed: what one process gives, on two ranks."""

from dataclasses import replace
from pathlib import Path
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


def test_shards_are_reduced_within_and_between_groups_of_ranks(alone: dict[str, Any]) -> None:
    check(run_distributed(loops.fsdp, "shard first", "hybrid", world_size=4), alone)


@pytest.mark.parametrize(
    ("stage", "how"), [(0, "initialize"), (1, "initialize"), (2, "initialize"), (3, "initialize"), (3, "zero.Init")]
)
def test_deepspeed_gives_what_one_process_does(stage: int, how: str, alone: dict[str, Any]) -> None:
    check(run_distributed(loops.zero, stage, how, world_size=2), alone)


def close(found: torch.Tensor, wanted: torch.Tensor) -> bool:
    return float((found - wanted).norm() / wanted.norm()) < TOLERANCE


def test_an_adapter_comes_and_goes_on_a_sharded_model(alone: dict[str, Any]) -> None:
    for found in run_distributed(loops.trained_and_taken_off, world_size=2):
        assert torch.equal(found["bare"], found["base"])
        assert not close(found["adapted"], found["base"])
        assert close(found["used"], found["adapted"])
        assert close(found["values"], alone["dense"]) and torch.equal(found["again"], found["values"])
        assert not close(found["further"], found["values"])


def test_modules_are_trained_in_full_on_a_sharded_model() -> None:
    wanted = loops.with_a_head(False)
    for found in run_distributed(loops.with_a_head, True, world_size=2):
        assert torch.equal(found["positions"], wanted["positions"])
        assert all(close(found[name], wanted[name]) for name in ("dense", "values", "head"))
        assert not found["moved"].any()


def test_a_model_is_sharded_and_adapted_on_the_meta_device(alone: dict[str, Any]) -> None:
    check(run_distributed(loops.from_meta, world_size=2), alone)


def test_a_distributed_checkpoint_of_the_adapter_resumes_at_another_size(tmp_path: Path) -> None:
    model = loops.tiny_llama()
    loops.attach(model, loops.SPEC)
    optimizer = torch.optim.AdamW(loops.trainable(model).values(), lr=loops.LR, eps=loops.EPS, weight_decay=0.0)
    loops.steps(model, optimizer, 2 * loops.STEPS)
    run_distributed(loops.saved_by_dcp, tmp_path, False, world_size=2)
    [found] = run_distributed(loops.saved_by_dcp, tmp_path, True, world_size=1)
    assert close(found, loops.values_of(loops.extract(model, name="math")))


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_a_deepspeed_checkpoint_without_the_base_resumes_as_if_it_had_not_stopped(stage: int, tmp_path: Path) -> None:
    for found in run_distributed(loops.zero_resumed, stage, tmp_path, world_size=2):
        assert torch.equal(found["resumed"], found["whole"])


@pytest.mark.parametrize(
    "more",
    [
        {"zero": {"offload_param": {"device": "cpu"}}},
        {"zero": {"offload_optimizer": {"device": "cpu"}}, "zero_force_ds_cpu_optimizer": False},
        {"zero": {"zero_hpz_partition_size": 2}},
    ],
    ids=["parameters offloaded", "optimizer offloaded", "hpZ"],
)
def test_sections_of_deepspeed_change_no_value(more: dict[str, Any], alone: dict[str, Any]) -> None:
    for found in run_distributed(loops.zero_with, more, world_size=2):
        assert close(found["values"], alone["dense"])


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_values_of_a_bf16_section_are_deepspeed_s_own_in_float32(stage: int) -> None:
    for found in run_distributed(loops.zero_with, {"stage": stage, "bf16": {"enabled": True}}, world_size=2):
        assert found["values"].dtype == torch.float32
        assert not torch.equal(found["values"], found["values"].bfloat16().float())


def test_a_mixed_precision_policy_keeps_values_in_float32(alone: dict[str, Any]) -> None:
    for found in run_distributed(loops.mixed, world_size=2):
        assert found["dtypes"] == {torch.float32}
        assert not torch.equal(found["values"], found["values"].bfloat16().float())


def test_rows_meet_their_own_adapters_on_a_sharded_model() -> None:
    adapters = {}
    for seed, name in enumerate(("math", "code")):
        model = loops.tiny_llama()
        loops.attach(model, replace(loops.SPEC, seed=seed))
        loops.train(model)
        adapters[name] = loops.extract(model, name=name)
    wanted = loops.several(False, adapters)
    for found in run_distributed(loops.several, True, adapters, world_size=2):
        torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("how", ["", "ddp", "fsdp attach first", "fsdp shard first", "2", "3"])
def test_adapters_and_heads_that_are_trained_together_are_those_trained_alone(how: str) -> None:
    alone = [loops.trained_alone(task, clips=not how.isdecimal()) for task in loops.TASKS]
    wanted = alone[0] | alone[1]
    found = run_distributed(loops.trained_together, how, world_size=2) if how else [loops.trained_together(how)]
    for of_rank in found:
        for task, values in wanted.items():
            assert close(of_rank[task], values), task


def test_models_that_are_split_otherwise_are_refused() -> None:
    [found] = run_distributed(loops.refused, world_size=1)
    assert found["ddp"].startswith("model: is a DistributedDataParallel, which does not take new parameters")
    assert found["tensor parallel"].startswith("model.layers.0.mlp.up_proj.weight: is a DTensor on a mesh")
    assert found["pipeline"].startswith("model: is a DeepSpeed PipelineModule, and pipeline parallelism")
    assert found["several"].startswith("model: is wrapped in DistributedDataParallel already; attach first")


@pytest.mark.parametrize("how", ["", "fsdp2", "2", "3"])
def test_a_state_that_accelerate_saved_resumes_as_if_it_had_not_stopped(how: str, tmp_path: Path) -> None:
    for found in run_distributed(loops.accelerate_resumed, how, tmp_path, world_size=2):
        assert torch.equal(found["resumed"], found["whole"])
