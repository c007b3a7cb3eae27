"""The mask of each kind of projection."""

import torch
from hypothesis import given
from torch import Tensor

from lori_dist.masks.per_projection import mask
from tests.masks.oracle import DENSITIES, adapters, flat, kept


@given(adapters(), DENSITIES)
def test_every_kind_keeps_the_start_of_its_sort(b: dict[str, Tensor], density: float) -> None:
    assert flat(mask(b, density=density)) == kept(b, lambda module: module.split(".")[-1], density)


def test_kinds_are_counted_over_layers() -> None:
    b = {
        "h.0.attn.c_attn": torch.tensor([[5.0], [6.0]]),
        "h.0.mlp.c_fc": torch.tensor([[50.0], [60.0]]),
        "h.1.attn.c_attn": torch.tensor([[1.0], [2.0]]),
        "lm_head": torch.tensor([[0.1], [0.2]]),
    }
    assert flat(mask(b, density=0.5)) == {
        "h.0.attn.c_attn": [True, True],
        "h.0.mlp.c_fc": [False, True],
        "h.1.attn.c_attn": [False, False],
        "lm_head": [False, True],
    }
