"""Several B's on one A, of which a router weighs each token's."""

import torch
from torch import Tensor

from lori_dist.forms.hydra import Hydra


def tensors(heads: int = 3) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(2)
    shapes = {"a": (4, 6), "b": (heads, 5, 4), "router": (heads, 6)}
    return {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}


def made(heads: int = 3) -> Hydra:
    return Hydra(rank=4, scale=2.0, trains_a=False, heads=heads)


def test_it_is_the_formula_token_by_token() -> None:
    t, x = tensors(), torch.randn(7, 6, generator=torch.Generator().manual_seed(3))
    for token, found in zip(x, made().update(t, x), strict=True):
        shares = torch.softmax(t["router"] @ token, 0)
        wanted = 2.0 * sum(share * (b @ t["a"] @ token) for share, b in zip(shares, t["b"], strict=True))
        torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-5)


def test_equal_heads_are_plain_lora_whatever_the_router() -> None:
    t, x = tensors(), torch.randn(7, 6, generator=torch.Generator().manual_seed(3))
    t["b"] = t["b"][:1].expand(3, -1, -1)
    torch.testing.assert_close(made().update(t, x), 2.0 * x @ t["a"].t() @ t["b"][0].t(), rtol=1e-5, atol=1e-5)


def test_one_head_is_plain_lora() -> None:
    t, x = tensors(1), torch.randn(7, 6, generator=torch.Generator().manual_seed(3))
    torch.testing.assert_close(made(1).update(t, x), 2.0 * x @ t["a"].t() @ t["b"][0].t(), rtol=1e-5, atol=1e-5)
