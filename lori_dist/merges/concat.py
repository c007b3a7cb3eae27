"""The exact sum, as the tasks' blocks side by side."""

import dataclasses
import math
from collections.abc import Collection, Sequence

from lori_dist.adapter.update import Part, Update
from lori_dist.errors import ConfigError
from lori_dist.plugin import nearest

EXACT: dict[str, tuple[object, ...]] = {"drop": ((),), "reweight": (None, {})}
"""Options -> values for which the result is the weighted sum of the updates, exactly."""


def merge(
    updates: Sequence[Update],
    *,
    weights: Sequence[float],
    drop: tuple[str, ...] = (),
    reweight: dict[str, float] | None = None,
) -> list[Part]:
    """The exact weighted sum of updates, sum_t w_t D_t, of rank sum_t r_t.

    Every block keeps its seed, rank, alpha and kept entries; only its weight is multiplied by its adapter's. So the
    result stays sparse on seeds, a task can be added by merging the merge with it at weights of 1 and its own, and a
    task can be taken out again or given another weight.
    updates: of one module, one per adapter. weights: one per adapter, of any sign. drop: names of blocks to leave out.
    reweight: name of a block -> the weight it has in its adapter from now on.
    Raises ConfigError for a name that no block has, for a weight that is not finite, and if every block is dropped.
    Source: LoRI (arXiv 2504.07448), concatenated merging.
    """
    reweight = reweight or {}
    names = list(dict.fromkeys(part.name for update in updates for part in update.parts))
    _check(drop, names, "drop")
    _check(reweight, names, "reweight")
    for name, weight in reweight.items():
        if not math.isfinite(weight):
            raise ConfigError(f"merge.method.reweight.{name}: got {weight}; give a finite number")
    if names and set(names) <= set(drop):
        raise ConfigError(f"merge.method.drop: {', '.join(names)} are all components; keep at least one")
    return [
        dataclasses.replace(part, weight=float(weight) * reweight.get(part.name, part.weight))
        for update, weight in zip(updates, weights, strict=True)
        for part in update.parts
        if part.name not in drop
    ]


def _check(given: Collection[str], names: Sequence[str], option: str) -> None:
    for name in given:
        if name not in names:
            known = ", ".join(names)
            raise ConfigError(
                f"merge.method.{option}: unknown component {name!r}; there are {known}.{nearest(name, names)}"
            )
