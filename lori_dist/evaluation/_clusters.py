"""Rows of all tasks in clusters of rows that are alike to the base, on the gang and the placement of evaluations."""

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
import torch.distributed as dist
from torch import Tensor, nn
from transformers import PreTrainedModel

from lori_dist.adapter.projection import projection
from lori_dist.config import Run
from lori_dist.errors import ConfigError
from lori_dist.evaluation._place import place
from lori_dist.jobs import CLUSTERS, Job, tasks_of
from lori_dist.tensors import save
from lori_dist.training import data
from lori_dist.training.job_rows import rows_of
from lori_dist.training.loss import log_likelihoods
from lori_dist.training.model import check_fit, load_tokenizer
from lori_dist.training.token_files import Rows
from lori_dist.training.world import World, from_first

WIDTH = 256
"""Numbers of a row, at most: wider states are projected, which keeps distances nearly as they are."""
ROUNDS = 100
"""Rounds of Lloyd's algorithm at most."""

Points = npt.NDArray[np.float64]

log = logging.getLogger(__name__)


@torch.no_grad()
def divide(run: Run, job: Job, world: World, folder: Path, *, still_mine: Callable[[], None]) -> dict[str, Any]:
    """Divides the training rows of all tasks into clusters and writes the number of each row's, from 0, to
    folder/clusters.safetensors. Every rank calls this, and reads a part of the rows.

    Returns `sizes`, the numbers of rows of each cluster, and `tasks`: of each task in each. Raises ConfigError for rows
    that cannot be used, and for fewer different rows than clusters.
    """
    settings, tasks = job.settings["cluster"], tasks_of(job)
    tokenizer = load_tokenizer(run.model)
    rows = dict(zip(tasks, rows_of(run, job, tokenizer), strict=True))
    base = place(run, world, world.device)
    try:
        for of_task in rows.values():
            check_fit(of_task.longest, of_task.largest, base.model)
        points = {
            task: _points(base.model, of_task, data.pad_id(tokenizer), run.evaluate.batch_size, world)
            for task, of_task in rows.items()
        }
    finally:
        base.close()

    def write() -> dict[str, Any]:
        found = clusters(np.concatenate([*points.values()]), settings["clusters"], settings["seed"])
        ends = np.cumsum([len(of_task) for of_task in points.values()])[:-1]
        of_tasks = dict(zip(tasks, np.split(found, ends), strict=True))
        still_mine()
        tensors = {task: torch.from_numpy(numbers.astype(np.int32)) for task, numbers in of_tasks.items()}
        save(folder / CLUSTERS, tensors, {})
        sizes = {task: _sizes(numbers, settings["clusters"]) for task, numbers in of_tasks.items()}
        for task, of_task in sizes.items():
            log.info("%s: %s rows of %s in clusters 1 to %d", job.name, of_task, task, settings["clusters"])
        return {"sizes": _sizes(found, settings["clusters"]), "tasks": sizes}

    return from_first(world, write)


def _sizes(numbers: npt.NDArray[np.int64], count: int) -> list[int]:
    return [int(one) for one in np.bincount(numbers, minlength=count)]


def _points(model: PreTrainedModel, rows: Rows, pad: int, size: int, world: World) -> Points:
    """(rows, features): the mean of the last hidden states over each row's tokens, of length 1. Equal on all ranks."""
    order = sorted(range(len(rows)), key=lambda row: -rows.num_tokens(row))
    own, states = order[world.rank :: world.size], list[Tensor]()
    inner = getattr(model, model.base_model_prefix, model)

    def keep(module: nn.Module, args: Any, output: Any) -> None:
        states.append(output[0])

    hook = inner.register_forward_hook(keep)
    found = torch.zeros(0)
    try:
        for first in range(0, -(-len(rows) // world.size), size):  # equally often on every rank
            numbers = own[first : first + size]
            batch = data.collate([rows[row] for row in numbers], pad).to(world.device)
            log_likelihoods(model, batch)
            counted = batch.attention_mask[..., None].float()
            mean = (states.pop().float() * counted).sum(1) / counted.sum(1).clamp(min=1)
            if mean.shape[1] > WIDTH:
                mean = mean @ projection(0, "clusters", WIDTH, mean.shape[1], device=mean.device).t()
            if not len(found):
                found = torch.zeros(len(rows), mean.shape[1], device=mean.device)
            if numbers:
                found[numbers] = nn.functional.normalize(mean[: len(numbers)], dim=1)
    finally:
        hook.remove()
    dist.all_reduce(found)
    return found.double().cpu().numpy()


def clusters(points: Points, count: int, seed: int) -> npt.NDArray[np.int64]:
    """The cluster of each point, from 0, by k-means: those that k-means++ begins with, then Lloyd's algorithm until
    nothing changes. Clusters are numbered in the order of their first points, and none is empty.

    Raises ConfigError for fewer different points than clusters.
    """
    different = len(np.unique(points.round(6), axis=0))
    if different < count:
        raise ConfigError(
            f"multitask.clusters: got {count}, and the tasks have {different} rows that differ; give fewer"
        )
    random = np.random.Generator(np.random.Philox(seed))
    centres = points[[int(random.integers(len(points)))]]
    while len(centres) < count:
        nearest = _distances(points, centres).min(1)
        chosen = int(np.searchsorted(np.cumsum(nearest), random.random() * nearest.sum(), side="right"))
        centres = np.concatenate([centres, points[[min(chosen, len(points) - 1)]]])
    found = np.full(len(points), -1)
    for _ in range(ROUNDS):
        distances = _distances(points, centres)
        before, found = found, distances.argmin(1)
        for number in range(count):
            if not (found == number).any():  # the point that is farthest from its own begins it again
                far = distances[np.arange(len(points)), found]
                far = np.where(np.bincount(found, minlength=count)[found] > 1, far, -1)
                found[int(far.argmax())] = number
        if (found == before).all():
            break
        centres = np.stack([points[found == number].mean(0) for number in range(count)])
    _, first = np.unique(found, return_index=True)
    order = np.empty(count, dtype=np.int64)
    order[found[np.sort(first)]] = np.arange(count)
    return order[found]


def _distances(points: Points, centres: Points) -> Points:
    """Squared, (points, centres)."""
    squares = (points**2).sum(1)[:, None] - 2 * points @ centres.T + (centres**2).sum(1)
    return squares.clip(min=0)
