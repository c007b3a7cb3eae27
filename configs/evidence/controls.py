"""A merge in which the first adapter is noise of the same size: what other tasks lose to it, they lose to anything."""

import dataclasses
from collections.abc import Sequence

import torch

from lori_dist.adapter.adapter import Entries
from lori_dist.adapter.update import Part, Update
from lori_dist.merges import linear


def merge(updates: Sequence[Update], *, weights: Sequence[float], seed: int = 0) -> list[Part]:
    """As `linear`, with the kept entries of the first adapter's B in a random order, so that their norm stays.

    updates: of one module, one per adapter. weights: one per adapter. seed: of the order, in each module another one.
    Source: a control of ours.
    """
    first, *others = updates
    generator = torch.Generator().manual_seed(seed + sum(map(ord, first.module)))
    parts = tuple(_shuffled(part, generator) for part in first.parts)
    return linear.merge([dataclasses.replace(first, parts=parts), *others], weights=weights)


def _shuffled(part: Part, generator: torch.Generator) -> Part:
    if part.entries is None:
        return part
    order = torch.randperm(part.entries.values.numel(), generator=generator)
    return dataclasses.replace(part, entries=Entries(index=part.entries.index, values=part.entries.values[order]))
