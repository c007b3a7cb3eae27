"""The exact sum, at the tasks' own rank where they share A."""

import dataclasses
from collections.abc import Sequence

import torch

from lori_dist.adapter.update import Part, Update
from lori_dist.merges import concat
from lori_dist.merges._forms import groups, on_projection, scaled_entries

EXACT: dict[str, tuple[object, ...]] = {}
"""The result is the weighted sum of the updates, exactly."""


def merge(updates: Sequence[Update], *, weights: Sequence[float]) -> list[Part]:
    """The exact weighted sum of updates, sum_t w_t D_t, with one block for each A.

    Blocks that share A (equal seed, rank and dtype) become one of the same rank: B = sum_t w_t s_t B_t, whose kept
    entries are the union of theirs, computed in float64 and kept in fp32 (or their own dtype, if that is wider). Blocks
    that share theirs with no other stay as they are, so the result has rank r if A is shared by all.
    updates: of one module, one per adapter. weights: one per adapter, of any sign.
    Raises AdapterError for one A with two checksums.
    Source: LoRI (arXiv 2504.07448), linear merging, on updates: A and B averaged apart would add cross terms.
    """
    weighted = concat.merge(updates, weights=weights)
    whole = dataclasses.replace(updates[0], parts=tuple(weighted))
    return [_sum(parts) for parts in groups([whole])]


def _sum(parts: Sequence[Part]) -> Part:
    """One part with the sum of the updates of parts that share A."""
    if len(parts) == 1:
        return parts[0]
    name = "+".join(part.name for part in parts)
    keeping = [part for part in parts if part.entries is not None]
    if (
        len(keeping) == 1
        and keeping[0].weight == keeping[0].gain == 1.0
        and all(part.alpha == keeping[0].alpha for part in parts)
    ):
        return dataclasses.replace(keeping[0], name=name)  # nothing to add up, as where a new task adapts other modules
    b = scaled_entries(parts)
    whole = torch.ones(b.kept, dtype=torch.bool)
    return on_projection(parts, b.values, name, support=whole, positions=b.index)
