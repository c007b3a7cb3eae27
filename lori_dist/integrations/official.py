"""Adapters in the layout of LoRI's official code (juzhengz/LoRI): a LoRA folder of PEFT, with its mask beside it."""

import io
from pathlib import Path

import torch

from lori_dist.adapter.adapter import Adapter
from lori_dist.atomic import complete, replacing
from lori_dist.errors import AdapterError
from lori_dist.integrations import peft
from lori_dist.integrations._peft_rules import EXPERT
from lori_dist.integrations._readback import compare_as_read
from lori_dist.integrations.model_card import UNKNOWN, Origin


def export(adapter: Adapter, folder: Path, *, base_model_name: str, origin: Origin = UNKNOWN) -> None:
    """Writes the folder that the official scripts, PEFT, and `lori` read: A and B of every module, and B's mask.

    The mask is a dictionary of bool tensors, (out_features, rank), under the names of PEFT's parameters, in a file
    named after its sparsity: 0.9_mask.pt. A dense adapter (LoRI-D) has none. A module that keeps nothing has a B of 0.
    It is read back once, mask and all, and compared. The folder appears complete or not at all.
    Raises AdapterError if it holds anything already, for a merge of several blocks or with a weight and for fused
    experts, which that layout has no place for, and where a module without entries has no A.
    """
    if len(adapter.blocks) != 1 or adapter.blocks[0].weight != 1.0:
        raise AdapterError(
            f"export: the adapter has {len(adapter.blocks)} weighted blocks; the official layout holds one A and B. "
            "Use --format peft, or export each task"
        )
    if adapter.saved:
        raise AdapterError(
            f"export: {next(iter(adapter.saved))} was trained in full, for which the official layout has no place. "
            "Use --format peft"
        )
    (block,) = adapter.blocks
    without = next((module for module in adapter.shapes if block.rank_of(module) != block.rank), None)
    if without is not None:
        raise AdapterError(
            f"{without}: its A has {block.rank_of(without)} rows of {block.rank}; the official layout holds one rank "
            "for all modules. Use --format peft"
        )
    expert = next((module for module in adapter.shapes if EXPERT.fullmatch(module)), None)
    if expert is not None:
        raise AdapterError(
            f"export: {expert} is one of fused experts, for which the official layout has no place. Use --format peft"
        )
    with complete(folder) as partial:
        peft.write(adapter, partial, list(adapter.shapes), base_model_name, origin)
        if adapter.kept < adapter.total:
            written = io.BytesIO()  # torch's own error of a full disk is of no class to tell it by
            torch.save(_mask(adapter), written)
            with replacing(partial / f"{_sparsity(adapter)}_mask.pt") as file:
                file.write(written.getbuffer())
        compare_as_read(partial, adapter)


def _sparsity(adapter: Adapter) -> float:
    """The sparsity that was asked for: the shortest decimal that agrees with the counts up to rounding in each
    module."""
    exact = 1 - adapter.kept / adapter.total
    near = (round(exact, digits) for digits in range(1, 8))
    fits = (found for found in near if 0 < found < 1 and abs(found - exact) * adapter.total <= len(adapter.shapes))
    return next(fits, exact)


def _mask(adapter: Adapter) -> dict[str, torch.Tensor]:
    (block,) = adapter.blocks
    mask = {}
    for module, (out_features, _) in adapter.shapes.items():
        kept = torch.zeros(out_features * block.rank, dtype=torch.bool)
        if module in block.entries:
            index = block.entries[module].index
            kept[slice(None) if index is None else index.long()] = True
        mask[f"base_model.model.{module}.lora_B.default.weight"] = kept.view(out_features, block.rank)
    return mask
