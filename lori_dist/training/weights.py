"""The frozen base: first its structure, without memory; then its weights, read to where each rank keeps its share."""

import copy
import itertools
import logging
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol, cast

import torch
from accelerate import init_empty_weights
from torch import Tensor, nn
from transformers import PretrainedConfig, PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key

from lori_dist import config
from lori_dist.adapter import saved
from lori_dist.adapter.experts import AdaptedExperts
from lori_dist.adapter.linear import AdaptedLinear, BaseDelta
from lori_dist.errors import ConfigError
from lori_dist.tensors import Stored
from lori_dist.training.engine import Part
from lori_dist.training.model_files import check_causal, loading, made_from, settings_of, stored_weights
from lori_dist.training.quantized import QuantizedWeights, quantize_layers

HOLDERS = (AdaptedLinear, AdaptedExperts)
"""Modules by which an adapter replaces those of the base, which become their `base`."""


UNUSED = (r"rotary_emb\.inv_freq$", r"(^|\.)position_ids$")
"""Tensors that older files have and models compute by themselves."""

log = logging.getLogger(__name__)


class Weights(Protocol):
    """A source of a base's weights."""

    def read(self, name: str, into: Tensor, start: int) -> None:
        """Fills a flat tensor with entries of a parameter or buffer, row by row, from the flat position `start` on."""
        ...


# --- from files ------------------------------------------------------------------------------------------------------


def attention_of(model: config.Model) -> dict[str, str]:
    """Arguments for transformers, when it makes a model, that follow from `model.attention`."""
    return {} if model.attention is None else {"attn_implementation": model.attention}


def skeleton(model: config.Model) -> tuple[PreTrainedModel, Weights]:
    """The base in evaluation mode, its parameters on the meta device, its buffers real; and its weights.

    Raises ConfigError if it cannot be loaded, if its files lack a weight, or have one of another shape.
    """
    dtype = getattr(torch, model.dtype)
    with loading(model):
        settings = settings_of(model)
        attention = attention_of(model)
        made = without_weights(settings, dtype, trust_remote_code=model.trust_remote_code, **attention)
        _keep_exact(made, dtype)
    weights = find_weights(made, model)
    _check_attention(made, model)
    check_causal(made, model)
    if model.quantize is None:
        return made.eval(), weights
    quantize_layers(made, model.quantize)
    return made.eval(), QuantizedWeights(made, weights.read)


def find_weights(made: PreTrainedModel, model: config.Model) -> "_Files":
    """Finds the weights in the model's files; only their headers are read.

    Raises ConfigError if they cannot be read, lack a weight, or have one of another shape.
    """
    with loading(model):
        weights = _Files(made, stored_weights(model))
    weights.check(model.path)
    return weights


def without_weights(settings: PretrainedConfig, dtype: torch.dtype, **more: Any) -> PreTrainedModel:
    """The model of a configuration, its parameters on the meta device, its buffers real. more: as `made_from` takes."""
    with init_empty_weights(include_buffers=False):
        made = made_from(settings, dtype=dtype, **more)
    made.tie_weights()
    return made


def _check_attention(made: PreTrainedModel, model: config.Model) -> None:
    """Raises ConfigError where transformers has taken another one than was asked for, as it does for some models."""
    found = made.config._attn_implementation
    if model.attention not in (None, found):
        raise ConfigError(
            f"model.attention: got {model.attention}, and transformers takes {found} for {type(made).__name__}; set "
            f"{found}, or remove the key"
        )


def _keep_exact(model: PreTrainedModel, dtype: torch.dtype) -> None:
    """Parameters that a model keeps in fp32 whatever its dtype, as loading it has them."""
    kept = [rf"(^|\.){name}(\.|$)" for name in model._get_dtype_plan(dtype)]
    for path, parameter in list(model.named_parameters()):
        if any(re.search(pattern, path) for pattern in kept):
            parent, _, name = path.rpartition(".")
            setattr(model.get_submodule(parent), name, nn.Parameter(parameter.float(), requires_grad=False))


class _Files:
    """`Weights` that lie in safetensors files, under the names that files have, as transformers translates them."""

    def __init__(self, model: PreTrainedModel, found: Mapping[str, Stored]) -> None:
        self.model = model
        self.direct: dict[str, Stored] = {}
        self.converted: dict[str, _Conversion] = {}
        self.rows: dict[str, list[dict[Stored, int]]] = {}
        self.unused: list[str] = []
        """Names in files that the model has no place for."""
        self.doubled: set[str] = set()
        """The model's names of weights that files have under two names, with the same values."""
        shapes = model.state_dict()
        transforms = get_model_conversion_mapping(model)
        renamings = [one for one in transforms if isinstance(one, WeightRenaming)]
        converters = [one for one in transforms if isinstance(one, WeightConverter)]
        by_pattern = {pattern: one for one in converters for pattern in one.source_patterns}
        conversions: dict[str, _Conversion] = {}
        for source in sorted(found, key=_natural):
            name, pattern = rename_source_key(source, renamings, converters, model.base_model_prefix, shapes)
            if name not in shapes and source in shapes:
                name, pattern = source, None
            if pattern is not None:
                made = conversions.setdefault(name, _Conversion(converter=by_pattern[pattern], name=name))
                made.sources.append((source, pattern, found[source]))
            elif name in shapes:
                if name in self.direct:
                    _refuse_two(name, source, found[source], self.direct[name])
                    self.doubled.add(name)
                self.direct[name] = found[source]
            else:
                self.unused.append(source)
        for conversion in conversions.values():
            self.converted.update(dict.fromkeys(conversion.make(model, "meta"), conversion))
        self._share_tied(model)

    def _share_tied(self, model: PreTrainedModel) -> None:
        """Files hold a tied weight once, under whichever of its names. Two that differ are not tied, whatever the
        configuration says, as when transformers loads them."""
        names: dict[nn.Parameter, list[str]] = {}
        for name, parameter in model.named_parameters(remove_duplicate=False):
            names.setdefault(parameter, []).append(name)
        for parameter, same in names.items():
            first, *others = [name for name in same if name in self.direct] or same
            for name in others:
                if not self.direct[first].equals(self.direct[name]):
                    parent, _, leaf = name.rpartition(".")
                    setattr(model.get_submodule(parent), leaf, nn.Parameter(parameter.clone(), requires_grad=False))
            if first in self.direct:
                self.direct.update((name, self.direct[first]) for name in same if name not in self.direct)

    def check(self, path: str) -> None:
        """Raises ConfigError unless every weight is there, in its shape."""
        wanted = {**dict(self.model.named_parameters()), **persistent_buffers(self.model)}
        lacking = sorted(
            name
            for name, tensor in wanted.items()
            if name not in self.converted
            and (name not in self.direct or self.direct[name].shape != tuple(tensor.shape))
        )
        if lacking:
            others = f", and have {len(self.unused)} with other names ({_first(self.unused)})" if self.unused else ""
            raise ConfigError(
                f"model.path: the weights in {path!r} lack {len(lacking)} tensors of the shape config.json asks for "
                f"({_first(lacking)}){others}; give a folder whose weights and config.json belong together"
            )
        ignored = [*(self.model._keys_to_ignore_on_load_unexpected or ()), *UNUSED]
        unused = [name for name in self.unused if not any(re.search(pattern, name) for pattern in ignored)]
        if unused:
            log.warning(
                "model.path: the weights in %s have %d tensors that %s has no place for (%s); they are not used",
                path,
                len(unused),
                type(self.model).__name__,
                _first(unused),
            )

    def read(self, name: str, into: Tensor, start: int) -> None:
        if name in self.direct:
            self.direct[name].read(into, start)
        else:
            full = self.converted[name].make(self.model, "cpu")[name]
            into.copy_(full.reshape(-1)[start : start + into.numel()])

    def rows_of(self, name: str, number: int) -> dict[Stored, int]:
        """Tensors in files that one matrix of a 3-D weight is made of -> the row of the matrix where each begins."""
        if name not in self.rows:
            self.rows[name] = self.converted[name].rows_of(self.model)
        return self.rows[name][number]


@dataclass(frozen=True, kw_only=True, slots=True)
class _Conversion:
    """A weight that files hold in pieces or in another order, as the experts of some mixtures."""

    converter: WeightConverter
    name: str
    sources: list[tuple[str, str, Stored]] = field(default_factory=list)

    def make(self, model: PreTrainedModel, device: str) -> dict[str, Tensor]:
        """The model's tensors that these become; on the meta device, their names and shapes alone."""

        def read(where: Stored) -> Tensor:
            tensor = torch.empty(where.shape, dtype=where.dtype, device=device)
            if not tensor.is_meta:
                where.read(tensor)
            return tensor

        return self._convert(model, [read(where) for _, _, where in self.sources])

    def rows_of(self, model: PreTrainedModel) -> list[dict[Stored, int]]:
        """The tensors that are rows of each matrix of the 3-D tensor that these become, and where they begin.

        One column of numbers is converted instead of each tensor, which shows what becomes of its rows.
        """
        sizes = [where.shape[0] for _, _, where in self.sources]
        starts = list(itertools.accumulate(sizes, initial=0))
        columns = [torch.arange(start, end)[:, None] for start, end in itertools.pairwise(starts)]
        of_start = {start: where for start, (_, _, where) in zip(starts, self.sources, strict=False)}
        made = self._convert(model, columns)[self.name]
        found = []
        for numbers in made.flatten(1).tolist():
            begins = {number: row for row, number in enumerate(numbers) if number in of_start}
            if numbers != [start + row for start in begins for row in range(of_start[start].shape[0])]:
                raise ConfigError(
                    f"model.path: {self.name} is not made of the files' tensors row by row, so it cannot be "
                    "sharded; use train.engine=ddp"
                )
            found.append({of_start[number]: row for number, row in begins.items()})
        return found

    def _convert(self, model: PreTrainedModel, tensors: Sequence[Tensor]) -> dict[str, Tensor]:
        converter = copy.deepcopy(self.converter)
        for (source, pattern, _), tensor in zip(self.sources, tensors, strict=True):
            converter.add_tensor(self.name, source, pattern, cast(Any, tensor))
        made = converter.convert(self.name, model=model, config=model.config)
        return {name: tensor[0] if isinstance(tensor, list) else tensor for name, tensor in made.items()}


def _refuse_two(name: str, source: str, one: Stored, other: Stored) -> None:
    """Two names in files may stand for one weight, as with and without the model's prefix, if both are the same."""
    if not one.equals(other):
        raise ValueError(f"{name} is twice in the weights, the second time as {source}, with other values")


def _first(names: Sequence[str]) -> str:
    return ", ".join(names[:3]) + (", ..." if len(names) > 3 else "")


def _natural(name: str) -> list[tuple[bool, int, str]]:
    """Expert 10 comes after expert 9."""
    return [(piece.isdecimal(), int(piece) if piece.isdecimal() else 0, piece) for piece in name.split(".")]


# --- to where they belong --------------------------------------------------------------------------------------------


def materialize(
    model: nn.Module, device: torch.device, make: Callable[[nn.Parameter], nn.Parameter] | None = None
) -> None:
    """Gives a model's meta tensors memory on a device, and takes its real tensors there.

    A is made from its seed and B is zero; parameters of the base hold anything until `fill`. make: the parameter to
    replace another with, for engines that keep theirs elsewhere.
    """
    make = make or (lambda parameter: on(device, parameter))
    made: dict[nn.Parameter, nn.Parameter] = {}  # torch's own `to_empty` would untie what is tied
    for module in model.modules():
        if isinstance(module, BaseDelta):
            is_meta = any(tensor.is_meta for tensor in (*module.parameters(), *module.buffers()))
            module.to_empty(device=device) if is_meta else module.to(device)
        for name, parameter in module.named_parameters(recurse=False):
            if parameter not in made:
                made[parameter] = make(parameter)
            module._parameters[name] = made[parameter]
        for name, buffer in module.named_buffers(recurse=False):
            module._buffers[name] = _there(buffer, device)


def on(device: torch.device, parameter: nn.Parameter) -> nn.Parameter:
    """A parameter's like on a device, with its content if it has any."""
    return nn.Parameter(_there(parameter, device), requires_grad=parameter.requires_grad)


def _there(tensor: Tensor, device: torch.device) -> Tensor:
    return torch.empty_like(tensor, device=device) if tensor.is_meta else tensor.detach().to(device)


@torch.no_grad()
def fill(model: nn.Module, weights: Weights, part: Callable[[Any], Part]) -> None:
    """Reads this rank's share of every parameter of the base, and all of its persistent buffers.

    part: the share of a parameter.
    """
    for name, parameter in base_parameters(model).items():
        share = part(parameter)
        weights.read(name, share.data, share.start)
    for name, parameter in saved.copies(model):
        share = part(parameter)
        weights.read(name, share.data, share.start)
    for name, buffer in persistent_buffers(model).items():
        weights.read(name, buffer.view(-1), 0)


def whole(parameter: Tensor) -> Part:
    """All of it."""
    return Part(start=0, data=parameter.detach().view(-1))


def base_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """Name, as it was before an adapter was attached -> parameter that is not trained, or trained in full."""
    inside = {f"{path}.base." for path, module in model.named_modules() if isinstance(module, HOLDERS)}

    def name_before(name: str) -> str:
        prefix = next((prefix for prefix in _prefixes(name) if prefix in inside), None)
        return name if prefix is None else name.replace(prefix, prefix.removesuffix("base."), 1)

    whole = saved.parameters(model)
    return {name_before(name): p for name, p in model.named_parameters() if not p.requires_grad or name in whole}


def _prefixes(name: str) -> Iterator[str]:
    pieces = name.split(".")
    return (".".join(pieces[:depth]) + "." for depth in range(1, len(pieces)))


def persistent_buffers(model: nn.Module) -> dict[str, Tensor]:
    """Name -> buffer that is part of a model's weights."""
    return {
        f"{path}.{name}" if path else name: buffer
        for path, module in model.named_modules()
        for name, buffer in module.named_buffers(recurse=False)
        if name not in module._non_persistent_buffers_set
    }
