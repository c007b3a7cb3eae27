"""Timing candidates side by side in one run, so that what is quoted are ratios."""

import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager

import torch


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
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - start
