"""What a plan has to know of a model with an adapter, counted on tensors without content: no weight is read or made."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers import PreTrainedModel

from lori_dist.adapter import saved
from lori_dist.adapter.adapter import Spec
from lori_dist.adapter.attach import attach, trainable_projections
from lori_dist.adapter.experts import is_experts
from lori_dist.config import Run
from lori_dist.errors import ConfigError
from lori_dist.training.flops import per_token
from lori_dist.training.model import blocks
from lori_dist.training.model_files import check_causal, loading, made_from, settings_of
from lori_dist.training.quantized import quantize_layers


@dataclass(frozen=True, kw_only=True, slots=True)
class Counted:
    """Bytes, unless it is said otherwise."""

    parameters: int
    """Entries of the base."""
    base: int
    """All frozen weights."""
    block: int
    """Of the base, in its largest block."""
    blocks: int
    """Of the base, in all blocks."""
    num_blocks: int
    num_modules: int
    """That are adapted."""
    entries: int
    """Entries of B over all modules."""
    kept: int
    """Those that are trained in the sparse phase."""
    whole: int
    """Entries that are trained besides, in both phases: of A where it is trained, and of modules_to_save."""
    projections: int
    """A, cached on every rank."""
    quantized: int
    """Entries of the largest quantised weight, which is a matrix again while its layer computes; 0 for none."""
    widest_b: int
    """Entries of the largest B, which is dense while its layer computes."""
    vocabulary: int
    dtype: int
    """Of an entry of what is computed."""
    block_activations: int
    """Kept for the backward pass by one block, of one micro-batch."""
    block_gradients: int
    """That a block has at once in its backward pass: of what it multiplies, and of the two factors."""
    block_input: int
    """All that activation checkpointing keeps of a block."""
    other_activations: int
    """Kept outside of the blocks, logits apart."""
    tokens: int
    """Of one micro-batch."""
    flops: float | None
    """Of training on a token; None for mixtures of experts."""


def count(run: Run, *, ranks: int = 1) -> Counted:
    """ranks: that a batch is divided among, the micro-batch smaller where there are more of them than it has rows.

    Raises ConfigError for a model whose configuration cannot be read, that has no blocks or fewer positions than a
    row has tokens, and for a mixture of experts, whose activations depend on what it is shown."""
    model = skeleton(run)
    check_causal(model, run.model)
    experts = next((path for path, module in model.named_modules() if is_experts(module)), None)
    if experts is not None:
        raise ConfigError(
            f"model.path: {experts} is a mixture of experts, whose activations depend on the rows; a plan cannot count "
            "them, so measure a few steps instead"
        )
    positions = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    if positions is not None and run.train.max_length > positions:
        raise ConfigError(
            f"train.max_length: {run.train.max_length} was given, the model has {positions} positions; give no more"
        )
    attached = attach(model, spec(run))
    flops = per_token(model, activation_checkpointing=False)
    trained_a = sum(a.numel() for a in trainable_projections(model).values())
    found = _blocks(model)
    in_blocks = [sum(map(_bytes, _frozen(block))) for block in found]
    sizes = [(layer.deltas[0].out_features, layer.deltas[0].in_features) for layer in attached.values()]
    rank, entries = run.adapter.rank, sum(rows for rows, _ in sizes) * run.adapter.rank
    rows, length = min(run.train.micro_batch_size, -(-run.train.batch_size // ranks)), run.train.max_length
    one, two = (_saved(run, num_blocks, rows) for num_blocks in (1, 2))
    dtype = getattr(torch, run.model.dtype)
    settings = model.config.get_text_config()
    return Counted(
        parameters=sum(parameter.numel() for parameter in skeleton(run, quantized=False).parameters()),
        base=sum(map(_bytes, _frozen(model))),
        block=max(in_blocks),
        blocks=sum(in_blocks),
        num_blocks=len(found),
        num_modules=len(sizes),
        entries=entries,
        kept=round(run.adapter.density * entries),
        whole=trained_a + sum(parameter.numel() for parameter in saved.parameters(model).values()),
        projections=_cached(run) * sum(columns for _, columns in sizes) * rank,
        quantized=max((rows * columns for rows, columns in sizes), default=0) if run.model.quantize else 0,
        widest_b=max(rows for rows, _ in sizes) * rank,
        vocabulary=settings.vocab_size,
        dtype=dtype.itemsize,
        block_activations=two - one,
        block_gradients=3 * rows * length * max(map(max, sizes)) * dtype.itemsize,
        block_input=rows * length * settings.hidden_size * dtype.itemsize,
        other_activations=max(0, 2 * one - two),
        tokens=rows * length,
        flops=flops,
    )


def skeleton(run: Run, *, num_blocks: int | None = None, quantized: bool = True) -> PreTrainedModel:
    """The base on the meta device, from its config.json alone. num_blocks: so many of them in the place of all."""
    with loading(run.model):
        settings = settings_of(run.model)
        text = settings.get_text_config()
        if num_blocks is not None:
            text.num_hidden_layers = num_blocks
            if getattr(text, "layer_types", None):
                text.layer_types = text.layer_types[:num_blocks]
        with torch.device("meta"):
            model = made_from(
                settings, trust_remote_code=run.model.trust_remote_code, dtype=getattr(torch, run.model.dtype)
            )
    model.requires_grad_(False)
    if quantized and run.model.quantize is not None:
        quantize_layers(model, run.model.quantize)
    return model.eval()


def spec(run: Run) -> Spec:
    adapter = run.adapter
    return Spec(
        rank=adapter.rank,
        alpha=adapter.alpha,
        seed=adapter.seed,
        targets=adapter.targets,
        dtype=getattr(torch, adapter.dtype),
        projection=adapter.projection,
        modules_to_save=adapter.modules_to_save,
        exclude=adapter.exclude,
    )


def _cached(run: Run) -> int:
    """Bytes of an entry of A in a layer."""
    return getattr(torch, run.adapter.dtype).itemsize if run.adapter.projection == "cached" else 0


def _blocks(model: PreTrainedModel) -> list[nn.Module]:
    found = blocks(model)[::-1]
    if not found:
        raise ConfigError(
            f"model.path: {type(model).__name__} does not say what its blocks are, so none can be counted"
        )
    return found


def _frozen(module: nn.Module) -> Iterator[Tensor]:
    return (parameter for parameter in module.parameters() if not parameter.requires_grad)


def _bytes(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()


# --- activations -----------------------------------------------------------------------------------------------------


def _saved(run: Run, num_blocks: int, rows: int) -> int:
    """What a forward pass of so many rows keeps for the backward pass, in a model of so many blocks."""
    # Products with quantised weights keep what others do.
    model = skeleton(run, num_blocks=num_blocks, quantized=False)
    attach(model, spec(run))
    kept: dict[int, int] = {}
    with FakeTensorMode(allow_non_fake_inputs=True):
        _make_fake(model)
        resident = {_address(tensor) for tensor in (*model.parameters(), *model.buffers())}

        held: list[Any] = []  # or the next tensor could have an address that was counted

        def pack(tensor: Tensor) -> Tensor:
            held.append(tensor)
            if _address(tensor) not in resident:
                kept[_address(tensor)] = tensor.untyped_storage().nbytes()
            return tensor

        ids = torch.zeros(rows, run.train.max_length, dtype=torch.int64, device="cpu")
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            held.append(model(input_ids=ids, use_cache=False))
    return sum(kept.values())


def _make_fake(model: nn.Module) -> None:
    for module in model.modules():
        for name, parameter in list(module.named_parameters(recurse=False)):
            made = torch.empty(parameter.shape, dtype=parameter.dtype, device="cpu")
            module.register_parameter(name, nn.Parameter(made, requires_grad=parameter.requires_grad))
        for name, buffer in list(module.named_buffers(recurse=False)):
            module._buffers[name] = torch.empty(buffer.shape, dtype=buffer.dtype, device="cpu")


def _address(tensor: Tensor) -> int:
    return int(tensor.untyped_storage()._cdata)
