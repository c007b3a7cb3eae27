"""Adapters with random values on the tiny models."""

import torch
from transformers import PreTrainedModel

from lori_dist.adapter.adapter import Adapter, Spec
from lori_dist.adapter.attach import adapted, attach, detach, extract, trainable
from lori_dist.masks.magnitude import mask


def trained(
    model: PreTrainedModel,
    name: str = "task",
    *,
    density: float = 0.1,
    seed: int = 0,
    rank: int = 4,
    alpha: float = 10.0,
    targets: str | tuple[str, ...] = "all-linear",
    dtype: torch.dtype = torch.float32,
    base: dict[str, str] | None = None,
) -> Adapter:
    """An adapter whose update changes the logits visibly. The model is left as it was."""
    spec = Spec(rank=rank, alpha=alpha, seed=seed, targets=targets, dtype=dtype)
    generator = torch.Generator().manual_seed(seed)
    layers = attach(model, spec)
    shapes = {path: (layer.deltas[0].out_features, rank) for path, layer in layers.items()}
    detach(model)
    b = {path: torch.randn(shape, generator=generator) for path, shape in shapes.items()}
    masks = mask(b, density=density) if density < 1 else None
    attach(model, spec, masks=masks)
    with torch.no_grad():
        for path, values in trainable(model).items():
            values.copy_(b[path].flatten() if masks is None else b[path][masks[path]])
    adapter = extract(model, name=name, base=base)
    detach(model)
    assert not adapted(model)
    return adapter


def logits(model: PreTrainedModel) -> torch.Tensor:
    tokens = torch.arange(1, 25).view(2, 12)
    with torch.no_grad():
        return model(input_ids=tokens).logits.float()


def adapted_logits(model: PreTrainedModel, adapter: Adapter) -> torch.Tensor:
    attach(model, adapter)
    result = logits(model)
    detach(model)
    return result
