"""The frozen base model, its tokenizer, and what tells it from other models."""

import contextlib
import hashlib
import json
import logging
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, cast

import torch
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils import cached_file
from transformers.utils import logging as transformers_logging

from lori_dist import config
from lori_dist.errors import AdapterError, ConfigError
from lori_dist.files import require_regular
from lori_dist.jobs import TEXTS, WEIGHTS
from lori_dist.tensors import stored
from lori_dist.training.data import Example
from lori_dist.training.quantized import quantize_layers

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
PIECES = 64
"""Places of a weight file that its identity looks at,"""
PIECE_BYTES = 4096
"""and how many bytes it reads at each."""

log = logging.getLogger(__name__)


def load_model(model: config.Model) -> PreTrainedModel:
    """The base on the CPU in the dtype asked for, in evaluation mode, so without dropout.

    Raises ConfigError if it cannot be loaded, or if its files lack a weight, which would then be random.
    """
    with loading(model), _without_bars():
        loaded, report = AutoModelForCausalLM.from_pretrained(
            model.path,
            dtype=getattr(torch, model.dtype),
            use_safetensors=True,
            **attention(model),
            # Reported below with their names: by itself it refuses them with an error that names none.
            ignore_mismatched_sizes=True,
            output_loading_info=True,
        )
    missing = sorted(report["missing_keys"]) + sorted(str(item[0]) for item in report["mismatched_keys"])
    if missing:
        shown = ", ".join(missing[:3]) + (", ..." if len(missing) > 3 else "")
        raise ConfigError(
            f"model.path: the weights in {model.path!r} lack {len(missing)} tensors of the shape config.json asks for "
            f"({shown}); give a folder whose weights and config.json belong together"
        )
    check_attention(loaded, model)
    if model.quantize is not None:
        quantize_layers(loaded, model.quantize)
    return cast(PreTrainedModel, loaded.eval())


def attention(model: config.Model) -> dict[str, str]:
    """What transformers is told of it when it makes a model."""
    return {} if model.attention is None else {"attn_implementation": model.attention}


def check_attention(made: PreTrainedModel, model: config.Model) -> None:
    """Raises ConfigError where transformers has taken another one than was asked for, as it does for some models."""
    found = made.config._attn_implementation
    if model.attention not in (None, found):
        raise ConfigError(
            f"model.attention: {model.attention} was given, in the place of which transformers takes {found} for "
            f"{type(made).__name__}; give that one, or leave it out"
        )


def check_device(model: config.Model, device: torch.device) -> None:
    """Raises ConfigError where attention as it is asked for has no backward pass on a device."""
    if device.type == "cpu" and model.attention in ("flex_attention", *config.FLASH):
        raise ConfigError(
            f"model.attention: {model.attention} was given, which trains on CUDA devices only, and this rank computes "
            "on a CPU; use sdpa"
        )


def blocks(model: nn.Module) -> list[nn.Module]:
    """Its transformer blocks, inner ones first: the modules that transformers keeps on one device, if it says so."""
    names = set(getattr(model, "_no_split_modules", None) or ())
    return [module for module in model.modules() if type(module).__name__ in names][::-1]


def load_tokenizer(model: config.Model) -> PreTrainedTokenizerBase:
    """The base's own tokenizer. Raises ConfigError if there is none."""
    with loading(model, "the tokenizer of "):
        tokenizer = cast(PreTrainedTokenizerBase, AutoTokenizer.from_pretrained(model.path))
        # Without its files, a tokenizer of some models (GPT-2, Qwen) comes up empty and turns every text into nothing.
        names = ["tokenizer.json", *tokenizer.vocab_files_names.values()]
        if tokenizer.vocab_files_names and not any(_found(model, name) for name in names):
            raise FileNotFoundError(f"there is none of {', '.join(dict.fromkeys(names))}")
    return tokenizer


def check(examples: Sequence[Example], model: PreTrainedModel) -> None:
    """Raises ConfigError if a row has more tokens than the model has positions, or one it has no embedding for."""
    length = max((example.num_tokens for example in examples), default=0)
    positions = num_positions(model)
    if positions is not None and length > positions:
        raise ConfigError(
            f"train.max_length: a row has {length} tokens, the model has {positions} positions; "
            f"set train.max_length to {positions} or less"
        )
    largest = max((max(example.prompt_ids + example.response_ids) for example in examples), default=0)
    num_embeddings = model.get_input_embeddings().weight.shape[0]
    if largest >= num_embeddings:
        raise ConfigError(
            f"model.path: the tokenizer gives token {largest}, the model has embeddings for {num_embeddings}; "
            "give a model with its own tokenizer"
        )


def num_positions(model: PreTrainedModel) -> int | None:
    """Tokens the model can tell apart by place; None if there is no such limit."""
    return getattr(model.config.get_text_config(), "max_position_embeddings", None)


def identity(model: config.Model) -> dict[str, str]:
    """What tells this base from others, the same on every machine and in every folder.

    name: of the folder, or on the hub. model_type: as in config.json. architecture: a hash of all tensors' names and
    shapes. weights: a hash of samples of every weight file, so cheap at any size; models that differ by a whole
    training differ in it, a change of single bytes may not show.
    """
    with loading(model):
        settings = json.loads(_file(model, "config.json").read_text(encoding="utf-8"))
        files = weight_files(model)
        shapes = sorted((name, list(where.shape)) for file in files for name, where in stored(file).items())
        weights = hashlib.blake2b(digest_size=8)
        for file in files:
            _sample(file, weights)
    return {
        "name": Path(model.path).resolve().name if Path(model.path).is_dir() else model.path,
        "model_type": str(settings.get("model_type", "")),
        "architecture": hashlib.blake2b(json.dumps(shapes).encode(), digest_size=8).hexdigest(),
        "weights": weights.hexdigest(),
    }


def weight_files(model: config.Model) -> list[Path]:
    """All weight files, shards in the order of their first tensor in the index."""
    index = _found(model, INDEX)
    if index is None:
        return [_file(model, SINGLE)]
    shards = json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()
    return [_file(model, shard) for shard in dict.fromkeys(shards)]


def _found(model: config.Model, name: str) -> Path | None:
    """A file of the model's folder, or of its snapshot in the hub's cache."""
    path = cached_file(model.path, name, _raise_exceptions_for_missing_entries=False)
    return None if path is None else Path(path)


def _file(model: config.Model, name: str) -> Path:
    path = _found(model, name)
    if path is None:
        raise FileNotFoundError(f"there is no {name}")
    return path


def _sample(file: Path, digest: hashlib.blake2b) -> None:
    size = file.stat().st_size
    digest.update(size.to_bytes(8, "little"))
    last = max(0, size - PIECE_BYTES)
    with file.open("rb") as stream:
        for piece in range(PIECES):
            stream.seek(last * piece // (PIECES - 1))
            digest.update(stream.read(PIECE_BYTES))


@contextlib.contextmanager
def loading(model: config.Model, part: str = "") -> Iterator[None]:
    """What goes wrong below is about the folder or name that the user gave; the libraries raise nearly any class."""
    try:
        for file in Path(model.path).iterdir() if Path(model.path).is_dir() else ():
            if file.suffix in (*TEXTS, *WEIGHTS):  # which the libraries open, and would wait for if it were a pipe
                require_regular(file)
        yield
    except ConfigError:
        raise
    except Exception as error:
        reason = str(error).strip().partition("\n")[0]
        remedy = "" if model.attention is None else f", or leave out model.attention, which is {model.attention}"
        raise ConfigError(
            f"model.path: {part}{model.path!r} cannot be loaded ({type(error).__name__}: {reason}); give a folder with "
            f"config.json, safetensors weights and a tokenizer, or such a model's name on the hub{remedy}"
        ) from error


@contextlib.contextmanager
def _without_bars() -> Iterator[None]:
    """transformers draws a progress bar in every rank, and into files."""
    shown = transformers_logging.is_progress_bar_enabled()
    transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            transformers_logging.enable_progress_bar()


def check_base(path: Path, wanted: Mapping[str, Any], model: config.Model) -> None:
    """Raises AdapterError for an adapter at a path that was trained on another base. wanted: its own."""
    found = identity(model)
    if "weights" not in wanted:
        log.warning("%s does not name its base model: only the shapes can tell that it fits", path)
    elif wanted["weights"] != found["weights"]:
        raise AdapterError(
            f"{path}: was trained on {_describe(wanted)}, model.path is {_describe(found)}; "
            "set model.path to the base model it was trained on"
        )


def _describe(base: Mapping[str, Any]) -> str:
    return f"{base.get('name', 'a model without a name')} (weights {base['weights']})"
