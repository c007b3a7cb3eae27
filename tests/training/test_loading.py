"""While a base is loaded, no process ever holds it as a whole, where the engine shards it."""

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from lori_dist import config, plugin
from lori_dist.adapter.adapter import Spec
from lori_dist.adapter.attach import attach
from lori_dist.training.weights import skeleton
from lori_dist.training.world import from_environment
from tests.distributed import run_distributed
from tests.models import tiny_llama

GIGABYTE = 10**9


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, int]:
    """A model of more than a gigabyte in several files, and its bytes."""
    folder = tmp_path_factory.mktemp("models") / "large"
    settings = LlamaConfig(
        vocab_size=4096,
        hidden_size=2048,
        intermediate_size=5632,
        num_hidden_layers=11,
        num_attention_heads=16,
        num_key_value_heads=4,
        dtype="bfloat16",
    )
    with torch.device("meta"):
        model = LlamaForCausalLM(settings)
    model = model.to(torch.bfloat16).to_empty(device="cpu")
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(0.01)
    model.save_pretrained(folder, max_shard_size="200MB")
    return folder, sum(file.stat().st_size for file in folder.glob("*.safetensors"))


def memory(what: str) -> int:
    """Bytes of this process: VmRSS now, VmHWM at most since the last reset."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(what))


def load(folder: Path, name: str, options: dict[str, Any]) -> tuple[int, int]:
    """Most bytes above those before, while an engine is built; and those it keeps."""
    world = from_environment()
    tiny_llama()(torch.ones(1, 4, dtype=torch.int64))  # the first forward pass brings the libraries' own memory
    Path("/proc/self/clear_refs").write_text("5")
    before = memory("VmRSS")
    model, weights = skeleton(config.Model(path=str(folder), dtype="bfloat16"))
    attach(model, Spec(rank=4, alpha=8.0, seed=0, dtype=torch.bfloat16))
    build = plugin.find("engines", name, "build", "train.engine").load()
    engine = build(model, weights, config.Train(steps=1), world, state=None, **options)
    del engine
    return memory("VmHWM") - before, memory("VmRSS") - before


@pytest.mark.parametrize("world_size", [2, 4])
@pytest.mark.parametrize(("name", "options"), [("fsdp", {}), ("deepspeed", {"stage": 3})], ids=str)
def test_a_rank_holds_its_share_and_little_more(
    name: str, options: dict[str, Any], world_size: int, large: tuple[Path, int], record_property: Any
) -> None:
    folder, size = large
    assert size > GIGABYTE
    for most, kept in run_distributed(load, folder, name, options, world_size=world_size):
        record_property("share", most / size)
        print(f"{name} on {world_size}: at most {most / size:.3f} of the base, {kept / size:.3f} kept")
        assert most < 1.2 * size / world_size


def test_a_base_on_every_rank_is_there_once(large: tuple[Path, int]) -> None:
    folder, size = large
    for most, _ in run_distributed(load, folder, "ddp", {}, world_size=2):
        assert most < 1.2 * size
