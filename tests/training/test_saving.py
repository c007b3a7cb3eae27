"""Writing an adapter sends and holds the values, once, and nothing of the base."""

from pathlib import Path
from typing import Any

import pytest
from transformers import LlamaConfig, LlamaForCausalLM

from lori_dist import config, plugin
from lori_dist.adapter.adapter import Spec
from lori_dist.adapter.attach import attach, extract
from lori_dist.benchmarks._traffic import Traffic, process_bytes
from lori_dist.formats import native
from lori_dist.training.engine import Engine, gather
from lori_dist.training.world import World, from_environment
from tests.distributed import run_distributed
from tests.models import on_meta

ENGINES: list[tuple[str, dict[str, Any]]] = [
    ("ddp", {}),
    ("fsdp", {}),
    ("fsdp", {"base": "replicated"}),
    ("deepspeed", {"stage": 1}),
    ("deepspeed", {"stage": 3}),
]


def save(name: str, options: dict[str, Any], path: Path) -> tuple[int, int]:
    """Most bytes above those before, and bytes sent, while an adapter with a dense B of 60 MB is written."""
    world = from_environment()
    settings = LlamaConfig(
        vocab_size=64,
        hidden_size=512,
        intermediate_size=1024,
        num_hidden_layers=8,
        num_attention_heads=8,
        num_key_value_heads=4,
    )
    model: Any = LlamaForCausalLM(settings)
    attach(model, Spec(rank=512, alpha=8.0, seed=0))
    build = plugin.find("engines", name, "build", "train.engine").load()
    model, weights = on_meta(model)
    engine = build(model, weights, config.Train(steps=1), world, state=None, **options)
    with Traffic() as traffic:  # the first time, as libraries then load code of their own
        write(model, engine, world, path)
    Path("/proc/self/clear_refs").write_text("5")
    before = process_bytes("VmRSS")
    write(model, engine, world, path)
    return process_bytes("VmHWM") - before, traffic.gathered


def write(model: Any, engine: Engine, world: World, path: Path) -> None:
    values = gather(engine, "values", world)
    if world.rank == 0:
        native.save(extract(model, name="task", values=values), path)


@pytest.mark.parametrize(("name", "options"), ENGINES, ids=str)
def test_only_values_are_held_and_sent(name: str, options: dict[str, Any], tmp_path: Path) -> None:
    path = tmp_path / "adapter.safetensors"
    (first, sent), (other, _) = run_distributed(save, name, options, path, world_size=2)
    size = path.stat().st_size
    assert size > 60e6
    print(f"{name} {options}: the first rank holds {first / size:.3f} of the adapter, the other {other / size:.3f}")
    assert first < 1.1 * size
    assert other < 0.1 * size
    assert sent < 1.01 * size
