"""Seconds and memory of merges at the shapes of Llama-3-70B, file to file, against PEFT's `add_weighted_adapter`."""

import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

import torch
from torch import nn

from lori_dist.adapter.adapter import Adapter, Entries
from lori_dist.adapter.projection import checksum, projection
from lori_dist.adapter.update import Part, blocks
from lori_dist.atomic import aside
from lori_dist.formats import native
from lori_dist.formats.spool import Spool
from lori_dist.integrations import peft as exported
from lori_dist.merges import merge_files

METHODS = {"concat": "cat", "linear": "linear", "ties": "ties"}
"""Ours -> PEFT's `combination_type`."""

SEED = 0
"""Seed of A. All tasks share it, so that linear and TIES merge B on it; PEFT stores one A for each."""

PROGRAM = "import sys; from lori_dist.benchmarks import merge; print(merge.measure(sys.argv[1]))"


def run(
    *,
    layers: Annotated[int, "[1, inf)"] = 80,
    peft_layers: Annotated[int, "[1, inf)"] = 40,
    hidden: int = 8192,
    ffn: int = 28672,
    kv: int = 1024,
    tasks: Annotated[int, "[2, inf)"] = 4,
    rank: int = 32,
    density: Annotated[float, "(0, 1)"] = 0.1,
    threads: Annotated[int, "[1, inf)"] = 1,
    repetitions: Annotated[int, "[1, inf)"] = 3,
) -> dict[str, Any]:
    """Rows and ratios of the merges of `tasks` random adapters. On Linux.

    Every merge has a process of its own. Its `seconds` begin after the imports; `peak_mb` is the most memory that the
    process ever had, imports included. Ours: from adapter files to the merge's file on the disk (`merge_files`). PEFT:
    `seconds` of add_weighted_adapter alone, between `load_seconds`, which reads the same adapters, exported, into
    memory, and `save_seconds`, which writes the merge from there. Its model has no base weights in memory: each is one
    number, seen as a matrix. Both at `peft_layers`, which sets what PEFT takes (about 0.35 GB a layer and four
    tasks); ours also at `layers`. Processes take turns; figures are medians.
    ratios: method -> PEFT's over ours, at peft_layers: `seconds`, and `peak_bytes`; `file_to_file`: PEFT's with what
    reads and writes, which ours always has.
    layers, hidden, ffn, kv: Llama-3-70B's, kv being the outputs of k_proj and v_proj. threads: torch's, of both; with
    more than there are idle cores, they wait for each other in every small operation.
    """
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        shapes = {number: _shapes(number, hidden, ffn, kv) for number in (layers, peft_layers)}
        ours = {number: _made(folder, number, shapes[number], tasks, rank, density) for number in shapes}
        theirs = [folder / f"peft-{task}" for task in range(tasks)]
        for task in range(tasks):
            exported.export(native.open_lazy(ours[peft_layers][task]), theirs[task], base_model_name="none")
        work = {
            (who, method, number): {
                "who": who,
                "method": method,
                "paths": [str(path) for path in (theirs if who == "peft" else ours[number])],
                "shapes": shapes[number],
                "out": str(folder / "merged"),
            }
            for method in METHODS
            for who, number in dict.fromkeys([("ours", layers), ("ours", peft_layers), ("peft", peft_layers)])
        }
        found: dict[tuple[str, str, int], list[dict[str, float]]] = {key: [] for key in work}
        for _ in range(repetitions):
            for key, item in work.items():
                found[key].append(_in_a_process(item, threads))
    rows = {key: _row(*key, figures) for key, figures in found.items()}
    ratios = {
        method: _ratios(rows["ours", method, peft_layers], rows["peft", method, peft_layers]) for method in METHODS
    }
    return {"rows": list(rows.values()), "ratios": ratios}


def _row(who: str, method: str, layers: int, figures: Sequence[Mapping[str, float]]) -> dict[str, Any]:
    medians = {name: round(statistics.median(item[name] for item in figures), 3) for name in figures[0]}
    return {"name": who, "method": method, "layers": layers, **medians}


def _ratios(ours: Mapping[str, Any], theirs: Mapping[str, Any]) -> dict[str, float]:
    whole = theirs["load_seconds"] + theirs["seconds"] + theirs["save_seconds"]
    return {
        "seconds": round(theirs["seconds"] / ours["seconds"], 1),
        "file_to_file": round(whole / ours["seconds"], 1),
        "peak_bytes": round(theirs["peak_mb"] / ours["peak_mb"], 1),
    }


# --- adapters --------------------------------------------------------------------------------------------------------


def _shapes(layers: int, hidden: int, ffn: int, kv: int) -> dict[str, tuple[int, int]]:
    """Module path -> (out_features, in_features) of a Llama."""
    inside = {
        "self_attn.q_proj": (hidden, hidden),
        "self_attn.k_proj": (kv, hidden),
        "self_attn.v_proj": (kv, hidden),
        "self_attn.o_proj": (hidden, hidden),
        "mlp.gate_proj": (ffn, hidden),
        "mlp.up_proj": (ffn, hidden),
        "mlp.down_proj": (hidden, ffn),
    }
    return {f"model.layers.{layer}.{name}": shape for layer in range(layers) for name, shape in inside.items()}


def _made(
    folder: Path, layers: int, shapes: Mapping[str, tuple[int, int]], tasks: int, rank: int, density: float
) -> list[Path]:
    """Files of adapters with random masks and values."""
    sums = {
        module: checksum(projection(SEED, module, rank, in_features)) for module, (_, in_features) in shapes.items()
    }
    paths = [folder / f"{layers}-{task}.safetensors" for task in range(tasks)]
    for task, path in enumerate(paths):
        if path.exists():  # the same number of layers twice
            continue
        generator = torch.Generator().manual_seed(task)
        with aside(path) as waiting:
            spool = Spool(path=waiting, out=path)
            parts = {
                module: [spool.keep(_random(f"task{task}", module, shape, rank, density, sums[module], generator))]
                for module, shape in shapes.items()
            }
            native.save(Adapter(shapes=shapes, blocks=blocks(parts, shapes), targets="all-linear"), path)
    return paths


def _random(
    name: str,
    module: str,
    shape: tuple[int, int],
    rank: int,
    density: float,
    sum_of_a: str,
    generator: torch.Generator,
) -> Part:
    index = (torch.rand(shape[0] * rank, generator=generator) < density).nonzero().squeeze(1).to(torch.int32)
    values = torch.randn(index.numel(), generator=generator) * 0.01
    return Part(
        name=name,
        module=module,
        shape=shape,
        seed=SEED,
        rank=rank,
        alpha=2.0 * rank,
        entries=Entries(index=index, values=values),
        checksum=sum_of_a,
    )


# --- in a process of its own -----------------------------------------------------------------------------------------


def _in_a_process(work: Mapping[str, Any], threads: int) -> dict[str, float]:
    ended = subprocess.run(
        [sys.executable, "-c", PROGRAM, json.dumps(work)],
        stdout=subprocess.PIPE,
        text=True,
        check=True,
        env={**os.environ, "OMP_NUM_THREADS": str(threads)},
    )
    figures: dict[str, float] = json.loads(ended.stdout.splitlines()[-1])
    return figures


def measure(text: str) -> str:
    """The figures of one merge, as JSON. text: what to do, as JSON."""
    work = json.loads(text)
    if work["who"] == "ours":
        paths, out = [Path(path) for path in work["paths"]], Path(work["out"])
        figures = {"seconds": _seconds(lambda: merge_files(paths, out, method=work["method"]))}
    else:
        figures = _peft(work)
    return json.dumps({**figures, "peak_mb": _peak_bytes() / 1e6})


def _peft(work: Mapping[str, Any]) -> dict[str, float]:
    from peft import LoraConfig, PeftModel

    names = [f"task{number}" for number in range(len(work["paths"]))]
    config = LoraConfig.from_pretrained(work["paths"][0])
    config.task_type = None  # this model can do nothing
    options = {"density": 0.2} if work["method"] == "ties" else {}  # what ours has by default

    def load() -> PeftModel:
        model = PeftModel(_empty(work["shapes"]), config, adapter_name=names[0], low_cpu_mem_usage=True)
        for name, path in zip(names, work["paths"], strict=True):
            model.load_adapter(path, name, low_cpu_mem_usage=True)
        return model

    start = time.perf_counter()
    model = load()
    load_seconds = time.perf_counter() - start
    weights = [1 / len(names)] * len(names)
    seconds = _seconds(
        lambda: model.add_weighted_adapter(
            names, weights, "merged", combination_type=METHODS[work["method"]], **options
        )
    )
    save_seconds = _seconds(
        lambda: model.save_pretrained(work["out"] + "-peft", selected_adapters=["merged"], save_embedding_layers=False)
    )
    return {"seconds": seconds, "load_seconds": load_seconds, "save_seconds": save_seconds}


def _empty(shapes: Mapping[str, Sequence[int]]) -> nn.Module:
    """Linear layers at those paths, each with a weight that is one number in memory."""
    model = nn.Module()
    for path, (out_features, in_features) in shapes.items():
        *parents, name = path.split(".")
        module = model
        for parent in parents:
            if not hasattr(module, parent):
                module.add_module(parent, nn.Module())
            module = module.get_submodule(parent)
        layer = nn.Linear(in_features, out_features, bias=False, device="meta")
        layer.weight = nn.Parameter(torch.zeros(1, 1).expand(out_features, in_features), requires_grad=False)
        module.add_module(name, layer)
    return model


def _seconds(act: Callable[[], object]) -> float:
    start = time.perf_counter()
    act()
    return time.perf_counter() - start


def _peak_bytes() -> int:
    """Peak memory of this process. `ru_maxrss` would start with that of its parent."""
    lines: Iterator[str] = iter(Path("/proc/self/status").read_text(encoding="utf-8").splitlines())
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM"))
