"""Frozen linear layers: what they are, whether calling one is a product alone, and one that is not quantised."""

import copy

import torch
from torch import Tensor, nn

QUANTIZED = ("Linear4bit", "Linear8bitLt", "QuantizedLinear")
"""Classes of quantised linear layers."""


def is_conv1d(module: nn.Module) -> bool:
    """Whether it is GPT-2's linear layer, whose weight is (in_features, out_features)."""
    return type(module).__name__ == "Conv1D" and hasattr(module, "nf")


def is_product(module: nn.Module) -> bool:
    """Whether a linear layer, or one of a class derived from it, computes x W^T + bias and nothing else.

    A class with a forward of its own is tried on a few numbers in a small weight.
    """
    kind = type(module)
    # What torch's MultiheadAttention has as `out_proj` is never called.
    if not isinstance(module, nn.Linear) or kind.__name__ == "NonDynamicallyQuantizableLinear":
        return False
    if kind.forward is nn.Linear.forward:
        return True
    if set(module._parameters) != {"weight", "bias"} or module._buffers or module._modules:
        return False
    with torch.no_grad(), torch.device("cpu"):
        weight, bias, x = torch.arange(12.0).view(3, 4).cos(), torch.arange(3.0).sin(), torch.arange(8.0).sin()
        small = copy.copy(module)
        small._parameters = {
            "weight": nn.Parameter(weight),
            "bias": None if module.bias is None else nn.Parameter(bias),
        }
        small.in_features, small.out_features = 4, 3
        try:
            tried = [(given, kind.forward(small, given)) for given in (x.view(2, 4), x.view(1, 2, 4))]
        except Exception:  # whatever it is, it is not a product alone
            return False
        return all(
            isinstance(y, Tensor)
            and y.shape == (*given.shape[:-1], 3)
            and torch.allclose(y, nn.functional.linear(given, weight, small.bias), rtol=1e-5, atol=1e-6)
            for given, y in tried
        )


def is_plain(base: nn.Module) -> bool:
    """Whether calling a linear layer is its product and nothing else: no hooks, no other forward, nothing trained."""
    return (
        (type(base) is nn.Linear or is_conv1d(base))
        and not is_quantized(base)
        and not base.weight.requires_grad
        and (base.bias is None or not base.bias.requires_grad)
        and not (base._forward_hooks or base._forward_pre_hooks or base._backward_hooks or base._backward_pre_hooks)
        and "forward" not in vars(base)
    )


def is_quantized(module: nn.Module) -> bool:
    """Whether it is a linear layer of bitsandbytes, or one whose weight torchao has replaced, or our own."""
    if not isinstance(module, nn.Linear):
        return False
    weight = type(module.weight.data)
    return type(module).__name__ in QUANTIZED or (
        weight is not Tensor and weight.__module__.startswith("torchao.")  # of other libraries, FSDP has its own
    )


@torch.no_grad()
def dequantized(base: nn.Linear, dtype: torch.dtype) -> nn.Linear:
    """A layer of this dtype that computes what a quantised one does: its weight is what that makes of the unit
    vectors."""
    device = base.weight.device
    made = nn.Linear(base.in_features, base.out_features, base.bias is not None, device=device, dtype=dtype)
    for start in range(0, base.in_features, 1024):
        size = min(1024, base.in_features - start)
        units = torch.zeros(size, base.in_features, device=device, dtype=dtype)
        units[:, start : start + size].fill_diagonal_(1.0)
        columns = base(units).float()
        made.weight[:, start : start + size] = (columns if base.bias is None else columns - base.bias.float()).t()
    if base.bias is not None:
        made.bias.copy_(base.bias)
    return made.requires_grad_(False)


def features(base: nn.Module) -> tuple[int, int]:
    """(out_features, in_features) of a linear layer or Conv1D, also where an engine has emptied the weight."""
    if is_conv1d(base):
        return int(base.nf), int(base.nx)  # type: ignore[arg-type]
    return int(base.out_features), int(base.in_features)  # type: ignore[arg-type]
