"""Timing candidates side by side in one run, so that what is quoted are ratios."""

import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch

from lori_dist.training.device import synchronize


def interleaved(candidates: Mapping[str, Callable[[], object]], repetitions: int) -> dict[str, list[float]]:
    """Seconds of every repetition of every candidate.

    Candidates take turns, so that a slow moment of the machine meets all of them.
    """
    seconds: dict[str, list[float]] = {name: [] for name in candidates}
    for candidate in candidates.values():
        _seconds(candidate)
    for _ in range(repetitions):
        for name, candidate in candidates.items():
            seconds[name].append(_seconds(candidate))
    return seconds


def quotients(name: str, ones: Sequence[float], others: Sequence[float]) -> dict[str, Any]:
    """The median of one over other, of times taken in the same turns, and `NAME_quartiles`."""
    found = [one / other for one, other in zip(ones, others, strict=True)]
    low, median, high = statistics.quantiles(found, n=4) if len(found) > 1 else found * 3
    return {name: round(median, 4), f"{name}_quartiles": [round(low, 4), round(high, 4)]}


@contextmanager
def one_thread() -> Iterator[None]:
    """torch on one thread, and afterwards on as many as before."""
    num_threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(num_threads)


def _seconds(candidate: Callable[[], object]) -> float:
    start = time.perf_counter()
    candidate()
    synchronize()
    return time.perf_counter() - start
