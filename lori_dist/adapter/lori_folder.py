"""An adapter that PEFT has saved with our `LoriConfig`: adapter_config.json, and the kept entries of B. No A."""

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from lori_dist.adapter.adapter import Adapter, Block, Entries
from lori_dist.adapter.peft_folder import CONFIG, TENSORS, base_of
from lori_dist.adapter.projection import GENERATOR
from lori_dist.errors import AdapterError

TYPE = "LORI"
"""What `peft_type` begins with."""

_NAME = re.compile(r"(?:base_model\.model\.)?(?P<module>.+)\.lori_delta\.(?P<part>values|index)\Z")


def is_one(folder: Path) -> bool:
    try:
        config = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return False
    return isinstance(config, dict) and str(config.get("peft_type")).startswith(TYPE)


def opened(folder: Path) -> Adapter:
    """The adapter of such a folder. Its A is made from the seed, and checked where it is attached.

    Raises AdapterError for modules that were trained whole, for another generator of A, and for a file that does not
    belong to its configuration or is damaged.
    """
    config = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
    shapes = {module: tuple(shape) for module, shape in _mapping(config, "shapes").items()}
    if config.get("generator") != GENERATOR:
        raise AdapterError(
            f"{CONFIG}: generator is {config.get('generator')!r}, this version makes A with {GENERATOR!r}; use the "
            "version it was trained with"
        )
    if config.get("modules_to_save"):
        raise AdapterError(f"{CONFIG}: modules_to_save were trained whole beside B A; they cannot be merged")
    found: dict[str, dict[str, Tensor]] = {module: {} for module in shapes}
    for name, tensor in _tensors(folder / TENSORS).items():
        match = _NAME.match(name)
        if match is None or match["module"] not in found:
            raise AdapterError(f"{TENSORS}: {name} is nothing that {CONFIG} knows of; save the adapter again")
        found[match["module"]][match["part"]] = tensor
    rank = int(config["r"])
    entries = {module: _entries(module, parts, shapes[module][0] * rank) for module, parts in found.items()}
    block = Block(
        name=folder.resolve().name,
        seed=int(config["seed"]),
        rank=rank,
        alpha=float(config["lori_alpha"]),
        dtype=getattr(torch, config["projection_dtype"]),
        entries={module: of_one for module, of_one in entries.items() if of_one.kept},
        checksums=_mapping(config, "checksums"),
    )
    return Adapter(shapes=shapes, blocks=(block,), targets=tuple(shapes), base=base_of(config))


def _mapping(config: Mapping[str, Any], field: str) -> dict[str, Any]:
    found = config.get(field)
    if not isinstance(found, dict) or not found:
        raise AdapterError(f"{CONFIG}: {field} is missing; save the adapter again with this version")
    return found


def _tensors(path: Path) -> dict[str, Tensor]:
    try:
        return dict(load_file(path))
    except (OSError, SafetensorError, ValueError) as error:
        raise AdapterError(f"{path.name} is no whole safetensors file ({error}); save the adapter again") from error


def _entries(module: str, parts: Mapping[str, Tensor], size: int) -> Entries:
    values, index = parts.get("values", torch.zeros(0)), parts.get("index")
    kept = values.numel()
    is_whole = values.dim() == 1 and values.dtype == torch.float32 and bool(values.isfinite().all())
    if index is None:
        is_whole = is_whole and kept == size
    elif kept:
        is_whole = is_whole and index.shape == values.shape and are_positions(index, size)
    if not is_whole:
        raise AdapterError(f"{module}: its kept entries are damaged, or of another rank; save the adapter again")
    return Entries(index=index if kept else None, values=values)


def are_positions(index: Tensor, size: int) -> bool:
    """Whether these are ascending flat positions of entries of a B of that size."""
    if index.dtype != torch.int32 or index.dim() != 1 or not bool((index[1:] > index[:-1]).all()):
        return False
    return index.numel() == 0 or (int(index[0]) >= 0 and int(index[-1]) < size)
