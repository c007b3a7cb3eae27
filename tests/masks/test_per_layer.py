"""The mask of each layer."""

import pytest
import torch

from lori_dist.masks.per_layer import mask

GROUPS = {
    "model.layers.0.self_attn.q_proj": "0",
    "model.layers.0.mlp.experts.7.down_proj": "0",
    "model.layers.1.self_attn.q_proj": "1",
    "model.layers.10.self_attn.q_proj": "10",
    "transformer.h.1.attn.c_attn": "h1",
    "encoder.block.1.layer.0.SelfAttention.q": "encoder1",
    "decoder.block.1.layer.0.SelfAttention.q": "decoder1",
    "lm_head": "outside",
    "model.projector.dense": "outside",
}


@pytest.mark.parametrize("density", [0.1, 0.5])
def test_every_layer_and_all_outside_of_them_keep_their_share(density: float) -> None:
    sizes = {group: torch.rand(()).item() + 0.1 for group in GROUPS.values()}
    b = {module: torch.rand(10, 2) * sizes[group] for module, group in GROUPS.items()}
    masks = mask(b, density=density)
    for group in set(GROUPS.values()):
        modules = [module for module in GROUPS if GROUPS[module] == group]
        values = torch.cat([b[module].flatten() for module in modules])
        chosen = torch.cat([masks[module].flatten() for module in modules])
        assert int(chosen.sum()) == round(density * values.numel())
        assert values[chosen].min() >= values[~chosen].max()
