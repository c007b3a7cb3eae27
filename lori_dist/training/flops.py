"""How much of what a device could compute a training step uses: model FLOP utilisation (PaLM, arXiv 2204.02311, B)."""

from collections.abc import Callable, Mapping

import torch
from torch import nn
from transformers import PreTrainedModel

from lori_dist.config import Run
from lori_dist.training.world import World

Utilisation = Callable[[int, float], float | None]
"""(tokens of all ranks, seconds) -> a share, at most 1; None where a device's peak or a model's work is not known."""

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


def per_token(model: PreTrainedModel, *, activation_checkpointing: bool) -> float | None:
    """Floating point operations of training on one token with a frozen base.

    4 P: two for each weight in the forward pass, and two in the backward pass for the gradient of its input; a frozen
    weight has none of its own. With activation checkpointing the forward pass is done twice, 6 P, which counts what is
    done again (PaLM's hardware FLOP utilisation). P counts the base's matrices, embeddings only where they are tied to
    the head. Left out are attention's scores, up to 12 * layers * width * length, and the adapter.
    None for a mixture of experts, where P depends on how many of them a token meets.
    """
    if any(getattr(model.config.get_text_config(), name, None) for name in EXPERTS):
        return None
    looked_up = {id(module.weight) for module in model.modules() if isinstance(module, nn.Embedding)}
    looked_up -= {id(model.get_output_embeddings().weight)}
    frozen = [weight for weight in model.parameters() if weight.ndim == 2 and not weight.requires_grad]
    num_weights = sum(weight.numel() for weight in frozen if id(weight) not in looked_up)
    return (6.0 if activation_checkpointing else 4.0) * num_weights


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
    """Gives the model FLOP utilisation of a training of an adapted model, if the devices are all like this one.

    model: before an engine has sharded it.
    """
    flops = per_token(model, activation_checkpointing=run.train.activation_checkpointing)
    most = peak(world.device, getattr(torch, run.model.dtype))
    if flops is None or most is None:
        return lambda num_tokens, seconds: None
    return lambda num_tokens, seconds: flops * num_tokens / (seconds * world.size * most)
