"""Training on one GPU: tokens per second, the share of what the device can do, and memory, beside PEFT's LoRA."""

import gc
import importlib.util
import statistics
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor, nn
from transformers import LlamaConfig

from lori_dist import config, plugin
from lori_dist.benchmarks import layer
from lori_dist.benchmarks._methods import METHODS, Made
from lori_dist.benchmarks._timing import interleaved, quotients
from lori_dist.engines.ddp import Replicated, build
from lori_dist.errors import ConfigError
from lori_dist.training import flops
from lori_dist.training.compilation import compile_blocks
from lori_dist.training.data import Batch
from lori_dist.training.device import free_cached, free_memory, memory, reset_peak, without_cuda
from lori_dist.training.engine import StepResult, trained
from lori_dist.training.weights import without_weights
from lori_dist.training.world import World, from_environment

LLAMA_3 = {"vocab_size": 128256, "num_key_value_heads": 8}
SHAPES: Mapping[str, Mapping[str, Any]] = {
    "llama-3-8b": {**LLAMA_3, "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32},
    "llama-2-7b": {"vocab_size": 32000, "hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32},
    "llama-3-3b": {
        **LLAMA_3,
        "hidden_size": 3072,
        "intermediate_size": 8192,
        "num_hidden_layers": 28,
        "num_attention_heads": 24,
        "tie_word_embeddings": True,
    },
    "llama-3-1b": {
        **LLAMA_3,
        "hidden_size": 2048,
        "intermediate_size": 8192,
        "num_hidden_layers": 16,
        "tie_word_embeddings": True,
    },
}
"""Model shapes, which are measured one after the other."""
TINY = {
    "vocab_size": 256,
    "hidden_size": 64,
    "intermediate_size": 176,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}
WAYS: Mapping[str, Mapping[str, bool]] = {
    "peft_lora": {"peft_lora": False, "peft_lora_autocast": True},
    "lori_s": {"lori_s": False},
}
"""Method -> name of what is measured -> whether under autocast, as Trainers run PEFT, which else computes in fp32."""
OURS = "lori_s"
DTYPE = torch.bfloat16
SIDE = {"cuda": 8192, "cpu": 256}
"""Side of the square matrices whose product measures a device's speed."""
LAYER = {"cuda": (8192, 4096, 14336), "cpu": (64, 64, 176)}
"""Tokens, inputs and outputs of the layer that is measured alone."""
LR = 1e-4


def run(
    *,
    device: Literal["cuda", "cpu"] = "cuda",
    shape: str = "",
    rank: int = 32,
    rows: int = 2,
    length: int = 1024,
    steps: int = 10,
    compile: bool = False,
    tflops: float = 0.0,
) -> dict[str, Any]:
    """Rows for a table, and ratios of LoRI with a tenth of B to PEFT's LoRA of equal rank, on equal batches.

    device: cpu takes a tiny model, and tells nothing of GPUs. shape: of a Llama with random weights in bfloat16; by
    default the largest that the device has memory for twice, as both methods take turns. rank: of the adapters. rows,
    length: of a batch. steps: timed, after one that is not. compile: the blocks, as train.compile does. tflops: what
    the device can do by its data sheet; by default what is known of it by its name.

    training: peft_lora, as PEFT computes by itself, and under autocast; lori_s. tflops: the rate that the base's
    products come to, four operations for each weight and token, without those of attention's scores and of adapters.
    mfu, of_matmul: its share of the device's rate, and of that of one large product measured here, which is the row
    matmul. peak_memory_bytes: with the method's own base. layer: one layer alone, as in `bench layer`.
    Raises ConfigError where there is no GPU, where PEFT is not installed, and for a shape that is not known or that
    there is no memory for.
    """
    _check(device, shape)
    if device == "cpu":
        without_cuda()
    settings = {"rank": rank, "rows": rows, "length": length, "steps": steps, "compile": compile}
    with _alone() as world:
        peak = tflops * 1e12 or flops.peak(world.device, DTYPE)
        matmul = _matmul(world.device)
        name, found, seconds = _largest([shape] if shape else [*_shapes(device)], device, world, settings)
        of_layer = {row.pop("name"): row for row in layer.measure(*LAYER[device], device, DTYPE)}
    training = {method: _row(name, one, seconds[method], rows * length, peak, matmul) for method, one in found.items()}
    return {
        "rows": [
            {"what": "matmul", "tflops": _digits(matmul / 1e12), "peak_tflops": peak and peak / 1e12},
            *({"what": "training", "method": method, **row} for method, row in training.items()),
            *({"what": "layer", "method": method, **row} for method, row in of_layer.items()),
        ],
        "ratios": {
            **{
                f"step_seconds over {name}": quotients("step_seconds", seconds[OURS], times)
                for name, times in seconds.items()
                if name != OURS
            },
            "layer, ms": of_layer["lori_sparse"]["ms_over_peft"],
            **{
                figure: {method: row[figure] for method, row in training.items()}
                for figure in ("tokens_per_second", "mfu", "of_matmul", "peak_memory_bytes")
            },
        },
    }


@contextmanager
def _alone() -> Iterator[World]:
    """A world of one, which is gone afterwards."""
    try:
        yield from_environment()
    finally:
        dist.destroy_process_group()


def _shapes(device: str) -> Mapping[str, Mapping[str, Any]]:
    return SHAPES if device == "cuda" else {"tiny": TINY}


def _check(device: str, shape: str) -> None:
    if device == "cuda" and not torch.cuda.is_available():
        raise ConfigError(
            "bench gpu: torch finds no CUDA device here; run it where there is one, or give device=cpu, which runs all "
            "of it on a tiny model and measures nothing of a GPU"
        )
    if shape and shape not in _shapes(device):
        known = _shapes(device)
        raise ConfigError(
            f"bench gpu: shape: there is no {shape!r}; there are {', '.join(known)}.{plugin.nearest(shape, known)}"
        )
    if importlib.util.find_spec("peft") is None:
        raise ConfigError(
            "bench gpu: PEFT is not installed, and its LoRA is what is measured against; pip install 'lori_dist[peft]'"
        )


# --- training --------------------------------------------------------------------------------------------------------


def _largest(
    names: Sequence[str], device: str, world: World, settings: Mapping[str, Any]
) -> tuple[str, dict[str, dict[str, Any]], dict[str, list[float]]]:
    """The first of the shapes that there is memory for, what was found of it, and seconds of every step."""
    room = free_memory(world.device)
    for name in names:
        shape = LlamaConfig(**_shapes(device)[name], max_position_embeddings=max(512, settings["length"]))
        if room is not None and 2 * _num_parameters(without_weights(shape, DTYPE)) * DTYPE.itemsize > room:
            continue
        try:
            return name, *_train(shape, world, settings)
        except torch.OutOfMemoryError:
            pass
        gc.collect()  # outside of the clause above, which holds on to what was made
        free_cached()
    raise ConfigError(
        f"bench gpu: the device has no memory for {', '.join(names)}, twice, with rows={settings['rows']} and "
        f"length={settings['length']}; give fewer rows or tokens"
    )


def _num_parameters(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


class _Random:
    """`Weights` that are the same in every model."""

    def read(self, name: str, into: Tensor, start: int) -> None:
        if "norm" in name:
            into.fill_(1.0)
        else:
            into.normal_(std=0.02, generator=torch.Generator(into.device).manual_seed(zlib.crc32(name.encode())))


def _train(
    shape: LlamaConfig, world: World, settings: Mapping[str, Any]
) -> tuple[dict[str, dict[str, Any]], dict[str, list[float]]]:
    """The measurements of each method, and the seconds of its steps. Methods take turns, step by step."""
    batch = _batch(shape, settings["rows"], settings["length"])
    found: dict[str, dict[str, Any]] = {}
    steps: dict[str, Callable[[], StepResult]] = {}
    for method, ways in WAYS.items():
        before = _held(world)
        counted, engine = _engine(method, shape, world, settings)
        own = _held(world) - before
        for name, casts in ways.items():
            start = _held(world)
            steps[name] = partial(_step, engine, batch, casts)
            first = steps[name]()
            peak = own + memory(world.device) - start
            found[name] = {**counted, "peak_memory_bytes": peak, "first_loss": round(first.loss, 4)}
    seconds = interleaved(steps, settings["steps"])
    for name, step in steps.items():
        found[name]["last_loss"] = round(step().loss, 4)
    return found, seconds


def _engine(
    method: str, shape: LlamaConfig, world: World, settings: Mapping[str, Any]
) -> tuple[dict[str, Any], Replicated]:
    """The figures of what a method computes and trains, and the engine that trains it."""
    base: Made = (without_weights(shape, DTYPE).eval().requires_grad_(False), _Random())
    num_flops = flops.per_token(base[0], activation_checkpointing=False)
    parameters = _num_parameters(base[0])
    model, weights = METHODS[method](base, settings["rank"])
    if settings["compile"]:
        compile_blocks(model)
    trainable = sum(parameter.numel() for parameter in trained(model).values())
    counted = {"flops_per_token": num_flops, "parameters": parameters, "trainable": trainable}
    return counted, build(model, weights, config.Train(steps=1), world, state=None)


def _step(engine: Replicated, batch: Batch, casts: bool) -> StepResult:
    with torch.autocast(engine.world.device.type, DTYPE, enabled=casts):
        return engine.step([batch], num_targets=batch.labels[:, 1:].numel(), lr=LR)


def _held(world: World) -> int:
    """Bytes in use now, from which `memory` then counts."""
    reset_peak(world.device)
    return memory(world.device)


def _batch(shape: LlamaConfig, rows: int, length: int) -> Batch:
    ids = torch.randint(int(shape.vocab_size), (rows, length), generator=torch.Generator().manual_seed(0))
    return Batch(input_ids=ids, attention_mask=torch.ones_like(ids), labels=ids)


# --- figures ---------------------------------------------------------------------------------------------------------


def _matmul(device: torch.device) -> float:
    """FLOP/s of one large product."""
    side = SIDE[device.type]
    left, right = (torch.randn(side, side, device=device, dtype=DTYPE) for _ in range(2))
    seconds = interleaved({"matmul": lambda: left @ right}, 20)["matmul"]
    return 2 * side**3 / statistics.median(seconds)


def _digits(value: float) -> float:
    """Rounds to four significant digits; the TFLOP/s of a slow CPU are thousandths."""
    return float(f"{value:.4g}")


def _row(
    shape: str,
    found: Mapping[str, Any],
    seconds: Sequence[float],
    tokens: int,
    peak: float | None,
    matmul: float,
) -> dict[str, Any]:
    low, median, high = statistics.quantiles(seconds, n=4) if len(seconds) > 1 else [*seconds] * 3
    others = dict(found)
    rate = others.pop("flops_per_token") * tokens / median
    return {
        "shape": shape,
        "tokens": tokens,
        "step_seconds": round(median, 4),
        "step_seconds_quartiles": [round(low, 4), round(high, 4)],
        "tokens_per_second": round(tokens / median),
        "tflops": _digits(rate / 1e12),
        "mfu": None if peak is None else _digits(rate / peak),
        "of_matmul": _digits(rate / matmul),
        **others,
    }
