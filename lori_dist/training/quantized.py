"""A base whose frozen weights are kept in 4 or 8 bits, in tensors that every engine can shard.

Source: QLoRA (arXiv 2305.14314), section 3: 4-bit NormalFloat in blocks of 64, without double quantisation.
"""

from collections.abc import Callable
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from transformers import PreTrainedModel

from lori_dist.adapter.bases import is_conv1d
from lori_dist.adapter.experts import is_experts
from lori_dist.errors import ConfigError

Kind = Literal["nf4", "int8"]
BLOCK = 64
"""Weights that share a scale in nf4."""


class QuantizedLinear(nn.Linear):
    """A linear layer with a frozen weight of bytes, made to a matrix again in each pass, forward and backward.

    weight: uint8, two entries a byte (nf4), or int8 (int8). scales: fp32, of each BLOCK of entries (nf4) or row (int8).
    """

    scales: nn.Parameter

    def __init__(self, like: nn.Linear, kind: Kind) -> None:
        """Without content, unless `like` has one."""
        super().__init__(like.in_features, like.out_features, bias=False, device="meta", dtype=like.weight.dtype)
        self.kind, self.dtype = kind, like.weight.dtype
        num_entries = like.in_features * like.out_features
        if like.weight.is_meta:
            shape = (
                (like.out_features, like.in_features // 2) if kind == "nf4" else (like.out_features, like.in_features)
            )
            weight = torch.empty(shape, dtype=torch.uint8 if kind == "nf4" else torch.int8, device="meta")
            num_scales = -(-num_entries // BLOCK) if kind == "nf4" else like.out_features
            scales = torch.empty(num_scales, device="meta")
        else:
            weight, scales = quantize(like.weight.detach(), kind)
        self.weight = nn.Parameter(weight, requires_grad=False)
        self.scales = nn.Parameter(scales, requires_grad=False)
        self.bias = like.bias

    def matrix(self, dtype: torch.dtype) -> Tensor:
        """(out_features, in_features)."""
        return dequantize(self.weight, self.scales, self.kind, (self.out_features, self.in_features)).to(dtype)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = _Product.apply(x, self)
        return y if self.bias is None else y + self.bias

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, {self.kind}"


class _Product(torch.autograd.Function):
    """x W^T. The backward pass makes W again from the layer, whose bytes an engine may have gathered again."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, layer: QuantizedLinear) -> Tensor:
        ctx.layer = layer
        return nn.functional.linear(x, layer.matrix(x.dtype))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return grad @ ctx.layer.matrix(grad.dtype), None


def quantize(weight: Tensor, kind: Kind) -> tuple[Tensor, Tensor]:
    """Bytes and scales of a weight, (out_features, in_features)."""
    exact = weight.float().contiguous()
    if kind == "int8":
        scales = exact.abs().amax(1).clamp(min=1e-30) / 127
        return (exact / scales[:, None]).round().to(torch.int8), scales
    import bitsandbytes

    packed, state = bitsandbytes.functional.quantize_4bit(exact, blocksize=BLOCK, quant_type="nf4")
    return packed.view(weight.shape[0], -1), state.absmax.float()


def dequantize(weight: Tensor, scales: Tensor, kind: Kind, shape: tuple[int, int]) -> Tensor:
    """The matrix that bytes and scales stand for, fp32."""
    if kind == "int8":
        return weight.float() * scales[:, None]
    import bitsandbytes

    state = bitsandbytes.functional.QuantState(
        absmax=scales,
        shape=torch.Size(shape),
        code=bitsandbytes.functional.get_4bit_type("nf4", device=weight.device),
        blocksize=BLOCK,
        quant_type="nf4",
        dtype=torch.float32,
    )
    return bitsandbytes.functional.dequantize_4bit(weight.reshape(-1, 1), state)


def quantize_layers(model: PreTrainedModel, kind: Kind) -> None:
    """Replaces all linear layers by quantised ones, but the output embedding.

    Raises ConfigError for a model whose weights are mostly in other layers, which would stay as large as they are.
    """
    other = next((path for path, module in model.named_modules() if is_conv1d(module) or is_experts(module)), None)
    if other is not None:
        name = type(model.get_submodule(other)).__name__
        raise ConfigError(
            f"model.quantize: {other} is a {name}, which is not quantised, only linear layers are; remove it"
        )
    output = model.get_output_embeddings()
    for path, module in list(model.named_modules()):
        if type(module) is nn.Linear and module is not output:
            if kind == "nf4" and module.in_features % 2:
                raise ConfigError(f"model.quantize: {path} has {module.in_features} inputs; nf4 needs an even number")
            model.set_submodule(path, QuantizedLinear(module, kind))


class QuantizedWeights:
    """`Weights` of a model whose layers are quantised, from those of the model before: a layer at a time."""

    def __init__(self, model: nn.Module, read: Callable[[str, Tensor, int], None]) -> None:
        self.inner = read
        self.layers = {path: layer for path, layer in model.named_modules() if isinstance(layer, QuantizedLinear)}
        self.last: tuple[str, dict[str, Tensor]] = ("", {})

    def read(self, name: str, into: Tensor, start: int) -> None:
        path, _, part = name.rpartition(".")
        if path not in self.layers or part == "bias":
            self.inner(name, into, start)
            return
        if self.last[0] != path:
            layer = self.layers[path]
            full = torch.empty(layer.out_features * layer.in_features, dtype=layer.dtype)
            self.inner(f"{path}.weight", full, 0)
            weight, scales = quantize(full.view(layer.out_features, layer.in_features), layer.kind)
            self.last = path, {"weight": weight.view(-1), "scales": scales}
        into.copy_(self.last[1][part][start : start + into.numel()])
