"""One model adapted in several ways, at equal rank and targets, for the engines to train."""

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

from lori_dist import config
from lori_dist.adapter.adapter import Spec
from lori_dist.adapter.attach import attach
from lori_dist.adapter.bases import features
from lori_dist.adapter.linear import AdaptedLinear
from lori_dist.adapter.matching import match
from lori_dist.training.weights import Weights, skeleton

TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
DENSITY = 0.1

Made = tuple[Any, Weights]  # of which the first is a PreTrainedModel, or PEFT's


def make_llama(folder: Path, layers: int, hidden: int, length: int, vocabulary: int) -> None:
    """A base of random weights."""
    settings = LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=hidden,
        intermediate_size=hidden * 11 // 4,
        num_hidden_layers=layers,
        num_attention_heads=8,
        num_key_value_heads=2,
        max_position_embeddings=max(length, 512),
    )
    torch.manual_seed(0)
    LlamaForCausalLM(settings).save_pretrained(folder)


def from_files(base: Path, dtype: str) -> Made:
    """A base without an adapter."""
    return skeleton(config.Model(path=str(base), dtype=dtype))  # type: ignore[arg-type]


def floor(base: Made, rank: int) -> Made:
    """No adapter; one number before the first block, so that gradients flow through all of them."""
    model, weights = base
    model.requires_grad_(False)
    model.probe = nn.Parameter(torch.zeros(1))
    model.get_input_embeddings().register_forward_hook(
        lambda module, args, output: output + model.probe.to(output.dtype)
    )
    return model, weights


def peft_lora(base: Made, rank: int) -> Made:
    """LoRA as PEFT has it: A and B trained, in fp32 also above a base in half precision, as is its default."""
    from peft import LoraConfig, get_peft_model

    model, weights = base
    settings = LoraConfig(r=rank, lora_alpha=2 * rank, lora_dropout=0.0, target_modules=list(TARGETS))
    adapted: Any = get_peft_model(model, settings)
    generator = torch.Generator().manual_seed(0)
    for module in adapted.modules():  # made on the meta device, as the base is
        for name, parameter in module.named_parameters(recurse=False):
            if parameter.requires_grad:
                start = torch.zeros(parameter.shape)
                if parameter.shape[0] == rank:
                    start.uniform_(-1, 1, generator=generator).div_(math.sqrt(parameter.shape[1]))
                module._parameters[name] = nn.Parameter(start)
    return adapted, _OfPeft(weights)


def lori_d(base: Made, rank: int) -> Made:
    """LoRI with dense B."""
    return _lori(base, rank, None)


def lori_s(base: Made, rank: int) -> Made:
    """LoRI with one entry of B in ten."""
    return _lori(base, rank, DENSITY)


METHODS: dict[str, Callable[[Made, int], Made]] = {
    "floor": floor,
    "peft_lora": peft_lora,
    "lori_d": lori_d,
    "lori_s": lori_s,
}


def is_adapted(module: nn.Module) -> bool:
    return isinstance(module, AdaptedLinear) or hasattr(module, "lora_A")


def _lori(base: Made, rank: int, density: float | None) -> Made:
    model, weights = base
    masks = None
    if density is not None:
        generator = torch.Generator().manual_seed(0)
        masks = {
            path: torch.rand(features(module)[0], rank, generator=generator) < density
            for path, module in match(model, TARGETS).items()
        }
    spec = Spec(rank=rank, alpha=2.0 * rank, seed=0, targets=TARGETS, dtype=model.dtype)
    attach(model, spec, masks=masks)
    return model, weights


class _OfPeft:
    """`Weights` under the names that they have inside a PEFT model."""

    def __init__(self, weights: Weights) -> None:
        self.weights = weights

    def read(self, name: str, into: Tensor, start: int) -> None:
        self.weights.read(name.removeprefix("base_model.model.").replace(".base_layer.", "."), into, start)
