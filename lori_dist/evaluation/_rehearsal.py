"""An evaluation up to its first batch, with adapters that stand for those which are not trained yet."""

import dataclasses
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import nn

from lori_dist import config
from lori_dist.adapter.adapter import Adapter, Block, Entries
from lori_dist.adapter.bases import features
from lori_dist.adapter.matching import match
from lori_dist.adapter.projection import checksum, projection
from lori_dist.adapter.saved import match as match_saved
from lori_dist.evaluation import evaluate_all
from lori_dist.training.task import spec_of
from lori_dist.training.weights import skeleton
from lori_dist.training.world import World


def rehearse(run: config.Run, models: Mapping[str, Path | int], world: World) -> None:
    """Places the base as the run's evaluation does, attaches every model, and measures one batch of each metric and
    task on each rank: the longest rows. Every rank calls this; nothing is written.

    models: by name; an adapter's path, or the number of components of one that does not exist yet: 1 of a training, 0
    of the base, as many as there are tasks of their merge. Raises what `evaluate_all` would.
    """
    made, _ = skeleton(run.model)
    adapters: dict[str, Path | Adapter | None] = {}
    for name, what in models.items():
        adapters[name] = what if isinstance(what, Path) else stand_in(run, made, what) if what else None
    measured = run.evaluate.lm_eval
    if measured is not None:
        few = dataclasses.replace(run.evaluate, lm_eval=dataclasses.replace(measured, rows=1))
        run = dataclasses.replace(run, evaluate=few)
    evaluate_all(run, adapters, world=world, longest=run.evaluate.batch_size * world.size)


def stand_in(run: config.Run, model: nn.Module, components: int) -> Adapter:
    """An adapter of the size that a run's training gives, or a merge of as many as there are components; it changes
    nothing, but for modules_to_save, which are zero.

    model: the base, without an adapter; on the meta device too.
    """
    spec = spec_of(run, next(iter(run.tasks)))
    bases = match(model, spec.targets, spec.modules_to_save, spec.exclude)
    shapes = {path: features(base) for path, base in bases.items()}
    blocks = []
    for number in range(components):
        is_stored = spec.projection == "trained" or config.reads_moments(run)
        checksums, entries, stored = {}, {}, {}
        for path, (out_features, in_features) in shapes.items():
            a = projection(spec.seed + number, path, spec.rank, in_features, dtype=spec.dtype)
            kept, total = round(run.adapter.density * out_features * spec.rank), out_features * spec.rank
            checksums[path] = checksum(a)
            if is_stored:
                stored[path] = a
            if kept:
                index = None if kept == total else torch.arange(kept, dtype=torch.int32)
                entries[path] = Entries(index=index, values=torch.zeros(kept))
        blocks.append(
            Block(
                name=f"component {number + 1}",
                seed=None if is_stored else spec.seed + number,
                rank=spec.rank,
                alpha=spec.alpha,
                dtype=spec.dtype,
                entries=entries,
                checksums=checksums,
                projections=stored,
            )
        )
    saved = {name: torch.zeros(one.shape) for name, one in match_saved(model, spec.modules_to_save).items()}
    return Adapter(shapes=shapes, blocks=tuple(blocks), targets=spec.targets, saved=saved)
