"""A model's treatment of tokens, seen on a small copy: which layers run, how many of a mixture's experts compute a
token, whether tokens see later ones, and how logits are made.

All are properties of a model's code and configuration, not of its weights. So the copy has the model's class and its
configuration with narrow layers and few words, random weights, and all its blocks, or the first few where even these
are large. A copy of a model of 70B parameters has about 20M and answers in a second or two, on the CPU; ranks, a plan
and a dry run make the same copy and get the same answer, whatever engine shards the model itself, and before any of its
weights is read. Where no copy can be made, as of models whose configuration transformers does not define, nothing is
known, and the log says so.
"""

import contextlib
import copy
import functools
import inspect
import itertools
import json
import logging
import re
import warnings
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, TypeGuard

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule

from lori_dist.adapter.bases import is_conv1d
from lori_dist.adapter.experts import is_experts

SCALES = (64, 32, 16, 8, 4, 2, 1)
"""Divisors of the widths; the first that gives a model that computes is used."""
MOST_PARAMETERS = 2**24
"""Most parameters of a copy with all blocks: 64 MB."""
NUM_BLOCKS = 8
"""Number of blocks of a copy that would otherwise be larger."""
NARROWEST = 32
"""Features of a token in a copy that is narrower than its model: in fewer, normalisation hides what tokens are."""
VOCABULARY = 256
NUM_TOKENS = 6
LEAK = 1e-3
"""Share of the logits' range above which a change counts. Rounding changes them by less than 1e-5 of the range, a
visible token by 1e-2 or more."""

_WIDTH = re.compile(
    r"(_size|_dim|_headdim|_rank|_width|_channels|_d_head|_d_ssm)$|^(n_embd|n_inner|d_model|d_ff|d_inner|d_kv|dim|width)$"
)
_NO_WIDTH = re.compile(
    r"vocab|patch|image|kernel|chunk|block|window|group|merge|pool|batch|conv|state|in_channels|num_channels|crop|tile|max"
)
_OF_A_HEAD = re.compile(r"head_?dim|d_head|rope|nope")
_HEADS = re.compile(r"^(num|n)_?([a-z]+_)*heads?(_kv)?$")
_CHUNK = re.compile(r"chunk_size$")
"""Tokens that a state space model pads a row to."""
_BLOCKS = ("num_hidden_layers", "n_layer", "n_layers", "num_layers")

log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True, slots=True)
class Probe:
    """The findings about a model."""

    layers: frozenset[str]
    """Paths of the copy's linear layers and fused experts."""
    idle: frozenset[str]
    """The layers among them that are never called when the model reads tokens: an update there would do nothing."""
    mixing: frozenset[str]
    """The layers whose input has neither a row for each row of the batch, nor one for each of its tokens in order."""
    is_causal: bool | None
    """Whether no logit depends on a later token; None for models without logits at every token."""
    chosen: Mapping[str, int] = field(default_factory=dict)
    """Path of fused experts -> how many of them compute each token."""
    ends_in_head: bool = False
    """Whether the logits are what the layer of the output embeddings returns, and nothing is done to them after it."""
    keeps_logits: bool = False
    """Whether `forward(logits_to_keep=mask)`, of a boolean mask of tokens, returns the logits of those tokens alone."""

    def is_idle(self, path: str) -> bool:
        """Tells whether the layer at a path is idle. Blocks that the copy lacks are taken to be like those it has."""
        return self._is_in(self.idle, path)

    def mixes_rows(self, path: str) -> bool:
        """Whether the layer at a path cannot tell which row of the batch its input is of."""
        return self._is_in(self.mixing, path)

    def _is_in(self, some: frozenset[str], path: str) -> bool:
        if path in self.layers:
            return path in some
        alike = [other for other in self.layers if _kind(other) == _kind(path)]
        return bool(alike) and some.issuperset(alike)

    def num_chosen(self, path: str) -> int | None:
        """How many of the fused experts at a path compute each token; None where that is not known."""
        alike = (number for other, number in self.chosen.items() if _kind(other) == _kind(path))
        return self.chosen.get(path, next(alike, None))


NOTHING = Probe(layers=frozenset(), idle=frozenset(), mixing=frozenset(), is_causal=None)
_known: dict[tuple[type, str], Probe] = {}


def probe(model: nn.Module) -> Probe:
    """Probes a model of transformers, which may be on the meta device. Other modules give an empty finding.

    It is kept, so that a second call for the same configuration costs nothing.
    """
    settings: Any = getattr(model, "config", None)
    if not hasattr(settings, "to_dict") or getattr(model, "main_input_name", None) != "input_ids":
        return NOTHING
    # FSDP gives a module a class of its own.
    kind = next(kind for kind in type(model).__mro__ if not issubclass(kind, FSDPModule))
    key = kind, json.dumps(settings.to_dict(), sort_keys=True, default=str)
    if key not in _known:
        _known[key] = _probed(kind, settings)
    return _known[key]


def _probed(kind: type, settings: Any) -> Probe:
    problem: Exception | None = None
    width = getattr(settings.get_text_config(), "hidden_size", None)
    for scale, fewer_heads in itertools.product(SCALES, (False, True)):
        if scale > 1 and isinstance(width, int) and width // scale < NARROWEST:
            continue
        try:
            with _quietly():
                small = _copy(kind, settings, scale, fewer_heads)
                if small is not None:
                    return _observed(small)
        except Exception as error:  # widths that do not fit together fail in any way
            problem = error
    reason = "too large" if problem is None else f"{type(problem).__name__}: {problem}".partition("\n")[0]
    log.warning(
        "%s: no small copy of it can be run (%s), so layers that are never called are not detected",
        kind.__name__,
        reason,
    )
    return NOTHING


@contextlib.contextmanager
def _quietly() -> Iterator[None]:
    """Without words, without a trace in the random numbers of torch, on the CPU in float32.

    In one thread: a copy of a mixture of experts makes thousands of operations of a few numbers each, and to divide
    them among threads takes ten times as long as to compute them.
    """
    library, dtype = logging.getLogger("transformers"), torch.get_default_dtype()
    level, num_threads = library.level, torch.get_num_threads()
    with warnings.catch_warnings(), torch.random.fork_rng(devices=[]), torch.device("cpu"), torch.no_grad():
        warnings.simplefilter("ignore")
        library.setLevel(logging.CRITICAL)
        torch.set_num_threads(1)
        torch.set_default_dtype(torch.float32)
        try:
            yield
        finally:
            torch.set_num_threads(num_threads)
            torch.set_default_dtype(dtype)
            library.setLevel(level)


# --- a copy ----------------------------------------------------------------------------------------------------------


def _copy(kind: type, settings: Any, scale: int, fewer_heads: bool) -> Any:
    """A model of the same kind and structure, narrower; None where it is too large all the same.

    fewer_heads: whether there are fewer heads of the same width, instead of as many that are narrower.
    """
    small = _narrow(copy.deepcopy(settings), scale, fewer_heads)
    if _num_parameters(kind, small) > MOST_PARAMETERS:
        _cut(small)
        if _num_parameters(kind, small) > 8 * MOST_PARAMETERS:
            return None
    torch.manual_seed(0)
    made = kind(small).float().eval()
    for parameter in made.parameters():
        if parameter.ndim > 1:  # larger than models begin with, so that every token has a say
            parameter.normal_(std=parameter.shape[-1] ** -0.5)
    return made


def _num_parameters(kind: type, settings: Any) -> int:
    with torch.device("meta"):
        return sum(parameter.numel() for parameter in kind(copy.deepcopy(settings)).parameters())


def _parts(settings: Any) -> Iterator[Any]:
    """A configuration and those in it, of the text and of pictures."""
    yield settings
    for value in list(vars(settings).values()):
        if hasattr(value, "to_dict") and hasattr(value, "model_type"):
            yield from _parts(value)


def _narrow(settings: Any, scale: int, fewer_heads: bool) -> Any:
    for part in _parts(settings):
        for name, value in list(vars(part).items()):
            if _HEADS.search(name) or (_OF_A_HEAD.search(name) and _WIDTH.search(name)):
                if fewer_heads == (_HEADS.search(name) is not None):
                    setattr(part, name, _divided(value, scale))
            elif _WIDTH.search(name) and not _NO_WIDTH.search(name):
                setattr(part, name, _divided(value, scale))
            elif name == "vocab_size" and isinstance(value, int) and value > VOCABULARY:
                part.vocab_size = VOCABULARY
            elif _CHUNK.search(name) and isinstance(value, int):
                setattr(part, name, min(value, 2 * NUM_TOKENS))
            elif name in ("rope_scaling", "rope_parameters") and isinstance(value, dict):
                sections = value.get("mrope_section")
                if sections and not fewer_heads:
                    setattr(part, name, {**value, "mrope_section": _sections(sections, scale)})
        padding = getattr(part, "pad_token_id", None)
        if isinstance(padding, int) and padding >= getattr(part, "vocab_size", padding + 1):
            part.pad_token_id = 0
    if getattr(settings, "_attn_implementation", None) not in (None, "eager", "sdpa"):
        settings._attn_implementation = "eager"  # others need a GPU
    if hasattr(settings, "_experts_implementation"):
        settings._experts_implementation = "eager"  # others need wide rows
    return settings


def _divided(value: Any, scale: int) -> Any:
    if isinstance(value, list | tuple):
        return type(value)(_divided(item, scale) for item in value)
    return max(1, -(-value // scale)) if isinstance(value, int) and not isinstance(value, bool) else value


def _sections(sizes: list[int], scale: int) -> list[int]:
    """A model's section sizes for the small copy: as many, with their sum divided by scale."""
    size, rest = divmod(max(len(sizes), sum(sizes) // scale), len(sizes))
    return [size + (number < rest) for number in range(len(sizes))]


def _cut(settings: Any) -> None:
    """Leaves the first blocks of each part, and what lists say of them."""
    for part in _parts(settings):
        for name in _BLOCKS:
            count = vars(part).get(name)
            if isinstance(count, int) and count > NUM_BLOCKS:
                for other, value in list(vars(part).items()):
                    if isinstance(value, list) and len(value) == count:
                        setattr(part, other, value[:NUM_BLOCKS])
                setattr(part, name, NUM_BLOCKS)


# --- what it does ----------------------------------------------------------------------------------------------------


def _observed(model: Any) -> Probe:
    layers = {path: module for path, module in model.named_modules() if _is_layer(module)}
    called: dict[str, tuple[Any, ...]] = {}
    for path, module in layers.items():
        module.register_forward_pre_hook(lambda module, inputs, path=path: called.update({path: inputs}))
    ids = _two_rows(model)
    more = {"decoder_input_ids": ids} if getattr(model.config, "is_encoder_decoder", False) else {}
    read = functools.partial(model, input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False, **more)
    returned: list[Any] = []
    if isinstance(head := model.get_output_embeddings(), nn.Module):
        head.register_forward_hook(lambda module, inputs, output: returned.append(output))
    logits = getattr(read(), "logits", None)
    return Probe(
        layers=frozenset(layers),
        idle=frozenset(layers) - called.keys(),
        mixing=frozenset(path for path, inputs in called.items() if inputs and _mixes(inputs[0])),
        is_causal=_is_causal(logits),
        # The numbers of each token's experts.
        chosen={
            path: int(inputs[1].shape[-1])
            for path, inputs in called.items()
            if is_experts(layers[path]) and len(inputs) > 1
        },
        ends_in_head=_is_per_token(logits) and len(returned) == 1 and returned[0] is logits,
        keeps_logits=_is_per_token(logits) and _keeps_logits(model, read, logits),
    )


def _mixes(x: Any) -> bool:
    """Whether a layer's input has neither a row for each of the two rows, nor an entry for each of their tokens."""
    return isinstance(x, Tensor) and x.shape[0] != 2 and x.numel() != 2 * NUM_TOKENS * x.shape[-1]


def _keeps_logits(model: Any, read: Callable[..., Any], logits: Tensor) -> bool:
    if "logits_to_keep" not in inspect.signature(model.forward).parameters:
        return False
    mask = torch.ones(logits.shape[:2], dtype=torch.bool)
    mask[0, 1:] = mask[1, 0] = False  # not as many of each row
    try:
        kept = read(logits_to_keep=mask).logits
    except Exception:  # a model whose code knows numbers of tokens only
        return False
    return kept.shape == logits[mask].shape and torch.allclose(kept, logits[mask], rtol=1e-4, atol=1e-5)


def _is_layer(module: nn.Module) -> bool:
    return isinstance(module, nn.Linear) or is_conv1d(module) or is_experts(module)


def _two_rows(model: Any) -> Tensor:
    """Two rows of tokens that differ in the last."""
    size = model.get_input_embeddings().weight.shape[0]
    padding = getattr(model.config.get_text_config(), "pad_token_id", None)
    usable = [token for token in range(min(3, size // 2), size) if token != padding][: NUM_TOKENS + 1]
    if len(usable) <= NUM_TOKENS:
        raise ValueError(f"the vocabulary has only {size} tokens")
    return torch.tensor([usable[:-1], [*usable[:-2], usable[-1]]])


def _is_per_token(logits: Any) -> TypeGuard[Tensor]:
    return isinstance(logits, Tensor) and logits.ndim == 3 and logits.shape[:2] == (2, NUM_TOKENS)


def _is_causal(logits: Any) -> bool | None:
    """Whether those before the last token are the same in both rows."""
    if not _is_per_token(logits):
        return None
    extent = logits.max() - logits.min()
    if not torch.isfinite(logits).all() or torch.equal(logits[0, -1], logits[1, -1]):
        raise ValueError("its logits do not distinguish two tokens")
    return bool((logits[0, :-1] - logits[1, :-1]).abs().max() < LEAK * extent)


def _kind(path: str) -> str:
    """The path without the number of its block."""
    return re.sub(r"(?<=\.)\d+(?=\.|$)", "*", path)
