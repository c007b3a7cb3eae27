"""PEFT's treatment of module names, apart from finding them, as far as an export depends on it."""

import re
from collections.abc import Iterable

from transformers.conversion_mapping import get_checkpoint_conversion_mapping
from transformers.core_model_loading import MergeModulelist, WeightConverter

from lori_dist.errors import AdapterError

EXPERT = re.compile(r"(.+)\.(gate_up_proj|up_proj|down_proj)\.([0-9]+)")
"""Path of one expert's matrix of a fused weight."""

REFUSED = {"falcon_h1", "falcon_mamba", "mamba", "mamba2", "nemotron_h"}
"""Model types of which PEFT refuses BYPASSED_NAMES: their fused kernels use such weights without calling the layer."""
BYPASSED = {*REFUSED, "bamba", "granitemoehybrid", "zamba2"}
"""The refused model types, and others with the same kernels, for which PEFT accepts such a target without applying
it."""
BYPASSED_NAMES = {"out_proj", "conv1d"}

UNFOLDED = "export it with --format folded instead, which any reader of the base model takes"


def taken_for_experts(model_type: str | None) -> set[str]:
    """Last names of linear layers that PEFT takes for experts which transformers has fused, in models of this type.

    Targets of these names, those of dense first layers and of shared experts too, are moved to the fused weights,
    unless they stand in `target_parameters`.
    """
    if model_type is None:
        return set()
    found = {
        pattern.removesuffix(".weight").rpartition(".")[2]
        for conversion in get_checkpoint_conversion_mapping(model_type) or ()
        if isinstance(conversion, WeightConverter)
        and any(isinstance(operation, MergeModulelist) for operation in conversion.operations)
        for pattern in conversion.source_patterns
    }
    return {*found, "gate"} if found else set()


def refuse_bypassed(model_type: str | None, modules: Iterable[str]) -> None:
    """Raises AdapterError for a module that PEFT refuses, or leaves out on some devices, in models of this type."""
    bypassed = (path for path in modules if path.rpartition(".")[2] in BYPASSED_NAMES)
    if model_type in BYPASSED and (path := next(bypassed, None)) is not None:
        raise AdapterError(
            f"export: PEFT {'refuses' if model_type in REFUSED else 'cannot adapt'} {path} in models of type "
            f"{model_type}, whose kernels use its weight without calling the layer; {UNFOLDED}"
        )
