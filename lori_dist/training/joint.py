"""Rows of several tasks in one batch."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor

from lori_dist.training import data
from lori_dist.training.data import Batch, Example


@dataclass(frozen=True, kw_only=True, slots=True)
class Joint:
    """How tasks are trained together: what a joint job's settings say."""

    tasks: Sequence[str]
    weights: Sequence[float]
    """What each task's mean loss is multiplied by."""
    projection: Literal["original", "in_place", "none"]
    granularity: Literal["matrix", "layer", "type", "global"]
    reduce: Literal["sum", "mean"]
    seed: int


def rows_of_step(step: int, *, num_rows: Sequence[int], batch_size: int, seed: int) -> list[tuple[int, int]]:
    """The global batch of a step as (task, row), task by task: as many rows of each task, to one.

    Each task goes on from one permutation of its rows to the next by itself: the smaller it is, the more often.
    num_rows: of each task, of which there are at most batch_size.
    """
    num_tasks = len(num_rows)
    shares = [len(range(task, batch_size, num_tasks)) for task in range(num_tasks)]
    return [
        (task, row)
        for task, (count, share) in enumerate(zip(num_rows, shares, strict=True))
        for row in data.rows_of_step(step, num_rows=count, batch_size=share, seed=seed, epochs=None)
    ]


def batches(
    rows: Sequence[tuple[int, int]],
    examples: Sequence[Sequence[Example]],
    weights: Sequence[float],
    pieces: Sequence[Sequence[tuple[int, int]]],
    pad_id: int,
    pack: int | None = None,
) -> list[Batch]:
    """A rank's micro-batches, with weights that make the sum over their losses that over tasks of weight * mean loss.

    rows: of the global batch, as `rows_of_step` gives them; pieces: of these, the rank's. pack: rows of a task share
    sequences of at most so many tokens.
    """
    counts = [0] * len(weights)
    for task, row in rows:
        counts[task] += len(examples[task][row].response_ids)
    of_tasks = torch.tensor([weight / count for weight, count in zip(weights, counts, strict=True)])
    if pack is not None:
        return [_packed(piece, examples, of_tasks, pad_id, pack) for piece in pieces]
    return [
        replace(
            data.collate([examples[task][row] for task, row in piece], pad_id),
            tasks=tuple(task for task, _ in piece) or (0,),  # no rows give one of padding
            weights=of_tasks,
        )
        for piece in pieces
    ]


def _packed(
    piece: Sequence[tuple[int, int]],
    examples: Sequence[Sequence[Example]],
    weights: Tensor,
    pad_id: int,
    length: int,
) -> Batch:
    """A micro-batch each of whose sequences has rows of one task."""
    of_tasks: dict[int, list[Example]] = {} if piece else {0: []}
    for task, row in piece:
        of_tasks.setdefault(task, []).append(examples[task][row])
    found = {task: data.collate(of_task, pad_id, length) for task, of_task in of_tasks.items()}
    return data.side_by_side(found, weights, pad_id)
