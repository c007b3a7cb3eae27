"""The most memory a rank takes while it evaluates a base and two adapters, over the base; and the bytes it gathers.

`python -m tests.benchmarks.evaluating --out evaluating.json` measures it.
"""

import json
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch

from lori_dist import config
from lori_dist.__main__ import main
from lori_dist.adapter import attach
from lori_dist.adapter.adapter import Spec
from lori_dist.benchmarks._gang import gang
from lori_dist.benchmarks._methods import from_files
from lori_dist.benchmarks._traffic import Traffic, process_bytes
from lori_dist.evaluation import evaluate_all
from lori_dist.formats import native
from lori_dist.training.model import identity
from lori_dist.training.world import World
from tests.benchmarks.loading import make, most
from tests.tokenizers import tiny_tokenizer

ENGINES: dict[str, Any] = {"fsdp": "fsdp", "zero3": {"name": "deepspeed", "stage": 3}}
ADAPTERS = ("one", "other")


def run(*, ranks: str = "2,4", layers: int = 11, hidden: int = 2048) -> dict[str, Any]:
    """Rows for a table; ratios[engine][ranks], the most bytes of any rank over those of the base's files; and
    ratios["gathered"][engine], what three models in one pass gather over what they gather one after another.

    ranks: processes, numbers separated by commas. layers, hidden: of a Llama in bfloat16, 1 GB at the defaults. A row's
    peak_bytes are above what a rank had after it had evaluated a small model.
    """
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        base_bytes = make(folder, layers, hidden)
        for size in ("small", "large"):
            tiny_tokenizer().save_pretrained(folder / size)
            _adapters(folder / size)
        rows = (folder / "rows.jsonl").open("w", encoding="utf-8")
        with rows:
            rows.writelines(json.dumps({"prompt": f"{n}+{n}=", "response": str(n + n)}) + "\n" for n in range(8))
        found = [
            {"engine": engine, "ranks": number, "base_bytes": base_bytes, **gang(measure, number, folder, engine)}
            for engine in ENGINES
            for number in map(int, ranks.split(","))
        ]
    ratios: dict[str, dict[str, float]] = {"gathered": {}}
    for row in found:
        ratios.setdefault(row["engine"], {})[str(row["ranks"])] = round(row["peak_bytes"] / base_bytes, 3)
        ratios["gathered"][row["engine"]] = round(row["gathered_together"] / row["gathered_in_turn"], 3)
    return {"rows": found, "ratios": ratios}


def _adapters(base: Path) -> None:
    own = identity(config.Model(path=str(base), dtype="bfloat16"))
    for number, name in enumerate(ADAPTERS):
        model, _ = from_files(base, "bfloat16")
        spec = Spec(rank=4, alpha=8.0, seed=number, dtype=torch.bfloat16, targets=("q_proj",))
        attach.attach(model, spec)
        model.to_empty(device="cpu")  # A is made again from its seed
        values = {path: torch.full(tuple(one.shape), 0.01) for path, one in attach.trainable(model).items()}
        native.save(attach.extract(model, name=name, values=values, base=own), base / f"{name}.safetensors")


def measure(world: World, folder: Path, engine: str) -> dict[str, int]:
    """On every rank: the most bytes that any rank takes, and those gathered by the models together and in turn."""
    _evaluate(world, folder, "small", engine, ADAPTERS)  # what the libraries take for themselves is not the base's
    Path("/proc/self/clear_refs").write_text("5")
    before = process_bytes("VmRSS")
    together = _evaluate(world, folder, "large", engine, ADAPTERS)
    peak = most(world, "VmHWM", before)
    in_turn = sum(_evaluate(world, folder, "small", engine, names) for names in ((), *((name,) for name in ADAPTERS)))
    small = _evaluate(world, folder, "small", engine, ADAPTERS)
    return {"peak_bytes": peak, "gathered_bytes": together, "gathered_together": small, "gathered_in_turn": in_turn}


def _evaluate(world: World, folder: Path, size: str, engine: str, names: tuple[str, ...]) -> int:
    """Bytes that are gathered."""
    task = {"train": str(folder / "rows.jsonl"), "test": str(folder / "rows.jsonl")}
    described = config.validate(
        {
            "name": "run",
            "model": {"path": str(folder / size), "dtype": "bfloat16"},
            "tasks": {"sums": task},
            "train": {"steps": 1, "max_length": 32},
            "evaluate": {"engine": ENGINES[engine], "max_new_tokens": 2, "batch_size": 4},
        }
    )
    models = {name: folder / size / f"{name}.safetensors" for name in names} or {"base": None}
    if len(names) == len(ADAPTERS):
        models = {"base": None, **models}
    with Traffic() as traffic:
        evaluate_all(described, models, world=world)
    return traffic.gathered


if __name__ == "__main__":
    sys.exit(main(["bench", "tests.benchmarks.evaluating", *sys.argv[1:]]))
