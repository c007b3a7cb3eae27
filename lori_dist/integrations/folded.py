"""The base model with an adapter baked into its weights."""

import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor
from transformers import AutoConfig

from lori_dist import config
from lori_dist.adapter.adapter import Adapter
from lori_dist.adapter.attach import foldable
from lori_dist.adapter.linear import is_conv1d
from lori_dist.adapter.update import Update, split
from lori_dist.errors import AdapterError
from lori_dist.integrations._folder import complete
from lori_dist.integrations.model_card import UNKNOWN, Origin, text
from lori_dist.tensors import PIECE_BYTES, Stored, metadata, stored, write
from lori_dist.training.model import identity, load_tokenizer, weight_files
from lori_dist.training.weights import skeleton

WEIGHTS = (".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".h5", ".msgpack", ".gguf", ".onnx", ".ot")
"""Not copied: without the adapter in them, they would be another model."""

TEMPLATES = "additional_chat_templates"
"""A folder that a tokenizer may have."""


def export_folded(run_model_path: str, adapter: Adapter, folder: Path, *, origin: Origin = UNKNOWN) -> None:
    """Writes a transformers model, with its tokenizer, whose weights are the base's plus the adapter's updates.

    Its model card is the adapter's: a card of the base would not be one of this model.

    run_model_path: the base model, a folder or a name on the hub. Its weight files are read and written one at a time,
    and each weight piece by piece, so that a piece and the factors of one update are in memory. Names and order of
    files and tensors, every dtype, what is tied and all other files stay as they are. An update is added in fp32 and
    the sum rounded once, so the outputs are those of base and adapter to the rounding of the weights' dtype.
    The folder appears complete or not at all. Raises AdapterError if it holds anything already, for another base model
    than the adapter was trained on, and for a weight that cannot be changed alone (a tied one); ConfigError for a base
    model that cannot be loaded.
    """
    with complete(folder) as partial:
        _refuse_other_base(run_model_path, adapter)
        base = config.Model(path=run_model_path, dtype=_dtype(run_model_path))
        load_tokenizer(base)  # a model without one is refused, and one on the hub is fetched
        updated = _updated(base, adapter)
        files = weight_files(base)
        for file in files:
            found = dict(sorted(stored(file).items(), key=lambda item: item[1].offset))
            layout = {name: (where.dtype, where.shape) for name, where in found.items()}
            pieces = (piece for where in found.values() for piece in _folded(where, updated, adapter))
            write(partial / file.name, layout, pieces, {"format": "pt", **metadata(file)})
        _copy_others(files[0].parent, partial)
        name = str(adapter.base.get("name", run_model_path))
        (partial / "README.md").write_text(text(adapter, name, origin, library="transformers"), encoding="utf-8")


def _updated(base: config.Model, adapter: Adapter) -> dict[Stored, tuple[str, bool]]:
    """Weight in a file -> the module whose update it gets, and whether it is stored as (in_features, out_features)."""
    model, weights = skeleton(base)
    direct: Mapping[str, Stored] = cast(Any, weights).direct  # a model's names -> where files have those tensors
    found = {}
    for path, layer in foldable(model, adapter).items():
        where = direct.get(f"{path}.weight")
        if where is None:
            raise AdapterError(
                f"{path}: its weight is not one tensor in the files of {base.path}, but made of several; "
                "keep the adapter unfolded"
            )
        found[where] = (path, is_conv1d(layer))
    return found


def _folded(where: Stored, updated: Mapping[Stored, tuple[str, bool]], adapter: Adapter) -> Iterator[Tensor | Stored]:
    """The pieces of what a stored tensor becomes: itself, or some rows at a time of its sum with an update."""
    if where not in updated:
        yield where
        return
    path, is_transposed = updated[where]
    update = split(adapter, path, adapter.shapes[path])
    if not update.kept:
        yield where
        return
    dtype = torch.promote_types(where.dtype, torch.float32)
    left, right = (factor.to(dtype) for factor in _factors(update, is_transposed))
    num_rows, num_columns = where.shape
    step = max(1, PIECE_BYTES // (num_columns * dtype.itemsize))
    for start in range(0, num_rows, step):
        factor = left[start : start + step]
        rows = torch.empty(len(factor), num_columns, dtype=where.dtype)
        where.read(rows, start * num_columns)
        yield rows.to(dtype).addmm_(factor, right).to(where.dtype)


def _factors(update: Update, is_transposed: bool) -> tuple[Tensor, Tensor]:
    """Two whose product is the update, float64."""
    b = torch.cat([part.scaled_b() for part in update.kept], dim=1)
    a = torch.cat([part.a() for part in update.kept])
    return (a.t(), b.t()) if is_transposed else (b, a)


def _copy_others(base: Path, folder: Path) -> None:
    """Configuration, tokenizer, index and the like."""
    for item in base.iterdir():
        if item.is_file() and item.suffix not in WEIGHTS and not item.name.startswith("."):
            shutil.copyfile(item, folder / item.name)
        elif item.is_dir() and item.name == TEMPLATES:
            shutil.copytree(item, folder / item.name)


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
