"""Bars for long work, on the last line of a terminal. Where stderr is no terminal there is nothing."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from tqdm import tqdm
from tqdm.contrib.logging import logging_redirect_tqdm

from lori_dist.cluster.board import Progress


@contextmanager
def of_run() -> Iterator[Callable[[Progress], None]]:
    """Gives what `cluster.run.execute` reports to: how many jobs are done, and where each running one is."""
    running: dict[str, str] = {}

    def show(event: Progress) -> None:
        running.pop(event.job, None)
        if event.state == "running":
            running[event.job] = _told(event)
        bar.total, bar.n = event.num_jobs, event.num_done
        bar.set_description_str("".join(f" | {text}" for text in running.values()))

    with _bar("{n_fmt}/{total_fmt} jobs [{elapsed}]{desc}") as bar:
        yield show


def _told(event: Progress) -> str:
    steps = f" {event.phase} {event.step}/{event.num_steps}" if event.num_steps else ""
    loss = f" loss {event.loss:.3f}" if event.loss is not None else ""
    return f"{event.job}{steps}{loss}"


@contextmanager
def of_training() -> Iterator[Callable[[Mapping[str, Any]], None]]:
    """Gives what `training.train` reports to: the steps of the phase it is in."""

    def show(record: Mapping[str, Any]) -> None:
        if record["step"] != bar.n + 1 or record["num_steps"] != bar.total:  # a phase begins, maybe in its middle
            bar.reset(total=record["num_steps"])
            bar.initial = bar.n = record["step"] - 1
        loss = "no number" if record["loss"] is None else f"{record['loss']:.3f}"
        bar.set_description_str(f"{record['phase']} loss {loss}", refresh=False)
        bar.update()

    with _bar("{desc} {n_fmt}/{total_fmt} {bar} {rate_fmt} {elapsed}<{remaining}") as bar:
        yield show


@contextmanager
def of_evaluation(models: Sequence[str]) -> Iterator[Callable[[str, str, int, int], None]]:
    """Gives what takes a model's name and then what `evaluation.evaluate` reports: measurements over all models."""

    def show(model: str, what: str, num_done: int, num_measurements: int) -> None:
        bar.total = num_measurements * len(models)
        bar.n = num_measurements * models.index(model) + num_done
        bar.set_description_str(f"{model}: {what}")

    with _bar("{desc} {n_fmt}/{total_fmt} {bar} {elapsed}<{remaining}") as bar:
        yield show


@contextmanager
def _bar(layout: str) -> Iterator[Any]:
    """Log lines appear above it."""
    with logging_redirect_tqdm(), tqdm(disable=None, leave=False, bar_format=layout) as bar:
        yield bar
