"""The exact sum, as the tasks' blocks side by side."""

import dataclasses
from collections.abc import Sequence

from lori_dist.adapter.update import Part, Update


def merge(updates: Sequence[Update], *, weights: Sequence[float]) -> list[Part]:
    """The exact weighted sum of updates, sum_t w_t D_t, of rank sum_t r_t.

    Every block keeps its seed, rank, alpha and kept entries; only its weight is multiplied by its adapter's. So the
    result stays sparse on seeds, and a task can be given another weight or taken out again.
    updates: of one module, one per adapter. weights: one per adapter, of any sign.
    Source: LoRI (arXiv 2504.07448), concatenated merging.
    """
    return [
        dataclasses.replace(part, weight=float(weight) * part.weight)
        for update, weight in zip(updates, weights, strict=True)
        for part in update.parts
    ]
