"""The frozen base model in memory, and whether rows and devices fit it."""

import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, cast

import torch
from torch import nn
from transformers import PreTrainedModel

from lori_dist import config
from lori_dist.adapter import sharded
from lori_dist.errors import AdapterError, ConfigError
from lori_dist.training.data import Example
from lori_dist.training.model_files import generation_settings
from lori_dist.training.model_files import identity as identity
from lori_dist.training.model_files import load_tokenizer as load_tokenizer
from lori_dist.training.model_files import loading as loading
from lori_dist.training.model_files import weight_files as weight_files
from lori_dist.training.weights import Weights, fill, materialize, skeleton, whole

log = logging.getLogger(__name__)


def load_model(model: config.Model) -> PreTrainedModel:
    """The base on the CPU in the dtype asked for, in evaluation mode, so without dropout.

    It is read as training reads it. Raises ConfigError if it cannot be loaded, or if its files lack a weight.
    """
    made, weights = frozen(model)
    materialize(made, torch.device("cpu"))
    fill(made, weights, whole)
    return made


def frozen(model: config.Model) -> tuple[PreTrainedModel, Weights]:
    """The base in evaluation mode, without its weights, of which none needs a gradient; and the weights.

    Raises ConfigError as `load_model`.
    """
    made, weights = skeleton(model)
    made.requires_grad_(False)
    if (settings := generation_settings(model)) is not None:
        made.generation_config = settings
    return cast(PreTrainedModel, made.eval()), weights


def check_device(model: config.Model, device: torch.device) -> None:
    """Raises ConfigError where attention as it is asked for has no backward pass on a device."""
    if device.type == "cpu" and model.attention in ("flex_attention", *config.FLASH):
        raise ConfigError(
            f"model.attention: got {model.attention}, which trains on CUDA devices only, and this rank computes "
            "on a CPU; use sdpa"
        )


def blocks(model: nn.Module) -> list[nn.Module]:
    """The model's transformer blocks, inner ones first: the modules that transformers keeps on one device, if it names
    any."""
    names = set(getattr(model, "_no_split_modules", None) or ())
    return [module for module in model.modules() if type(module).__name__ in names][::-1]


def check(examples: Sequence[Example], model: PreTrainedModel) -> None:
    """Raises ConfigError if a row has more tokens than the model has positions, or one it has no embedding for."""
    longest = max((example.num_tokens for example in examples), default=0)
    largest = max((max(example.prompt_ids + example.response_ids) for example in examples), default=0)
    check_fit(longest, largest, model)


def check_fit(longest: int, largest: int, model: PreTrainedModel) -> None:
    """Raises ConfigError as `check`. longest: tokens of the longest row. largest: the largest token."""
    positions = num_positions(model)
    if positions is not None and longest > positions:
        raise ConfigError(
            f"train.max_length: a row has {longest} tokens, the model has {positions} positions; "
            f"set train.max_length to {positions} or less"
        )
    num_embeddings = sharded.shape(model.get_input_embeddings().weight)[0]
    if largest >= num_embeddings:
        raise ConfigError(
            f"model.path: the tokenizer gives token {largest}, the model has embeddings for {num_embeddings}; "
            "give a model with its own tokenizer"
        )


def num_positions(model: PreTrainedModel) -> int | None:
    """Tokens the model can tell apart by place; None if there is no such limit."""
    return getattr(model.config.get_text_config(), "max_position_embeddings", None)


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
