"""How much of what a device could compute a training step uses: model FLOP utilisation (PaLM, arXiv 2204.02311, B)."""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Protocol, cast

import torch
from torch import nn
from transformers import PreTrainedModel

from lori_dist.adapter.bases import is_quantized
from lori_dist.adapter.experts import is_experts, projections
from lori_dist.adapter.probe import probe
from lori_dist.adapter.saved import RoutedModule
from lori_dist.config import Run
from lori_dist.training.world import World


class Utilisation(Protocol):
    """Gives a share of the devices' peak, at most 1; None where a device's peak or a model's work is not known."""

    def __call__(self, num_tokens: int, seconds: float, lengths: Iterable[int] = ()) -> float | None:
        """num_tokens: of all ranks. lengths: tokens of each row, for the products of attention; without them these
        are left out."""
        ...


PEAKS: Mapping[str, Mapping[str, float]] = {
    "Tesla T4": {"float16": 65, "float32": 8.1},
    "Tesla V100-SXM2-16GB": {"float16": 125, "float32": 15.7},
    "Tesla V100-SXM2-32GB": {"float16": 125, "float32": 15.7},
    "NVIDIA A100-PCIE-40GB": {"bfloat16": 312, "float16": 312, "tf32": 156, "float32": 19.5},
    "NVIDIA A100 80GB PCIe": {"bfloat16": 312, "float16": 312, "tf32": 156, "float32": 19.5},
    "NVIDIA A100-SXM4-40GB": {"bfloat16": 312, "float16": 312, "tf32": 156, "float32": 19.5},
    "NVIDIA A100-SXM4-80GB": {"bfloat16": 312, "float16": 312, "tf32": 156, "float32": 19.5},
    "NVIDIA L4": {"bfloat16": 121, "float16": 121, "tf32": 60, "float32": 30.3},
    "NVIDIA L40S": {"bfloat16": 362, "float16": 362, "tf32": 183, "float32": 91.6},
    "NVIDIA H100 PCIe": {"bfloat16": 756, "float16": 756, "tf32": 378, "float32": 51},
    "NVIDIA H100 NVL": {"bfloat16": 835, "float16": 835, "tf32": 417, "float32": 60},
    "NVIDIA H100 80GB HBM3": {"bfloat16": 989, "float16": 989, "tf32": 494, "float32": 67},
    "NVIDIA H200": {"bfloat16": 989, "float16": 989, "tf32": 494, "float32": 67},
    "NVIDIA B200": {"bfloat16": 2250, "float16": 2250},
}
"""Name of the device, as its driver gives it -> dtype -> TFLOP/s of dense products, from NVIDIA's data sheets of
T4, V100, A100, L4, L40S, H100, H200 and HGX B200, which since Ampere give twice that, with sparsity. Other names, such
as parts of a device (MIG), have no peak here."""

EXPERTS = ("num_experts", "num_local_experts", "n_routed_experts")
"""Names that configurations have for the number of a mixture's experts."""


def per_token(model: PreTrainedModel, *, activation_checkpointing: bool = False) -> float | None:
    """Floating point operations of training on one token, in products with the base's matrices.

    4 for each frozen weight: two in the forward pass, and two in the backward pass for the gradient of its input; a
    frozen weight has none of its own. 6 for a weight that is trained (adapter.modules_to_save). Weights are counted as
    they compute: a tensor of packed 4-bit entries is the matrix that it stands for. Embeddings count only where they
    are tied to the head. Left out are attention's products, see `attention`, and the adapter.
    activation_checkpointing: adds the second forward pass, which model FLOPs leave out and hardware FLOPs have.
    Of a mixture of experts, the share of the experts that compute a token counts. None where that is not known.
    """
    shares = active_shares(model)
    if shares is None:
        return None
    again = 2.0 if activation_checkpointing else 0.0
    return sum((again + (6.0 if trained else 4.0)) * numel for numel, trained in _matrices(model, shares))


def active_shares(model: nn.Module) -> dict[str, float] | None:
    """Path of a mixture's fused experts -> the share of them that computes a token; empty for dense models.

    The paths are those before an adapter was attached. None where the share is not known, as of experts that are
    modules of their own.
    """
    found: dict[str, float] = {}
    for path, module in model.named_modules():
        if is_experts(module):
            chosen = probe(model).num_chosen(path.removesuffix(".base"))
            if chosen is None:
                return None
            found[path.removesuffix(".base")] = chosen / cast(int, module.num_experts)
    settings: Any = getattr(model, "config", None)
    if not found and settings is not None:
        text = settings.get_text_config()
        if any(isinstance(number := getattr(text, name, None), int) and number > 1 for name in EXPERTS):
            return None
    return found


def _matrices(model: PreTrainedModel, shares: Mapping[str, float]) -> Iterator[tuple[float, bool]]:
    """Entries of each matrix that a token is multiplied with, and whether it is trained."""
    head = model.get_output_embeddings()
    seen = {id(module.weight) for module in model.modules() if isinstance(module, nn.Embedding)}
    seen -= {id(head.weight)} if head is not None else set()
    for path, module in model.named_modules():
        if is_experts(module):
            share = shares[path.removesuffix(".base")]
            for fused in (getattr(module, name) for name in projections(module)):
                yield share * fused.numel(), fused.requires_grad
            continue
        for name, parameter in module.named_parameters(recurse=False):
            is_packed = is_quantized(module) and name == "weight"
            is_another_copy = isinstance(module, RoutedModule) and not name.startswith("copy_0_")
            if (parameter.ndim != 2 and not is_packed) or id(parameter) in seen or is_another_copy:
                continue
            seen.add(id(parameter))
            numel = parameter.numel()
            if is_packed:
                layer: Any = module
                numel = layer.in_features * layer.out_features
            yield numel, parameter.requires_grad


# --- attention -------------------------------------------------------------------------------------------------------

LOCAL = ("sliding_attention", "local", "sliding")
"""Names in configurations for layers whose tokens see a window."""
CHUNKED = ("chunked_attention",)
"""Names for layers whose tokens see the chunk that they are in."""
NO_PRODUCTS = ("linear_attention", "mamba", "mamba2", "conv", "recurrent", "linear")
"""Names for layers without a product of every two tokens."""
BACKWARD = 2
"""Products of attention in the backward pass, over those of the forward pass: each of the two has two gradients."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Attention:
    """The products of one layer's scores and values."""

    per_pair: int
    """Operations of the forward pass for one token that sees one token."""
    window: int | None = None
    """Tokens that one sees at most, itself included; None for all before it."""
    is_chunked: bool = False
    """Whether windows do not overlap: a token sees those before it in its chunk."""

    def pairs(self, length: int, *, skips: bool = True) -> float:
        """Pairs of tokens in a row that attention computes.

        skips: only those at or before a token and in its window; else every token sees all of the row, which is what
        a kernel computes that applies the mask afterwards.
        """
        if not skips:
            return float(length) * length
        window = min(length, self.window or length)
        whole, rest = divmod(length, window) if self.is_chunked and window else (1, 0)
        if self.is_chunked:
            return whole * window * (window + 1) / 2 + rest * (rest + 1) / 2
        return window * (window + 1) / 2 + float(length - window) * window


def attention(config: Any) -> list[Attention]:
    """The layers of a model that have attention, from its configuration."""
    text = config.get_text_config(decoder=True)
    heads = getattr(text, "num_attention_heads", None)
    if not isinstance(heads, int) or not heads:
        return []
    hidden = getattr(text, "hidden_size", 0)
    of_values = getattr(text, "head_dim", None) or hidden // heads
    of_scores = of_values
    if getattr(text, "kv_lora_rank", None):  # multi-head latent attention
        of_scores = text.qk_nope_head_dim + text.qk_rope_head_dim
        of_values = text.v_head_dim
    per_pair = 2 * heads * (of_scores + of_values)
    return [
        Attention(per_pair=per_pair, window=window, is_chunked=is_chunked)
        for window, is_chunked in _windows(text, text.num_hidden_layers)
    ]


def _windows(text: Any, num_layers: int) -> Iterator[tuple[int | None, bool]]:
    """Yields the window of each layer with attention."""
    sliding = getattr(text, "sliding_window", None) or getattr(text, "window_size", None)
    kinds = getattr(text, "layer_types", None) or getattr(text, "attention_layers", None)
    kinds = kinds or getattr(text, "layers_block_type", None)
    if not kinds:
        uses = getattr(text, "use_sliding_window", True)
        yield from [(sliding if isinstance(sliding, int) and uses else None, False)] * num_layers
        return
    for kind in list(kinds)[:num_layers]:
        if kind in NO_PRODUCTS:
            continue
        if kind in CHUNKED:
            yield getattr(text, "attention_chunk_size", None), True
        else:
            yield (sliding if kind in LOCAL else None), False


def of_attention(layers: Iterable[Attention], lengths: Iterable[int]) -> float:
    """Model FLOPs of training in attention's products, over rows of these lengths, forward and backward."""
    counts: dict[int, int] = {}
    for length in lengths:
        counts[length] = counts.get(length, 0) + 1
    alike: dict[Attention, int] = {}
    for layer in layers:
        alike[layer] = alike.get(layer, 0) + 1
    return sum(
        (1 + BACKWARD) * num_layers * layer.per_pair * num_rows * layer.pairs(length)
        for layer, num_layers in alike.items()
        for length, num_rows in counts.items()
    )


# --- devices ---------------------------------------------------------------------------------------------------------


def peak(device: torch.device, dtype: torch.dtype) -> float | None:
    """FLOP/s that a device can do at most in products of a dtype; None where that is not known, as for CPUs."""
    if device.type != "cuda":
        return None
    name = str(dtype).removeprefix("torch.")
    if name == "float32" and torch.get_float32_matmul_precision() != "highest":
        name = "tf32"
    found = PEAKS.get(torch.cuda.get_device_name(device), {}).get(name)
    return None if found is None else found * 1e12


def utilisation(model: PreTrainedModel, run: Run, world: World) -> Utilisation:
    """Gives the model FLOP utilisation of training an adapted model, if the devices are all like this one.

    What activation checkpointing computes a second time does not count, as the result does not need it: with it the
    utilisation is lower by the time that takes. model: before an engine has sharded it.
    """
    flops = per_token(model)
    most = peak(world.device, getattr(torch, run.model.dtype))
    if flops is None or most is None:
        return lambda num_tokens, seconds, lengths=(): None
    layers = attention(model.config)

    def share(num_tokens: int, seconds: float, lengths: Iterable[int] = ()) -> float:
        return (flops * num_tokens + of_attention(layers, lengths)) / (seconds * world.size * most)

    return share
