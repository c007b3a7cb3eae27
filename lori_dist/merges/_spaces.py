"""The matrices of a method that works entry by entry: B on a shared A, or the updates themselves."""

import logging
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from typing import Literal

from torch import Tensor

from lori_dist.adapter.adapter import Entries
from lori_dist.adapter.update import Part, Update
from lori_dist.errors import AdapterError, ConfigError
from lori_dist.merges._cuts import Cut, common_cuts, largest
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
Trim = Literal["module", "model"]
Keep = Callable[[Tensor], Tensor]
"""A mask of the entries of a matrix, or of those of one that are not zero, that take part: bool, of its shape."""
Cuts = Sequence[Cut]
"""The cuts of one task in one module: for each A that its matrices stand on, or once for its update."""


def merge_entries(
    updates: Sequence[Update],
    combine: Combine,
    *,
    space: Space,
    rank: int | None,
    votes: bool,
    draws: bool = False,
    density: float | None = None,
) -> list[Part]:
    """The merged update of one module, by a method that works entry by entry; A is never touched.

    space: `b`: on the s_t B_t of tasks that share A, so that the result is a sparse B on it. `dense`: on the updates
    D_t, (out_features, in_features), so that the result is a dense matrix, of which the `rank` largest singular
    directions are kept, as computed A and B: exact if it has no more. `auto`: `b` where the tasks that keep entries in
    this module share A, else `dense`. rank: None for the sum of the tasks' ranks, or the most the shape allows.
    votes: whether an entry's result depends on other tasks. If not, `b` also takes tasks on several A, each by itself.
    draws: whether it depends on the entry's place; else entries that no task keeps are left out of what is combined.
    density: the share of each task's entries that takes part, the `largest`; not with `draws`. Where updates
    were surveyed by `model_cuts`, it is those that are the largest in the whole model.
    Raises AdapterError for `b` without a shared A, ConfigError for a rank above what the shape allows.
    """
    rank, grounds = rank_within(updates, rank), _grounds(updates, space, votes)
    return [
        _merged(updates, ground, combine, _keeps(updates, density, place), draws, rank)
        for place, ground in enumerate(grounds)
    ]


def model_cuts(
    modules: Iterable[Sequence[Update]], *, trim: Trim, density: float, space: Space, votes: bool
) -> dict[str, list[Cuts]] | None:
    """Module -> the cuts by which each task keeps its largest entries of the whole model; None if `trim` is `module`.

    modules: the updates of one after the other, again and again. One matrix at a time is in memory.
    Raises AdapterError as `merge_entries`, and where `auto` would compare entries of B with those of updates.
    """
    if trim == "module":
        return None
    kept = [updates for updates in modules if any(update.kept for update in updates)]
    _refuse_both(kept, space)
    grounds = {updates[0].module: _grounds(updates, space, votes) for updates in modules}
    tasks = range(len(next(iter(modules))))

    def pieces(task: int) -> Iterator[Tensor]:
        for updates in modules:
            for ground in grounds[updates[0].module]:
                yield updates[task].delta() if ground is None else _entries(updates[task], ground).values

    found = [iter(common_cuts(partial(pieces, task), density)) for task in tasks]
    return {module: [[next(of_task) for _ in places] for of_task in found] for module, places in grounds.items()}


def rank_within(updates: Sequence[Update], rank: int | None) -> int:
    """The rank asked for; by default the sum of the tasks' ranks or, if that is less, the most that the shape allows.

    Raises ConfigError for more than the shape allows.
    """
    most = min(updates[0].shape)
    if rank is None:
        return min(most, sum(part.rank for update in updates for part in update.kept))
    if rank > most:
        raise ConfigError(
            f"merge.method.rank: got {rank}, and the weight of {updates[0].module} is "
            f"{updates[0].shape[0]} x {updates[0].shape[1]}; give at most {most}"
        )
    return rank


def rank_of_one(updates: Sequence[Update], rank: int | None) -> int:
    """The rank asked for; by default the largest of the tasks' ranks or, if that is less, the most the shape allows.

    Raises ConfigError for more than the shape allows.
    """
    if rank is None:
        return min(*updates[0].shape, max(sum(part.rank for part in update.kept) for update in updates))
    return rank_within(updates, rank)


def _grounds(updates: Sequence[Update], space: Space, votes: bool) -> list[list[Part] | None]:
    """The grounds of the tasks' matrices: the parts on each A, or once None, for the updates themselves."""
    one = shared(updates)
    if space == "dense" or (space == "auto" and one is None):
        return [None]
    if one is not None:
        return [one]
    if votes:
        raise AdapterError(
            f"{updates[0].module}: the tasks do not share A, so their B cannot vote entry by entry; train them with "
            "adapter.share_projection, or merge with space=dense"
        )
    return [*groups(updates)]


def _refuse_both(modules: Sequence[Sequence[Update]], space: Space) -> None:
    """Sizes of B and of updates have no common measure."""
    if space != "auto":
        return
    by_space = {shared(updates) is None: updates[0].module for updates in modules}
    if len(by_space) == 2:
        raise AdapterError(
            f"{by_space[True]}: the tasks do not share A, in {by_space[False]} they do, so there is no one threshold "
            "for both; merge with space=dense, or with trim=module"
        )


def _keeps(updates: Sequence[Update], density: float | None, place: int) -> list[Keep] | None:
    """The masks of the tasks on the ground of that place; None keeps all."""
    if density is None:
        return None
    by_size = partial(largest, density=density)
    return [by_size if update.surveyed is None else update.surveyed[place].keep for update in updates]


def _merged(
    updates: Sequence[Update],
    ground: Sequence[Part] | None,
    combine: Combine,
    keeps: Sequence[Keep] | None,
    draws: bool,
    rank: int,
) -> Part:
    if ground is None:
        return _dense(updates, combine, keeps, rank)
    name = joined_name(updates if shared(updates) else ground)
    if draws:
        return on_projection(ground, combine([scaled_b(update, ground) for update in updates]), name)
    tasks = [_entries(update, ground) for update in updates]
    if keeps is not None:
        tasks = [only(entries, keep(entries.values)) for entries, keep in zip(tasks, keeps, strict=True)]
    support = Support(tasks, ground[0].shape[0] * ground[0].rank)
    return on_projection(ground, combine(map(support.spread, tasks)), name, positions=support.positions)


def _entries(update: Update, ground: Sequence[Part]) -> Entries:
    """The entries of the update's s_t B_t on that A."""
    return scaled_entries(part for part in update.kept if part.key == ground[0].key)


def _dense(updates: Sequence[Update], combine: Combine, keeps: Sequence[Keep] | None, rank: int) -> Part:
    matrices: Iterable[Tensor] = (update.delta() for update in updates)
    if keeps is not None:
        matrices = (x * keep(x) for x, keep in zip(matrices, keeps, strict=True))
    merged = combine(matrices)
    left, right = leading(merged, rank)
    held = float(((left.t() @ left) * (right @ right.t())).sum() / merged.square().sum()) if right.numel() else 1.0
    log.debug("%s: rank %d holds %.2f%% of the squared norm", updates[0].module, right.shape[0], 100 * held)
    return computed(updates, left, right)
