"""Transformer blocks as torch.compile makes them, one by one."""

from typing import Any

from torch import nn

from lori_dist.adapter.experts import AdaptedExperts
from lori_dist.adapter.formed import FormedDelta
from lori_dist.adapter.linear import AdaptedLinear
from lori_dist.adapter.routed import RoutedLinear
from lori_dist.adapter.saved import RoutedModule
from lori_dist.errors import ConfigError
from lori_dist.training.model import blocks

GRAPHS = 8
"""Most graphs of a block on average: with and without a gradient of its input, for fixed and for changing sizes."""


def compile_blocks(model: nn.Module, *, backend: str = "inductor") -> None:
    """Compiles each block's forward pass, and with it the backward pass, when it is first called; blocks that are
    alike share what was made. Once for each model, before an engine takes it.

    Only `forward` is: the hooks by which engines gather and free a block's weights are called outside of it.
    backend: of torch.compile; aot_eager takes the same graphs, and runs them with torch's own kernels.
    Raises ConfigError for a model that does not say which of its modules are blocks.
    Source: torchtitan, which compiles each of its TransformerBlocks.
    """
    found = blocks(model)
    if not found:
        raise ConfigError(
            f"train.compile: compiles transformer blocks, and {type(model).__name__} does not say which of its modules "
            "they are (_no_split_modules); remove it"
        )
    import torch._dynamo  # which takes seconds

    torch._dynamo.reset()  # what was made of an earlier model in this process would count, too
    settings: Any = torch._dynamo.config
    # Layers keep different numbers of entries: with fixed sizes, each block would be compiled by itself.
    settings.force_parameter_static_shapes = settings.force_nn_module_property_static_shapes = False
    settings.optimize_ddp = False  # it cuts a whole model where gradients are sent, which between blocks it is already
    # Beyond these, blocks run as if this were not asked for.
    settings.recompile_limit = max(settings.recompile_limit, GRAPHS * len(found))
    settings.accumulated_recompile_limit = max(settings.accumulated_recompile_limit, GRAPHS * len(found))
    for module in model.modules():
        if _looks_at_rows(module):
            module.forward = torch._dynamo.disable(module.forward)
    for block in found:
        block.forward = torch.compile(block.forward, backend=backend)


def _looks_at_rows(module: nn.Module) -> bool:
    """Whether what a module does follows from whose rows a batch has: compiled, it would do the same in every step."""
    if isinstance(module, AdaptedExperts):
        return module.router() is not None
    if isinstance(module, RoutedLinear | RoutedModule):
        return True
    return isinstance(module, AdaptedLinear) and any(
        delta.per_task is not None or isinstance(delta, FormedDelta) for delta in module.deltas
    )
