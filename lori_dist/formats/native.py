"""The adapter file: kept entries, their masks and one JSON header, in a safetensors file. The README specifies it."""

import copy
import json
import os
import re
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from lori_dist import tensors
from lori_dist.adapter.adapter import Adapter, Block, Elsewhere, Entries, in_memory, loaded
from lori_dist.adapter.projection import DTYPES, GENERATOR
from lori_dist.adapter.splitting import dependent
from lori_dist.errors import AdapterError
from lori_dist.files import parse_json, require_regular
from lori_dist.formats.checks import (
    MAX_ENTRIES,
    check_choice,
    check_hash,
    check_integer,
    check_name,
    named,
    require,
    shown,
)
from lori_dist.formats.lazy import (
    DAMAGED,
    Place,
    StoredEntries,
    StoredProjection,
    all_finite,
    as_bytes,
    digest,
    encode,
    encode_projection,
    naming,
)
from lori_dist.tensors import Stored, stored

FORMAT = "lori_dist.adapter"
VERSIONS = (1, 2, 3)
"""Read. Version 2 is written only where a block has no seed, version 3 only where parameters were trained in full: all
other files stay as they were."""
FORMS = 4
"""Version of files whose tasks have updates of their own, which forms.py reads and writes."""
DISTRIBUTION = "uniform"
"""Distribution of the entries of A. Together with the generator it defines A."""

METADATA = "lori"  # the key of the header in the safetensors metadata
_DIGEST_AT_END = re.compile(r',"digest":"([0-9a-f]{16})"\}\Z')
PROJECTION_DTYPES = {str(dtype).removeprefix("torch."): dtype for dtype in DTYPES}
VALUE_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
_MAX_HEADER = 1 << 24  # characters; parsed, JSON can take thirty times its size

_FIELDS = ("format", "version", "generator", "distribution", "values_dtype", "targets", "base", "blocks", "modules")
_BLOCK_FIELDS = ("name", "seed", "rank", "alpha", "weight", "dtype")
_MODULE_FIELDS = {
    1: ("shape", "kept", "projection", "digest"),
    2: ("shape", "rank", "kept", "projection", "digest"),
    3: ("shape", "rank", "kept", "projection", "digest"),
}
SAVED = "saved."  # begins the name of a tensor that was trained in full; those of blocks begin with a number


def save(adapter: Adapter, path: str | os.PathLike[str], *, dtype: torch.dtype = torch.float32) -> None:
    """Writes one adapter file. It appears whole or not at all, and the same adapter gives the same bytes.

    dtype: what values are rounded to: float32, bfloat16 or float16. Entries without values are not written.
    Raises AdapterError if the adapter is not consistent, if values are not finite in dtype, or if it cannot be written.
    """
    path = Path(path)
    _verify(adapter, dtype)
    with naming(path, "written"):
        header = _describe(adapter, dtype)
        _check_header(header)
        encoded = _encode(adapter, dtype, header["modules"])
        tensors.save(path, encoded, {METADATA: serialize(header)})


def load(path: str | os.PathLike[str]) -> Adapter:
    """The adapter of a file, on the CPU, its values in the dtype they are stored in.

    Raises AdapterError that says what is wrong and where, if this is not an undamaged adapter file of a known version.
    """
    return loaded(open_lazy(path))


def open_lazy(path: str | os.PathLike[str]) -> Adapter:
    """The adapter of a file as of `load`, but its tensors stay there: they are read, and checked, when asked for.

    So it takes the memory of its header. Raises AdapterError as `header`, and whoever asks for a tensor gets it as of
    `load`; the file must stay until then.
    """
    path = Path(path)
    with naming(path, "read"):
        with opened(path) as file:
            header = _read_header(file)
        where = places(path)
        whole = {name.removeprefix(SAVED): where.pop(name) for name in list(where) if name.startswith(SAVED)}
        for name, place in where.items():
            _check_tensor(name, place, header)
        targets = header["targets"]
        return Adapter(
            shapes={name: (module["shape"][0], module["shape"][1]) for name, module in header["modules"].items()},
            blocks=tuple(_block(header, number, where) for number in range(len(header["blocks"]))),
            targets=targets if isinstance(targets, str) else tuple(targets),
            base=header["base"],
            generator=header["generator"],
            saved={name: saved_of(name, about, whole[name], header) for name, about in header.get("saved", {}).items()},
        )


def places(path: Path) -> dict[str, Stored]:
    try:
        return stored(path)
    except ValueError as error:
        raise AdapterError(f"{error}; {DAMAGED}") from error


def header(path: str | os.PathLike[str]) -> dict[str, Any]:
    """The header of an adapter file, checked, without reading a tensor. The README says what is in it.

    Raises AdapterError as `load` does, save for damage to the tensors themselves.
    """
    path = Path(path)
    with naming(path, "read"), opened(path) as file:
        return _read_header(file)


def block_bytes(path: str | os.PathLike[str]) -> tuple[int, ...]:
    """Bytes of each block's tensors in the file: values, masks and stored A. Raises AdapterError as `header`."""
    path = Path(path)
    with naming(path, "read"), opened(path) as file:
        sizes = [0] * len(_read_header(file)["blocks"])
        for name in file.keys():  # noqa: SIM118  (a safetensors file is not a mapping)
            if name.startswith(SAVED):
                continue
            sizes[int(name.partition(".")[0])] += file.get_tensor(name).nbytes
        return tuple(sizes)


@contextmanager
def opened(path: Path) -> Iterator[Any]:
    if path.is_dir():
        raise AdapterError("this is a folder; give the adapter file itself")
    require_regular(path)
    try:
        with safe_open(path, framework="pt", device="cpu") as file:
            yield file
    except SafetensorError as error:
        with open(path, "rb") as start:
            first = start.read(4)
        if first == b"PK\3\4" or (first[:1] == b"\x80" and first[1:2] in (b"\2", b"\3", b"\4", b"\5")):
            what = "this is a pickle or a zip file, which is never opened; give an adapter.safetensors"
        else:
            what = f"this is not a whole safetensors file ({named(str(error))}); {DAMAGED}"
        raise AdapterError(what) from error


def serialize(header: Mapping[str, Any]) -> str:
    try:
        text = json.dumps(header, separators=(",", ":"), ensure_ascii=False, allow_nan=False)
        if json.loads(text) != header:
            raise ValueError("reading it gives something else")
        body = text.removesuffix("}")
        text = f'{body},"digest":"{digest(body.encode())}"}}'
    except (TypeError, ValueError, RecursionError) as error:
        raise AdapterError(f"the header cannot be JSON ({error}); give `base` as plain JSON data") from error
    _check_length(text)
    return text


def _check_length(text: str) -> None:
    if len(text) > _MAX_HEADER:
        raise AdapterError(f"the header has {len(text)} characters, at most {_MAX_HEADER} are read; use fewer blocks")


def _parse(text: str) -> Any:
    """Raises AdapterError for text that was changed, and for all that is JSON to Python but not to others."""
    _check_length(text)
    end = _DIGEST_AT_END.search(text)
    if end is None or end[1] != digest(text[: end.start()].encode()):
        raise AdapterError(f"the header does not match its digest; {DAMAGED}")
    try:
        return parse_json(text[: end.start()] + "}")
    except ValueError as error:
        raise AdapterError(f"the header is not valid JSON ({error}); {DAMAGED}") from error


def _read_header(file: Any) -> dict[str, Any]:
    header = parsed(file)
    _check_header(header)
    _check_names(header, set(file.keys()))
    return header  # type: ignore[no-any-return]


def parsed(file: Any) -> Any:
    """The header of an open file, as far as its digest vouches for it."""
    metadata = file.metadata() or {}
    if METADATA not in metadata:
        is_lora = any("lora_" in name for name in file.keys())  # noqa: SIM118  (a safetensors file is not a mapping)
        what = "a LoRA adapter of PEFT" if is_lora else "some other safetensors file"
        raise AdapterError(f"this is {what}: it has no {METADATA!r} in its metadata; give an adapter of lori_dist")
    return _parse(metadata[METADATA])


def _check_names(header: Mapping[str, Any], found: set[str]) -> None:
    expected = set()
    for name, module in header["modules"].items():
        for number, kept in enumerate(module["kept"]):
            if kept:
                expected.add(f"{number}.{name}.values")
            if 0 < kept < module["shape"][0] * _rank(header, name, number):
                expected.add(f"{number}.{name}.mask")
            if kept and header["blocks"][number]["seed"] is None:
                expected.add(f"{number}.{name}.a")
    expected |= {f"{SAVED}{name}" for name in header.get("saved", {})}
    if missing := expected - found:
        raise AdapterError(f"tensor {named(min(missing))} is missing; {DAMAGED}")
    if superfluous := found - expected:
        raise AdapterError(f"tensor {named(min(superfluous))} is not in the header; {DAMAGED}")


def _rank(header: Mapping[str, Any], module: str, number: int) -> int:
    """Rows of A of one block in one module."""
    about = header["modules"][module]
    rank: int = about["rank"][number] if "rank" in about else header["blocks"][number]["rank"]
    return rank


def _check_header(header: Any) -> None:
    if not isinstance(header, dict) or header.get("format") != FORMAT:
        raise AdapterError(f"header: format is not {FORMAT!r}; give an adapter file of lori_dist")
    version = header.get("version")
    if version == FORMS and "form" in header:
        if header.get("depends_on_input") is True:
            form = header["form"].get("name") if isinstance(header["form"], dict) else None
            raise AdapterError(dependent(named(form)))
        tasks = header.get("tasks")
        names = ", ".join(map(named, tasks[:8])) if isinstance(tasks, list) and tasks else "several"
        raise AdapterError(
            f"has an update for each of the tasks {names}; add @TASK to the path for the adapter of one of them, or "
            "write all of them with `lori export --format tasks`"
        )
    if type(version) is not int or version not in VERSIONS:
        known = " and ".join((", ".join(map(str, VERSIONS[:-1])), str(VERSIONS[-1])))
        raise AdapterError(f"header: version is {shown(version)}, this program reads {known}; update lori_dist")
    check_fields("header", header, (*_FIELDS, *(("saved",) if version > 2 else ())), version)
    for field, known in (("generator", GENERATOR), ("distribution", DISTRIBUTION)):
        if header[field] != known:
            raise AdapterError(
                f"header: {field} is {shown(header[field])}, this program makes A with {known!r}; update lori_dist"
            )
    check_choice("header: values_dtype", header["values_dtype"], VALUE_DTYPES)
    check_targets(header["targets"])
    require(isinstance(header["base"], dict), "header: base", header["base"], "an object")
    blocks, modules = header["blocks"], header["modules"]
    require(isinstance(blocks, list) and len(blocks) > 0, "header: blocks", blocks, "an array with at least one block")
    require(isinstance(modules, dict) and len(modules) > 0, "header: modules", modules, "an object with a module")
    for number, block in enumerate(blocks):
        _check_block(f"header: blocks[{number}]", block, version)
    for name, module in modules.items():
        check_name("header: modules", name)
        _check_module(f"header: module {named(name)}", module, blocks, version)
    if version > 2:
        check_saved(header["saved"])


def check_saved(parameters: Any) -> None:
    require(isinstance(parameters, dict) and len(parameters) > 0, "header: saved", parameters, "an object of tensors")
    for name, about in parameters.items():
        check_name("header: saved", name)
        where = f"header: saved {named(name)}"
        check_fields(where, about, ("shape", "digest"), 3)
        require(isinstance(about["shape"], list), f"{where}: shape", about["shape"], "an array")
        for size in about["shape"]:
            check_integer(f"{where}: shape", size, 1, MAX_ENTRIES)
        check_hash(f"{where}: digest", about["digest"])


def check_targets(targets: Any) -> None:
    names = [targets] if isinstance(targets, str) else targets
    require(isinstance(names, list) and len(names) > 0, "header: targets", targets, "a name or an array of names")
    for name in names:
        check_name("header: targets", name)


def _check_block(where: str, block: Any, version: int) -> None:
    check_fields(where, block, _BLOCK_FIELDS, version)
    check_name(f"{where}.name", block["name"])
    if version == 1 or block["seed"] is not None:
        check_integer(f"{where}.seed", block["seed"], 0, 2**64 - 1)
    check_integer(f"{where}.rank", block["rank"], 1, MAX_ENTRIES)
    for field in ("alpha", "weight"):
        value = block[field]
        fits = isinstance(value, int | float) and not isinstance(value, bool) and abs(value) <= sys.float_info.max
        require(fits, f"{where}.{field}", value, "a finite number")
    check_choice(f"{where}.dtype", block["dtype"], PROJECTION_DTYPES)


def _check_module(where: str, module: Any, blocks: list[Any], version: int) -> None:
    check_fields(where, module, _MODULE_FIELDS[version], version)
    for field in _MODULE_FIELDS[version]:
        length = 2 if field == "shape" else len(blocks)
        fits = isinstance(module[field], list) and len(module[field]) == length
        require(fits, f"{where}: {field}", module[field], f"an array of {length}")
    for size in module["shape"]:
        check_integer(f"{where}: shape", size, 1, MAX_ENTRIES)
    ranks = module["rank"] if version > 1 else [block["rank"] for block in blocks]
    for block, rank, kept, projection, hashed in zip(
        blocks, ranks, module["kept"], module["projection"], module["digest"], strict=True
    ):
        is_stored = block["seed"] is None
        check_integer(f"{where}: rank", rank, 0 if is_stored else block["rank"], block["rank"])
        if max(module["shape"]) * rank > MAX_ENTRIES:
            raise AdapterError(
                f"{where}: shape {module['shape']} with rank {rank} gives more than {MAX_ENTRIES} entries; "
                "use a smaller rank"
            )
        check_integer(f"{where}: kept", kept, 1 if is_stored and rank else 0, module["shape"][0] * rank)
        check_hash(f"{where}: digest", hashed)
        if is_stored and rank == 0:
            require(
                projection is None, f"{where}: projection", projection, "null where a block without a seed has no A"
            )
        else:
            check_hash(f"{where}: projection", projection)


def check_fields(where: str, value: Any, fields: tuple[str, ...], version: int) -> None:
    require(isinstance(value, dict), where, value, "an object")
    for field in fields:
        if field not in value:
            raise AdapterError(f"{where}: {field} is missing; {DAMAGED}")
    for field in value:
        if field not in fields:
            raise AdapterError(f"{where}: {named(field)} is not known in version {version}; update lori_dist")


def _describe(adapter: Adapter, dtype: torch.dtype) -> dict[str, Any]:
    """The header of the adapter if nothing were kept."""
    for block in adapter.blocks:
        if unknown := (set(block.entries) | set(block.checksums)) - set(adapter.shapes):
            raise AdapterError(
                f"block {named(block.name)} has {named(min(unknown))}, which has no shape; add its shape"
            )
    targets, version = adapter.targets, 2 if any(block.seed is None for block in adapter.blocks) else 1
    version = 3 if adapter.saved else version
    return {
        "format": FORMAT,
        "version": version,
        "generator": adapter.generator,
        "distribution": DISTRIBUTION,
        "values_dtype": str(dtype).removeprefix("torch."),
        "targets": targets if isinstance(targets, str) else list(targets),
        "base": dict(adapter.base),
        "blocks": [
            {
                "name": block.name,
                "seed": block.seed,
                "rank": block.rank,
                "alpha": block.alpha,
                "weight": block.weight,
                "dtype": str(block.dtype).removeprefix("torch."),
            }
            for block in adapter.blocks
        ],
        "modules": {
            name: {
                "shape": list(shape),
                **(
                    {"rank": [0 if block.seed is None else block.rank for block in adapter.blocks]}
                    if version > 1
                    else {}
                ),
                "kept": [0 for _ in adapter.blocks],
                "projection": [None if block.seed is None else block.checksums.get(name) for block in adapter.blocks],
                "digest": [digest() for _ in adapter.blocks],
            }
            for name, shape in adapter.shapes.items()
        },
        **({"saved": {name: about_saved(name, t, dtype) for name, t in adapter.saved.items()}} if version > 2 else {}),
    }


def about_saved(name: str, tensor: Tensor | Elsewhere, dtype: torch.dtype) -> dict[str, Any]:
    encoded = encode_saved(name, tensor, dtype)
    return {"shape": list(encoded.shape), "digest": digest(as_bytes(encoded.flatten()))}


def encode_saved(name: str, tensor: Tensor | Elsewhere, dtype: torch.dtype) -> Tensor:
    """A parameter that was trained in full, as it is written. Raises AdapterError if it is not finite in dtype."""
    encoded = in_memory(tensor).detach().to("cpu", dtype).contiguous()
    if not all_finite(encoded):
        raise AdapterError(f"{named(name)} has values that are not finite as {dtype}; write it as float32")
    return encoded


def saved_of(name: str, about: Mapping[str, Any], where: Stored, header: Mapping[str, Any]) -> StoredProjection:
    dtype, shape = VALUE_DTYPES[header["values_dtype"]], tuple(about["shape"])
    if (where.dtype, tuple(where.shape)) != (dtype, shape):
        raise AdapterError(f"tensor {named(SAVED + name)} is not {dtype} of {list(shape)}; {DAMAGED}")
    return StoredProjection(about=named(name), where=where, shape=shape, dtype=dtype, checksum=about["digest"])


def _verify(adapter: Adapter, dtype: torch.dtype) -> None:
    """Checks what will be copied from other files. Raises AdapterError that names the file."""
    for block in adapter.blocks:
        for entries in block.entries.values():
            if isinstance(entries, StoredEntries) and entries.place.dtype == dtype:
                entries.place.verify()
        for a in block.projections.values():
            if isinstance(a, StoredProjection):
                a.read()


def _encode(adapter: Adapter, dtype: torch.dtype, modules: dict[str, Any]) -> dict[str, Tensor | Stored]:
    """The tensors of the file; their counts and digests go into the header's `modules`.

    Those that lie in a file already, as they are to be written, stay there.
    """
    tensors: dict[str, Tensor | Stored] = {
        f"{SAVED}{name}": encode_saved(name, tensor, dtype) for name, tensor in adapter.saved.items()
    }
    for number, block in enumerate(adapter.blocks):
        for name, entries in block.entries.items():
            about, rank = f"{named(name)} in block {number}", block.rank_of(name)
            num_entries = adapter.shapes[name][0] * rank
            if block.seed is None and entries.kept:
                a, checksum = _encode_projection(f"A of {about}", block, name, adapter.shapes[name][1])
                tensors[f"{number}.{name}.a"] = a
                modules[name]["rank"][number] = rank
                modules[name]["projection"][number] = checksum
            values, mask, hashed = _encode_entries(f"B of {about}", entries, num_entries, dtype)
            if values.numel if isinstance(values, Stored) else values.numel():
                tensors[f"{number}.{name}.values"] = values
            if mask is not None:
                tensors[f"{number}.{name}.mask"] = mask
            modules[name]["kept"][number] = entries.kept
            modules[name]["digest"][number] = hashed
    return tensors


def _encode_entries(
    about: str, entries: Entries, num_entries: int, dtype: torch.dtype
) -> tuple[Tensor | Stored, Tensor | Stored | None, str]:
    """Values, mask and digest."""
    if isinstance(entries, StoredEntries) and (entries.place.dtype, entries.place.num_entries) == (dtype, num_entries):
        return entries.place.values, entries.place.mask, entries.place.digest
    values, mask = encode(about, copy.copy(entries), num_entries, dtype)  # a copy: what it reads goes with it
    return values, mask if mask.numel() else None, digest(as_bytes(values), as_bytes(mask))


def _encode_projection(about: str, block: Block, name: str, in_features: int) -> tuple[Tensor | Stored, str]:
    """A of a block without a seed, and its checksum."""
    a = block.projections.get(name)
    if isinstance(a, StoredProjection):
        return a.where, a.checksum
    encoded = encode_projection(about, cast(Tensor | None, a), block.rank, in_features, block.dtype)
    return encoded, digest(as_bytes(encoded.flatten()))


def _block(header: Mapping[str, Any], number: int, where: Mapping[str, Stored]) -> Block:
    about = header["blocks"][number]
    kept = {name: module for name, module in header["modules"].items() if module["kept"][number]}
    dtype = PROJECTION_DTYPES[about["dtype"]]
    return Block(
        name=about["name"],
        seed=about["seed"],
        rank=about["rank"],
        alpha=float(about["alpha"]),
        weight=float(about["weight"]),
        dtype=dtype,
        entries={name: _entries(header, number, name, where) for name in kept},
        checksums={
            name: module["projection"][number]
            for name, module in header["modules"].items()
            if module["projection"][number] is not None
        },
        projections={
            name: StoredProjection(
                about=f"A of {named(name)} in block {number}",
                where=where[f"{number}.{name}.a"],
                shape=(module["rank"][number], module["shape"][1]),
                dtype=dtype,
                checksum=module["projection"][number],
            )
            for name, module in kept.items()
            if about["seed"] is None
        },
    )


def _check_tensor(name: str, where: Stored, header: Mapping[str, Any]) -> None:
    number, kind = int(name.partition(".")[0]), name.rpartition(".")[2]
    dtype, num_dimensions = {
        "values": (VALUE_DTYPES[header["values_dtype"]], 1),
        "mask": (torch.uint8, 1),
        "a": (PROJECTION_DTYPES[header["blocks"][number]["dtype"]], 2),
    }[kind]
    if where.dtype != dtype or len(where.shape) != num_dimensions:
        found = f"{where.dtype} with {len(where.shape)} dimensions"
        wanted = "one" if num_dimensions == 1 else "two"
        raise AdapterError(f"tensor {named(name)} is {found}; it must be {dtype} with {wanted}; {DAMAGED}")


def _entries(header: Mapping[str, Any], number: int, name: str, where: Mapping[str, Stored]) -> StoredEntries:
    module = header["modules"][name]
    return StoredEntries(
        Place(
            about=f"B of {named(name)} in block {number}",
            values=where[f"{number}.{name}.values"],
            mask=where.get(f"{number}.{name}.mask"),
            kept=module["kept"][number],
            num_entries=module["shape"][0] * _rank(header, name, number),
            dtype=VALUE_DTYPES[header["values_dtype"]],
            digest=module["digest"][number],
        )
    )
