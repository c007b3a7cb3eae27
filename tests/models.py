"""Tiny models with random weights for the tests: equal in every process, whatever ran before."""

from typing import Any

import torch
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
)

from lori_dist.adapter.linear import BaseDelta
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


def tiny_classifier(kind: str, labels: int = 3) -> Any:
    """A model that classifies texts, such as an encoder, with a head that was never trained."""
    sizes = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 44, "num_hidden_layers": 2}
    more = {"num_attention_heads": 4, "max_position_embeddings": 64, "num_labels": labels, "initializer_range": 0.2}
    with torch.random.fork_rng():
        torch.manual_seed(0)
        made = AutoConfig.for_model(kind, pad_token_id=0, **sizes, **more)
        return AutoModelForSequenceClassification.from_config(made).eval()


def _of_kind(model_type: str, **more: Any) -> Any:
    """A model of two layers with weights as its class draws them, but larger, so that updates are seen."""
    sizes = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 44, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8, "max_position_embeddings": 64}
    tokens = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
    made = AutoConfig.for_model(model_type, **{**sizes, **heads, **tokens, "initializer_range": 0.2, **more})
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return AutoModelForCausalLM.from_config(made).eval()


KINDS: dict[str, dict[str, Any]] = {
    "llama": {},
    "mistral": {"sliding_window": 6},
    "qwen2": {},
    "qwen3": {},
    "gemma": {"tie_word_embeddings": True},
    "gemma2": {"tie_word_embeddings": True},
    "phi": {},
    "phi3": {},
    "gpt_neox": {},
    "gpt2": {"n_embd": 32, "n_layer": 2, "n_head": 2, "n_positions": 64},
}
"""Model type -> settings besides those of size."""
MIXTURES: dict[str, dict[str, Any]] = {
    "mixtral": {"num_local_experts": 4, "num_experts_per_tok": 2},
    "qwen3_moe": {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 20},
    "gpt_oss": {"num_local_experts": 4, "num_experts_per_tok": 2, "layer_types": ["full_attention"] * 2},
    "deepseek_v3": {
        **{"n_routed_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 20, "n_group": 1},
        **{"topk_group": 1, "first_k_dense_replace": 1, "n_shared_experts": 1, "kv_lora_rank": 8, "q_lora_rank": 16},
        **{"qk_rope_head_dim": 4, "v_head_dim": 8, "qk_nope_head_dim": 8, "head_dim": 4, "num_key_value_heads": 4},
    },
}
"""The same, of models whose experts are fused; gpt_oss has them transposed, and with bias."""


def tiny(model_type: str) -> Any:
    """A causal language model of one of KINDS or MIXTURES."""
    return _of_kind(model_type, **{**KINDS, **MIXTURES}[model_type])


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
            if not isinstance(module, BaseDelta):
                of_base = nn.Parameter(parameter.detach().to("meta"), requires_grad=parameter.requires_grad)
                meta.setdefault(parameter, of_base)
                module._parameters[name] = meta[parameter]
    return model, weights
