"""Forward and backward of the adapted layer against PEFT's LoRA layer and the bare linear layer."""

import importlib.util
import statistics
from collections.abc import Callable
from typing import Any, Literal

import torch
from torch import Tensor, nn

from lori_dist.adapter.adapter import Spec
from lori_dist.adapter.attach import attach
from lori_dist.benchmarks._timing import interleaved, one_thread
from lori_dist.errors import ConfigError

RANK = 32
DENSITY = 0.1
CPU_SHAPES = ((1024, 512, 512), (512, 1024, 1024), (512, 1024, 4096), (512, 4096, 1024))  # (tokens, in, out)
CUDA_SHAPES = ((8192, 4096, 4096), (8192, 8192, 8192), (8192, 8192, 28672))
REPETITIONS = 15


class Model(nn.Module):
    """One linear layer, as a child that can be replaced."""

    def __init__(self, in_features: int, out_features: int, device: str, dtype: torch.dtype) -> None:
        super().__init__()
        self.projection = nn.Linear(in_features, out_features, bias=False, device=device, dtype=dtype)

    def forward(self, x: Tensor) -> Tensor:
        return self.projection(x)


def run() -> dict[str, Any]:
    """Rows for a table; the ratios of medians to PEFT's LoRA, the worst over all shapes of a device.

    resident_bytes: what a layer holds besides the base's weight.

    Raises ConfigError where PEFT is not installed.
    """
    if importlib.util.find_spec("peft") is None:
        raise ConfigError(
            "bench layer: PEFT is not installed, and its layer is what is measured against; "
            "pip install 'lori_dist[peft]'"
        )
    with one_thread():
        rows = [row for shape in CPU_SHAPES for row in measure(*shape, "cpu", torch.float32)]
    if torch.cuda.is_available():
        rows += [row for shape in CUDA_SHAPES for row in measure(*shape, "cuda", torch.bfloat16)]
    ratios = {
        f"{device}, {name}, {figure}": max(
            row[f"{figure}_over_peft"] for row in rows if row["name"] == name and row["device"] == device
        )
        for device in dict.fromkeys(row["device"] for row in rows)
        for name in ("lori_dense", "lori_sparse", "lori_sparse_recomputed")
        for figure in ("ms", "saved_bytes")
    }
    return {"rows": rows, "ratios": ratios}


def measure(tokens: int, in_features: int, out_features: int, device: str, dtype: torch.dtype) -> list[dict[str, Any]]:
    """A row for each of MAKERS."""
    models = {name: make(Model(in_features, out_features, device, dtype)) for name, make in MAKERS.items()}
    x = torch.randn(tokens, in_features, device=device, dtype=dtype, requires_grad=True)
    grad = torch.randn(tokens, out_features, device=device, dtype=dtype)

    def step(model: nn.Module) -> Callable[[], None]:
        def forward_and_backward() -> None:
            model.zero_grad()
            x.grad = None
            model(x).backward(grad)

        return forward_and_backward

    seconds = interleaved({name: step(model) for name, model in models.items()}, REPETITIONS)
    saved = {name: _saved_bytes(model, x) for name, model in models.items()}
    medians = {name: statistics.median(times) * 1e3 for name, times in seconds.items()}
    return [
        {
            "name": name,
            "device": device,
            "tokens": tokens,
            "in_features": in_features,
            "out_features": out_features,
            "ms": round(medians[name], 3),
            "saved_bytes": saved[name],
            "resident_bytes": _resident_bytes(models[name]) - _resident_bytes(models["bare"]),
            "ms_over_peft": round(medians[name] / medians["peft_lora"], 3),
            "saved_bytes_over_peft": round(saved[name] / saved["peft_lora"], 3),
        }
        for name in models
    ]


def _saved_bytes(model: nn.Module, x: Tensor) -> int:
    """Bytes kept for backward, without what is there anyway: parameters and buffers."""
    resident = {tensor.data_ptr() for tensor in (*model.parameters(), *model.buffers())}
    saved: dict[int, int] = {}

    def count(tensor: Tensor) -> Tensor:
        if tensor.data_ptr() not in resident:
            saved[tensor.data_ptr()] = tensor.numel() * tensor.element_size()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(count, lambda tensor: tensor):
        output = model(x)
    del output
    return sum(saved.values())


def _resident_bytes(model: nn.Module) -> int:
    """Bytes of parameters and buffers."""
    return sum(tensor.numel() * tensor.element_size() for tensor in (*model.parameters(), *model.buffers()))


def _bare(model: nn.Module) -> nn.Module:
    return model.requires_grad_(False)


def _peft_lora(model: nn.Module) -> nn.Module:
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(r=RANK, lora_alpha=2 * RANK, lora_dropout=0.0, target_modules=["projection"])
    # PEFT keeps trained weights in fp32 above a bf16 base; autocast_adapter_dtype is its default
    return get_peft_model(model, config)


def _lori(density: float, projection: Literal["cached", "recomputed"] = "cached") -> Callable[[nn.Module], nn.Module]:
    def make(model: nn.Module) -> nn.Module:
        weight = next(model.parameters())
        generator = torch.Generator().manual_seed(0)
        mask = torch.rand(weight.shape[0], RANK, generator=generator) < density
        attach(
            model,
            Spec(
                rank=RANK,
                alpha=2.0 * RANK,
                seed=0,
                targets=("projection",),
                dtype=weight.dtype,
                projection=projection,
            ),
            masks={"projection": mask},
        )
        return model

    return make


MAKERS: dict[str, Callable[[nn.Module], nn.Module]] = {
    "bare": _bare,
    "peft_lora": _peft_lora,
    "lori_dense": _lori(1.0),
    "lori_sparse": _lori(DENSITY),
    "lori_sparse_recomputed": _lori(DENSITY, "recomputed"),
}
