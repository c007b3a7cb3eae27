"""An adapter that PEFT has saved with our `LoriConfig`: adapter_config.json, and the kept entries of B. No A."""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from lori_dist.adapter.adapter import Adapter, Block, Entries
from lori_dist.adapter.projection import DTYPES, GENERATOR
from lori_dist.errors import AdapterError
from lori_dist.formats.checks import (
    MAX_ENTRIES,
    check_choice,
    check_hash,
    check_integer,
    check_number,
    named,
    read_object,
    require,
    shown,
)
from lori_dist.formats.peft import CONFIG, TENSORS, base_of, check_header_length

PROJECTION_DTYPES = {str(dtype).removeprefix("torch."): dtype for dtype in DTYPES}

TYPE = "LORI"
"""Start of `peft_type`."""

_NAME = re.compile(r"(?:base_model\.model\.)?(?P<module>.+)\.lori_delta\.(?P<part>values|index)\Z")


def is_one(folder: Path) -> bool:
    try:
        config = read_object(folder / CONFIG)
    except AdapterError:
        return False
    return str(config.get("peft_type")).startswith(TYPE)


def open_lazy(folder: Path) -> Adapter:
    """The adapter of such a folder. Its A is made from the seed, and checked where it is attached.

    Raises AdapterError for modules that were trained in full, for another generator of A, and for a file that does not
    belong to its configuration or is damaged.
    """
    config = read_object(folder / CONFIG)
    check_settings(config, is_saved=True)
    shapes = {module: (shape[0], shape[1]) for module, shape in config["shapes"].items()}
    if config.get("modules_to_save"):
        raise AdapterError(f"{CONFIG}: modules_to_save were trained in full beside B A; they cannot be merged")
    found: dict[str, dict[str, Tensor]] = {module: {} for module in shapes}
    for name, tensor in _tensors(folder / TENSORS).items():
        match = _NAME.match(name)
        if match is None or match["module"] not in found or match["part"] in found[match["module"]]:
            raise AdapterError(
                f"{TENSORS}: {named(name)} does not belong to what {CONFIG} describes; save the adapter again"
            )
        found[match["module"]][match["part"]] = tensor
    rank = config["r"]
    entries = {module: _entries(module, parts, shapes[module][0] * rank) for module, parts in found.items()}
    block = Block(
        name=folder.resolve().name,
        seed=config["seed"],
        rank=rank,
        alpha=float(config["lori_alpha"]),
        dtype=PROJECTION_DTYPES[config["projection_dtype"]],
        entries={module: of_one for module, of_one in entries.items() if of_one.kept},
        checksums=config["checksums"],
    )
    return Adapter(shapes=shapes, blocks=(block,), targets=tuple(shapes), base=base_of(config))


def check_settings(config: Mapping[str, Any], *, is_saved: bool) -> None:
    """Raises AdapterError for what no `LoriConfig` is made of. is_saved: with an adapter, whose modules it names."""
    for field in ("r", "seed", "lori_alpha", "projection_dtype", "generator"):
        if field not in config:
            raise AdapterError(f"{CONFIG}: {field} is missing; save the adapter again with this version")
    if config["generator"] != GENERATOR:
        raise AdapterError(
            f"{CONFIG}: generator is {shown(config['generator'])}, this version makes A with {GENERATOR!r}; use the "
            "version it was trained with"
        )
    check_integer(f"{CONFIG}: r", config["r"], 1, MAX_ENTRIES)
    check_integer(f"{CONFIG}: seed", config["seed"], 0, 2**64 - 1)
    check_number(f"{CONFIG}: lori_alpha", config["lori_alpha"])
    require(config["lori_alpha"] > 0, f"{CONFIG}: lori_alpha", config["lori_alpha"], "above 0")
    check_choice(f"{CONFIG}: projection_dtype", config["projection_dtype"], PROJECTION_DTYPES)
    for field in ("shapes", "checksums", "kept"):
        found = config.get(field)
        if found is None and (not is_saved or field == "kept"):
            continue
        if found is None or (found == {} and is_saved and field != "kept"):
            raise AdapterError(f"{CONFIG}: {field} is missing; save the adapter again with this version")
        require(isinstance(found, dict), f"{CONFIG}: {field}", found, "an object")
    for module, shape in (config.get("shapes") or {}).items():
        where = f"{CONFIG}: shapes.{named(module)}"
        require(isinstance(shape, list) and len(shape) == 2, where, shape, "an array of 2")
        for size in shape:
            check_integer(where, size, 1, MAX_ENTRIES // config["r"])
    for module, checksum in (config.get("checksums") or {}).items():
        check_hash(f"{CONFIG}: checksums.{named(module)}", checksum)
    for module, kept in (config.get("kept") or {}).items():
        check_integer(f"{CONFIG}: kept.{named(module)}", kept, 0, MAX_ENTRIES)
    if is_saved and (other := min(config["shapes"].keys() ^ config["checksums"].keys(), default=None)) is not None:
        raise AdapterError(f"{CONFIG}: {named(other)} is in only one of shapes and checksums; save the adapter again")


def _tensors(path: Path) -> dict[str, Tensor]:
    try:
        check_header_length(path)
        return dict(load_file(path))
    except (OSError, SafetensorError, ValueError) as error:
        reason = named(getattr(error, "strerror", None) or str(error))
        raise AdapterError(f"{path.name} is not a whole safetensors file ({reason}); save the adapter again") from error


def _entries(module: str, parts: Mapping[str, Tensor], size: int) -> Entries:
    values, index = parts.get("values", torch.zeros(0)), parts.get("index")
    kept = values.numel()
    is_whole = values.dim() == 1 and values.dtype == torch.float32 and bool(values.isfinite().all())
    if index is None:
        is_whole = is_whole and kept == size
    else:
        is_whole = is_whole and index.shape == values.shape and are_positions(index, size)
    if not is_whole:
        raise AdapterError(f"{named(module)}: its kept entries are damaged, or of another rank; save the adapter again")
    return Entries(index=index if kept else None, values=values)


def are_positions(index: Tensor, size: int) -> bool:
    """Whether these are ascending flat positions of entries of a B of that size."""
    if index.dtype != torch.int32 or index.dim() != 1 or not bool((index[1:] > index[:-1]).all()):
        return False
    return index.numel() == 0 or (int(index[0]) >= 0 and int(index[-1]) < size)
