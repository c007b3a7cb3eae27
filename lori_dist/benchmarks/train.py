"""Training with LoRI beside PEFT's LoRA: the same base, rank, targets, batch and engine."""

import importlib.util
import statistics
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
import torch.distributed as dist
import torch.multiprocessing
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from lori_dist import config, plugin
from lori_dist.adapter.attach import adapted, extract
from lori_dist.adapter.bases import features
from lori_dist.benchmarks._gang import gang
from lori_dist.benchmarks._methods import METHODS, from_files, is_adapted, make_llama
from lori_dist.benchmarks._timing import quotients
from lori_dist.benchmarks._traffic import Traffic, moment_bytes, process_bytes, saved_bytes
from lori_dist.errors import ConfigError
from lori_dist.formats import native
from lori_dist.training import checkpoint, device
from lori_dist.training.data import Batch
from lori_dist.training.engine import Engine, gather, trained
from lori_dist.training.world import World

ENGINES: dict[str, tuple[str, dict[str, Any]]] = {
    "ddp": ("ddp", {}),
    "fsdp": ("fsdp", {}),
    "fsdp_replicated": ("fsdp", {"base": "replicated"}),
    "zero1": ("deepspeed", {"stage": 1}),
    "zero2": ("deepspeed", {"stage": 2}),
    "zero3": ("deepspeed", {"stage": 3}),
}
COUNTED = ("optimizer_bytes", "gradient_bytes", "adapter_file_bytes", "saved_activation_bytes")
"""Counted quantities that get a ratio, in addition to the times."""
VOCABULARY = 8192
AGAINST, FLOOR = "peft_lora", "floor"


@dataclass(frozen=True, kw_only=True)
class Setting:
    """Settings of every gang of ranks."""

    folder: Path
    """Folder with the base in `base` and room for results."""
    engine: str
    rank: int
    rows: int
    length: int
    steps: int
    dtype: str


def run(
    *,
    engines: str = "ddp,fsdp,fsdp_replicated,zero1,zero2,zero3",
    ranks: int = 2,
    rank: int = 32,
    layers: int = 14,
    hidden: int = 512,
    rows: int = 8,
    length: int = 128,
    steps: int = 5,
    dtype: str = "",
) -> dict[str, Any]:
    """Rows for a table, and ratios[engine][method] to PEFT's LoRA, times with the quartiles of their spread.

    engines: names separated by commas. ranks: processes; on CUDA at most one per device. rank: of the adapters.
    layers, hidden: of a Llama with random weights, 48 million at the defaults. rows, length: of a rank's batch.
    steps: timed, in turns, after one that is not. dtype: of the base, by default bfloat16 on CUDA, else float32.

    A row's figures are of rank 0. optimizer_bytes: Adam's moments held. gradient_bytes and adapter_gathered_bytes: of
    the adapter, in the collectives of one step; base_reduced_bytes and base_gathered_bytes: of all else, which is what
    the same engine sends without an adapter. Each counts the whole tensor that is reduced or made.
    saved_activation_bytes: kept for the backward pass by the adapted layers; model_activation_bytes: by the whole
    model. peak_memory_bytes: above what the process had before the model. first_step_seconds: from the start of the
    process to the end of the first step.
    Raises ConfigError for an engine that is not known, and where PEFT is not installed.
    """
    chosen = engines.split(",")
    _check(chosen)
    num_ranks = device.num_ranks(ranks)
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        make_llama(folder / "base", layers, hidden, length, VOCABULARY)
        rows_of_table: list[dict[str, Any]] = []
        ratios: dict[str, Any] = {}
        for engine in chosen:
            setting = Setting(
                folder=folder,
                engine=engine,
                rank=rank,
                rows=rows,
                length=length,
                steps=steps,
                dtype=dtype or device.dtype_of_base(),
            )
            alone = {method: gang(_alone, num_ranks, setting, method, time.time()) for method in METHODS}
            together = gang(_together, num_ranks, setting)
            made = [_row(engine, method, alone, together["seconds"], num_ranks * rows * length) for method in METHODS]
            rows_of_table += made
            ratios[engine] = _ratios({row["method"]: row for row in made}, together)
    return {"rows": rows_of_table, "ratios": ratios}


def _check(engines: Sequence[str]) -> None:
    for engine in engines:
        if engine not in ENGINES:
            near = plugin.nearest(engine, ENGINES)
            raise ConfigError(f"bench train: engines: there is no {engine!r}; there are {', '.join(ENGINES)}.{near}")
    if importlib.util.find_spec("peft") is None:
        raise ConfigError(
            "bench train: PEFT is not installed, and its LoRA is what is measured against; "
            "pip install 'lori_dist[peft]'"
        )


# --- the table -------------------------------------------------------------------------------------------------------


def _row(
    engine: str, method: str, alone: Mapping[str, dict[str, Any]], seconds: Mapping[str, list[float]], tokens: int
) -> dict[str, Any]:
    counted, without = alone[method], alone[FLOOR]
    times = seconds[method]
    low, median, high = statistics.quantiles(times, n=4) if len(times) > 1 else times * 3
    has_adapter = method != FLOOR
    return {
        "engine": engine,
        "method": method,
        "trainable": counted["trainable"],
        "optimizer_bytes": counted["optimizer_bytes"],
        "gradient_bytes": counted["reduced"] - without["reduced"] if has_adapter else 0,
        "adapter_gathered_bytes": counted["gathered"] - without["gathered"] if has_adapter else 0,
        "base_reduced_bytes": without["reduced"],
        "base_gathered_bytes": without["gathered"],
        "collectives": counted["collectives"],
        "saved_activation_bytes": counted["layer_bytes"],
        "model_activation_bytes": counted["model_bytes"],
        "step_seconds": round(median, 4),
        "step_seconds_quartiles": [round(low, 4), round(high, 4)],
        "tokens_per_second": round(tokens / median),
        "peak_memory_bytes": counted["peak_memory_bytes"],
        "first_step_seconds": round(counted["first_step_seconds"], 2),
        "adapter_file_bytes": counted["adapter_file_bytes"],
        "checkpoint_bytes": counted["checkpoint_bytes"],
        "checkpoint_seconds": round(counted["checkpoint_seconds"], 4),
    }


def _ratios(rows: Mapping[str, Mapping[str, Any]], together: Mapping[str, Any]) -> dict[str, Any]:
    """Ratios: of counts, the quotients; of times, the median of the quotients of steps taken in the same turn."""
    found = {}
    for method in ("lori_d", "lori_s"):
        counted = {name: round(rows[method][name] / rows[AGAINST][name], 4) for name in COUNTED}
        share = together["adapter_flops"] / together["floor_flops"]
        found[method] = {
            **counted,
            **quotients("step_seconds", together["seconds"][method], together["seconds"][AGAINST]),
            **quotients("step_seconds_over_floor", together["seconds"][method], together["seconds"][FLOOR]),
            "adapter_share_of_flops": round(share, 4),
            "wanted_over_floor": round(1 + 1.5 * share, 4),
        }
    return found


# --- gangs -----------------------------------------------------------------------------------------------------------


def _build(setting: Setting, method: str, world: World) -> tuple[nn.Module, Engine]:
    name, options = ENGINES[setting.engine]
    model, weights = METHODS[method](from_files(setting.folder / "base", setting.dtype), setting.rank)
    build = plugin.find("engines", name, "build", "engine").load()
    train = config.Train(steps=setting.steps, micro_batch_size=setting.rows)
    return model, build(model, weights, train, world, state=None, **options)


def _batch(setting: Setting, world: World) -> Batch:
    generator = torch.Generator().manual_seed(world.rank)
    ids = torch.randint(VOCABULARY, (setting.rows, setting.length), generator=generator)
    return Batch(input_ids=ids, attention_mask=torch.ones_like(ids), labels=ids)


def _step(engine: Engine, batch: Batch, world: World) -> float:
    """Seconds that one step takes, on a machine where all ranks have arrived."""
    dist.barrier()
    start = time.perf_counter()
    engine.step([batch], num_targets=world.size * batch.labels[:, 1:].numel(), lr=1e-4)
    return time.perf_counter() - start


def _together(world: World, setting: Setting) -> dict[str, Any]:
    """Seconds of every method's steps, taken in turns, and what a forward and a backward pass compute."""
    batch = _batch(setting, world)
    engines = {method: _build(setting, method, world)[1] for method in METHODS}
    with FlopCounterMode(display=False) as counter:
        _step(engines[FLOOR], batch, world)
    for engine in engines.values():
        _step(engine, batch, world)
    seconds: dict[str, list[float]] = {method: [] for method in METHODS}
    for _ in range(setting.steps):
        for method, engine in engines.items():
            seconds[method].append(_step(engine, batch, world))
    return {"seconds": seconds, "floor_flops": counter.get_total_flops(), "adapter_flops": _adapter_flops(setting)}


def _adapter_flops(setting: Setting) -> int:
    """FLOPs of LoRI's products in one forward and backward pass of a rank: A x and B (A x), their transposes, and B's
    gradient."""
    model, _ = METHODS["lori_d"](from_files(setting.folder / "base", setting.dtype), setting.rank)
    sizes = [features(layer.base) for layer in adapted(model).values()]
    each = sum(2 * (inputs + outputs) + outputs for outputs, inputs in sizes)
    return 2 * setting.rows * setting.length * setting.rank * each


def _alone(world: World, setting: Setting, method: str, started: float) -> dict[str, Any]:
    """All that is counted, and what would be another method's if it were in the same process.

    started: when the processes were, by the clock on the wall.
    """
    batch = _batch(setting, world)
    before = _memory(world, reset=True)
    model, engine = _build(setting, method, world)
    _step(engine, batch, world)
    first_step_seconds = time.time() - started
    with Traffic() as traffic:  # of the second, as engines settle in the first
        engine.step([batch], num_targets=batch.labels.numel(), lr=1e-4)
    peak = _memory(world, reset=False) - before
    with saved_bytes(engine.model, is_adapted) as saved:
        engine.step([batch], num_targets=batch.labels.numel(), lr=1e-4)
    start = time.perf_counter()
    path = checkpoint.save(setting.folder / "checkpoints", method, engine, world, origin={}, keep=1)
    checkpoint_seconds = time.perf_counter() - start
    adapter = _save(setting.folder / "adapter.safetensors", method, model, engine, world)
    return {
        # At ZeRO's stage 3, parameters are empty between steps.
        "trainable": sum(getattr(parameter, "ds_numel", parameter.numel()) for parameter in trained(model).values()),
        "optimizer_bytes": moment_bytes(engine),
        "reduced": traffic.reduced,
        "gathered": traffic.gathered,
        "collectives": traffic.num_calls,
        "layer_bytes": saved.layer_bytes,
        "model_bytes": saved.model_bytes,
        "peak_memory_bytes": peak,
        "first_step_seconds": first_step_seconds,
        "adapter_file_bytes": adapter,
        "checkpoint_bytes": path.stat().st_size if world.rank == 0 else 0,
        "checkpoint_seconds": checkpoint_seconds,
    }


def _save(path: Path, method: str, model: nn.Module, engine: Engine, world: World) -> int:
    """Bytes of the adapter's file in bf16: of LoRI as this package writes it, of LoRA its A and B, as PEFT does."""
    values = gather(engine, "values", world)
    if world.rank > 0 or method == FLOOR:
        return 0
    if adapted(model):
        native.save(extract(model, name=method, values=values), path, dtype=torch.bfloat16)
    else:
        safetensors.torch.save_file({name: value.bfloat16() for name, value in values.items()}, path)
    return path.stat().st_size


def _memory(world: World, *, reset: bool) -> int:
    """The most bytes in use: of the device, on CPU of the whole process. reset: only what is in use now."""
    if world.device.type == "cuda":
        if reset:
            device.reset_peak(world.device)
        return device.memory(world.device)
    if reset:
        Path("/proc/self/clear_refs").write_text("5")
    return process_bytes("VmHWM")
