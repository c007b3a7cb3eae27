"""The most memory a rank takes while an engine loads a base, over the base.

`python -m tests.benchmarks.loading --out loading.json` measures it.
"""

import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from lori_dist import config, plugin
from lori_dist.__main__ import main
from lori_dist.adapter.adapter import Spec
from lori_dist.adapter.attach import attach
from lori_dist.benchmarks._gang import gang
from lori_dist.benchmarks._methods import from_files, make_llama
from lori_dist.benchmarks._traffic import process_bytes
from lori_dist.training.data import Batch
from lori_dist.training.world import World

ENGINES: dict[str, tuple[str, dict[str, Any]]] = {
    "ddp": ("ddp", {}),
    "fsdp": ("fsdp", {}),
    "zero3": ("deepspeed", {"stage": 3}),
}
SHARDED = ("fsdp", "zero3")


def run(*, ranks: str = "2,4", layers: int = 11, hidden: int = 2048) -> dict[str, Any]:
    """Rows for a table, and ratios[engine][ranks]: the most bytes of any rank over those of the base's files.

    ranks: processes, numbers separated by commas; ddp, which holds a whole base on every rank, is measured on the first
    number alone. layers, hidden: of a Llama in bfloat16 whose weights are all alike, 1 GB at the defaults, in files of
    200 MB. A row's peak_bytes and held_bytes are above what a rank had after it had built the same for a small model.
    """
    numbers = [int(number) for number in ranks.split(",")]
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        base_bytes = make(folder, layers, hidden)
        rows = []
        for engine in ENGINES:
            for number in numbers if engine in SHARDED else numbers[:1]:
                found = gang(load, number, folder, engine)
                rows.append({"engine": engine, "ranks": number, "base_bytes": base_bytes, **found})
    ratios: dict[str, dict[str, float]] = {}
    for row in rows:
        ratios.setdefault(row["engine"], {})[str(row["ranks"])] = round(row["peak_bytes"] / base_bytes, 3)
    return {"rows": rows, "ratios": ratios}


def make(folder: Path, layers: int = 11, hidden: int = 2048) -> int:
    """Saves a small and a large base for `load`. Returns the bytes of the large one's files."""
    make_llama(folder / "small", 1, 64, 16, 64)
    settings = LlamaConfig(
        vocab_size=4096,
        hidden_size=hidden,
        intermediate_size=hidden * 11 // 4,
        num_hidden_layers=layers,
        num_attention_heads=16,
        num_key_value_heads=4,
    )
    with torch.device("meta"):
        model = LlamaForCausalLM(settings)
    model = model.to(torch.bfloat16).to_empty(device="cpu")
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(0.01)
    model.save_pretrained(folder / "large", max_shard_size="200MB")
    return sum(file.stat().st_size for file in (folder / "large").glob("*.safetensors"))


def load(world: World, folder: Path, engine: str) -> dict[str, int]:
    """On every rank: the most bytes that any rank takes while the engine is built, and those that it keeps."""
    _build(world, folder / "small", engine)  # what the libraries take for themselves is not the base's
    Path("/proc/self/clear_refs").write_text("5")
    before = process_bytes("VmRSS")
    _build(world, folder / "large", engine)
    return {"peak_bytes": most(world, "VmHWM", before), "held_bytes": most(world, "VmRSS", before)}


def _build(world: World, base: Path, engine: str) -> None:
    model, weights = from_files(base, "bfloat16")
    attach(model, Spec(rank=4, alpha=8.0, seed=0, dtype=torch.bfloat16))
    name, options = ENGINES[engine]
    build = plugin.find("engines", name, "build", "engine").load()
    built = build(model, weights, config.Train(steps=1), world, state=None, **options)
    ids = torch.ones(1, 4, dtype=torch.int64)
    if base.name == "small":
        built.step([Batch(input_ids=ids, attention_mask=ids, labels=ids)], num_targets=3 * world.size, lr=0.0)


def most(world: World, what: str, before: int) -> int:
    """Of all ranks."""
    grown = torch.tensor(process_bytes(what) - before)
    if world.size > 1:
        torch.distributed.all_reduce(grown, op=torch.distributed.ReduceOp.MAX)
    return int(grown)


if __name__ == "__main__":
    sys.exit(main(["bench", "tests.benchmarks.loading", *sys.argv[1:]]))
