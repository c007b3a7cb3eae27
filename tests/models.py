"""Tiny models with random weights for the tests: equal in every process, whatever ran before."""

from typing import Any

import torch
from torch import Tensor, nn
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

from lori_dist.training.weights import base_parameters, persistent_buffers


def tiny_llama(*, layers: int = 2, tied: bool = False, vocabulary: int = 64) -> LlamaForCausalLM:
    """A Llama whose projections have unequal and odd sizes, so that shards are uneven."""
    config = LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=36,
        intermediate_size=52,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=9 + 1,
        max_position_embeddings=128,
        tie_word_embeddings=tied,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=0,
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return LlamaForCausalLM(config).eval()


def tiny_gpt2() -> GPT2LMHeadModel:
    """A GPT-2: its projections are `Conv1D`, whose weight is (in_features, out_features)."""
    config = GPT2Config(vocab_size=64, n_positions=64, n_embd=36, n_layer=2, n_head=2, bos_token_id=1, eos_token_id=2)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return GPT2LMHeadModel(config).eval()


class InMemory:
    """`Weights` of a model that is there."""

    def __init__(self, model: nn.Module) -> None:
        tensors = {**base_parameters(model), **persistent_buffers(model)}
        self.tensors = {name: tensor.detach().clone() for name, tensor in tensors.items()}

    def read(self, name: str, into: Tensor, start: int) -> None:
        into.copy_(self.tensors[name].view(-1)[start : start + into.numel()])


def on_meta(model: Any) -> tuple[Any, InMemory]:
    """A model whose base is as it is before its weights are loaded, and its weights."""
    weights = InMemory(model)
    meta: dict[nn.Parameter, nn.Parameter] = {}
    for module in model.modules():
        for name, parameter in module.named_parameters(recurse=False):
            if not parameter.requires_grad:
                meta.setdefault(parameter, nn.Parameter(parameter.detach().to("meta"), requires_grad=False))
                module._parameters[name] = meta[parameter]
    return model, weights
