"""MLPs with slices of the sequence: the numbers of the whole, and fewer tokens at a time."""

from typing import Any

import pytest
import torch
from torch import Tensor

from lori_dist.adapter.adapter import Spec
from lori_dist.adapter.attach import attach, trainable
from lori_dist.errors import ConfigError
from lori_dist.training.sliced import mlps, slice_mlps
from lori_dist.training.trainer import checkpoint_activations
from tests.models import KINDS, tiny

IDS = torch.randint(3, 64, (2, 11), generator=torch.Generator().manual_seed(2))


def gradients(kind: str, slices: int, checkpoints: bool) -> tuple[Tensor, dict[str, Tensor], list[int]]:
    """Logits, gradients, and the tokens of a row that each call of the first MLP's first layer has seen."""
    model: Any = tiny(kind)
    attach(model, Spec(rank=4, alpha=8.0, seed=3))
    with torch.no_grad():
        for number, parameter in enumerate(trainable(model).values()):
            parameter.normal_(std=0.3, generator=torch.Generator().manual_seed(number))
    seen: list[int] = []
    first = next(iter(mlps(model).values()))
    next(first.children()).register_forward_hook(lambda module, inputs, output: seen.append(output.shape[1]))
    if slices > 1:
        slice_mlps(model, slices)
    if checkpoints:
        checkpoint_activations(model)
    output = model(input_ids=IDS, labels=IDS, use_cache=False)
    output.loss.backward()
    grads = {name: parameter.grad for name, parameter in trainable(model).items() if parameter.grad is not None}
    return output.logits.detach(), grads, seen


@pytest.mark.parametrize("checkpoints", [False, True])
@pytest.mark.parametrize("slices", [3, 16])
@pytest.mark.parametrize("kind", ["llama", "gpt2", "gemma"])
@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
def test_slices_give_the_numbers_of_the_whole(kind: str, slices: int, checkpoints: bool) -> None:
    logits, wanted, at_once = gradients(kind, 1, checkpoints)
    found, grads, seen = gradients(kind, slices, checkpoints)
    torch.testing.assert_close(found, logits, rtol=1e-5, atol=1e-5)
    assert grads.keys() == wanted.keys() and wanted
    for name, gradient in wanted.items():
        assert (grads[name] - gradient).norm() <= 5e-6 * gradient.norm(), name
    assert set(at_once) == {11} and max(seen) == -(-11 // slices)
    assert len(seen) > slices  # and again in the backward pass


def test_kinds_that_have_an_mlp_and_mixtures_that_have_none() -> None:
    for kind in KINDS:
        assert len(mlps(tiny(kind))) == 2, kind
    with pytest.raises(ConfigError, match=r"^train\.mlp_slices: MixtralForCausalLM has no block with an MLP"):
        slice_mlps(tiny("mixtral"), 2)
