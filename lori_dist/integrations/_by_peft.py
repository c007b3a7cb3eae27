"""PEFT's own reading of a LoRA folder. The module is imported only where PEFT is installed."""

import warnings
from collections.abc import Iterator
from pathlib import Path

import torch
from peft import PeftConfig, inject_adapter_in_model
from peft.tuners.lora import LoraLayer
from peft.tuners.lora.layer import ParamWrapper
from peft.utils import ModulesToSaveWrapper, load_peft_weights, set_peft_model_state_dict
from torch import Tensor, nn

from lori_dist.adapter.bases import features

NAME = "default"
Factors = tuple[Tensor, Tensor]
"""A, (rank, in_features), and scale * B, (out_features, rank)."""


def read(folder: Path, model: nn.Module) -> tuple[dict[str, Factors], dict[str, Tensor]]:
    """Module path -> what PEFT adds to it; and parameter name -> what PEFT takes instead of the base's.

    model: the base, whose weights need not hold anything; it is changed. Modules that PEFT wraps without having found
    tensors for them are left out, as their update stays zero. Raises whatever PEFT raises.
    """
    with warnings.catch_warnings(), torch.random.fork_rng(devices=[]):
        warnings.simplefilter("ignore")  # they are for people who train
        config = PeftConfig.from_pretrained(str(folder))
        wrapped = inject_adapter_in_model(config, model, NAME, low_cpu_mem_usage=True)
        weights = {_key(key): tensor for key, tensor in load_peft_weights(str(folder), device="cpu").items()}
        set_peft_model_state_dict(wrapped, weights, NAME, low_cpu_mem_usage=True)
    return dict(_updates(wrapped)), dict(_saved(wrapped))


def _key(key: str) -> str:
    """PEFT looks for modules_to_save by their names in the model that it gets, which is not a PeftModel here."""
    return key if ".lora_" in key else key.removeprefix("base_model.model.")


def _updates(model: nn.Module) -> Iterator[tuple[str, Factors]]:
    for name, layer in model.named_modules():
        if not isinstance(layer, LoraLayer) or NAME not in layer.lora_A:
            continue
        path, a, b = name.replace(".base_layer", ""), layer.lora_A[NAME].weight, layer.lora_B[NAME].weight
        if a.is_meta or b.is_meta:
            continue
        a, b = a.detach(), b.detach() * layer.scaling[NAME]
        if isinstance(layer, ParamWrapper) and layer.get_param().dim() == 3:
            number_of_experts = layer.get_param().shape[0]
            of_a = a.view(number_of_experts, -1, a.shape[1])
            of_b = b.view(b.shape[0], -1, number_of_experts)
            for number in range(number_of_experts):
                yield f"{path}.{layer.parameter_name}.{number}", (of_a[number], of_b[..., number])
        else:
            out_features, in_features = features(layer.get_base_layer())
            assert (b.shape[0], a.shape[1]) == (out_features, in_features)
            yield path, (a, b)


def _saved(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    for path, module in model.named_modules():
        if isinstance(module, ModulesToSaveWrapper):
            for name, parameter in module.modules_to_save[NAME].named_parameters():
                yield f"{path}.{name}", parameter.detach()
