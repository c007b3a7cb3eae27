"""Adapters for PEFT, and for all that reads its LoRA folders."""

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lori_dist.adapter.adapter import Adapter, in_memory
from lori_dist.atomic import complete, write_text
from lori_dist.errors import AdapterError
from lori_dist.integrations import _readback, model_card
from lori_dist.integrations._peft_rules import EXPERT, refuse_bypassed, taken_for_experts
from lori_dist.integrations.model_card import UNKNOWN, Origin
from lori_dist.tensors import save

CONV1D_MODELS = ("gpt2", "openai-gpt", "imagegpt")
"""Model types whose linear layers are `Conv1D`, with a weight of (in_features, out_features)."""


def export(adapter: Adapter, folder: Path, *, base_model_name: str, origin: Origin = UNKNOWN) -> None:
    """Writes a LoRA folder that `peft.PeftModel.from_pretrained` loads with the outputs of this adapter.

    It holds a model card (README.md), adapter_config.json and adapter_model.safetensors: A made from its seed, in its
    own dtype, and B dense in fp32, for every module that keeps an entry; to leave out the others changes no output.
    Several blocks become one LoRA of the sum of their ranks, their scales multiplied into B; a module where a block has
    fewer rows of A gets zeros for the rest, as readers expect one rank of all modules. base_model_name: path or hub
    name of the base model, written into the configuration, a path as an absolute one. origin: what the card says of
    data, training and measures.
    The folder is read back once with PEFT, where it is installed, on the structure of the base model, which takes no
    memory, and every module compared. It appears complete or not at all.
    Raises AdapterError if it holds anything already, for an adapter without a kept entry, and for one that PEFT would
    refuse or load as another.
    """
    modules = [module for module in adapter.shapes if any(module in block.entries for block in adapter.blocks)]
    if not modules:
        raise AdapterError("export: the adapter keeps no entry of any module; there is nothing to export")
    with complete(folder) as partial:
        write(adapter, partial, modules, base_model_name, origin)


def write(adapter: Adapter, folder: Path, modules: list[str], base_model_name: str, origin: Origin = UNKNOWN) -> None:
    """The files of `export`, of these modules, into a folder that is there. Raises AdapterError as `export`."""
    base = _readback.settings_of(base_model_name)
    model_type = adapter.base.get("model_type") if base is None else base.model_type
    refuse_bypassed(model_type, modules)
    tensors: dict[str, Tensor] = {}
    tensors.update({f"base_model.model.{name}": in_memory(values).float() for name, values in adapter.saved.items()})
    for module in _linear(modules):
        a, b = _factors(adapter, module)
        tensors[f"base_model.model.{module}.lora_A.weight"] = a
        tensors[f"base_model.model.{module}.lora_B.weight"] = b
    for weight in (fused := _fused(modules)):
        a, b = _factors_of_experts(adapter, weight)
        # PEFT wraps the module for each of its weights; down_proj, which comes last, is the outermost.
        experts, _, projection = weight.rpartition(".")
        is_inner = projection != "down_proj" and f"{experts}.down_proj" in fused
        tensors[f"base_model.model.{experts}{'.base_layer' if is_inner else ''}.lora_A.weight"] = a
        tensors[f"base_model.model.{experts}{'.base_layer' if is_inner else ''}.lora_B.weight"] = b
    save(folder / "adapter_model.safetensors", tensors, {"format": "pt"})
    settings = _config(adapter, modules, _path_or_name(base_model_name), model_type)
    write_text(folder / "adapter_config.json", json.dumps(settings, indent=2) + "\n")
    write_text(folder / "README.md", model_card.text(adapter, base_model_name, origin))
    _readback.compare(folder, adapter, base)


def is_loadable(base_model_name: str) -> bool:
    """Whether `AutoPeftModelForCausalLM.from_pretrained` can find the base by this name: it is that of a folder or of a
    cached model, or has the form `owner/name` of one on the hub."""
    return base_model_name.count("/") == 1 or _readback.settings_of(base_model_name) is not None


def _path_or_name(base_model_name: str) -> str:
    """A folder's path from wherever the reader is."""
    return str(Path(base_model_name).resolve()) if Path(base_model_name).is_dir() else base_model_name


def _scales_as_it_is(adapter: Adapter) -> bool:
    """Whether PEFT's own alpha / rank is the scale, and B can be written to the bit."""
    return len(adapter.blocks) == 1 and adapter.blocks[0].weight == 1.0


def _factors(adapter: Adapter, module: str) -> tuple[Tensor, Tensor]:
    """A, (sum of ranks, in_features), and B, (out_features, sum of ranks), of one module."""
    out_features, in_features = adapter.shapes[module]
    a, b = [], []
    for block in adapter.blocks:
        rank = block.rank_of(module)
        if rank:
            a.append(block.projection(module, in_features))
        if rank < block.rank:
            a.append(torch.zeros(block.rank - rank, in_features, dtype=block.dtype))
        if module in block.entries:
            dense = block.entries[module].dense(out_features, rank)
            b.append((dense if _scales_as_it_is(adapter) else dense.double() * block.scale).float())
        else:
            b.append(torch.zeros(out_features, rank))
        b.append(torch.zeros(out_features, block.rank - rank))
    return torch.cat(a).contiguous(), torch.cat(b, dim=1).contiguous()


def _linear(modules: list[str]) -> list[str]:
    return [module for module in modules if not EXPERT.fullmatch(module)]


def _modules(parameters: Iterable[str]) -> list[str]:
    return list(dict.fromkeys(name.rpartition(".")[0] for name in parameters))


def _fused(modules: list[str]) -> list[str]:
    """The fused weights that the matrices of experts are in."""
    return list(dict.fromkeys(module.rpartition(".")[0] for module in modules if EXPERT.fullmatch(module)))


def _factors_of_experts(adapter: Adapter, weight: str) -> tuple[Tensor, Tensor]:
    """A, (experts * rank, in_features), and B, (out_features, rank * experts), experts the fastest to change."""
    num_experts = sum(1 for module in adapter.shapes if module.rpartition(".")[0] == weight)
    paths = [f"{weight}.{number}" for number in range(num_experts)]
    if lacking := [path for path in paths if path not in adapter.shapes]:
        raise AdapterError(
            f"export: {lacking[0]} is not a target, others of its experts are; PEFT knows all of them or none"
        )
    a, b = zip(*(_factors(adapter, path) for path in paths), strict=True)
    return torch.cat(a), torch.stack(b, dim=-1).flatten(1)


def _config(adapter: Adapter, modules: list[str], base_model_name: str, model_type: str | None) -> dict[str, Any]:
    moved = taken_for_experts(model_type)
    parameters = [f"{module}.weight" for module in _linear(modules) if module.rpartition(".")[2] in moved]
    parameters += _fused(modules)
    rank = sum(block.rank for block in adapter.blocks)
    alpha = adapter.blocks[0].alpha if _scales_as_it_is(adapter) else float(rank)
    return {
        "peft_type": "LORA",
        "task_type": None if adapter.saved else "CAUSAL_LM",  # what has a head of its own may be of any class
        "base_model_name_or_path": base_model_name,
        "inference_mode": True,
        "r": rank,
        "lora_alpha": int(alpha) if alpha.is_integer() else alpha,  # readers that are strict want an integer
        "lora_dropout": 0.0,
        "bias": "none",
        "use_rslora": False,
        "use_dora": False,
        "fan_in_fan_out": model_type in CONV1D_MODELS or "fan_in_fan_out" in adapter.base,
        "target_modules": [module for module in _linear(modules) if f"{module}.weight" not in parameters],
        **({"modules_to_save": saved} if (saved := _modules(adapter.saved)) else {}),
        **({"target_parameters": parameters} if parameters else {}),
    }
