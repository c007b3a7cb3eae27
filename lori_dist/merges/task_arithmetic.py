"""The sum of updates, scaled, with tasks that are taken away."""

from collections.abc import Sequence

from lori_dist.adapter.update import Part, Update
from lori_dist.errors import ConfigError
from lori_dist.merges import linear
from lori_dist.plugin import nearest

EXACT: dict[str, tuple[object, ...]] = {"scale": (1.0,), "negate": ((),)}
"""Options -> values for which the result is the weighted sum of the updates, exactly."""


def merge(
    updates: Sequence[Update], *, weights: Sequence[float], scale: float = 1.0, negate: tuple[str, ...] = ()
) -> list[Part]:
    """The scaled sum of updates, scale * sum_t +-w_t D_t, where the tasks in `negate` are subtracted.

    The result has the form of `linear`: exact, sparse on the tasks' seeds, one block for each A.
    updates: of one module, one per adapter. weights: one per adapter, by default equal ones that sum
    to one; with weights of 1, `scale` is the paper's lambda,
    with the default ones, which sum to one, it is T lambda. negate: names of adapters, to forget what they learned.
    Raises ConfigError for a name in `negate` that no adapter has.
    Source: Ilharco et al., "Editing models with task arithmetic" (arXiv 2212.04089), section 2.
    """
    names = [update.name for update in updates]
    for name in negate:
        if name not in names:
            raise ConfigError(
                f"merge.method.negate: unknown adapter {name!r}; there are {', '.join(names)}.{nearest(name, names)}"
            )
    signed = [scale * (-weight if name in negate else weight) for name, weight in zip(names, weights, strict=True)]
    return linear.merge(updates, weights=signed)
