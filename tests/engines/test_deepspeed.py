import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import deepspeed
import pytest
import torch

from lori_dist import plugin
from lori_dist.engines.deepspeed import build
from lori_dist.errors import ConfigError
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
