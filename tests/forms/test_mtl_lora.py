"""Several B's that all tasks mix, each in its own way."""

from typing import Any

import pytest
import torch
from torch import Tensor

from lori_dist.adapter.adapter import Spec
from lori_dist.adapter.attach import attach
from lori_dist.adapter.splitting import split
from lori_dist.adapter.task_adapter import extract_formed
from lori_dist.forms.mtl_lora import form
from lori_dist.training.engine import trained
from tests.forms.made import TASKS, Case, backward, descend
from tests.models import tiny_llama

NAMES = ("a", "b", "l", "w")


def made(**options: Any) -> Any:
    return form(rank=4, alpha=8.0, trains_a=True, **options)


def tensors(heads: int = 3, transform: str = "full") -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(3)
    shapes: dict[str, tuple[int, ...]] = {"a": (4, 6), "b": (heads, 5, 4), "w": (heads,)}
    if transform != "none":
        shapes["l"] = (4, 4) if transform == "full" else (4,)
    return {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}


def product(of: Any, t: dict[str, Tensor]) -> Tensor:
    b, a = of.factors(t)
    found: Tensor = b @ a
    return found


def test_equal_heads_and_no_transform_are_plain_lora_whatever_the_weights() -> None:
    t = tensors()
    t |= {"b": t["b"][:1].expand(3, -1, -1), "l": torch.eye(4)}
    torch.testing.assert_close(product(made(), t), 2.0 * t["b"][0] @ t["a"])


@pytest.mark.parametrize("transform", ["full", "diagonal", "none"])
def test_it_is_the_formula(transform: str) -> None:
    t = tensors(transform=transform)
    shares = torch.softmax(t["w"] / 0.1, 0)
    mixed = sum(share * b for share, b in zip(shares, t["b"], strict=True))
    after = {"full": lambda: t["l"], "diagonal": lambda: torch.diag(t["l"]), "none": lambda: torch.eye(4)}[transform]()
    torch.testing.assert_close(product(made(transform=transform), t), 2.0 * mixed @ after @ t["a"])


def test_a_high_temperature_gives_the_mean() -> None:
    t = tensors(transform="none")
    wanted = 2.0 * t["b"].mean(0) @ t["a"]
    torch.testing.assert_close(product(made(transform="none", temperature=1e9), t), wanted)


def of_tensor(model: Any, tensor: str) -> list[Tensor]:
    found = [(name, parameter.grad) for name, parameter in trained(model).items() if name.endswith(f":{tensor}")]
    assert found
    return [grad for _, grad in found if grad is not None]


def test_gradients_at_the_start() -> None:
    """B alone has one, of each head its share of LoRA's."""
    model = Case(name="mtl_lora", a="trained", density=None).model()
    plain = Case(name="lori", a="trained", density=None).model()
    backward(model, 0, [1])
    backward(plain, 0, [1])
    for name in ("a", "l", "w"):
        assert all(not bool(grad.any()) for grad in of_tensor(model, name))
    weights = [parameter for name, parameter in trained(model).items() if name.endswith(":w")]
    for weight, of_heads, of_lora in zip(weights, of_tensor(model, "b"), of_tensor(plain, "b"), strict=True):
        shares = torch.softmax(weight.detach().view(3, 3)[1] / 0.1, 0)
        wanted = shares[:, None] * of_lora.view(1, -1)
        torch.testing.assert_close(of_heads.view(3, -1), wanted, rtol=1e-4, atol=1e-7)


def test_one_head_for_one_task_is_lori_bit_for_bit() -> None:
    options = {"heads": 1, "transform": "none"}
    model, plain = Case(name="mtl_lora", options=options, density=None).model(["one"]), tiny_llama()
    attach(plain, Spec(rank=4, alpha=8.0, seed=9))
    for one in (model, plain):
        descend(one, range(4), [0])
    ours = {name: parameter for name, parameter in trained(model).items() if name.endswith(":b")}
    theirs = trained(plain)
    assert [name.removesuffix(":b") for name in ours] == list(theirs)
    for name, parameter in theirs.items():
        assert torch.equal(ours[f"{name}:b"], parameter)
        assert bool(parameter.any())
    assert all(not bool(grad.any()) for grad in of_tensor(model, "w"))


def test_the_number_of_parameters() -> None:
    """At d 4096, rank 8, 3 heads and 8 tasks: 131,608, and 9,918 with a frozen A, a tenth of B and a diagonal."""
    adapter = extract_formed(Case(name="mtl_lora", a="trained", density=None).model())
    rank, heads, count = 4, 3, len(TASKS)
    wanted = sum(
        rank * in_features + heads * rank * out_features + count * rank * rank + count * heads
        for out_features, in_features in adapter.shapes.values()
    )
    assert adapter.kept == adapter.total == wanted


def test_a_diagonal_keeps_every_task_on_the_mask() -> None:
    case = Case(name="mtl_lora", options={"transform": "diagonal"})
    model = case.model()
    masks = case.masks(tiny_llama())
    assert masks is not None
    descend(model, range(4))
    for adapter in split(extract_formed(model)).values():
        [block] = adapter.blocks
        for module, entries in block.entries.items():
            kept = masks[f"{module}:b"].flatten().nonzero().squeeze(1)
            assert entries.index is not None
            assert torch.equal(entries.index.long(), kept)
