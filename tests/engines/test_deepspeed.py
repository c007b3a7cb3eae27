import json
import os
import re
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import deepspeed
import pytest
import torch

from lori_dist import plugin
from lori_dist.config import Choice, Model, Run, Task, Train
from lori_dist.engines.deepspeed import build, check, settled
from lori_dist.errors import ConfigError
from lori_dist.jobs import differences, train_job
from lori_dist.training.engine import State
from lori_dist.training.world import World, from_environment
from tests.distributed import run_distributed
from tests.engines.oracle import TRAIN, Course, adapt, difference, one_process, run
from tests.models import on_meta, tiny_llama


def engine(stage: Any, world: World, **options: Any) -> Any:
    return build(*on_meta(adapt(tiny_llama())), TRAIN, world, state=None, stage=stage, **options)


def undocumented_names() -> list[bool]:
    world = from_environment()
    found = []
    for stage in (1, 2, 3):
        zero = engine(stage, world).model.optimizer
        wanted = ("single_partition_of_fp32_groups", "_lazy_init_hp_params_optimizer_state")
        found += [hasattr(zero, name) for name in (wanted if stage < 3 else ("fp32_partitioned_groups_flat",))]
    return [*found, hasattr(deepspeed.zero.Init, "_convert_to_deepspeed_param")]


def test_the_undocumented_names_are_there() -> None:
    assert "deepspeed_shm_comm" in deepspeed.ops.__compatible_ops__
    assert run_distributed(undocumented_names, world_size=1) == [[True] * 6]


def one_step(stage: int) -> None:
    world = from_environment()
    run(engine(stage, world), world, range(1))


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_nothing_is_compiled(stage: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path))
    run_distributed(one_step, stage, world_size=2)
    assert list(tmp_path.iterdir()) == []


def test_the_lock_of_a_killed_build_stops_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "deepspeed_shm_comm").mkdir()
    (tmp_path / "deepspeed_shm_comm" / "lock").touch()
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path))
    run_distributed(one_step, 2, world_size=1)


def partitioned() -> tuple[int, list[int]]:
    """Values that stay gathered after a step at stage 3, and the sizes of what this rank holds of them."""
    world = from_environment()
    zero = engine(3, world)
    run(zero, world, range(1))
    values = zero.parameters.values()
    return sum(p.numel() for p in values), sorted({-(-p.ds_numel // world.size) - p.ds_tensor.numel() for p in values})


def test_small_values_are_partitioned_too() -> None:
    assert run_distributed(partitioned, world_size=2) == [(0, [0])] * 2


def test_stages_are_checked_with_the_configuration() -> None:
    method = plugin.find("engines", "deepspeed", "build", "train.engine")
    assert method.bind({"stage": 3}, "train.engine") == {"stage": 3}
    with pytest.raises(ConfigError, match=r"train\.engine\.stage: got 4"):
        method.bind({"stage": 4}, "train.engine")
    with pytest.raises(ConfigError, match=r"train\.engine\.hpz: got 0; it must be in \[1, inf\)"):
        method.bind({"hpz": 0}, "train.engine")


def build_with(options: dict[str, Any]) -> None:
    engine(options.pop("stage"), from_environment(), **options)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"stage": 3, "hpz": 2},
            r"ConfigError: train\.engine\.hpz: got 2 for 1 ranks; give a number",
        ),
        (
            {"stage": 2, "offload": True},
            r"train\.engine\.offload: got True at stage 2, where the base",
        ),
    ],
    ids=str,
)
def test_placements_that_cannot_be_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(pytest.fail.Exception, match=message):
        run_distributed(build_with, options, world_size=1)


def linear_after(stage: int) -> bool:
    before = torch.nn.functional.linear
    world = from_environment()
    run(engine(stage, world), world, range(1))
    return torch.nn.functional.linear is before


def test_the_process_keeps_its_own_linear() -> None:
    assert run_distributed(linear_after, 3, world_size=1) == [True]


# --- its configuration file ------------------------------------------------------------------------------------------

FILES: dict[str, dict[str, Any]] = {
    "small, persistent": {
        "stage": 3,
        "stage3_param_persistence_threshold": 100,
        "sub_group_size": 150,
        "stage3_max_live_parameters": 0,
        "stage3_prefetch_bucket_size": 0,
        "reduce_bucket_size": "auto",
        "stage3_gather_16bit_weights_on_model_save": True,
    },
    "hpz, on the host": {"stage": 3, "zero_hpz_partition_size": 2, "offload_param": {"device": "cpu"}},
    "moments on the host": {"stage": 2, "offload_optimizer": {"device": "cpu"}, "reduce_bucket_size": 300},
    "small buckets": {"stage": 1, "allgather_bucket_size": 64, "overlap_comm": True, "contiguous_gradients": False},
}
"""Sections zero_optimization."""


def write(folder: Path, name: str, **settings: Any) -> str:
    path = folder / f"{name}.json"
    path.write_text(json.dumps(settings))
    return str(path)


def trained_with(paths: Sequence[str], halfway: State) -> list[tuple[list[Course], dict[str, Any]]]:
    """Of each file: six steps, and twice the last three, from what one process had before: resumed, and loaded into an
    engine that has trained; and the settings that DeepSpeed has."""
    found = []
    world = from_environment()
    for path in paths:
        engine = build(*on_meta(adapt(tiny_llama())), TRAIN, world, state=None, config=path)
        courses = [run(engine, world, range(6))]
        engine = build(*on_meta(adapt(tiny_llama())), TRAIN, world, state=halfway, config=path)
        courses.append(run(engine, world, range(3, 6)))
        engine.load(halfway)
        courses.append(run(engine, world, range(3, 6)))
        found.append((courses, engine.model._config.zero_config.model_dump(mode="json")))
    return found


def test_a_configuration_file_reaches_deepspeed_and_changes_no_result(tmp_path: Path) -> None:
    paths = [
        write(tmp_path, name, zero_optimization=zero, train_batch_size="auto", steps_per_print="auto")
        for name, zero in FILES.items()
    ]
    halfway, wanted = one_process(adapt(tiny_llama()), 3).state, one_process(adapt(tiny_llama()), 6).state
    outcome = run_distributed(trained_with, paths, halfway, world_size=2)[0]
    for zero, (courses, settings) in zip(FILES.values(), outcome, strict=True):
        for course in courses:
            assert difference(course.state, wanted) < 5e-6
        for key, value in zero.items():
            found = settings[key.removeprefix("stage3_")]
            if isinstance(value, dict):
                found = {name: found[name] for name in value}
            assert value == "auto" or found == value, key


def described(path: str, **engine: Any) -> Run:
    """A run with a configuration file."""
    return Run(
        name="demo",
        model=Model(path="model"),
        tasks={"math": Task(train="a", test="b")},
        train=Train(
            steps=9,
            batch_size=8,
            micro_batch_size=2,
            schedule="linear",
            warmup_steps=2,
            engine=Choice(name="deepspeed", options={"config": path, **engine}),
        ),
    )


AGREEING: dict[str, Any] = {
    "train_batch_size": 8,
    "train_micro_batch_size_per_gpu": 2,
    "gradient_accumulation_steps": 2,
    "gradient_clipping": 1.0,
    "optimizer": {"type": "AdamW", "params": {"lr": 5e-4, "betas": [0.9, 0.999], "eps": 1e-8, "weight_decay": "auto"}},
    "scheduler": {
        "type": "WarmupDecayLR",
        "params": {"warmup_num_steps": 2, "total_num_steps": "auto", "warmup_min_lr": 0, "warmup_max_lr": "auto"},
    },
    "fp16": {"enabled": "auto", "loss_scale": 0, "initial_scale_power": 16},
    "bf16": {"enabled": False},
    "zero_optimization": {"stage": 3, "overlap_comm": True, "stage3_prefetch_bucket_size": "auto"},
    "steps_per_print": 100,
    "wall_clock_breakdown": False,
    "comms_logger": {"enabled": False},
    "flops_profiler": {"enabled": False, "profile_step": 1},
}


def test_a_file_that_agrees_is_taken(tmp_path: Path) -> None:
    assert list(check(described(write(tmp_path, "ds", **AGREEING)), 2)) == []
    assert settled({"config": write(tmp_path, "ds", **AGREEING)})["stage"] == 3


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"train_batch_size": 9}, "has train_batch_size 9, and train.batch_size is 8; write the same"),
        ({"train_micro_batch_size_per_gpu": 1}, "train_micro_batch_size_per_gpu 1, and train.micro_batch_size is 2"),
        (
            {"gradient_accumulation_steps": 3},
            "accumulation_steps 3, and train.batch_size 8 .* on 2 ranks is 2",
        ),
        ({"gradient_clipping": 0.5}, "gradient_clipping 0.5, and train.clip is 1.0"),
        ({"optimizer": {"type": "Lamb"}}, "optimizer.type 'Lamb', and the optimizer of train is AdamW"),
        ({"optimizer": {"type": "Adam", "params": {"lr": 0.1}}}, "optimizer.params.lr 0.1, and train.lr is 0.0005"),
        ({"optimizer": {"params": {"betas": [0.5, 0.5]}}}, r"betas \[0.5, 0.5\], and train.betas is \[0.9, 0.999\]"),
        ({"optimizer": {"params": {"weight_dcay": 0}}}, "unknown key optimizer.params.weight_dcay.*'weight_decay'"),
        (
            {"scheduler": {"type": "WarmupLR"}},
            "scheduler.type 'WarmupLR', and train.schedule is linear, .*DecayLR",
        ),
        ({"scheduler": {"params": {"warmup_num_steps": 5}}}, "warmup_num_steps 5, and train.warmup_steps is 2"),
        (
            {"bf16": {"enabled": True}},
            "bf16.enabled True, and model.dtype is float32; write `model: {dtype: bf",
        ),
        ({"fp16": {"enabled": True}}, "fp16.enabled True, and model.dtype is float32"),
        ({"zero_optimization": {"stage": 1}}, "zero_optimization.stage 1, and train.engine.stage is 3"),
        (
            {"zero_optimization": {"stage": 3, "overlap_com": True}},
            "unknown key zero_optimization.overlap_com.*_comm",
        ),
        (
            {"zero_optimization": {"offload_param": {"devise": "cpu"}}},
            "zero_optimization.offload_param.devise.*device",
        ),
        ({"zero_optimization": {"reduce_bucket_size": -1}}, "zero_optimization.reduce_bucket_size -1: wanted greater"),
        ({"zero_optimisation": {}}, "unknown key zero_optimisation; remove it. Did you mean 'zero_optimization'"),
        ({"checkpoint": {"tag_validatoin": "Warn"}}, "unknown key checkpoint.tag_validatoin.*tag_validation"),
        ({"tensor_parallel": {"autotp_size": 2}}, "asks for tensor_parallel, which is not done here"),
        ({"activation_checkpointing": {"partition_activations": True}}, "train.activation_checkpointing; remove"),
        ({"amp": {"enabled": True}}, "DeepSpeed refuses .*Apex AMP integration has been removed"),
    ],
    ids=str,
)
def test_what_contradicts_the_yaml_or_is_unknown_is_named(
    changes: dict[str, Any], message: str, tmp_path: Path
) -> None:
    run = described(write(tmp_path, "ds", **{**AGREEING, **changes}), stage=3)
    [problem] = check(run, 2)
    assert problem.startswith(("train.engine.config: " + str(tmp_path), "train.engine.config: DeepSpeed refuses"))
    assert re.search(message, problem)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"{", "is not valid JSON"),
        (b"[]", "it holds a list, not an object"),
        (b'{"a": 1, "a": 2}', "the same key twice"),
        (b'{"zero_optimization": {"reduce_bucket_size": NaN}}', "NaN is not a finite number"),
        (b'{"zero_optimization": true}', "zero_optimization holds a bool, not an object"),
        (b"[" * 100_000, "nested too deeply"),
        (b" " * (2**20 + 1), "has more than the 1048576 bytes"),
        (b'{"zero_optimization": {"stage": 0}}', "stage 0; give 1, 2 or 3 there, or write `train: {engine: ddp}`"),
    ],
    ids=lambda value: str(value)[:30],
)
def test_files_that_are_no_configuration_are_refused(content: bytes, message: str, tmp_path: Path) -> None:
    (tmp_path / "ds.json").write_bytes(content)
    with pytest.raises(ConfigError, match=message):
        list(check(described(str(tmp_path / "ds.json"))))


def test_only_regular_files_are_read(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(ConfigError, match="is a named pipe, not a regular file"):
        list(check(described(str(tmp_path / "pipe"))))


def test_a_changed_file_is_a_changed_setting(tmp_path: Path) -> None:
    (tmp_path / "rows.jsonl").write_text('{"prompt": "a", "response": "b"}')

    def settings(**changes: Any) -> Any:
        run = described(write(tmp_path, "ds", **{**AGREEING, **changes}))
        rows = str(tmp_path / "rows.jsonl")
        return train_job(replace(run, tasks={"math": Task(train=rows, test=rows)}), "math")

    first, changed = settings(), settings(communication_data_type="bf16")
    assert first.fingerprint != changed.fingerprint == settings(communication_data_type="bf16").fingerprint
    assert any("communication_data_type" in line for line in differences("train", first.settings, changed.settings))
