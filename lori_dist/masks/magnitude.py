"""The largest entries over the whole model: LoRI's own rule."""

from collections.abc import Mapping

from torch import Tensor

from lori_dist.masks._select import Rule, largest, magnitudes


def mask(b: Mapping[str, Tensor], *, density: float) -> dict[str, Tensor]:
    """Keeps the largest |B| over the whole model.

    b: module path -> (out_features, rank), the dense B after calibration. density: kept entries / all entries, in
    (0, 1]. Returns module path -> (out_features, rank) bool, on the same device. Exactly max(1, round(density * n)) of
    the n entries are kept, halves rounded to even; ties go to the earlier entry, by the order of `b` and then by flat
    index; zeros are kept only once all other entries are. A module may keep none.
    Raises ConfigError if density is outside (0, 1], AdapterError naming the module for an entry that is not finite.
    Source: LoRI (arXiv 2504.07448), model-wise magnitude mask.
    """
    return largest(b, rule(), density)


def rule() -> Rule:
    """The rule by which several processes choose together."""
    return Rule(group=lambda module: "", keys=magnitudes)
