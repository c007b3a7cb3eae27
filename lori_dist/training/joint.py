"""Rows of several tasks in one batch."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch

from lori_dist.training import data
from lori_dist.training.data import Batch, Example
from lori_dist.training.sequences import Share


@dataclass(frozen=True, kw_only=True, slots=True)
class Joint:
    """How tasks are trained together."""

    tasks: Sequence[str]
    weights: Sequence[float]
    """Factor of each task's mean loss."""
    shares: Sequence[float] | None
    """Share of each task in a batch's rows; None means equally many, to one."""
    balance: str
    options: Mapping[str, Any]
    """Options of the balance."""
    granularity: Literal["matrix", "layer", "type", "global"]
    reduce: Literal["sum", "mean"]
    seed: int


def joint(settings: Mapping[str, Any], num_rows: Sequence[int]) -> Joint:
    """The joint training that a job's settings and the tasks' numbers of rows describe.

    With a sampling, a task's weight is multiplied by T times its share of the rows: a row counts alike whatever task it
    is of, and in equal shares this changes nothing.
    """
    balance, options = balance_of(settings)
    shares, weights = shares_of(settings, num_rows), settings["weights"]
    if shares is not None:
        weights = [len(shares) * share * weight for share, weight in zip(shares, weights, strict=True)]
    return Joint(
        tasks=settings["tasks"],
        weights=weights,
        shares=shares,
        balance=balance,
        options=options,
        granularity=settings["granularity"],
        reduce=settings["reduce"],
        seed=settings["seed"],
    )


def balance_of(settings: Mapping[str, Any]) -> tuple[str, Mapping[str, Any]]:
    """Name and options of the balance in a joint job's settings, which say of Ortho-LoRA what it projects against."""
    if "balance" in settings:
        return settings["balance"]["name"], settings["balance"]["options"]
    return ("none", {}) if settings["projection"] == "none" else ("ortho", {"against": settings["projection"]})


def shares_of(settings: Mapping[str, Any], num_rows: Sequence[int]) -> list[float] | None:
    """The share of each task in the rows, by a joint job's settings; None: equal."""
    sampling = settings.get("sampling")
    if sampling is None:
        return None
    sizes: list[float] = sampling.get("shares") or [
        min(number, sampling["cap"] or number) ** (1 / sampling["temperature"]) for number in num_rows
    ]
    return [size / sum(sizes) for size in sizes]


def counts_in_batch(shares: Sequence[float] | None, num_tasks: int, batch_size: int) -> list[int]:
    """Rows of each task in every batch: by their shares, to one, and at least one; without shares, equally many.

    num_tasks: at most batch_size.
    """
    if shares is None:
        return [len(range(task, batch_size, num_tasks)) for task in range(num_tasks)]
    counts = [1] * num_tasks
    for _ in range(batch_size - num_tasks):  # each row to the task that lacks most
        lacks = [share * batch_size - count for share, count in zip(shares, counts, strict=True)]
        counts[lacks.index(max(lacks))] += 1
    return counts


def rows_of_step(
    step: int, *, num_rows: Sequence[int], batch_size: int, seed: int, shares: Sequence[float] | None = None
) -> list[tuple[int, int]]:
    """The global batch of a step as (task, row), task by task, as `counts_in_batch` says.

    Each task continues from one permutation of its rows to the next by itself: the smaller it is, the more often.
    num_rows: of each task, of which there are at most batch_size. shares: of the rows, by task.
    """
    counts = counts_in_batch(shares, len(num_rows), batch_size)
    return [
        (task, row)
        for task, (count, share) in enumerate(zip(num_rows, counts, strict=True))
        for row in data.rows_of_step(step, num_rows=count, batch_size=share, seed=seed, epochs=None)
    ]


def batches(
    rows: Sequence[tuple[int, int]],
    examples: Sequence[Sequence[Example]],
    weights: Sequence[float],
    pieces: Sequence[Sequence[tuple[int, int]]],
    pad_id: int,
    share: Share,
    max_length: int,
) -> list[Batch]:
    """A rank's micro-batches, with weights that make the sum over their losses that over tasks of weight * mean loss.

    rows: of the global batch, as `rows_of_step` gives them; pieces: of these, the rank's. share: whether rows share
    sequences, of at most max_length tokens.
    """
    counts = [0] * len(weights)
    for task, row in rows:
        counts[task] += examples[task][row].num_targets
    of_targets = torch.tensor([weight / count for weight, count in zip(weights, counts, strict=True)])
    found = []
    for piece in pieces:
        of_tasks: dict[int, list[Example]] = {} if piece else {0: []}
        for task, row in piece:
            of_tasks.setdefault(task, []).append(examples[task][row])
        found.append(data.together(of_tasks, of_targets, pad_id, share, max_length))
    return found
