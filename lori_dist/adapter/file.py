"""The adapter file: kept entries, their masks and one JSON header, in a safetensors file. The README specifies it."""

import hashlib
import json
import math
import os
import re
import stat
import sys
import zlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from lori_dist.adapter.adapter import Adapter, Block, Entries
from lori_dist.adapter.projection import DTYPES, GENERATOR
from lori_dist.errors import AdapterError
from lori_dist.tensors import write

FORMAT = "lori_dist.adapter"
VERSIONS = (1, 2)
"""Read. Version 2 is written only where a block has no seed, so that all other files stay as they were."""
DISTRIBUTION = "uniform"
"""Of the entries of A. Together with the generator it says what A is."""

_METADATA = "lori"  # the key of the header in the safetensors metadata
_DAMAGED = "the file is damaged, write it again"
_DIGEST_AT_END = re.compile(r',"digest":"([0-9a-f]{16})"\}\Z')
_HEX = re.compile(r"[0-9a-f]{16}\Z")
_PROJECTION_DTYPES = {str(dtype).removeprefix("torch."): dtype for dtype in DTYPES}
_VALUE_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
_MAX_ENTRIES = 2**31 - 1  # of A or B of one module: positions are int32
_MAX_HEADER = 1 << 24  # characters; parsed, JSON can take thirty times its size

_FIELDS = ("format", "version", "generator", "distribution", "values_dtype", "targets", "base", "blocks", "modules")
_BLOCK_FIELDS = ("name", "seed", "rank", "alpha", "weight", "dtype")
_MODULE_FIELDS = {
    1: ("shape", "kept", "projection", "digest"),
    2: ("shape", "rank", "kept", "projection", "digest"),
}

_STRATEGIES = (zlib.Z_HUFFMAN_ONLY, zlib.Z_RLE, zlib.Z_DEFAULT_STRATEGY)  # scattered, whole rows, whole columns
_SAMPLE = 1 << 14  # bytes; matching costs 20 ms for 115 kB of a random mask, where it gains nothing
_CHUNK = 1 << 16  # bytes of a mask at a time


def save(adapter: Adapter, path: str | os.PathLike[str], *, dtype: torch.dtype = torch.float32) -> None:
    """Writes one adapter file. It appears whole or not at all, and the same adapter gives the same bytes.

    dtype: what values are rounded to: float32, bfloat16 or float16. Entries without values are not written.
    Raises AdapterError if the adapter is not consistent, if values are not finite in dtype, or if it cannot be written.
    """
    path = Path(path)
    with _naming(path, "written"):
        header = _describe(adapter, dtype)
        _check_header(header)
        tensors = _encode(adapter, dtype, header["modules"])
        names = sorted(tensors, key=lambda name: (-tensors[name].itemsize, name))  # the wider first, so all are aligned
        layout = {name: (tensors[name].dtype, tuple(tensors[name].shape)) for name in names}
        write(path, layout, (tensors[name] for name in names), {_METADATA: _serialize(header)})


def load(path: str | os.PathLike[str]) -> Adapter:
    """The adapter of a file, on the CPU, its values in the dtype they are stored in.

    Raises AdapterError that says what is wrong and where, if this is not an undamaged adapter file of a known version.
    """
    path = Path(path)
    with _naming(path, "read"), _opened(path) as file:
        header = _read_header(file)
        blocks = tuple(_block(file, header, number) for number in range(len(header["blocks"])))
        targets = header["targets"]
        return Adapter(
            shapes={name: (module["shape"][0], module["shape"][1]) for name, module in header["modules"].items()},
            blocks=blocks,
            targets=targets if isinstance(targets, str) else tuple(targets),
            base=header["base"],
            generator=header["generator"],
        )


def header(path: str | os.PathLike[str]) -> dict[str, Any]:
    """The header of an adapter file, checked, without reading a tensor. The README says what is in it.

    Raises AdapterError as `load` does, save for damage to the tensors themselves.
    """
    path = Path(path)
    with _naming(path, "read"), _opened(path) as file:
        return _read_header(file)


def block_bytes(path: str | os.PathLike[str]) -> tuple[int, ...]:
    """What the tensors of each block take in the file: values, masks and stored A. Raises AdapterError as `header`."""
    path = Path(path)
    with _naming(path, "read"), _opened(path) as file:
        sizes = [0] * len(_read_header(file)["blocks"])
        for name in file.keys():  # noqa: SIM118  (a safetensors file is no mapping)
            sizes[int(name.partition(".")[0])] += file.get_tensor(name).nbytes
        return tuple(sizes)


@contextmanager
def _naming(path: Path, verb: str) -> Iterator[None]:
    try:
        yield
    except AdapterError as error:
        raise AdapterError(f"{path}: {error}") from error
    except OSError as error:
        raise AdapterError(f"{path}: it cannot be {verb}: {error.strerror or error}; check the path") from error


@contextmanager
def _opened(path: Path) -> Iterator[Any]:
    status = path.stat()
    if not stat.S_ISREG(status.st_mode):
        kind = "a folder" if stat.S_ISDIR(status.st_mode) else "not a regular file"
        raise AdapterError(f"this is {kind}; give the adapter file itself")
    try:
        with safe_open(path, framework="pt", device="cpu") as file:
            yield file
    except SafetensorError as error:
        with open(path, "rb") as start:
            first = start.read(4)
        if first == b"PK\3\4" or (first[:1] == b"\x80" and first[1:2] in (b"\2", b"\3", b"\4", b"\5")):
            what = "this is a pickle or a zip file, which is never opened; give an adapter.safetensors"
        else:
            what = f"this is no whole safetensors file ({_named(str(error))}); {_DAMAGED}"
        raise AdapterError(what) from error


def _serialize(header: Mapping[str, Any]) -> str:
    try:
        text = json.dumps(header, separators=(",", ":"), ensure_ascii=False, allow_nan=False)
        if json.loads(text) != header:
            raise ValueError("reading it gives something else")
        body = text.removesuffix("}")
        text = f'{body},"digest":"{_digest(body.encode())}"}}'
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
    if end is None or end[1] != _digest(text[: end.start()].encode()):
        raise AdapterError(f"the header is not what its digest is of; {_DAMAGED}")
    try:
        header = json.loads(
            text[: end.start()] + "}", object_pairs_hook=_unique, parse_float=_finite, parse_constant=_finite
        )
        json.dumps(header, ensure_ascii=False).encode()  # escapes can make text that cannot be shown or written again
        return header
    except (ValueError, RecursionError) as error:
        raise AdapterError(f"the header is no valid JSON ({error}); {_DAMAGED}") from error


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(pairs)
    if len(result) < len(pairs):
        raise ValueError("an object has the same key twice")
    return result


def _finite(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise ValueError(f"{text[:20]} is not a finite number")
    return value


def _read_header(file: Any) -> dict[str, Any]:
    metadata = file.metadata() or {}
    names = set(file.keys())
    if _METADATA not in metadata:
        what = "a LoRA adapter of PEFT" if any("lora_" in name for name in names) else "some other safetensors file"
        raise AdapterError(f"this is {what}: it has no {_METADATA!r} in its metadata; give an adapter of lori_dist")
    header = _parse(metadata[_METADATA])
    _check_header(header)
    _check_names(header, names)
    return header  # type: ignore[no-any-return]


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
    if missing := expected - found:
        raise AdapterError(f"tensor {_named(min(missing))} is missing; {_DAMAGED}")
    if superfluous := found - expected:
        raise AdapterError(f"tensor {_named(min(superfluous))} does not follow from the header; {_DAMAGED}")


def _rank(header: Mapping[str, Any], module: str, number: int) -> int:
    """Rows of A of one block in one module."""
    about = header["modules"][module]
    rank: int = about["rank"][number] if "rank" in about else header["blocks"][number]["rank"]
    return rank


def _check_header(header: Any) -> None:
    if not isinstance(header, dict) or header.get("format") != FORMAT:
        raise AdapterError(f"header: format is not {FORMAT!r}; give an adapter file of lori_dist")
    version = header.get("version")
    if type(version) is not int or version not in VERSIONS:
        known = " and ".join(map(str, VERSIONS))
        raise AdapterError(f"header: version is {_shown(version)}, this program reads {known}; update lori_dist")
    _check_fields("header", header, _FIELDS, version)
    for field, known in (("generator", GENERATOR), ("distribution", DISTRIBUTION)):
        if header[field] != known:
            raise AdapterError(
                f"header: {field} is {_shown(header[field])}, this program makes A with {known!r}; update lori_dist"
            )
    _check_choice("header: values_dtype", header["values_dtype"], _VALUE_DTYPES)
    _check_targets(header["targets"])
    _require(isinstance(header["base"], dict), "header: base", header["base"], "an object")
    blocks, modules = header["blocks"], header["modules"]
    _require(isinstance(blocks, list) and len(blocks) > 0, "header: blocks", blocks, "an array with at least one block")
    _require(isinstance(modules, dict) and len(modules) > 0, "header: modules", modules, "an object with a module")
    for number, block in enumerate(blocks):
        _check_block(f"header: blocks[{number}]", block, version)
    for name, module in modules.items():
        _check_name("header: modules", name)
        _check_module(f"header: module {_named(name)}", module, blocks, version)


def _check_targets(targets: Any) -> None:
    names = [targets] if isinstance(targets, str) else targets
    _require(isinstance(names, list) and len(names) > 0, "header: targets", targets, "a name or an array of names")
    for name in names:
        _check_name("header: targets", name)


def _check_block(where: str, block: Any, version: int) -> None:
    _check_fields(where, block, _BLOCK_FIELDS, version)
    _check_name(f"{where}.name", block["name"])
    if version == 1 or block["seed"] is not None:
        _check_integer(f"{where}.seed", block["seed"], 0, 2**64 - 1)
    _check_integer(f"{where}.rank", block["rank"], 1, _MAX_ENTRIES)
    for field in ("alpha", "weight"):
        value = block[field]
        fits = isinstance(value, int | float) and not isinstance(value, bool) and abs(value) <= sys.float_info.max
        _require(fits, f"{where}.{field}", value, "a finite number")
    _check_choice(f"{where}.dtype", block["dtype"], _PROJECTION_DTYPES)


def _check_module(where: str, module: Any, blocks: list[Any], version: int) -> None:
    _check_fields(where, module, _MODULE_FIELDS[version], version)
    for field in _MODULE_FIELDS[version]:
        length = 2 if field == "shape" else len(blocks)
        fits = isinstance(module[field], list) and len(module[field]) == length
        _require(fits, f"{where}: {field}", module[field], f"an array of {length}")
    for size in module["shape"]:
        _check_integer(f"{where}: shape", size, 1, _MAX_ENTRIES)
    ranks = module["rank"] if version > 1 else [block["rank"] for block in blocks]
    for block, rank, kept, projection, digest in zip(
        blocks, ranks, module["kept"], module["projection"], module["digest"], strict=True
    ):
        is_stored = block["seed"] is None
        _check_integer(f"{where}: rank", rank, 0 if is_stored else block["rank"], block["rank"])
        if max(module["shape"]) * rank > _MAX_ENTRIES:
            raise AdapterError(
                f"{where}: shape {module['shape']} with rank {rank} gives more than {_MAX_ENTRIES} entries; "
                "use a smaller rank"
            )
        _check_integer(f"{where}: kept", kept, 1 if is_stored and rank else 0, module["shape"][0] * rank)
        _check_hash(f"{where}: digest", digest)
        if is_stored and rank == 0:
            _require(
                projection is None, f"{where}: projection", projection, "null where a block without a seed has no A"
            )
        else:
            _check_hash(f"{where}: projection", projection)


def _check_hash(where: str, value: Any) -> None:
    _require(isinstance(value, str) and _HEX.match(value) is not None, where, value, "16 digits of 0-9a-f")


def _check_fields(where: str, value: Any, fields: tuple[str, ...], version: int) -> None:
    _require(isinstance(value, dict), where, value, "an object")
    for field in fields:
        if field not in value:
            raise AdapterError(f"{where}: {field} is missing; {_DAMAGED}")
    for field in value:
        if field not in fields:
            raise AdapterError(f"{where}: {_named(field)} is not known in version {version}; update lori_dist")


def _check_name(where: str, value: Any) -> None:
    _require(isinstance(value, str) and value != "", where, value, "a text that is not empty")


def _check_choice(where: str, value: Any, choices: Mapping[str, Any]) -> None:
    _require(isinstance(value, str) and value in choices, where, value, f"one of {', '.join(choices)}")


def _check_integer(where: str, value: Any, smallest: int, largest: int) -> None:
    fits = type(value) is int and smallest <= value <= largest  # bool is an int too
    _require(fits, where, value, f"an integer from {smallest} to {largest}")


def _require(fits: bool, where: str, value: Any, wanted: str) -> None:
    if not fits:
        raise AdapterError(f"{where} is {_shown(value)}; it must be {wanted}")


def _named(name: Any) -> str:
    """A name for messages, which must stay short and printable whatever is in the file."""
    return name if isinstance(name, str) and name.isprintable() and 0 < len(name) <= 120 else _shown(name)


def _shown(value: Any) -> str:
    """A value for messages."""
    if isinstance(value, str):
        return ascii(value[:120])
    if isinstance(value, int) and abs(value) > 2**64:
        return f"an integer of {value.bit_length()} bits"
    if value is None or isinstance(value, bool | int | float):
        return repr(value)
    return f"of type {type(value).__name__}"


def _describe(adapter: Adapter, dtype: torch.dtype) -> dict[str, Any]:
    """The header of the adapter if nothing were kept."""
    for block in adapter.blocks:
        if unknown := (set(block.entries) | set(block.checksums)) - set(adapter.shapes):
            raise AdapterError(
                f"block {_named(block.name)} has {_named(min(unknown))}, which has no shape; add its shape"
            )
    targets, version = adapter.targets, 2 if any(block.seed is None for block in adapter.blocks) else 1
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
                "digest": [_digest() for _ in adapter.blocks],
            }
            for name, shape in adapter.shapes.items()
        },
    }


def _encode(adapter: Adapter, dtype: torch.dtype, modules: dict[str, Any]) -> dict[str, Tensor]:
    """The tensors of the file; their counts and digests go into the header's `modules`."""
    tensors = {}
    for number, block in enumerate(adapter.blocks):
        for name, entries in block.entries.items():
            about, rank = f"B of {_named(name)} in block {number}", block.rank_of(name)
            num_entries = adapter.shapes[name][0] * rank
            if block.seed is None and entries.values.numel():
                a = _encode_projection(f"A of {_named(name)} in block {number}", block, name, adapter.shapes[name][1])
                tensors[f"{number}.{name}.a"] = a
                modules[name]["rank"][number] = rank
                modules[name]["projection"][number] = _digest(_bytes(a.flatten()))
            values, mask = _encode_entries(about, entries, num_entries, dtype)
            if values.numel():
                tensors[f"{number}.{name}.values"] = values
            if mask.numel():
                tensors[f"{number}.{name}.mask"] = mask
            modules[name]["kept"][number] = values.numel()
            modules[name]["digest"][number] = _digest(_bytes(values), _bytes(mask))
    return tensors


def _encode_projection(about: str, block: Block, name: str, in_features: int) -> Tensor:
    """A of a block without a seed, on the CPU."""
    a = block.projections.get(name)
    if type(a) is not Tensor or a.dtype != block.dtype or a.ndim != 2 or a.is_meta:
        found = "missing" if a is None else f"a {type(a).__name__}, {a.dtype} {tuple(a.shape)} on {a.device}"
        raise AdapterError(f"{about} is {found}; without a seed, give it as a plain {block.dtype} matrix")
    if not 0 < a.shape[0] <= block.rank or a.shape[1] != in_features:
        raise AdapterError(
            f"{about} has the shape {tuple(a.shape)}; wanted at most {block.rank} rows, and {in_features} columns"
        )
    if not bool(torch.isfinite(a).all()):
        raise AdapterError(f"{about} has values that are not finite; merge again")
    return a.detach().to("cpu", copy=True).contiguous()


def _encode_entries(about: str, entries: Entries, num_entries: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Values and mask, on the CPU. A mask without elements: all entries are kept, or none."""
    for what, tensor in (("values", entries.values), ("index", entries.index)):
        if tensor is None:
            continue
        if type(tensor) not in (Tensor, nn.Parameter) or tensor.ndim != 1 or tensor.is_meta:
            found = f"a {type(tensor).__name__} of shape {tuple(tensor.shape)} on {tensor.device}"
            raise AdapterError(f"{about}: {what} is {found}; give a plain tensor of one dimension that has data")
    values = entries.values.detach().to("cpu", dtype).contiguous()
    if not bool(torch.isfinite(values).all()):
        raise AdapterError(f"{about} has values that are not finite as {dtype}; write it as float32, or train it again")
    mask = torch.empty(0, dtype=torch.uint8, device="cpu")
    if entries.index is None:
        if values.numel() != num_entries:
            raise AdapterError(f"{about} has {values.numel()} values for {num_entries} entries; give their index")
        return values, mask
    index = entries.index.detach().cpu()
    _check_index(about, index, values.numel(), num_entries)
    if 0 < values.numel() < num_entries:
        mask = _pack(index, num_entries)
    return values, mask


def _check_index(about: str, index: Tensor, num_values: int, num_entries: int) -> None:
    if index.dtype != torch.int32:
        raise AdapterError(f"{about}: index is {index.dtype}; give int32")
    if index.numel() != num_values:
        raise AdapterError(f"{about} has {num_values} values, but {index.numel()} positions; give one position a value")
    if num_values and (index[0] < 0 or index[-1] >= num_entries or not bool((index[1:] > index[:-1]).all())):
        raise AdapterError(f"{about}: index is not ascending within [0, {num_entries}); sort it")


def _pack(index: Tensor, num_entries: int) -> Tensor:
    kept = np.zeros(num_entries, dtype=bool)
    kept[index.numpy()] = True
    bits = np.packbits(kept, bitorder="little").tobytes()
    middle = max(0, len(bits) - _SAMPLE) // 2
    sample = bits[middle : middle + _SAMPLE]
    best = min(_STRATEGIES, key=lambda strategy: len(_deflate(sample, strategy)))
    return torch.frombuffer(bytearray(_deflate(bits, best)), dtype=torch.uint8)


def _deflate(data: bytes, strategy: int) -> bytes:
    stream = zlib.compressobj(level=6, memLevel=9, strategy=strategy)
    return stream.compress(data) + stream.flush()


def _block(file: Any, header: Mapping[str, Any], number: int) -> Block:
    about = header["blocks"][number]
    dtype = _VALUE_DTYPES[header["values_dtype"]]
    kept = {name: module for name, module in header["modules"].items() if module["kept"][number]}
    entries = {
        name: _decode_entries(file, number, name, module, _rank(header, name, number), dtype)
        for name, module in kept.items()
    }
    projection_dtype = _PROJECTION_DTYPES[about["dtype"]]
    return Block(
        name=about["name"],
        seed=about["seed"],
        rank=about["rank"],
        alpha=float(about["alpha"]),
        weight=float(about["weight"]),
        dtype=projection_dtype,
        entries=entries,
        checksums={
            name: module["projection"][number]
            for name, module in header["modules"].items()
            if module["projection"][number] is not None
        },
        projections={
            name: _decode_projection(file, number, name, module, projection_dtype)
            for name, module in kept.items()
            if about["seed"] is None
        },
    )


def _decode_projection(file: Any, number: int, name: str, module: Mapping[str, Any], dtype: torch.dtype) -> Tensor:
    about, wanted = f"A of {_named(name)} in block {number}", (module["rank"][number], module["shape"][1])
    a = _tensor(file, f"{number}.{name}.a", dtype, num_dimensions=2)
    if tuple(a.shape) != wanted:
        raise AdapterError(f"{about} has the shape {tuple(a.shape)}, its header has {wanted}; {_DAMAGED}")
    if _digest(_bytes(a.flatten())) != module["projection"][number]:
        raise AdapterError(f"{about} is not what its checksum is of; {_DAMAGED}")
    if not bool(torch.isfinite(a).all()):
        raise AdapterError(f"{about} has values that are not finite; {_DAMAGED}")
    return a


def _decode_entries(
    file: Any, number: int, name: str, module: Mapping[str, Any], rank: int, dtype: torch.dtype
) -> Entries:
    about = f"B of {_named(name)} in block {number}"
    kept, num_entries = module["kept"][number], module["shape"][0] * rank
    values = _tensor(file, f"{number}.{name}.values", dtype)
    if values.numel() != kept:
        raise AdapterError(f"{about} has {values.numel()} values, its header keeps {kept}; {_DAMAGED}")
    mask = torch.empty(0, dtype=torch.uint8, device="cpu")
    if kept < num_entries:
        mask = _tensor(file, f"{number}.{name}.mask", torch.uint8)
    if _digest(_bytes(values), _bytes(mask)) != module["digest"][number]:
        raise AdapterError(f"{about} is not what its digest is of; {_DAMAGED}")
    if not bool(torch.isfinite(values).all()):
        raise AdapterError(f"{about} has values that are not finite; {_DAMAGED}")
    index = _unpack(about, _bytes(mask), num_entries, kept) if kept < num_entries else None
    return Entries(index=index, values=values)


def _tensor(file: Any, name: str, dtype: torch.dtype, *, num_dimensions: int = 1) -> Tensor:
    tensor: Tensor = file.get_tensor(name)
    if tensor.dtype != dtype or tensor.ndim != num_dimensions:
        found = f"{tensor.dtype} with {tensor.ndim} dimensions"
        wanted = "one" if num_dimensions == 1 else "two"
        raise AdapterError(f"tensor {_named(name)} is {found}; it must be {dtype} with {wanted}; {_DAMAGED}")
    return tensor.clone()  # what safe_open gives is a view of the file, and changes with it


def _unpack(about: str, stream: memoryview, num_entries: int, kept: int) -> Tensor:
    """The positions of the bits that are set. Memory follows `kept`, whatever the stream unfolds to."""
    num_bytes = -(-num_entries // 8)
    index = np.empty(kept, dtype=np.int32)
    num_read = num_found = 0
    try:
        for chunk in _inflate(stream):
            found = np.flatnonzero(np.unpackbits(np.frombuffer(chunk, dtype=np.uint8), bitorder="little").view(bool))
            found += 8 * num_read
            num_read += len(chunk)
            if num_read > num_bytes or (found.size and found[-1] >= num_entries):
                raise AdapterError(f"the mask of {about} is longer than its {num_entries} entries; {_DAMAGED}")
            if num_found + found.size > kept:
                raise AdapterError(f"{about} has {kept} values, its mask keeps more; {_DAMAGED}")
            index[num_found : num_found + found.size] = found
            num_found += found.size
    except zlib.error as error:
        raise AdapterError(f"the mask of {about} cannot be unpacked ({error}); {_DAMAGED}") from error
    if num_read < num_bytes:
        raise AdapterError(f"the mask of {about} is shorter than its {num_entries} entries; {_DAMAGED}")
    if num_found < kept:
        raise AdapterError(f"{about} has {kept} values, its mask keeps {num_found}; {_DAMAGED}")
    return torch.from_numpy(index)


def _inflate(stream: memoryview) -> Iterator[bytes]:
    """Chunks of what a zlib stream unfolds to. Raises zlib.error unless it is whole and nothing follows it."""
    inflater = zlib.decompressobj()
    for start in range(0, len(stream), _CHUNK):
        chunk = inflater.decompress(stream[start : start + _CHUNK], _CHUNK)
        while chunk:
            yield chunk
            chunk = inflater.decompress(inflater.unconsumed_tail, _CHUNK)
    if not inflater.eof:
        raise zlib.error("the stream ends early")
    if inflater.unused_data:
        raise zlib.error("bytes follow the stream")


def _bytes(tensor: Tensor) -> memoryview:
    return tensor.view(torch.uint8).numpy().data


def _digest(*parts: bytes | memoryview) -> str:
    digest = hashlib.blake2b(digest_size=8)
    for part in parts:
        digest.update(part)
    return digest.hexdigest()
