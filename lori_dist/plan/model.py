"""Counts of a model with an adapter, made on tensors without content: no weight is read or made."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers import PreTrainedModel

from lori_dist.adapter import saved
from lori_dist.adapter.adapter import Adapter, Spec
from lori_dist.adapter.attach import attach
from lori_dist.adapter.bases import features
from lori_dist.adapter.experts import AdaptedExperts, Expert, is_experts
from lori_dist.adapter.linear import AdaptedLinear
from lori_dist.adapter.probe import probe
from lori_dist.config import FLASH, Run
from lori_dist.errors import ConfigError
from lori_dist.training.cost import Counted, Sizes
from lori_dist.training.flops import active_shares, attention, per_token
from lori_dist.training.loss import is_chunked
from lori_dist.training.model import blocks
from lori_dist.training.model_files import check_causal, has_weights, loading, made_from, settings_of
from lori_dist.training.quantized import QuantizedLinear, quantize_layers
from lori_dist.training.sequence_parallel import check_attention, check_ranks, own_tokens
from lori_dist.training.sequences import Share
from lori_dist.training.sliced import mlps, slice_mlps
from lori_dist.training.task import spec_of
from lori_dist.training.weights import attention_of, find_weights

__all__ = ["Counted", "count", "skeleton", "spec"]


def count(run: Run, *, ranks: int = 1, adapters: int = 1, start: Adapter | None = None) -> Counted:
    """Counts the parameters, bytes and operations of a run's model with its adapters.

    ranks: number of ranks that a batch is divided among; with more ranks than rows, the micro-batch is smaller.
    adapters: number of adapters that are trained over the base at once, each with rows of its own. start: an adapter
    whose training continues. The experts of a mixture are counted with equally many tokens each; the sum of what they
    keep does not depend on that. Raises ConfigError for a model whose configuration cannot be read, that has no blocks
    or fewer positions than a row has tokens, and for a mixture of experts of which it is not known how many compute a
    token.
    """
    model = skeleton(run)
    if has_weights(run.model):  # else the plan is of a model that is not on this machine
        find_weights(skeleton(run, quantized=False), run.model)
    check_causal(model, run.model)
    shares = active_shares(model)
    if shares is None:
        raise ConfigError(
            f"model.path: {type(model).__name__} is a mixture of experts, and how many of them compute a token could "
            "not be found out on a small copy of it, so a plan cannot count them; measure a few steps instead"
        )
    positions = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    if positions is not None and run.train.max_length > positions:
        raise ConfigError(
            f"train.max_length: got {run.train.max_length}, the model has {positions} positions; give no more"
        )
    of_spec = spec(run) if start is None else _spec_of(start)
    known = probe(model)
    attached = attach(model, of_spec)
    found = _blocks(model)
    in_blocks = [sum(map(_bytes, _frozen(block))) for block in found]
    deltas = [layer.deltas[0] for layer in attached.values()]
    meets = {path: _share_of(path, layer.base, shares) for path, layer in attached.items()}
    entries, beside = (sum(counts) for counts in zip(*(delta.counted() for delta in deltas), strict=True))
    check_ranks(run.train, ranks)
    check_attention(model.config, run.train.sequence_parallel, run.train.max_length)
    groups = run.train.groups(ranks)
    rows, length = min(run.train.rows_at_once, -(-run.train.batch_size // groups)) * adapters, own_tokens(run.train)
    slices = run.train.mlp_slices
    dtype = getattr(torch, run.model.dtype)
    settings = model.config.get_text_config()
    hidden = rows * length * settings.hidden_size * dtype.itemsize
    of_blocks, other = _activations(run, of_spec, found, rows, slices)
    of_slice = 0
    if slices > 1:  # what one of them keeps while it is computed again; all are views of the input
        at_once, _ = _activations(run, of_spec, found, rows, 1)
        of_slice = max(whole - least for whole, least in zip(at_once, of_blocks, strict=True)) // slices
        of_blocks = [size + hidden for size in of_blocks]
    widest = max(_widest(_apart(model, attached, slices), shares), -(-_widest(attached, shares) // slices))
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
        whole=beside + sum(parameter.numel() for parameter in saved.parameters(model).values()),
        projections=adapters * sum(_bytes(a) for delta in deltas for a in delta.buffers()),
        quantized=max(quantized, default=0),
        of_a=0
        if deltas[0].trains_a
        else sum(of_spec.rank * features(layer.base)[1] * of_spec.dtype.itemsize for layer in attached.values()),
        layer=max(map(_largest_layer, found)),
        ends=_ends(model),
        largest=max(map(_bytes, _frozen(model))),
        widest=_widest(attached, shares),
        is_routable=not run.adapter.modules_to_save and not any(map(known.mixes_rows, attached)),
        classes=_classes(model),
        dequantized=round(sum(quantized) * _moved(run, dtype)),
        widest_b=adapters * max(delta.counted()[0] for delta in deltas),
        vocabulary=settings.vocab_size,
        chunked=is_chunked(model),
        dtype=dtype.itemsize,
        block_activations=max(of_blocks),
        blocks_activations=sum(of_blocks),
        block_gradients=3 * rows * length * widest * dtype.itemsize + of_slice,
        block_input=hidden,
        other_activations=other,
        tokens=rows * length,
        flops=per_token(model),
        adapter_flops=float(sum(meets[path] * _of_delta(layer.deltas[0]) for path, layer in attached.items())),
        attention=tuple(attention(model.config)),
        kernel=run.model.attention or str(model.config._attn_implementation),
        key_values=_key_values(settings),
        adapters=adapters,
        share=Share.of(run, model.config.model_type),
    )


def _largest_layer(block: nn.Module) -> int:
    """Bytes of the largest linear layer of a block, or of what the block has besides."""
    layers = [sum(map(_bytes, _frozen(one))) for one in block.modules() if isinstance(one, nn.Linear)]
    return max(*layers, sum(map(_bytes, _frozen(block))) - sum(layers)) if layers else sum(map(_bytes, _frozen(block)))


def _ends(model: PreTrainedModel) -> tuple[int, ...]:
    """Bytes of the embedding and of the output layer; none where they share a weight, or where there is one."""
    found = [module for module in (model.get_input_embeddings(), model.get_output_embeddings()) if module is not None]
    weights = [parameter for module in found for parameter in module.parameters()]
    if len(found) < 2 or len({id(weight) for weight in weights}) < len(weights):
        return ()
    return tuple(sum(map(_bytes, _frozen(module))) for module in found)


def _moved(run: Run, dtype: torch.dtype) -> float:
    """Bytes that go through a device's memory to dequantize one entry of a weight: it is read as it is stored and
    written as fp32; int8 is read, scaled and written once more; then it is read and written in the dtype of the
    base."""
    stored, scaled = (0.5, 0) if run.model.quantize == "nf4" else (1.0, 8)
    return stored + 4 + scaled + (0 if dtype == torch.float32 else 4 + dtype.itemsize)


def _key_values(settings: Any) -> int:
    """Entries of keys and values of a token in a block."""
    heads = getattr(settings, "num_attention_heads", None) or 0
    if getattr(settings, "kv_lora_rank", None):  # multi-head latent attention, kept as keys and values of every head
        return int(heads * (settings.qk_nope_head_dim + settings.qk_rope_head_dim + settings.v_head_dim))
    size = getattr(settings, "head_dim", None) or (settings.hidden_size // heads if heads else 0)
    return int(2 * (getattr(settings, "num_key_value_heads", None) or heads) * size)


def _of_delta(delta: Any) -> int:
    """Operations of training on a token: A x, B (A x) and their gradients. A has a gradient only if it is trained."""
    down, up = 2 * delta.rank * delta.in_features, 2 * delta.rank * delta.out_features
    return int(down * (2 + delta.trains_a) + up * 3)


def _share_of(path: str, base: nn.Module, shares: Mapping[str, float]) -> float:
    """The share of tokens that an adapted layer computes, where experts have equally many."""
    return shares[path.rsplit(".", 2)[0]] if isinstance(base, Expert) else 1.0


def _widest(attached: Mapping[str, AdaptedLinear], shares: Mapping[str, float]) -> int:
    """Most features that a token has in or out of an adapted layer, or of all experts that compute it."""
    widths = [max(features(layer.base)) for layer in attached.values() if not isinstance(layer.base, Expert)]
    for path, layer in attached.items():
        if isinstance(layer.base, Expert):
            chosen = round(_share_of(path, layer.base, shares) * cast(int, layer.base.experts.num_experts))
            widths.append(chosen * min(features(layer.base)))
    return max(widths)


def _apart(model: nn.Module, attached: Mapping[str, AdaptedLinear], slices: int) -> Mapping[str, AdaptedLinear]:
    """The layers that see all tokens of a row at once."""
    inside = tuple(f"{path}." for path in mlps(model)) if slices > 1 else ()
    return {path: layer for path, layer in attached.items() if not path.startswith(inside)} or attached


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
            before, text.num_hidden_layers = text.num_hidden_layers, num_blocks
            for name, value in list(vars(text).items()):
                if isinstance(value, list) and len(value) == before:  # of each block
                    setattr(text, name, value[:num_blocks])
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
    """The Spec of a run's adapters, which differ by their seeds alone."""
    return spec_of(run, next(iter(run.tasks)))


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


def _activations(run: Run, of_spec: Spec, blocks: Sequence[nn.Module], rows: int, slices: int) -> tuple[list[int], int]:
    """Bytes that a forward pass of so many rows keeps for the backward pass: in each block, and outside of them.

    slices: `train.mlp_slices`.

    Blocks with the same weights keep the same, so a model of the first few is run, with one of each kind at least.
    """
    kinds = [_kind(block) for block in blocks]
    num_blocks = min(len(kinds), max(2, *(kinds.index(kind) + 1 for kind in kinds)))
    kept, other = _saved(run, of_spec, num_blocks, rows, slices)
    of_kind = dict(zip(kinds, kept, strict=False))  # of the last of each: the first block's input is counted there
    return [of_kind[kind] for kind in kinds], max(0, other + kept[0] - of_kind[kinds[0]])


def _kind(block: nn.Module) -> tuple[tuple[str, tuple[int, ...]], ...]:
    return tuple((name, tuple(parameter.shape)) for name, parameter in block.named_parameters())


def _saved(run: Run, of_spec: Spec, num_blocks: int, rows: int, slices: int) -> tuple[list[int], int]:
    """Bytes that a forward pass of `rows` rows keeps in each block of a model of `num_blocks` blocks, and outside of
    them."""
    # Products with quantised weights keep what others do.
    model = skeleton(run, num_blocks=num_blocks, quantized=False)
    attach(model, of_spec)
    _share_evenly(model)
    if slices > 1:
        slice_mlps(model, slices)
    length = own_tokens(run.train)
    is_eager = model.config._attn_implementation == "eager"
    # Rows that are padded or packed have a mask, of which each layer keeps a copy in the base's dtype. Without content
    # transformers cannot see where there is none to be made, and makes one.
    is_masked = (rows > 1 or run.train.pack) and run.train.sequence_parallel == 1
    has_mask = is_eager or (is_masked and run.model.attention not in LINEAR)
    kept: dict[int, tuple[int, int]] = {}
    running = [-1]  # outside of all blocks

    def leave() -> None:
        running.pop()

    for number, block in enumerate(_blocks(model)):
        block.register_forward_pre_hook(lambda *_, number=number: running.append(number))
        block.register_forward_hook(lambda *_: leave())
    with FakeTensorMode(allow_non_fake_inputs=True):
        _make_fake(model)
        resident = {_address(tensor) for tensor in (*model.parameters(), *model.buffers())}

        held: list[Any] = []  # or the next tensor could have an address that was counted

        def pack(tensor: Tensor) -> Tensor:
            held.append(tensor)
            is_mask = tensor.ndim == 4 and tensor.shape[1] == 1 and tensor.shape[-2:] == (length, length)
            if _address(tensor) not in resident and (has_mask or not is_mask):
                kept.setdefault(_address(tensor), (running[-1], tensor.untyped_storage().nbytes()))
            return tensor

        ids = torch.zeros(rows, length, dtype=torch.int64, device="cpu")
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            held.append(model(input_ids=ids, use_cache=False))
    sums = [sum(size for where, size in kept.values() if where == number) for number in range(-1, num_blocks)]
    return sums[1:], sums[0]


def _share_evenly(model: nn.Module) -> None:
    """Makes experts have equally many tokens each, as tensors without content do not say which they have."""
    for path, module in list(model.named_modules()):
        if is_experts(module) and not path.endswith(".base"):  # not adapted, but computed in the same way
            parent, _, name = path.rpartition(".")
            setattr(model.get_submodule(parent), name, AdaptedExperts(module, {}))
    for module in model.modules():
        if isinstance(module, AdaptedExperts):
            module.count = _even  # type: ignore[method-assign]


def _even(places: Tensor, num_places: int) -> list[int]:
    size, rest = divmod(places.numel(), num_places)
    return [size + (number < rest) for number in range(num_places)]


def _make_fake(model: nn.Module) -> None:
    for module in model.modules():
        for name, parameter in list(module.named_parameters(recurse=False)):
            made = torch.empty(parameter.shape, dtype=parameter.dtype, device="cpu")
            module.register_parameter(name, nn.Parameter(made, requires_grad=parameter.requires_grad))
        for name, buffer in list(module.named_buffers(recurse=False)):
            module._buffers[name] = torch.empty(buffer.shape, dtype=buffer.dtype, device="cpu")


def _address(tensor: Tensor) -> int:
    return int(tensor.untyped_storage()._cdata)
