"""Quantised bases: what is trained on them, and what folding does."""

from collections.abc import Callable

import bitsandbytes
import pytest
import torch
from torch import nn
from transformers import PreTrainedModel

from lori_dist import AdapterError, Spec, attach, detach, extract, fold, trainable, unfold
from lori_dist.training.quantized import QuantizedLinear
from tests.integrations.made import adapted_logits, logits
from tests.models import tiny

SPEC = Spec(rank=4, alpha=16.0, seed=3)
IDS = torch.arange(1, 25).view(2, 12)


def four_bits(linear: nn.Linear) -> nn.Linear:
    made = bitsandbytes.nn.Linear4bit(
        linear.in_features, linear.out_features, bias=linear.bias is not None, compute_dtype=torch.float32,
        quant_type="nf4",
    )  # fmt: skip
    made.load_state_dict(linear.state_dict())
    return made.to("cpu")


def eight_bits(linear: nn.Linear) -> nn.Linear:
    made = bitsandbytes.nn.Linear8bitLt(
        linear.in_features, linear.out_features, bias=linear.bias is not None, has_fp16_weights=False
    )
    made.load_state_dict(linear.state_dict())
    return made.to("cpu")


def torchao(linear: nn.Linear) -> nn.Linear:
    quantization = pytest.importorskip("torchao.quantization")
    made = nn.Sequential(linear)
    quantization.quantize_(made, quantization.Int8WeightOnlyConfig())
    return made[0]


def shardable(linear: nn.Linear) -> nn.Linear:
    """As `model.quantize` does."""
    return QuantizedLinear(linear, "nf4")


kinds = pytest.mark.parametrize("quantize", [four_bits, eight_bits, torchao, shardable])
Quantize = Callable[[nn.Linear], nn.Linear]


def quantised(quantize: Quantize, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    """All linear layers but the output embedding; their sizes are multiples of 4."""
    model = tiny("qwen2").to(dtype)
    for path, module in list(model.named_modules()):
        if type(module) is nn.Linear and path != "lm_head":
            model.set_submodule(path, quantize(module))
    return model


@kinds
def test_it_trains_on_a_quantised_base_and_folds_only_where_told_to(quantize: Quantize) -> None:
    model = quantised(quantize)
    before = logits(model)
    attach(model, SPEC)
    optimizer, losses = torch.optim.Adam(trainable(model).values(), lr=0.02), []
    for _ in range(8):
        loss = model(input_ids=IDS, labels=IDS).loss
        losses.append(loss.item())
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    assert losses[-1] < losses[0] - 0.3
    adapter, after = extract(model, name="task"), logits(model)
    detach(model)
    assert torch.equal(logits(model), before)
    assert torch.equal(adapted_logits(quantised(quantize), adapter), after)

    attach(model, adapter)
    with pytest.raises(AdapterError, match=r"q_proj: its weight is quantised \(.*fold\(model, dequantize=True\)"):
        fold(model)
    fold(model, dequantize=True)
    scale = after.abs().max()
    assert (logits(model) - after).abs().max() < (0.05 if quantize is eight_bits else 1e-4) * scale
    unfold(model)
    detach(model)
    assert (logits(model) - before).abs().max() < (0.05 if quantize is eight_bits else 1e-4) * scale


@kinds
def test_a_base_in_bfloat16_is_folded_in_bfloat16(quantize: Quantize) -> None:
    """As is loaded from a model of today: weights in 4 or 8 bits, all the rest in bfloat16."""
    model = quantised(quantize, torch.bfloat16)
    attach(model, SPEC)
    with torch.no_grad():
        for values in trainable(model).values():
            values.normal_(std=0.05, generator=torch.Generator().manual_seed(0))
    before = logits(model).float()
    fold(model, dequantize=True)
    assert {weight.dtype for path, weight in model.named_parameters() if "deltas" not in path} == {torch.bfloat16}
    assert (logits(model).float() - before).abs().max() < 0.05 * before.abs().max()
    unfold(model)
    detach(model)
    attach(model, SPEC)  # to the layers that stayed
    assert torch.isfinite(logits(model)).all()
