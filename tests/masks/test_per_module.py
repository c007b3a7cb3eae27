"""The mask of attention, of the MLPs, and of all else."""

import pytest
import torch

from lori_dist.masks.per_module import mask

KINDS = {
    "model.layers.0.self_attn.q_proj": "attention",
    "model.layers.3.self_attn.o_proj": "attention",
    "model.layers.0.mlp.gate_proj": "mlp",
    "model.layers.0.block_sparse_moe.experts.2.w1": "mlp",
    "transformer.h.0.attn.c_proj": "attention",
    "transformer.h.0.mlp.c_proj": "mlp",
    "transformer.h.0.self_attention.query_key_value": "attention",
    "transformer.h.0.mlp.dense_h_to_4h": "mlp",
    "model.decoder.layers.0.self_attn.out_proj": "attention",
    "model.decoder.layers.0.fc1": "mlp",
    "transformer.blocks.0.attn.Wqkv": "attention",
    "transformer.blocks.0.ffn.up_proj": "mlp",
    "model.layers.0.mixer.in_proj": "other",
    "moe.layers.0.self_attn.out": "attention",
    "attention_model.layers.0.mlp.dense": "mlp",
    "lm_head": "other",
}


@pytest.mark.parametrize("kind", ["attention", "mlp", "other"])
def test_every_kind_keeps_the_largest_of_its_own(kind: str) -> None:
    # Entries of the kind are tiny, so that a module counted to another kind would keep none, or all.
    modules = [module for module in KINDS if KINDS[module] == kind]
    b = {module: torch.rand(8, 4) * (1e-6 if module in modules else 1.0) for module in KINDS}
    masks = mask(b, density=0.25)
    values = torch.cat([b[module].flatten() for module in modules])
    chosen = torch.cat([masks[module].flatten() for module in modules])
    assert int(chosen.sum()) == round(0.25 * values.numel())
    assert values[chosen].min() >= values[~chosen].max()
