"""The largest entries of each kind of projection."""

from collections.abc import Mapping

from torch import Tensor

from lori_dist.adapter import targets
from lori_dist.masks._select import Rule, largest, magnitudes


def mask(b: Mapping[str, Tensor], *, density: float) -> dict[str, Tensor]:
    """Keeps the largest |B| of each kind of projection over all layers, all kinds at the same density.

    The kind is the last part of the module's path that is not a number: `q_proj`, `down_proj`, `c_attn`; those of all
    experts are one kind. As the mask `magnitude`, with the
    count, the ties and the zeros settled in each group apart.
    Source: juzhengz/LoRI (projection-wise mask).
    """
    return largest(b, rule(), density)


def rule() -> Rule:
    """The rule by which several processes choose together."""
    return Rule(group=targets.kind, keys=magnitudes)
