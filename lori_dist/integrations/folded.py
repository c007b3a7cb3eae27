"""The base model with an adapter baked into its weights."""

import dataclasses
import math
import shutil
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor
from transformers import PreTrainedModel

from lori_dist import config
from lori_dist.adapter.adapter import Adapter, in_memory
from lori_dist.adapter.attach import foldable
from lori_dist.adapter.bases import is_conv1d
from lori_dist.adapter.experts import Expert
from lori_dist.adapter.update import Update, split
from lori_dist.atomic import complete, write_text
from lori_dist.errors import AdapterError
from lori_dist.integrations.model_card import UNKNOWN, Origin, text
from lori_dist.tensors import PIECE_BYTES, Stored, metadata, stored, write
from lori_dist.training.model_files import (
    INDEX,
    SINGLE,
    identity,
    load_tokenizer,
    loading,
    settings_of,
    stored_weights,
    weight_files,
)
from lori_dist.training.weights import Weights, skeleton

WEIGHTS = (".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".h5", ".msgpack", ".gguf", ".onnx", ".ot")
"""Not copied: without the adapter in them, they would be another model."""

ADAPTER = "adapter_config.json"
"""Not copied either: transformers would put the adapter beside the base, which is not in the sum, on top of it."""

TEMPLATES = "additional_chat_templates"
"""A folder that a tokenizer may have."""


def export_folded(
    run_model_path: str,
    adapter: Adapter,
    folder: Path,
    *,
    origin: Origin = UNKNOWN,
    trust_remote_code: bool = False,
) -> None:
    """Writes a transformers model, with its tokenizer, whose weights are the base's plus the adapter's updates.

    Its model card is the adapter's: a card of the base would not be one of this model.

    run_model_path: the base model, a folder or a name on the hub; trust_remote_code: whether Python code of its own may
    be run. Its weight files are read and written one at a time,
    and each weight piece by piece, so that a piece and the factors of one update are in memory. Names and order of
    files and tensors, every dtype, what is tied and all other files stay as they are. An update is added in fp32 and
    the sum rounded once, so the outputs are those of base and adapter to the rounding of the weights' dtype.
    What was written is found again as a reader of the model finds it, and of every changed weight some rows are
    compared. The folder appears complete or not at all.
    Raises AdapterError if it holds anything already, for another base model
    than the adapter was trained on, and for a weight that cannot be changed alone (a tied one); ConfigError for a base
    model that cannot be loaded.
    """
    with complete(folder) as partial:
        base = config.Model(path=run_model_path, trust_remote_code=trust_remote_code)
        base = dataclasses.replace(base, dtype=_dtype(base))
        model, weights = skeleton(base)
        _refuse_other_base(base, adapter)
        load_tokenizer(base)  # a model without one is refused, and one on the hub is fetched
        updated, whole = _updated(base, model, weights, adapter)
        files, first = weight_files(base), stored_weights(base)
        for file in files:
            in_order = sorted(stored(file).items(), key=lambda item: item[1].offset)
            # A tensor that is in two files is the same in both, and becomes the same.
            found = {name: first[name] for name, _ in in_order}
            layout = {name: (where.dtype, where.shape) for name, where in found.items()}
            pieces = (piece for where in found.values() for piece in _folded(where, updated, adapter, whole))
            write(partial / file.name, layout, pieces, {"format": "pt", **metadata(file)})
        # Beside a single file, an index is one of other files.
        _copy_others(files[0].parent, partial, without={ADAPTER, INDEX} if files[0].name == SINGLE else {ADAPTER})
        _compare(base, partial, adapter, updated)
        name = str(adapter.base.get("name", run_model_path))
        write_text(partial / "README.md", text(adapter, name, origin, library="transformers"))


@dataclass(frozen=True, kw_only=True, slots=True)
class _Place:
    """Rows of a stored tensor, seen as a matrix of its last dimension, and what they get."""

    path: str
    """The module whose update it is."""
    num_rows: int
    first: int
    """Row of the update that goes to the first."""
    is_transposed: bool
    """Whether the rows are columns of the update."""


def _updated(
    base: config.Model, model: PreTrainedModel, weights: Weights, adapter: Adapter
) -> tuple[dict[Stored, list[_Place]], dict[Stored, str]]:
    """Weight in a file -> what its rows get, from the first to the last; and -> the name under which the adapter has
    it whole. model, weights: the base's skeleton."""
    files = cast(Any, weights)
    direct: Mapping[str, Stored] = files.direct  # a model's names -> where files have those tensors
    found: dict[Stored, list[_Place]] = {}
    for path, layer in foldable(model, adapter).items():
        if f"{path}.weight" in files.doubled:
            raise AdapterError(
                f"{path}: its weight is twice in the files of {base.path}, under two names; remove one of them"
            )
        name = path.rpartition(".")[0] if isinstance(layer, Expert) else f"{path}.weight"
        where = direct.get(name)
        if where is not None:
            is_transposed = layer.is_transposed if isinstance(layer, Expert) else is_conv1d(layer)
            place = _Place(path=path, num_rows=where.shape[-2], first=0, is_transposed=is_transposed)
            found.setdefault(where, []).append(place)
        elif not isinstance(layer, Expert) or layer.is_transposed:
            raise AdapterError(
                f"{path}: its weight is not one tensor in the files of {base.path}, but made of several; "
                "keep the adapter unfolded"
            )
        else:
            for where, first in files.rows_of(name, layer.number).items():
                found[where] = [_Place(path=path, num_rows=where.shape[-2], first=first, is_transposed=False)]
    for where, places in found.items():
        if sum(place.num_rows for place in places) != math.prod(where.shape[:-1]):
            raise AdapterError(
                f"{places[0].path}: other experts in the same weight are not targets; keep the adapter unfolded"
            )
    lacking = next((name for name in adapter.saved if name not in direct), None)
    if lacking is not None:
        raise AdapterError(
            f"{lacking}: was trained in full, and {base.path} has no such tensor; keep the adapter unfolded"
        )
    return found, {direct[name]: name for name in adapter.saved}


def _compare(base: config.Model, folder: Path, adapter: Adapter, updated: Mapping[Stored, list[_Place]]) -> None:
    """Raises AdapterError unless a folded model has, where its readers look for a weight, the base's plus the update.

    Of each weight two rows: the one that the update changes most, and the last one. All tensors must be there, in the
    base's dtypes and shapes, and those that were trained in full as they were trained.
    """
    folded = dataclasses.replace(base, path=str(folder))
    again, whole = _updated(folded, *skeleton(folded), adapter)
    for file in weight_files(base):
        layout, wanted = (
            {name: (t.dtype, t.shape) for name, t in stored(f).items()} for f in (folder / file.name, file)
        )
        if layout != wanted:
            raise AdapterError(
                f"{file.name}: has other tensors than the base's; there may be no space left, export again"
            )
    for old, new in zip(_segments(updated), _segments(again), strict=True):
        (was, start, place), (now, start_now, place_now) = old, new
        update = split(adapter, place.path, adapter.shapes[place.path])
        if place != place_now or (was.dtype, was.shape, start) != (now.dtype, now.shape, start_now):
            raise AdapterError(f"{place.path}: is another weight in the folded model; keep the adapter unfolded")
        if update.kept:
            left, right = _factors(update, place.is_transposed)
            rows = left[place.first :][: place.num_rows]
            for row in {int((rows @ (right @ right.t())).mul(rows).sum(1).argmax()), place.num_rows - 1}:
                before, after = (_row(where, start + row) for where in (was, now))
                expected = (before + rows[row] @ right).to(was.dtype).double()
                # It was rounded twice, in fp32 and to the weight's dtype; here once; in fp32 the terms count.
                terms = before.abs() + rows[row].abs() @ right.abs()
                absolute = 4 * torch.finfo(torch.float32).eps * float(terms.max())
                if not torch.allclose(after, expected, rtol=4 * torch.finfo(was.dtype).eps, atol=absolute):
                    raise AdapterError(
                        f"{place.path}: row {row} of its weight is not the base's plus the update; export again"
                    )
    for where, name in whole.items():
        if not torch.equal(where.load(), in_memory(adapter.saved[name]).to(where.dtype)):
            raise AdapterError(f"{name}: is not what was trained in full; export again")


def _segments(updated: Mapping[Stored, list[_Place]]) -> Iterator[tuple[Stored, int, _Place]]:
    """A stored tensor, its row where a place begins, and that place."""
    for where, places in updated.items():
        start = 0
        for place in places:
            yield where, start, place
            start += place.num_rows


def _row(where: Stored, row: int) -> Tensor:
    values = torch.empty(where.shape[-1], dtype=where.dtype)
    where.read(values, row * where.shape[-1])
    return values.double()


def _folded(
    where: Stored, updated: Mapping[Stored, list[_Place]], adapter: Adapter, whole: Mapping[Stored, str]
) -> Iterator[Tensor | Stored]:
    """The pieces of what a stored tensor becomes: itself, some rows at a time of its sum with an update, or what was
    trained in its place."""
    if where in whole:
        yield in_memory(adapter.saved[whole[where]]).to(where.dtype)
        return
    places = updated.get(where, ())
    updates = [split(adapter, place.path, adapter.shapes[place.path]) for place in places]
    if not any(update.kept for update in updates):
        yield where
        return
    start = 0
    for place, update in zip(places, updates, strict=True):
        yield from _summed(where, start, place, update)
        start += place.num_rows


def _summed(where: Stored, start: int, place: _Place, update: Update) -> Iterator[Tensor]:
    """Rows from `start` on of a stored tensor, with the update of one place."""
    dtype = torch.promote_types(where.dtype, torch.float32)
    num_columns = where.shape[-1]
    if update.kept:
        left, right = (factor.to(dtype) for factor in _factors(update, place.is_transposed))
    step = max(1, PIECE_BYTES // (num_columns * dtype.itemsize))
    for row in range(0, place.num_rows, step):
        rows = torch.empty(min(step, place.num_rows - row), num_columns, dtype=where.dtype)
        where.read(rows, (start + row) * num_columns)
        if update.kept:
            factor = left[place.first + row :][: len(rows)]
            rows = rows.to(dtype).addmm_(factor, right).to(where.dtype)
        yield rows


def _factors(update: Update, is_transposed: bool) -> tuple[Tensor, Tensor]:
    """Two whose product is the update, float64."""
    b = torch.cat([part.scaled_b() for part in update.kept], dim=1)
    a = torch.cat([part.a() for part in update.kept])
    return (a.t(), b.t()) if is_transposed else (b, a)


def _copy_others(base: Path, folder: Path, *, without: Collection[str]) -> None:
    """Configuration, tokenizer, index and the like."""
    for item in base.iterdir():
        if item.name in without or item.name.startswith("."):
            continue
        if item.is_file() and item.suffix not in WEIGHTS:
            shutil.copyfile(item, folder / item.name)
        elif item.is_dir() and item.name == TEMPLATES:
            shutil.copytree(item, folder / item.name, copy_function=shutil.copyfile)  # modes are the umask's


def _refuse_other_base(base: config.Model, adapter: Adapter) -> None:
    trained_on, found = adapter.base.get("weights"), identity(base)["weights"]
    if trained_on is not None and trained_on != found:
        raise AdapterError(
            f"{base.path}: has the weights {found}, the adapter was trained on {trained_on}; give the base model it "
            "was trained on"
        )


def _dtype(base: config.Model) -> config.Dtype:
    with loading(base):
        settings = settings_of(base)
    dtype = settings.dtype or settings.get_text_config().dtype or torch.float32
    return cast(config.Dtype, str(dtype).removeprefix("torch."))
