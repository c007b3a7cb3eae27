"""An adapter from a PEFT LoRA folder: adapter_config.json and adapter_model.safetensors."""

import functools
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from lori_dist.adapter.adapter import Adapter, Block, Entries
from lori_dist.adapter.projection import checksum
from lori_dist.errors import AdapterError
from lori_dist.files import open_regular
from lori_dist.formats import patterns
from lori_dist.formats.checks import (
    MAX_ENTRIES,
    check_flag,
    check_integer,
    check_number,
    named,
    read_object,
    require,
    shown,
)
from lori_dist.formats.lazy import StoredProjection, UnreadEntries, all_finite, as_bytes, digest
from lori_dist.tensors import Stored, stored

CONFIG, TENSORS, PICKLE = "adapter_config.json", "adapter_model.safetensors", "adapter_model.bin"
NAMES = (CONFIG, TENSORS, PICKLE)

REFUSED: Mapping[str, str] = {
    "use_dora": "DoRA also scales the columns of the base's weights, so its update is not B A alone",
    "lora_bias": "biases were trained beside B A",
    "modules_to_save": "whole layers were trained beside B A",
    "trainable_token_indices": "rows of the embedding were trained beside B A",
    "layer_replication": "layers of the base were repeated, so that paths name other layers",
    "alora_invocation_tokens": "the update only acts after certain tokens",
    "use_qalora": "A acts on pooled inputs",
    "use_bdlora": "A or B is block-diagonal",
    "arrow_config": "several adapters are routed between",
    "kasa_config": "the base's weights are truncated and B A has singular values of its own",
    "monteclora_config": "A has random parts of its own",
}
"""Fields that say, if they are set, that the update is not scale * B A on linear layers."""

CHANGES_BASE = ("pissa", "olora", "corda", "loftq", "lora_ga")
"""Initialisations that take something out of the base's weights: the update is one to that other base."""

MAX_HEADER_BYTES = 1 << 25
"""Most bytes of the header of the tensors' file, enough for some hundred thousand tensors."""

DTYPES = (torch.float32, torch.bfloat16, torch.float16)

_NAME = re.compile(r"(?:base_model\.model\.)?(?P<module>.+)\.lora_(?P<factor>[AB])(?:\.default)?\.weight\Z")


@dataclass(frozen=True, kw_only=True, slots=True)
class Factors:
    """The places of A and B of one module, and the scale of their product."""

    a: Stored  # (rank, in_features)
    b: Stored  # (out_features, rank)
    scale: float


@dataclass(frozen=True, kw_only=True, slots=True)
class FolderB:
    """The kept entries of a B, where they lie."""

    module: str
    where: Stored
    ratio: float
    """Factor of the values, applied in fp32; 1 leaves them as they are."""
    mask: npt.NDArray[np.uint8] | None
    """Bits in row-major order, eight to a byte, of what is kept; None: what is not zero."""
    kept: int
    digest: str
    """Digest of B as it is stored."""

    def read(self) -> Entries:
        """Raises AdapterError if the file has changed since it was opened."""
        b = self.where.load().flatten()
        if digest(as_bytes(b)) != self.digest:
            raise AdapterError(f"{self.where.path}: B of {self.module} changed while it was being read; try again")
        kept = self._kept(b)
        values = b if self.ratio == 1 else b.float() * self.ratio
        if bool(kept.all()):
            return Entries(index=None, values=values)
        index = kept.nonzero().squeeze(1)
        return Entries(index=index.to(torch.int32), values=values[index])

    def _kept(self, b: Tensor) -> Tensor:
        if self.mask is None:
            return b != 0
        return torch.from_numpy(np.unpackbits(self.mask, count=b.numel(), bitorder="little").view(bool))


def is_one(path: Path) -> bool:
    return (path / CONFIG).exists()


def open_lazy(folder: Path) -> Adapter:
    """The adapter of a LoRA folder, with the A that is stored there. Its tensors stay there until they are asked for.

    All of them are looked at once, module by module, as what is wrong must be known before a merge begins.
    Entries of B that are zero are not kept. Of modules with another scale than the first one's (alpha_pattern, rsLoRA
    with unequal ranks), B is multiplied by the ratio, in fp32. The base is known by its name only.
    Raises AdapterError for all that is not B A on linear layers, with the module or field and the reason.
    """
    return adapter(folder, read(folder), {})


def adapter(folder: Path, found: Mapping[str, Factors], masks: Mapping[str, Tensor]) -> Adapter:
    """The adapter of what `read` gave. masks: module -> (out_features, rank) bool, the entries of B that are kept;
    where there is none, those that are not zero. Raises AdapterError for values that are not finite."""
    scale = next((factors.scale for factors in found.values() if factors.scale), 1.0)
    rank = max(factors.a.shape[0] for factors in found.values())
    dtype = functools.reduce(torch.promote_types, (factors.a.dtype for factors in found.values()))
    entries: dict[str, Entries] = {}
    projections: dict[str, Tensor | StoredProjection] = {}
    checksums = {}
    for module, factors in found.items():
        a, kept = _projection(module, factors.a, dtype), _entries(module, factors, scale, masks.get(module))
        if kept is not None:
            entries[module], projections[module] = kept, a
            checksums[module] = a.checksum if isinstance(a, StoredProjection) else checksum(a)
    block = Block(
        name=folder.resolve().name,
        seed=None,
        rank=rank,
        alpha=scale * rank,
        dtype=dtype,
        entries=entries,
        checksums=checksums,
        projections=projections,
    )
    shapes = {module: (factors.b.shape[0], factors.a.shape[1]) for module, factors in found.items()}
    return Adapter(shapes=shapes, blocks=(block,), targets=tuple(shapes), base=base_of(_config(folder)))


def read(folder: Path) -> dict[str, Factors]:
    """Module -> its A, B and scale, in the order of the file. Raises AdapterError as `opened`."""
    config, found = _config(folder), dict[str, dict[str, Stored]]()
    for name, tensor in _tensors(folder).items():
        match = _NAME.match(name)
        if match is None:
            raise AdapterError(f"{_without_prefix(name)}: {_reason(name)}")
        module, factor = match["module"], match["factor"]
        if factor in found.setdefault(module, {}):
            raise AdapterError(f"{named(module)}: the file has two {factor} of it; save one adapter a folder")
        _check(module, factor, tensor)
        found[module][factor] = tensor
    if not found:
        raise AdapterError(f"{TENSORS} holds no tensor; there is nothing to merge")
    _check_targets(config, list(found))
    for field in PATTERNS:
        patterns.check(f"{CONFIG}: {field}", list(config.get(field) or ()), list(found))
    return {module: _pair(module, pair, config) for module, pair in found.items()}


def _check_targets(config: Mapping[str, Any], modules: list[str]) -> None:
    """Raises AdapterError for a module that PEFT would leave out, as it is not a target."""
    targets = config.get("target_modules")
    if not isinstance(targets, list):
        return  # all linear layers, PEFT's own choice, or a pattern, which PEFT alone may know
    names = {*targets, *(name.removesuffix(".weight") for name in config.get("target_parameters") or ())}
    for module in modules:
        parts = module.split(".")
        if not any(".".join(parts[start:]) in names for start in range(len(parts))):
            raise AdapterError(
                f"{named(module)}: the file has an update of it, but it is not a target in {CONFIG}; give the two "
                "files that "
                "were saved together"
            )


def finite(module: str, factor: str, where: Stored) -> Tensor:
    """A or B. Raises AdapterError for values that are not finite."""
    tensor = where.load()
    if not all_finite(tensor):
        raise AdapterError(f"{named(module)}: {factor} has values that are not finite; train it again")
    return tensor


def _without_prefix(name: str) -> str:
    return named(name.removeprefix("base_model.model."))


def _reason(name: str) -> str:
    if "lora_magnitude_vector" in name:
        return f"is a magnitude of DoRA; {REFUSED['use_dora']}"
    if "lora_embedding_" in name:
        return "is LoRA on an embedding, which is not a linear layer; train without it"
    if re.search(r"lora_[AB](\.default)?\.bias\Z", name):
        return f"is a bias of LoRA itself; {REFUSED['lora_bias']}"
    if "lora_" in name:
        return "is not an A or B of a linear layer; only these can be merged"
    return (
        "is a weight or bias of the base itself, not an update of it; train without modules_to_save and bias, and save "
        "with save_embedding_layers=False"
    )


def _check(module: str, factor: str, tensor: Stored) -> None:
    if len(tensor.shape) != 2:
        raise AdapterError(
            f"{named(module)}: {factor} has the shape {tensor.shape}, as of a convolution; only LoRA on linear layers "
            "can be merged"
        )
    if tensor.dtype not in DTYPES:
        known = ", ".join(str(dtype) for dtype in DTYPES)
        raise AdapterError(f"{named(module)}: {factor} is {tensor.dtype}; wanted one of {known}")
    if tensor.numel > MAX_ENTRIES:
        raise AdapterError(f"{named(module)}: {factor} has {tensor.numel} entries; at most {MAX_ENTRIES} are read")


def _pair(module: str, pair: Mapping[str, Stored], config: Mapping[str, Any]) -> Factors:
    for factor, other in (("A", "B"), ("B", "A")):
        if factor not in pair:
            raise AdapterError(f"{named(module)}: has {other} but no {factor}; the file is damaged, save it again")
    a, b = pair["A"], pair["B"]
    if a.shape[0] != b.shape[1] or not a.numel or not b.numel:
        raise AdapterError(
            f"{named(module)}: A is {a.shape} and B is {b.shape}, which do not fit; the file is damaged, save it again"
        )
    rank, alpha = _of(config, "rank_pattern", "r", module), _of(config, "alpha_pattern", "lora_alpha", module)
    if rank != a.shape[0]:
        raise AdapterError(
            f"{named(module)}: A has {a.shape[0]} rows, {CONFIG} says {rank:g} (r and rank_pattern), on which the "
            "scale depends; give the two files that were saved together"
        )
    return Factors(a=a, b=b, scale=alpha / (math.sqrt(rank) if config.get("use_rslora") else rank))


def _of(config: Mapping[str, Any], field: str, default: str, module: str) -> float:
    """A module's value from the first matching pattern, as PEFT reads patterns: regular expressions over the end of its
    path."""
    for pattern, value in (config.get(field) or {}).items():
        if re.match(rf"(.*\.)?({pattern})$", module):
            return float(value)
    return float(config[default])


def _projection(module: str, where: Stored, dtype: torch.dtype) -> Tensor | StoredProjection:
    """A: in memory only where it has another dtype than the widest of the folder."""
    a = finite(module, "A", where)
    if a.dtype != dtype:
        return a.to(dtype)
    return StoredProjection(about=f"A of {module}", where=where, shape=where.shape, dtype=dtype, checksum=checksum(a))


def _entries(module: str, factors: Factors, scale: float, mask: Tensor | None) -> UnreadEntries | None:
    """None: nothing is kept."""
    b = finite(module, "B", factors.b).flatten()
    kept = int(torch.count_nonzero(b if mask is None else mask)) if factors.scale else 0
    if not kept:
        return None
    ratio = factors.scale / scale
    if ratio != 1 and not all_finite(b.float() * ratio):
        raise AdapterError(
            f"{named(module)}: B times {ratio:g}, by which its scale is another than the first module's, is not "
            "finite; train it again"
        )
    place = FolderB(
        module=module,
        where=factors.b,
        ratio=ratio,
        mask=None if mask is None else np.packbits(mask.flatten().numpy(), bitorder="little"),
        kept=kept,
        digest=digest(as_bytes(b)),
    )
    return UnreadEntries(place)


PATTERNS = ("rank_pattern", "alpha_pattern")


def _config(folder: Path) -> dict[str, Any]:
    """The content of adapter_config.json, checked for the types that its users need."""
    config = read_object(folder / CONFIG)
    if config.get("peft_type") != "LORA":
        raise AdapterError(f"{CONFIG}: peft_type is {shown(config.get('peft_type'))}; only LORA can be merged")
    for field in ("r", "lora_alpha"):
        if field not in config:
            raise AdapterError(f"{CONFIG}: {field} is missing; save the adapter again")
    check_integer(f"{CONFIG}: r", config["r"], 1, MAX_ENTRIES)
    check_number(f"{CONFIG}: lora_alpha", config["lora_alpha"])
    for field in PATTERNS:
        found = config.get(field) or {}
        require(isinstance(found, dict), f"{CONFIG}: {field}", found, "an object")
        for pattern, value in found.items():
            where = f"{CONFIG}: {field}.{named(pattern)}"
            check_number(where, value) if field == "alpha_pattern" else check_integer(where, value, 1, MAX_ENTRIES)
    for field in ("use_rslora", "fan_in_fan_out"):
        if config.get(field) is not None:
            check_flag(f"{CONFIG}: {field}", config[field])
    targets, parameters = config.get("target_modules"), config.get("target_parameters")
    are_names = targets is None or isinstance(targets, str) or _are_texts(targets)
    require(are_names, f"{CONFIG}: target_modules", targets, "an array of names, a text or null")
    require(not parameters or _are_texts(parameters), f"{CONFIG}: target_parameters", parameters, "an array of names")
    if other := next((name for name in parameters or () if not name.endswith(".weight")), None):
        raise AdapterError(
            f"{CONFIG}: target_parameters has {named(other)}: parameters outside of linear layers were adapted; it "
            "cannot be merged"
        )
    for field, reason in REFUSED.items():
        if config.get(field):
            raise AdapterError(f"{CONFIG}: {field} is {shown(config[field])}: {reason}; it cannot be merged")
    if config.get("bias", "none") != "none":
        raise AdapterError(
            f"{CONFIG}: bias is {shown(config['bias'])}: biases of the base were trained as well; it cannot be merged"
        )
    start = config.get("init_lora_weights")
    if isinstance(start, str) and start.lower().startswith(CHANGES_BASE):
        raise AdapterError(
            f"{CONFIG}: init_lora_weights is {shown(start)}, which changes the base's weights before the training; "
            "save it with path_initial_model_for_weight_conversion, which makes an update of the base itself"
        )
    return config


def _are_texts(found: Any) -> bool:
    return isinstance(found, list) and all(isinstance(name, str) for name in found)


def base_of(config: Mapping[str, Any]) -> dict[str, Any]:
    """The description of the base model in an adapter_config.json; a folder is described by its name alone."""
    name = config.get("base_model_name_or_path")
    base: dict[str, Any] = {}
    if isinstance(name, str) and name:
        base["name"] = Path(name).name if name.startswith(("/", ".", "~")) or Path(name).is_dir() else name
    if config.get("fan_in_fan_out") is True:
        base["fan_in_fan_out"] = True  # of the base's weights: A and B are as for all others
    return base


def _tensors(folder: Path) -> dict[str, Stored]:
    path = folder / TENSORS
    if not path.exists():
        if (folder / PICKLE).exists():
            raise AdapterError(
                f"has its tensors in {PICKLE}, a pickle, which is never opened, as it may run any program; load it "
                "with PEFT where you trust it and save it with safe_serialization=True"
            )
        raise AdapterError(f"has no {TENSORS}; give a folder that PEFT has saved")
    try:
        check_header_length(path)
        with safe_open(path, framework="pt", device="cpu") as file:
            names = list(file.keys())  # checks more of the header than `stored`
        places = stored(path)
        return {name: places[name] for name in names}
    except (SafetensorError, OSError, ValueError) as error:
        reason = named(getattr(error, "strerror", None) or str(error))
        raise AdapterError(f"{TENSORS} is not a whole safetensors file ({reason}); save it again") from error


def check_header_length(path: Path) -> None:
    """Raises ValueError for a header that is too large to be read, and OSError for what is not a regular file."""
    with open_regular(path) as file:
        length = int.from_bytes(file.read(8), "little")
    if length > MAX_HEADER_BYTES:
        raise ValueError(f"its header has {length} bytes, at most {MAX_HEADER_BYTES} are read")
