"""Entries per second of the projection against `uniform_`, torch's own generator."""

import statistics
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor

from lori_dist.adapter.projection import projection
from lori_dist.benchmarks._timing import interleaved, one_thread

SHAPES = ((64, 4096), (64, 14336), (256, 28672))  # (rank, in_features)
REPETITIONS = 25


def run() -> dict[str, Any]:
    """Rows for a table, and ratios of medians: the worst shape against `uniform_`, the largest for two threads."""
    with one_thread():
        cpu = {shape: _measure(_cpu_candidates(*shape), shape) for shape in SHAPES}
    cuda = {shape: _measure(_cuda_candidates(*shape), shape) for shape in SHAPES if torch.cuda.is_available()}
    largest = cpu[SHAPES[-1]]
    ratios = {
        "cpu_one_thread": min(_ratio(rows, "projection, 1 thread", "uniform_, 1 thread") for rows in cpu.values()),
        "threads_2_over_1": _ratio(largest, "projection, 2 threads", "projection, 1 thread"),
    }
    if cuda:
        ratios["cuda"] = min(_ratio(rows, "projection, cuda", "uniform_, cuda") for rows in cuda.values())
    rows = [row for by_name in [*cpu.values(), *cuda.values()] for row in by_name.values()]
    return {"rows": rows, "ratios": ratios}


def _cpu_candidates(rank: int, in_features: int) -> dict[str, Callable[[], Tensor]]:
    make = partial(projection, 0, "layers.0.self_attn.q_proj", rank, in_features)
    return {
        "uniform_, 1 thread": lambda: torch.empty(rank * in_features).uniform_(),
        "projection, 1 thread": lambda: make(num_threads=1),
        "projection, 2 threads": lambda: make(num_threads=2),
        "projection, 1 thread, bf16": lambda: make(num_threads=1, dtype=torch.bfloat16),
    }


def _cuda_candidates(rank: int, in_features: int) -> dict[str, Callable[[], Tensor]]:
    make = partial(projection, 0, "layers.0.self_attn.q_proj", rank, in_features, device="cuda")
    return {
        "uniform_, cuda": lambda: torch.empty(rank * in_features, device="cuda").uniform_(),
        "projection, cuda": make,
        "projection, cuda, bf16": lambda: make(dtype=torch.bfloat16),
    }


def _measure(candidates: Mapping[str, Callable[[], Tensor]], shape: tuple[int, int]) -> dict[str, dict[str, Any]]:
    return {name: _row(name, shape, times) for name, times in interleaved(candidates, REPETITIONS).items()}


def _row(name: str, shape: tuple[int, int], seconds: list[float]) -> dict[str, Any]:
    rank, in_features = shape
    fast, median, slow = (rank * in_features / quartile / 1e6 for quartile in statistics.quantiles(seconds, n=4))
    return {
        "name": name,
        "rank": rank,
        "in_features": in_features,
        "million_entries_per_s": round(median, 1),
        "spread_percent": round(100 * (fast - slow) / median, 1),  # between the quartiles
    }


def _ratio(rows: Mapping[str, Mapping[str, Any]], name: str, over: str) -> float:
    return round(float(rows[name]["million_entries_per_s"] / rows[over]["million_entries_per_s"]), 3)
