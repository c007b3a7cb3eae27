"""Checkpoints in the layout of LoRI's official code: LoRA folders of PEFT, with masks as pickles of their own names."""

from collections.abc import Callable
from pathlib import Path

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor
from transformers import PreTrainedModel

from tests.models import tiny_llama

TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def lora(
    folder: Path,
    *,
    seed: int = 0,
    change: Callable[[str, Tensor], Tensor] = lambda name, b: b,
    dtype: torch.dtype = torch.float32,
    make: Callable[[], PreTrainedModel] = tiny_llama,
    **settings: object,
) -> PeftModel:
    """A folder that PEFT has saved, and its model. change: of a B of normal numbers, by its parameter's name."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        options = {"r": 4, "lora_alpha": 8, "target_modules": TARGETS, **settings}
        model = get_peft_model(make(), LoraConfig(**options))  # type: ignore[arg-type]
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.data = change(name, torch.randn(parameter.shape))
            if "lora_" in name:
                parameter.data = parameter.data.to(dtype)
    model.save_pretrained(str(folder), save_embedding_layers=False)
    return model


def mask_of(model: PeftModel, sparsity: float) -> dict[str, Tensor]:
    """Of the largest |B| of the whole model, under the names of its parameters."""
    b = {name: parameter.data.abs() for name, parameter in model.named_parameters() if "lora_B" in name}
    values = torch.cat([item.flatten() for item in b.values()])
    threshold = values.topk(int((1 - sparsity) * len(values))).values[-1]
    return {name: item >= threshold for name, item in b.items()}


def lori_d(folder: Path, *, seed: int = 0, sparsities: tuple[float, ...] = (0.5, 0.9)) -> PeftModel:
    """Dense, with the masks for the sparse phase in `masks/`."""
    model = lora(folder, seed=seed)
    (folder / "masks").mkdir()
    for sparsity in sparsities:
        torch.save(mask_of(model, sparsity), folder / "masks" / f"{sparsity}_mask.pt")
    return model


def lori_s(folder: Path, *, seed: int = 0, sparsity: float = 0.9) -> tuple[PeftModel, dict[str, Tensor]]:
    """Zero outside of a mask, which is beside it; one entry within is zero too."""
    mask = mask_of(lora(folder / "dense", seed=seed), sparsity)

    def change(name: str, b: Tensor) -> Tensor:
        b = b * mask[name]
        if name == next(iter(mask)):
            b.view(-1)[mask[name].flatten().nonzero()[0]] = 0.0
        return b

    model = lora(folder, seed=seed + 100, change=change)  # the A of another start, as the official code draws it anew
    torch.save(mask, folder / f"{sparsity}_mask.pt")
    return model, mask
