"""The base model with an adapter baked into its weights."""

from pathlib import Path
from typing import cast

import torch
from transformers import AutoConfig

from lori_dist import config
from lori_dist.adapter.adapter import Adapter
from lori_dist.adapter.attach import attach, detach, fold
from lori_dist.errors import AdapterError
from lori_dist.integrations._folder import complete
from lori_dist.training.model import identity, load_model, load_tokenizer


def export_folded(run_model_path: str, adapter: Adapter, folder: Path) -> None:
    """Writes a transformers model, with its tokenizer, whose weights are the base's plus the adapter's updates.

    run_model_path: the base model, a folder or a name on the hub. Its dtype is kept (as its config.json says; float32
    where that says none), so the outputs are those of base and adapter to that dtype's rounding.
    The folder appears complete or not at all. Raises AdapterError if it holds anything already, for another base model
    than the adapter was trained on, and for a weight that cannot be changed alone (a tied one); ConfigError for a base
    model that cannot be loaded.
    """
    with complete(folder) as partial:
        _refuse_other_base(run_model_path, adapter)
        base = config.Model(path=run_model_path, dtype=_dtype(run_model_path))
        model, tokenizer = load_model(base), load_tokenizer(base)
        attach(model, adapter)
        fold(model)
        detach(model)
        model.save_pretrained(partial)
        tokenizer.save_pretrained(partial)


def _refuse_other_base(path: str, adapter: Adapter) -> None:
    trained_on, found = adapter.base.get("weights"), identity(config.Model(path=path))["weights"]
    if trained_on is not None and trained_on != found:
        raise AdapterError(
            f"{path}: has the weights {found}, the adapter was trained on {trained_on}; give the base model it was "
            "trained on"
        )


def _dtype(path: str) -> config.Dtype:
    dtype = AutoConfig.from_pretrained(path).dtype or torch.float32
    return cast(config.Dtype, str(dtype).removeprefix("torch."))
