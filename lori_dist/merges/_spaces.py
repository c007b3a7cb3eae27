"""Where a method that works entry by entry finds its matrices: B on a shared A, or the updates themselves."""

import logging
from collections.abc import Callable, Sequence
from typing import Literal

from torch import Tensor

from lori_dist.adapter.update import Part, Update
from lori_dist.errors import AdapterError, ConfigError
from lori_dist.merges._entries import Combine
from lori_dist.merges._factors import leading
from lori_dist.merges._forms import (
    Support,
    computed,
    groups,
    joined_name,
    on_projection,
    only,
    scaled_b,
    scaled_entries,
    shared,
)

log = logging.getLogger(__name__)

Space = Literal["auto", "b", "dense"]
Keep = Callable[[Tensor], Tensor]
"""Which entries of a matrix, or of the flat entries of one that are not zero, take part: bool, of its shape."""


def merge_entries(
    updates: Sequence[Update],
    combine: Combine,
    *,
    space: Space,
    rank: int | None,
    votes: bool,
    draws: bool = False,
    keep: Keep | None = None,
) -> list[Part]:
    """The merged update of one module, by a method that works entry by entry; A is never touched.

    space: `b`: on the s_t B_t of tasks that share A, so that the result is a sparse B on it. `dense`: on the updates
    D_t, (out_features, in_features), so that the result is a dense matrix, of which the `rank` largest singular
    directions are kept, as computed A and B: exact if it has no more. `auto`: `b` where the tasks that keep entries in
    this module share A, else `dense`. rank: None for the sum of the tasks' ranks, or the most the shape allows.
    votes: whether an entry's result depends on other tasks. If not, `b` also takes tasks on several A, each by itself.
    draws: whether it depends on the entry's place; else entries that no task keeps are left out of what is combined.
    keep: which entries of each task's matrix take part; not with `draws`.
    Raises AdapterError for `b` without a shared A, ConfigError for a rank above what the shape allows.
    """
    rank = rank_within(updates, rank)
    one = shared(updates)
    if space == "dense" or (space == "auto" and one is None):
        return [_dense(updates, combine, keep, rank)]
    if one is not None:
        return [_on_projection(updates, one, combine, joined_name(updates), draws, keep)]
    if votes:
        raise AdapterError(
            f"{updates[0].module}: the tasks do not share A, so their B cannot vote entry by entry; train them with "
            "adapter.share_projection, or merge with space=dense"
        )
    return [
        _on_projection(updates, parts, combine, "+".join(part.name for part in parts), draws, keep)
        for parts in groups(updates)
    ]


def rank_within(updates: Sequence[Update], rank: int | None) -> int:
    """The rank asked for; by default the sum of the tasks' ranks or, if that is less, the most that the shape allows.

    Raises ConfigError for more than the shape allows.
    """
    most = min(updates[0].shape)
    if rank is None:
        return min(most, sum(part.rank for update in updates for part in update.kept))
    if rank > most:
        raise ConfigError(
            f"merge.method.rank: {rank} was given, and the weight of {updates[0].module} is "
            f"{updates[0].shape[0]} x {updates[0].shape[1]}; give at most {most}"
        )
    return rank


def _on_projection(
    updates: Sequence[Update],
    parts: Sequence[Part],
    combine: Combine,
    name: str,
    draws: bool,
    keep: Keep | None,
) -> Part:
    if draws:
        return on_projection(parts, combine([scaled_b(update, parts) for update in updates]), name)
    tasks = [scaled_entries(part for part in update.kept if part.key == parts[0].key) for update in updates]
    if keep is not None:
        tasks = [only(entries, keep(entries.values)) for entries in tasks]
    support = Support(tasks, parts[0].shape[0] * parts[0].rank)
    return on_projection(parts, combine(map(support.spread, tasks)), name, positions=support.positions)


def _dense(updates: Sequence[Update], combine: Combine, keep: Keep | None, rank: int) -> Part:
    matrices = (update.delta() for update in updates)
    merged = combine(matrices if keep is None else (x * keep(x) for x in matrices))
    left, right = leading(merged, rank)
    held = float(((left.t() @ left) * (right @ right.t())).sum() / merged.square().sum()) if right.numel() else 1.0
    log.debug("%s: rank %d holds %.2f%% of the squared norm", updates[0].module, right.shape[0], 100 * held)
    return computed(updates, left, right)
