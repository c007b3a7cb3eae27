"""The largest entries of all attention modules, and of all MLP modules."""

from collections.abc import Mapping

from torch import Tensor

from lori_dist.masks._select import Rule, largest, magnitudes

ATTENTION = ("attn", "attention", "q_proj", "k_proj", "v_proj", "o_proj", "qkv")
MLP = ("mlp", "ffn", "feed_forward", "expert", "moe", "gate_proj", "up_proj", "down_proj", "fc1", "fc2")


def mask(b: Mapping[str, Tensor], *, density: float) -> dict[str, Tensor]:
    """Keeps the largest |B| of attention, of the MLPs and of all else, all three at the same density.

    A module belongs to the innermost part of its path that holds a word of ATTENTION or of MLP: `self_attn.q_proj`,
    `attn.c_proj`, `mlp.c_proj`, `layers.3.fc1`. As the mask `magnitude`, with the count, the ties and the zeros settled
    in each group apart.
    Source: juzhengz/LoRI (module-wise mask).
    """
    return largest(b, rule(), density)


def rule() -> Rule:
    """The rule by which several processes choose together."""
    return Rule(group=_kind, keys=magnitudes)


def _kind(module: str) -> str:
    for part in reversed(module.lower().split(".")):
        if any(word in part for word in ATTENTION):
            return "attention"
        if any(word in part for word in MLP):
            return "mlp"
    return "other"
