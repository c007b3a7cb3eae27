"""Counts of a model with an adapter, made on tensors without content: no weight is read or made."""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers import PreTrainedModel

from lori_dist.adapter import saved
from lori_dist.adapter.adapter import Adapter, Spec
from lori_dist.adapter.attach import attach, trainable_projections
from lori_dist.adapter.experts import is_experts
from lori_dist.config import FLASH, Run
from lori_dist.errors import ConfigError
from lori_dist.training.cost import Counted, Sizes
from lori_dist.training.flops import attention, per_token
from lori_dist.training.model import blocks
from lori_dist.training.model_files import check_causal, loading, made_from, settings_of
from lori_dist.training.quantized import QuantizedLinear, quantize_layers
from lori_dist.training.weights import attention_of

__all__ = ["Counted", "count", "skeleton", "spec"]


def count(run: Run, *, ranks: int = 1, adapters: int = 1, start: Adapter | None = None) -> Counted:
    """ranks: that a batch is divided among, the micro-batch smaller where there are more of them than it has rows.
    adapters: that are trained over the base at once, each with rows of its own. start: whose training continues.

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
            f"train.max_length: got {run.train.max_length}, the model has {positions} positions; give no more"
        )
    of_spec = spec(run) if start is None else _spec_of(start)
    attached = attach(model, of_spec)
    trained_a = sum(a.numel() for a in trainable_projections(model).values())
    found = _blocks(model)
    in_blocks = [sum(map(_bytes, _frozen(block))) for block in found]
    deltas = [layer.deltas[0] for layer in attached.values()]
    entries = sum(delta.out_features * delta.rank for delta in deltas)
    rows, length = min(run.train.micro_batch_size, -(-run.train.batch_size // ranks)) * adapters, run.train.max_length
    one, two = (_saved(run, of_spec, num_blocks, rows) for num_blocks in (1, 2))
    dtype = getattr(torch, run.model.dtype)
    settings = model.config.get_text_config()
    quantized = [
        module.in_features * module.out_features for module in model.modules() if isinstance(module, QuantizedLinear)
    ]
    return Counted(
        parameters=sum(parameter.numel() for parameter in skeleton(run, quantized=False).parameters()),
        base=sum(map(_bytes, _frozen(model))),
        block=max(in_blocks),
        blocks=sum(in_blocks),
        num_blocks=len(found),
        num_modules=len(deltas),
        entries=entries,
        kept=round(run.adapter.density * entries) if start is None else start.kept,
        whole=trained_a + sum(parameter.numel() for parameter in saved.parameters(model).values()),
        projections=adapters * sum(_bytes(delta.projection) for delta in deltas if delta.projection is not None),
        quantized=max(quantized, default=0),
        classes=_classes(model),
        dequantized=round(sum(quantized) * _moved(run, dtype)),
        widest_b=adapters * max(delta.out_features * delta.rank for delta in deltas),
        vocabulary=settings.vocab_size,
        dtype=dtype.itemsize,
        block_activations=two - one,
        block_gradients=3 * rows * length * max(max(d.out_features, d.in_features) for d in deltas) * dtype.itemsize,
        block_input=rows * length * settings.hidden_size * dtype.itemsize,
        other_activations=max(0, 2 * one - two),
        tokens=rows * length,
        flops=per_token(model),
        adapter_flops=float(sum(_of_delta(delta) for delta in deltas)),
        attention=tuple(attention(model.config)),
        kernel=run.model.attention or str(model.config._attn_implementation),
        key_values=_key_values(settings),
        adapters=adapters,
    )


def _moved(run: Run, dtype: torch.dtype) -> float:
    """Bytes that go through a device's memory to dequantize one entry of a weight: it is read as it is stored and
    written as fp32; int8 is read, scaled and written once more; then it is read and written in the dtype of the
    base."""
    stored, scaled = (0.5, 0) if run.model.quantize == "nf4" else (1.0, 8)
    return stored + 4 + scaled + (0 if dtype == torch.float32 else 4 + dtype.itemsize)


def _key_values(settings: Any) -> int:
    heads = getattr(settings, "num_attention_heads", None) or 0
    size = getattr(settings, "head_dim", None) or (settings.hidden_size // heads if heads else 0)
    return int(2 * (getattr(settings, "num_key_value_heads", None) or heads) * size)


def _of_delta(delta: Any) -> int:
    """Operations of training on a token: A x, B (A x) and their gradients. A has a gradient only if it is trained."""
    down, up = 2 * delta.rank * delta.in_features, 2 * delta.rank * delta.out_features
    return int(down * (2 + (delta.trained_a is not None)) + up * 3)


def _spec_of(adapter: Adapter) -> Spec:
    """The Spec of an adapter whose training continues."""
    [block] = adapter.blocks
    names = tuple(dict.fromkeys(path.rpartition(".")[2] for path in adapter.shapes))
    return Spec(rank=block.rank, alpha=block.alpha, seed=block.seed or 0, targets=names, dtype=block.dtype)


def skeleton(run: Run, *, num_blocks: int | None = None, quantized: bool = True) -> PreTrainedModel:
    """The base on the meta device, from its config.json alone. num_blocks: this many blocks instead of all."""
    with loading(run.model):
        settings = settings_of(run.model)
        text = settings.get_text_config()
        if num_blocks is not None:
            text.num_hidden_layers = num_blocks
            if getattr(text, "layer_types", None):
                text.layer_types = text.layer_types[:num_blocks]
        with torch.device("meta"):
            model = made_from(
                settings,
                trust_remote_code=run.model.trust_remote_code,
                dtype=getattr(torch, run.model.dtype),
                **_attention_of(run),
            )
    model.requires_grad_(False)
    if quantized and run.model.quantize is not None:
        quantize_layers(model, run.model.quantize)
    return model.eval()


LINEAR = ("flex_attention", *FLASH)
"""Attention implementations that make no mask and keep memory linear in a row's length, as sdpa does without a mask.
Some need a GPU to run at all."""


def _attention_of(run: Run) -> dict[str, str]:
    return {"attn_implementation": "sdpa"} if run.model.attention in LINEAR else attention_of(run.model)


def spec(run: Run) -> Spec:
    """The Spec of a run's adapters."""
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


def _blocks(model: PreTrainedModel) -> list[nn.Module]:
    found = blocks(model)[::-1]
    if not found:
        raise ConfigError(
            f"model.path: {type(model).__name__} does not say what its blocks are, so none can be counted"
        )
    return found


def _classes(model: nn.Module) -> dict[str, Sizes]:
    """Class of modules with weights -> bytes of its largest module, and of all its modules that are not inside another
    of the same class."""
    found: dict[str, list[tuple[str, int]]] = {}
    for path, module in model.named_modules():
        of_class = found.setdefault(type(module).__name__, [])
        is_inside = bool(of_class) and path.startswith(f"{of_class[-1][0]}.")
        if path and not is_inside and (size := sum(map(_bytes, _frozen(module)))):
            of_class.append((path, size))
    return {
        name: Sizes(largest=max(size for _, size in sizes), total=sum(size for _, size in sizes))
        for name, sizes in found.items()
        if sizes
    }


def _frozen(module: nn.Module) -> Iterator[Tensor]:
    return (parameter for parameter in module.parameters() if not parameter.requires_grad)


def _bytes(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()


# --- activations -----------------------------------------------------------------------------------------------------


def _saved(run: Run, of_spec: Spec, num_blocks: int, rows: int) -> int:
    """What a forward pass of so many rows keeps for the backward pass, in a model of so many blocks."""
    # Products with quantised weights keep what others do.
    model = skeleton(run, num_blocks=num_blocks, quantized=False)
    attach(model, of_spec)
    length = run.train.max_length
    is_eager = model.config._attn_implementation == "eager"
    # Rows that are padded or packed have a mask, of which each layer keeps a copy in the base's dtype. Without content
    # transformers cannot see where there is none to be made, and makes one.
    has_mask = is_eager or ((rows > 1 or run.train.pack) and run.model.attention not in LINEAR)
    kept: dict[int, int] = {}
    with FakeTensorMode(allow_non_fake_inputs=True):
        _make_fake(model)
        resident = {_address(tensor) for tensor in (*model.parameters(), *model.buffers())}

        held: list[Any] = []  # or the next tensor could have an address that was counted

        def pack(tensor: Tensor) -> Tensor:
            held.append(tensor)
            is_mask = tensor.ndim == 4 and tensor.shape[1] == 1 and tensor.shape[-2:] == (length, length)
            if _address(tensor) not in resident and (has_mask or not is_mask):
                kept[_address(tensor)] = tensor.untyped_storage().nbytes()
            return tensor

        ids = torch.zeros(rows, length, dtype=torch.int64, device="cpu")
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
