"""The largest entries of each B."""

from collections.abc import Mapping

from torch import Tensor

from lori_dist.masks._select import Rule, largest, magnitudes


def mask(b: Mapping[str, Tensor], *, density: float) -> dict[str, Tensor]:
    """Keeps the largest |B| of each module, all modules at the same density.

    As the mask `magnitude`, with the count, the ties and the zeros settled in each module apart; every module keeps at
    least one entry.
    Source: juzhengz/LoRI (matrix-wise mask).
    """
    return largest(b, rule(), density)


def rule() -> Rule:
    """The rule by which several processes choose together."""
    return Rule(group=lambda module: module, keys=magnitudes)
