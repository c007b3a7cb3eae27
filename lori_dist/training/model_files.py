"""The content of a base model's folder, or of its snapshot from the hub: no other module opens any of it.

Training, evaluation, export, plan and identity read configuration, tokenizer and weights through these functions, so
that a folder means the same model to all of them, and code in it runs in all of them or in none.
"""

import contextlib
import fcntl
import functools
import hashlib
import json
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any, cast

from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoTokenizer,
    GenerationConfig,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.utils import HF_MODULES_CACHE, cached_file
from transformers.utils import logging as transformers_logging

from lori_dist import config
from lori_dist.adapter.probe import probe
from lori_dist.errors import ConfigError
from lori_dist.files import folder_problem, read_regular, require_regular
from lori_dist.jobs import TEXTS, WEIGHTS
from lori_dist.tensors import Stored, stored

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
UNREAD = (
    "pytorch_model.bin",
    "pytorch_model.bin.index.json",
    "consolidated.safetensors",
    "consolidated.00.pth",
    "adapter_model.safetensors",
    "tf_model.h5",
    "flax_model.msgpack",
)
"""Weights that a folder may have in other forms, named where there are none that are read."""
PIECES = 64
"""Places of a weight file that its identity samples."""
PIECE_BYTES = 4096
"""Bytes that are sampled at each place."""

log = logging.getLogger(__name__)


# --- configuration, tokenizer, class ---------------------------------------------------------------------------------


def settings_of(model: config.Model) -> PretrainedConfig:
    """The model's configuration. Raises ConfigError for a quantised model or a damaged config.json, and what
    transformers raises; within `loading` that is a ConfigError too."""
    read_settings(model)
    with _own_code(model):
        found = AutoConfig.from_pretrained(model.path, trust_remote_code=model.trust_remote_code)
    if getattr(found, "quantization_config", None) is not None:
        raise ConfigError(f"model.path: {model.path!r} is quantised, which is not supported; give the base itself")
    return cast(PretrainedConfig, found)


def read_settings(model: config.Model) -> dict[str, Any]:
    """config.json as it stands. Raises ConfigError where it is not there or is not a JSON object."""
    if (problem := folder_problem(model.path)) is not None:
        raise ConfigError(f"model.path: {problem}")
    with loading(model):
        try:
            found = json.loads(read_regular(_file(model, "config.json")))
        except ValueError as error:  # also of bytes that are not UTF-8
            raise ValueError(f"config.json is not valid JSON: {error}") from error
        if not isinstance(found, dict):
            raise ValueError(f"config.json holds a {type(found).__name__}, wanted a JSON object")
    return found


def made_from(settings: PretrainedConfig, *, trust_remote_code: bool = False, **more: Any) -> PreTrainedModel:
    """The model of a configuration: a causal LM, or, of a model that has none, the one of images and text.

    more: what transformers takes when it makes a model, such as `dtype`. Weights are what the current device and
    transformers' initialisation make of them.
    """
    auto = AutoModelForCausalLM
    is_own = trust_remote_code and auto.__name__ in (getattr(settings, "auto_map", None) or {})
    if not is_own and type(settings) not in auto._model_mapping:
        auto_of_images: Any = AutoModelForImageTextToText
        if type(settings) in auto_of_images._model_mapping:
            auto = auto_of_images
    with _one_process() if is_own else contextlib.nullcontext():
        return cast(PreTrainedModel, auto.from_config(settings, trust_remote_code=trust_remote_code, **more))


def check_causal(made: PreTrainedModel, model: config.Model) -> None:
    """Raises ConfigError for a model whose tokens see later ones: its loss would mean nothing. `probe` finds out."""
    if probe(made).is_causal is False:
        remedy = ", or set is_decoder: true in its config.json if it was trained so" if _can_decode(made) else ""
        raise ConfigError(
            f"model.path: {model.path!r} is a {type(made).__name__}, which is not a causal language model: a token "
            f"sees those after it; give a causal language model{remedy}"
        )


def _can_decode(made: PreTrainedModel) -> bool:
    return getattr(made.config, "is_decoder", None) is False


def load_tokenizer(model: config.Model) -> PreTrainedTokenizerBase:
    """The base's own tokenizer. Raises ConfigError if there is none."""
    read_settings(model)  # which transformers reads too, and would call a fault there one of the tokenizer
    with loading(model, "the tokenizer of "), _own_code(model):
        tokenizer = cast(
            PreTrainedTokenizerBase,
            AutoTokenizer.from_pretrained(model.path, trust_remote_code=model.trust_remote_code),
        )
        # Without its files, a tokenizer of some models (GPT-2, Qwen) comes up empty and turns every text into nothing.
        names = ["tokenizer.json", *tokenizer.vocab_files_names.values()]
        if tokenizer.vocab_files_names and not any(_found(model, name) for name in names):
            raise FileNotFoundError(f"found none of {', '.join(dict.fromkeys(names))}")
    return tokenizer


def generation_settings(model: config.Model) -> GenerationConfig | None:
    """The content of generation_config.json; None if there is no such file."""
    if _found(model, "generation_config.json") is None:
        return None
    with loading(model):
        return cast(GenerationConfig, GenerationConfig.from_pretrained(model.path))


@contextlib.contextmanager
def _own_code(model: config.Model) -> Iterator[None]:
    """Around calls of transformers that may run code of the model's own, if model.trust_remote_code says so."""
    if not model.trust_remote_code:
        yield
        return
    _say_that_code_runs(model.path)
    with _one_process():
        yield


@contextlib.contextmanager
def _one_process() -> Iterator[None]:
    """transformers copies a model's code to a folder of the user's and imports it from there: of ranks that start
    together, one would import what another is just writing."""
    folder = Path(HF_MODULES_CACHE)
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / ".lori.lock").open("w") as file:
        with contextlib.suppress(OSError):  # some network file systems have no locks
            fcntl.flock(file, fcntl.LOCK_EX)
        yield


@functools.cache
def _say_that_code_runs(path: str) -> None:
    log.warning("model.trust_remote_code: true: Python code in %s, if it has any of its own, is run", path)


# --- weights ---------------------------------------------------------------------------------------------------------


def has_weights(model: config.Model) -> bool:
    """Whether the model is a folder with weight files, of whatever format; nothing is downloaded to find out."""
    folder = Path(model.path)
    names = {file.name for file in folder.iterdir()} if folder.is_dir() else set()
    return any(name.endswith(".safetensors") or name in (INDEX, *UNREAD) for name in names)


def weight_files(model: config.Model) -> list[Path]:
    """All weight files: model.safetensors, or else the shards, in the order of their first tensor in the index.

    That is the order in which transformers looks. A folder that has both is said to. Raises ValueError for an index
    that cannot be read, FileNotFoundError for files that are not there, and names them.
    """
    single, index = _found(model, SINGLE), _found(model, INDEX)
    if single is not None:
        if index is not None:
            _say_once("model.path: %s has %s and %s; %s is read, as transformers does", model.path, SINGLE, INDEX)
        _say_of_an_adapter(model)
        return [single]
    if index is None:
        others = [name for name in UNREAD if _found(model, name) is not None]
        found = f"; {', '.join(others)} cannot be read: save the model with safetensors" if others else ""
        raise FileNotFoundError(f"there is no {SINGLE} and no {INDEX}{found}")
    _say_of_an_adapter(model)
    shards = list(dict.fromkeys(_weight_map(index).values()))
    missing = [shard for shard in shards if _found(model, shard) is None]
    if missing:
        shown = ", ".join(missing[:3]) + (", ..." if len(missing) > 3 else "")
        raise FileNotFoundError(f"{INDEX} names {len(missing)} files that are not there: {shown}")
    return [_file(model, shard) for shard in shards]


def stored_weights(model: config.Model) -> dict[str, Stored]:
    """Tensor name, as in the files -> where it lies. Raises ValueError for a tensor that two files have differently."""
    found: dict[str, Stored] = {}
    for file in weight_files(model):
        for name, where in stored(file).items():
            if name in found and not found[name].equals(where):
                raise ValueError(f"{name} is in {found[name].path.name} and, with other values, in {file.name}")
            found.setdefault(name, where)
    return found


def _weight_map(index: Path) -> dict[str, str]:
    tree = json.loads(read_regular(index))
    shards = tree.get("weight_map") if isinstance(tree, dict) else None
    if not isinstance(shards, dict) or not shards:
        raise ValueError(f"{INDEX} has no weight_map of tensor names to files")
    for name in shards.values():
        if not isinstance(name, str) or Path(name).name != name or Path(name).suffix != ".safetensors":
            raise ValueError(f"{INDEX} names {name!r}, wanted the name of a safetensors file beside it")
    return shards


def _say_of_an_adapter(model: config.Model) -> None:
    if Path(model.path).is_dir() and _found(model, "adapter_config.json") is not None:
        _say_once(
            "model.path: %s has an adapter_config.json beside the base; that adapter is not applied, and the base is "
            "read alone",
            model.path,
        )


@functools.cache
def _say_once(text: str, path: str, *names: str) -> None:
    log.warning(text, path, *names, *names[:1])


def _found(model: config.Model, name: str) -> Path | None:
    """A file of the model's folder, or of its snapshot in the hub's cache."""
    path = cached_file(model.path, name, _raise_exceptions_for_missing_entries=False)
    return None if path is None else Path(path)


def _file(model: config.Model, name: str) -> Path:
    path = _found(model, name)
    if path is None:
        raise FileNotFoundError(f"there is no {name}")
    return path


# --- identity --------------------------------------------------------------------------------------------------------


def identity(model: config.Model) -> dict[str, str]:
    """The identity of this base, which is the same on every machine and in every folder.

    name: of the folder, or on the hub. model_type: as in config.json. architecture: a hash of all tensors' names and
    shapes. weights: a hash of samples of every weight file, so cheap at any size; models that differ by a whole
    training differ in it, a change of single bytes may not show.
    """
    settings = read_settings(model)
    with loading(model):
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


def _sample(file: Path, digest: hashlib.blake2b) -> None:
    size = file.stat().st_size
    digest.update(size.to_bytes(8, "little"))
    last = max(0, size - PIECE_BYTES)
    with file.open("rb") as stream:
        for piece in range(PIECES):
            stream.seek(last * piece // (PIECES - 1))
            digest.update(stream.read(PIECE_BYTES))


# --- what goes wrong -------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def loading(model: config.Model, part: str = "") -> Iterator[None]:
    """Names the user's folder or model in errors that occur inside, as the libraries raise nearly any class."""
    try:
        for file in Path(model.path).iterdir() if Path(model.path).is_dir() else ():
            if file.suffix in (*TEXTS, *WEIGHTS):  # which the libraries open, and would wait for if it were a pipe
                require_regular(file)
        with _without_bars():
            yield
    except ConfigError:
        raise
    except Exception as error:
        reason = str(error).strip().partition("\n")[0]
        if "trust_remote_code" in str(error) and not model.trust_remote_code:
            raise ConfigError(
                f"model.path: {part}{model.path!r} needs Python code of its own (auto_map), and none of it was run; "
                "read that code, and set model.trust_remote_code: true if you trust it"
            ) from error
        remedy = "" if model.attention is None else f", or remove model.attention, which is {model.attention}"
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
