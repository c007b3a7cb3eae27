"""A base in 4 or 8 bits: what its layers compute, and a training on it."""

from pathlib import Path

import bitsandbytes
import pytest
import torch
from torch import nn

from lori_dist import config
from lori_dist.errors import ConfigError
from lori_dist.training.model import load_model
from lori_dist.training.quantized import Kind, QuantizedLinear, quantize_layers
from lori_dist.training.weights import fill, materialize, skeleton, whole
from tests.integrations.made import logits
from tests.models import tiny, tiny_llama
from tests.tokenizers import save

kinds = pytest.mark.parametrize("kind", ["nf4", "int8"])


@kinds
@pytest.mark.parametrize(("out_features", "in_features"), [(6, 10), (64, 48), (33, 6)])
def test_a_layer_is_near_the_one_it_was_made_of_and_gives_its_gradient(
    kind: Kind, out_features: int, in_features: int
) -> None:
    torch.manual_seed(0)
    exact = nn.Linear(in_features, out_features)
    layer = QuantizedLinear(exact, kind)
    weight = layer.matrix(torch.float32)
    assert (weight - exact.weight).abs().max() < {"nf4": 0.25, "int8": 0.005}[kind] * exact.weight.abs().max()
    x = torch.randn(3, in_features, requires_grad=True)
    layer(x).square().sum().backward()
    found, x.grad = x.grad, None
    nn.functional.linear(x, weight, exact.bias).square().sum().backward()
    assert torch.equal(found, x.grad)
    assert sum(parameter.nbytes for parameter in (layer.weight, layer.scales)) < 0.7 * exact.weight.nbytes


def test_four_bits_are_those_of_bitsandbytes() -> None:
    torch.manual_seed(0)
    exact, x = nn.Linear(64, 48, bias=False), torch.randn(3, 64)
    theirs = bitsandbytes.nn.Linear4bit(64, 48, bias=False, quant_type="nf4", compress_statistics=False)
    theirs.load_state_dict(exact.state_dict())
    torch.testing.assert_close(QuantizedLinear(exact, "nf4")(x), theirs.to("cpu")(x), rtol=1e-5, atol=1e-5)


@kinds
def test_a_base_read_from_files_is_the_one_loaded(tmp_path: Path, kind: Kind) -> None:
    settings = config.Model(path=str(save(tiny_llama(), tmp_path / "tiny")), quantize=kind)
    loaded = load_model(settings)
    assert sum(isinstance(module, QuantizedLinear) for module in loaded.modules()) == 14
    model, weights = skeleton(settings)
    model.requires_grad_(False)
    assert all(parameter.is_meta for parameter in model.parameters())
    materialize(model, torch.device("cpu"))
    fill(model, weights, whole)
    assert torch.equal(logits(model), logits(loaded))
    assert not torch.equal(logits(model), logits(tiny_llama()))


def test_a_model_of_other_layers_is_refused() -> None:
    for kind, name in (("gpt2", "Conv1D"), ("mixtral", "MixtralExperts")):
        with pytest.raises(ConfigError, match=f"model.quantize: .* is a {name}, which is not quantised"):
            quantize_layers(tiny(kind), "nf4")
