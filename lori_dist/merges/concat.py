"""The exact sum, as the tasks' blocks side by side."""

from collections.abc import Sequence

from lori_dist.adapter.adapter import Adapter
from lori_dist.merges._inputs import check, join, weighted


def merge(adapters: Sequence[Adapter], *, weights: Sequence[float]) -> Adapter:
    """The exact weighted sum of updates, sum_t w_t D_t, of rank sum_t r_t.

    Every block keeps its seed, rank, alpha and kept entries; only its weight is multiplied by its adapter's. Adapters
    may differ in rank, alpha, dtype and targets; a module that one of them does not adapt gets nothing from it.
    weights: one per adapter, of any sign. Blocks of one name are told apart (`math`, `math-2`).
    Raises ConfigError for weights that do not fit, AdapterError for adapters of different bases, shapes or generators.
    Source: LoRI (arXiv 2504.07448), concatenated merging.
    """
    check(adapters, weights)
    return join(adapters, weighted(adapters, weights))
