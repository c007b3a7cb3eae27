"""MLPs that compute with slices of the sequence: what they keep is most of what a block takes of a long row.

Source: Arctic Long Sequence Training (arXiv 2506.13996), section 3.1, where this is called TiledMLP.
"""

from collections.abc import Callable
from typing import cast

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from lori_dist.errors import ConfigError
from lori_dist.training.model import blocks

NAMES = ("mlp", "feed_forward")
"""What blocks call their MLP."""


def mlps(model: nn.Module) -> dict[str, nn.Module]:
    """Path -> the MLP of each block that has one. Mixtures of experts are none: these route tokens."""
    paths = {module: path for path, module in model.named_modules()}
    return {
        f"{paths[block]}.{name}": module
        for block in blocks(model)[::-1]
        for name, module in block.named_children()
        if name in NAMES and not any(path.rpartition(".")[2] == "experts" for path, _ in module.named_modules())
    }


def slice_mlps(model: nn.Module, number: int) -> None:
    """Makes each block's MLP compute with this many slices of the sequence, one after another, in place.

    A slice's activations are forgotten and computed again in the backward pass, so those of one slice exist at a time;
    outputs and gradients are those of the whole to rounding. All calls have as many slices, however short their rows
    are, as engines gather weights for each. Once for each model, before an engine takes it. Raises ConfigError for a
    model without such MLPs.
    """
    found = mlps(model)
    if not found:
        raise ConfigError(
            f"train.mlp_slices: {type(model).__name__} has no block with an MLP of its own ({' or '.join(NAMES)}) that "
            "computes token by token; remove it"
        )
    for module in found.values():
        module.forward = _sliced(module.forward, number)


def _sliced(forward: Callable[[Tensor], Tensor], number: int) -> Callable[[Tensor], Tensor]:
    def in_slices(x: Tensor) -> Tensor:
        """x, (rows, tokens, features)."""
        if not torch.is_grad_enabled():
            return torch.cat([forward(one) for one in x.tensor_split(number, dim=1)], dim=1)
        made = [cast(Tensor, checkpoint(forward, one, use_reentrant=False)) for one in x.tensor_split(number, dim=1)]
        return torch.cat(made, dim=1)

    return in_slices
