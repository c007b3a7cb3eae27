"""Second moments of what a base's layers read of tasks' training rows, on the gang and the placement of evaluations."""

import logging
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from transformers import PreTrainedModel

from lori_dist.adapter import moments
from lori_dist.adapter.experts import Expert
from lori_dist.adapter.matching import match
from lori_dist.adapter.moments import Watch
from lori_dist.config import Run
from lori_dist.errors import AdapterError, ConfigError
from lori_dist.evaluation._place import place
from lori_dist.jobs import MOMENTS, Job
from lori_dist.training import data
from lori_dist.training.data import Example
from lori_dist.training.job_rows import rows_of, spread
from lori_dist.training.loss import log_likelihoods
from lori_dist.training.model import check, load_tokenizer
from lori_dist.training.weights import skeleton
from lori_dist.training.world import World, from_first

log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True, slots=True)
class Wanted:
    """The moments of one task, and their place."""

    job: Job
    folder: Path
    """The folder for moments.safetensors, which only rank 0 need see."""
    still_mine: Callable[[], None] = lambda: None
    """Raises JobError where a newer attempt has taken the folder over."""


@torch.no_grad()
def measure(run: Run, wanted: Sequence[Wanted], world: World) -> dict[str, dict[str, Any]]:
    """Measures the moments of several tasks on one copy of the base and writes each to its folder. Every rank calls
    this; the base is placed as for evaluations, and the ranks divide the rows.

    A file that is there with a job's fingerprint is not made again. Returns, for each job, rows, tokens, distinct
    (number of inputs that differ), sketched (how many of them are kept as a sketch), width (its columns) and bytes.
    Raises ConfigError for rows or layers that cannot be measured.
    """
    tokenizer = load_tokenizer(run.model)
    rows = {one.job.name: _examples(run, one, tokenizer) for one in wanted}
    there = from_first(world, lambda: [one.job.name for one in wanted if _is_there(one)])
    left = [one for one in wanted if one.job.name not in there]
    if left:
        paths = _paths(run)
        base = place(run, world, world.device)
        try:
            layers = {path: base.model.get_submodule(path) for path in paths}
            for one in left:
                _measure(run, one, rows[one.job.name], base.model, layers, data.pad_id(tokenizer), world)
        finally:
            base.close()
    return from_first(world, lambda: {one.job.name: _result(one) for one in wanted})


def _examples(run: Run, one: Wanted, tokenizer: Any) -> list[Example]:
    [of_task] = rows_of(run, one.job, tokenizer)
    return [of_task[row] for row in spread(len(of_task), one.job.settings["moments"]["rows"])]


def _paths(run: Run) -> list[str]:
    """The layers whose inputs are measured. Raises ConfigError for those of which that is not possible."""
    adapter = run.adapter
    model, _ = skeleton(run.model)
    try:
        found = match(model, adapter.targets, adapter.modules_to_save, adapter.exclude)
    except AdapterError as error:
        raise ConfigError(f"adapter.{error}") from error
    expert = next((path for path, layer in found.items() if isinstance(layer, Expert)), None)
    if expert is not None:
        raise ConfigError(
            f"adapter.targets: {expert} is a matrix of fused experts, and what each of them reads is not measured; "
            "name the experts in adapter.exclude"
        )
    return list(found)


def _measure(
    run: Run,
    one: Wanted,
    examples: Sequence[Example],
    model: PreTrainedModel,
    layers: Mapping[str, nn.Module],
    pad: int,
    world: World,
) -> None:
    start, settings = time.monotonic(), one.job.settings["moments"]
    check(examples, model)
    longest_first = sorted(examples, key=lambda example: -example.num_tokens)
    own, size = longest_first[world.rank :: world.size], run.evaluate.batch_size
    num_batches = -(-len(examples) // (size * world.size))  # on every rank, as a forward pass may be a collective
    watch = Watch(layers, full_up_to=settings["full_up_to"], width=settings["width"])
    with watch:
        for number in range(num_batches):
            batch = data.collate(own[number * size : (number + 1) * size], pad).to(world.device)
            watch.begin(batch.attention_mask.bool())
            log_likelihoods(model, batch)
    _reduce(watch, world)
    if world.rank > 0:
        return
    one.still_mine()
    found = watch.moments()
    sketched = len(found.sketched)
    notes = {
        "fingerprint": one.job.fingerprint,
        "rows": len(examples),
        "tokens": found.num_tokens,
        "distinct": len(found.of_inputs),
        "sketched": sketched,
        "width": settings["width"] if sketched else None,
    }
    moments.write(one.folder / MOMENTS, found, notes)
    log.info(
        "%s: moments of %d distinct inputs of %d layers over %d tokens of %d rows, in %.1f s: %d in full, %s",
        one.job.name,
        len(found.of_inputs),
        len(layers),
        found.num_tokens,
        len(examples),
        time.monotonic() - start,
        len(found.of_inputs) - sketched,
        f"{sketched} as a sketch of {settings['width']} columns" if sketched else "none as a sketch",
    )


def _reduce(watch: Watch, world: World) -> None:
    """Adds up the sums of all ranks, on all ranks."""
    count = torch.tensor([watch.num_tokens], device=world.device)
    dist.all_reduce(count)
    watch.num_tokens = int(count)
    for total in watch.sums.values():
        dist.all_reduce(total)


def _is_there(one: Wanted) -> bool:
    """Whether an earlier attempt has left the file. A damaged one costs the measurement, nothing else."""
    path = one.folder / MOMENTS
    if not path.exists():
        return False
    try:
        moments.read(path)
        return bool(moments.notes_of(path).get("fingerprint") == one.job.fingerprint)
    except AdapterError as error:
        log.warning("%s; measuring again", error)
        return False


def _result(one: Wanted) -> dict[str, Any]:
    path = one.folder / MOMENTS
    notes = moments.notes_of(path)
    kept = {key: notes[key] for key in ("rows", "tokens", "distinct", "sketched", "width")}
    return {**kept, "bytes": path.stat().st_size}
