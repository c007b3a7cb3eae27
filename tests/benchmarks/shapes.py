"""The shapes of a 70B model on one machine: attaching, masks, A, files, and one block that is trained for real.

`python -m tests.benchmarks.shapes --out shapes.json` measures it.
"""

import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from lori_dist import config, plugin
from lori_dist.__main__ import main
from lori_dist.adapter.adapter import Adapter, Block, Entries, Spec
from lori_dist.adapter.attach import attach
from lori_dist.adapter.bases import features
from lori_dist.adapter.projection import checksum, projection
from lori_dist.benchmarks._gang import gang
from lori_dist.benchmarks._traffic import process_bytes
from lori_dist.formats import native
from lori_dist.masks.magnitude import mask
from lori_dist.training import checkpoint, masking
from lori_dist.training.data import Batch
from lori_dist.training.engine import Part, Quantity
from lori_dist.training.model_files import made_from, settings_of
from lori_dist.training.phases import CALIBRATE
from lori_dist.training.task import digest_of
from lori_dist.training.weights import skeleton
from lori_dist.training.world import World

VOCABULARY = 1024
"""Of the model with one block, whose embeddings would else be larger than it."""
ENGINES: Mapping[str, tuple[str, dict[str, Any]]] = {"fsdp": ("fsdp", {}), "zero3": ("deepspeed", {"stage": 3})}


def run(
    *,
    model: str = "configs/models/llama-3-70b",
    rank: int = 32,
    density: float = 0.1,
    ranks: int = 2,
    rows: int = 1,
    length: int = 64,
    steps: int = 3,
    engines: list[str] = ["fsdp", "zero3"],  # noqa: B006  # read from the source, never shared
) -> dict[str, Any]:
    """Rows for a table: what is done, seconds, and the process's most memory in MB at its end.

    model: a folder with a config.json. attach: the model is built on the meta device and an adapter attached to it.
    mask: of the largest |B| over all entries, exactly, in one process. calibrated: so many ranks, each holding a part,
    write that B to a file. mask, RANKS ranks: they choose the mask from the file together; `megabytes` is that of the
    rank that takes most, `before` what that was until then. projection: A of one block, one thread, with
    `entries_per_second`. write, read: the adapter's file. block: a model with one of the blocks, weights in bfloat16 in
    files, is loaded and trained on so many ranks, `seconds` of its last step, with rows * length tokens a rank.
    """
    torch.set_num_threads(1)
    settings = settings_of(config.Model(path=str(model)))
    rows_of_table: list[dict[str, Any]] = []

    def timed(what: str, do: Callable[[], Any], **more: Any) -> Any:
        start = time.perf_counter()
        result = do()
        seconds = time.perf_counter() - start
        extra = {name: value(result, seconds) for name, value in more.items()}
        rows_of_table.append({"what": what, "seconds": round(seconds, 3), "megabytes": _peak(), **extra})
        return result

    spec = Spec(rank=rank, alpha=2.0 * rank, seed=0, dtype=torch.bfloat16)
    layers = timed("attach", lambda: attach(_on_meta(settings), spec))
    shapes = {path: features(layer.base) for path, layer in layers.items()}
    b = dict(_calibrated_b(shapes, rank))
    masks = timed(
        "mask",
        lambda: mask(b, density=density),
        kept=lambda made, _: _kept(made),
        digest=lambda made, _: digest_of(made),
    )
    block = {path: shape for path, shape in shapes.items() if ".layers.0." in path}
    timed(
        "projection",
        lambda: [projection(0, path, rank, columns, dtype=torch.bfloat16) for path, (_, columns) in block.items()],
        entries_per_second=lambda made, seconds: round(sum(a.numel() for a in made) / seconds),
    )
    with tempfile.TemporaryDirectory() as place:
        adapter = _adapter(spec, shapes, b, masks)
        path = Path(place) / "adapter.safetensors"
        timed("write", lambda: native.save(adapter, path), bytes=lambda *_: path.stat().st_size)
        timed("read", lambda: native.load(path))
        calibrated = Path(place) / "calibrated.safetensors"
        rows_of_table.append({"what": "calibrated", **gang(_written, ranks, calibrated, shapes, rank)})
        together = gang(_chosen, ranks, calibrated, rank, density)
        rows_of_table.append({"what": f"mask, {ranks} ranks", **together})
        base = _make_block(Path(place) / "base", settings)
        for engine in engines:
            found = gang(_trained, ranks, base, engine, spec, density, rows, length, steps)
            rows_of_table.append({"what": f"block, {engine}", **found})
    return {"rows": rows_of_table, "ratios": {}}


def _on_meta(settings: Any) -> Any:
    with torch.device("meta"):
        return made_from(settings, dtype=torch.bfloat16)


def _calibrated_b(shapes: Mapping[str, tuple[int, int]], rank: int) -> Iterator[tuple[str, Tensor]]:
    """Any B: the same each time."""
    generator = torch.Generator().manual_seed(0)
    for path, (rows_of_b, _) in shapes.items():
        yield path, torch.randn(rows_of_b, rank, generator=generator)


def _kept(masks: Mapping[str, Tensor]) -> int:
    return int(sum(mask.sum() for mask in masks.values()))


def _adapter(
    spec: Spec, shapes: Mapping[str, tuple[int, int]], b: Mapping[str, Tensor], masks: Mapping[str, Tensor]
) -> Adapter:
    entries = {}
    for path, of_module in masks.items():
        index = of_module.flatten().nonzero().squeeze(1)
        entries[path] = Entries(index=index.to(torch.int32), values=b[path].flatten()[index])
    block = Block(
        name="task",
        seed=spec.seed,
        rank=spec.rank,
        alpha=spec.alpha,
        dtype=spec.dtype,
        entries=entries,
        checksums={
            path: checksum(projection(spec.seed, path, spec.rank, columns, dtype=spec.dtype))
            for path, (_, columns) in shapes.items()
        },
    )
    return Adapter(shapes=dict(shapes), blocks=(block,), targets="all-linear")


def _make_block(folder: Path, settings: Any) -> Path:
    text = settings.get_text_config()
    text.num_hidden_layers, text.vocab_size = 1, VOCABULARY
    text.bos_token_id = text.eos_token_id = text.pad_token_id = 0
    made_from(settings, dtype=torch.bfloat16).save_pretrained(folder)
    return folder


def _peak() -> int:
    return round(process_bytes("VmHWM") / 2**20)


# --- ranks -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True, slots=True)
class _Held:
    """As much of an engine as a file is written from."""

    b: Mapping[str, Part]
    num_steps: int = 0

    def parts(self, quantity: Quantity) -> Mapping[str, Part]:
        return self.b


def _written(world: World, path: Path, shapes: Mapping[str, tuple[int, int]], rank: int) -> dict[str, Any]:
    b = {}
    for module, tensor in _calibrated_b(shapes, rank):
        first, end = (tensor.numel() * number // world.size for number in (world.rank, world.rank + 1))
        b[module] = Part(start=first, data=tensor.view(-1)[first:end].clone())
    held: Any = _Held(b=b)

    def write() -> None:
        checkpoint.write_state(path, CALIBRATE, held, world, origin={}, quantities=("values",))

    return _measured(world, write)[1]


def _chosen(world: World, path: Path, rank: int, density: float) -> dict[str, Any]:
    settings = config.Adapter(rank=rank, density=density)
    masks, found = _measured(world, lambda: masking.choose(path, CALIBRATE, origin={}, settings=settings, world=world))
    return {**found, "kept": _kept(masks), "digest": digest_of(masks)}


def _measured(world: World, do: Callable[[], Any]) -> tuple[Any, dict[str, Any]]:
    before = _peak()
    dist.barrier()
    start = time.perf_counter()
    result = do()
    dist.barrier()
    seconds = time.perf_counter() - start
    most = torch.tensor([_peak(), before], device=world.device)
    dist.all_reduce(most, dist.ReduceOp.MAX)
    return result, {"seconds": round(seconds, 3), "megabytes": int(most[0]), "before": int(most[1])}


def _trained(
    world: World, base: Path, engine: str, spec: Spec, density: float, rows: int, length: int, steps: int
) -> dict[str, Any]:
    model, weights = skeleton(config.Model(path=str(base), dtype="bfloat16"))
    generator = torch.Generator().manual_seed(0)
    sizes = {path: features(layer.base) for path, layer in attach(_on_meta(model.config), spec).items()}
    masks = {
        path: torch.rand(rows_of_b, spec.rank, generator=generator) < density for path, (rows_of_b, _) in sizes.items()
    }
    attach(model, spec, masks=masks)
    name, options = ENGINES[engine]
    train = config.Train(steps=steps, micro_batch_size=rows)
    build = plugin.find("engines", name, "build", "engine").load()
    made = build(model, weights, train, world, state=None, **options)
    generator = torch.Generator().manual_seed(world.rank)
    ids = torch.randint(VOCABULARY, (rows, length), generator=generator)
    batch = Batch(input_ids=ids, attention_mask=torch.ones_like(ids), labels=ids)
    losses, seconds = [], 0.0
    for _ in range(steps):
        start = time.perf_counter()
        losses.append(made.step([batch], num_targets=world.size * rows * (length - 1), lr=1e-3).loss)
        seconds = time.perf_counter() - start
    return {"seconds": round(seconds, 3), "megabytes": _peak(), "first_loss": losses[0], "last_loss": losses[-1]}


if __name__ == "__main__":
    sys.exit(main(["bench", "tests.benchmarks.shapes", *sys.argv[1:]]))
