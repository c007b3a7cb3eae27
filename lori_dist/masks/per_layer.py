"""The largest entries of each layer."""

from collections.abc import Mapping

from torch import Tensor

from lori_dist.adapter import targets
from lori_dist.masks._select import Rule, largest, magnitudes


def mask(b: Mapping[str, Tensor], *, density: float) -> dict[str, Tensor]:
    """Keeps the largest |B| of each layer, all layers at the same density.

    The layer is the path up to its first number (`model.layers.3`, `transformer.h.3`, `encoder.block.3`), so an
    expert's number inside a layer makes no group. Modules outside of all layers are one group. As the mask `magnitude`,
    with the count, the ties and the zeros settled in each group apart.
    Source: juzhengz/LoRI (layer-wise mask).
    """
    return largest(b, rule(), density)


def rule() -> Rule:
    """The rule by which several processes choose together."""
    return Rule(group=targets.layer, keys=magnitudes)
