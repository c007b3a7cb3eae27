"""The file of a form in which tasks have updates of their own: version 4 of the adapter file.

Its tensors are `f.MODULE.NAME` and, where some entries are not kept, `f.MODULE.NAME.mask`; FORMAT.md specifies both.
"""

import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch

from lori_dist import plugin, tensors
from lori_dist.adapter.adapter import Adapter, Elsewhere, Entries
from lori_dist.adapter.form_tensors import Sizes
from lori_dist.adapter.projection import GENERATOR
from lori_dist.adapter.splitting import of_task, split
from lori_dist.adapter.task_adapter import TaskAdapter, loaded_formed
from lori_dist.errors import AdapterError, ConfigError
from lori_dist.formats import native
from lori_dist.formats.checks import (
    MAX_ENTRIES,
    check_choice,
    check_flag,
    check_hash,
    check_integer,
    check_name,
    check_number,
    named,
    require,
    shown,
)
from lori_dist.formats.lazy import DAMAGED, Place, StoredEntries, as_bytes, digest, encode, naming
from lori_dist.forms import FormChoice
from lori_dist.plugin import nearest
from lori_dist.tensors import Stored

VERSION = native.FORMS
_FIELDS = (
    *("format", "version", "generator", "distribution", "values_dtype", "targets", "base"),
    *("form", "depends_on_input", "tasks", "seed", "seeds", "rank", "alpha", "trains_a", "dtype", "modules"),
)
_MODULE_FIELDS = ("shape", "projections", "tensors")
_TENSOR_FIELDS = ("shape", "kept", "digest")
_MAX_TASKS = 1 << 12


def save(adapter: TaskAdapter, path: str | os.PathLike[str], *, dtype: torch.dtype = torch.float32) -> None:
    """Writes the file of a form. It appears whole or not at all, and the same adapter gives the same bytes.

    dtype: what values are rounded to: float32, bfloat16 or float16. Raises AdapterError as `native.save`, and
    for an A that was computed from data, which an ordinary adapter stores and this file does not.
    """
    if adapter.given:
        raise AdapterError(
            f"form: {adapter.form.name} began with an A computed from data; split it, and save an adapter"
        )
    path = Path(path)
    with naming(path, "written"):
        encoded: dict[str, torch.Tensor | Stored] = {}
        modules, form = dict[str, Any](), adapter.made
        for module, shape in adapter.shapes.items():
            sizes, about = adapter.sizes(module, form), dict[str, Any]()
            for name, entries in adapter.tensors.get(module, {}).items():
                about[name] = _encode(encoded, sizes, name, entries, dtype)
            modules[module] = {
                "shape": list(shape),
                "projections": list(adapter.checksums[module]),
                "tensors": about,
            }
        header = {
            "format": native.FORMAT,
            "version": VERSION,
            "generator": adapter.generator,
            "distribution": native.DISTRIBUTION,
            "values_dtype": _dtype(dtype),
            "targets": adapter.targets if isinstance(adapter.targets, str) else list(adapter.targets),
            "base": dict(adapter.base),
            "form": {"name": adapter.form.name, "options": dict(adapter.form.options)},
            "depends_on_input": adapter.form.is_dependent,
            "tasks": list(adapter.form.tasks),
            "seed": adapter.seed,
            "seeds": list(adapter.form.seeds),
            "rank": adapter.rank,
            "alpha": adapter.alpha,
            "trains_a": adapter.trains_a,
            "dtype": _dtype(adapter.dtype),
            "modules": modules,
        }
        if adapter.saved:
            header["saved"] = {name: native.about_saved(name, t, dtype) for name, t in adapter.saved.items()}
            encoded |= {
                f"{native.SAVED}{name}": native.encode_saved(name, t, dtype) for name, t in adapter.saved.items()
            }
        _check_header(header)
        tensors.save(path, encoded, {native.METADATA: native.serialize(header)})


def _dtype(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _encode(
    into: dict[str, torch.Tensor | Stored], sizes: Sizes, name: str, entries: Entries, dtype: torch.dtype
) -> dict[str, Any]:
    """Adds a tensor as it is written. Returns what the header says of it."""
    values, mask = encode(f"{name} of {named(sizes.site.module)}", entries, sizes.numel(name), dtype)
    key = _key(sizes.site.module, name)
    into[key] = values
    if mask.numel():
        into[f"{key}.mask"] = mask
    return {
        "shape": list(sizes.shape(name)),
        "kept": entries.kept,
        "digest": digest(as_bytes(values), as_bytes(mask)),
    }


def _key(module: str, name: str) -> str:
    return f"f.{module}.{name}"


def load(path: str | os.PathLike[str]) -> TaskAdapter:
    """The adapter of a form's file, on the CPU, its values in the dtype they are stored in.

    Raises AdapterError that says what is wrong and where, if this is not an undamaged file of version 4.
    """
    path = Path(path)
    with naming(path, "read"):
        with native.opened(path) as file:
            header = native.parsed(file)
            if not is_one(header):
                raise AdapterError("has one update for all rows, not one for each task; load it as an adapter")
            _check_header(header)
        return loaded_formed(_made(header, native.places(path)))


def is_one(header: Any) -> bool:
    return isinstance(header, dict) and header.get("version") == VERSION


def load_tasks(path: str | os.PathLike[str]) -> dict[str, Adapter]:
    """Task -> its adapter, of a file in which each task has an update of its own. Raises AdapterError as `load`."""
    return split(load(path))


def load_task(path: str | os.PathLike[str], task: str) -> Adapter:
    """The adapter of one task. Raises AdapterError as `load`, and for a task that it does not have."""
    found = load(path)
    if task not in (tasks := found.form.tasks):
        raise AdapterError(f"{path}: has no task {task!r}; there are {', '.join(tasks)}.{nearest(task, tasks)}")
    return of_task(found, task)


# --- what a file says ------------------------------------------------------------------------------------------------


def _check_header(header: Mapping[str, Any]) -> None:
    more = ("saved",) if "saved" in header else ()
    native.check_fields("header", header, (*_FIELDS, *more), VERSION)
    for name, known in (("generator", GENERATOR), ("distribution", native.DISTRIBUTION)):
        if header[name] != known:
            raise AdapterError(
                f"header: {name} is {shown(header[name])}, this program makes A with {known!r}; update lori_dist"
            )
    check_choice("header: values_dtype", header["values_dtype"], native.VALUE_DTYPES)
    check_choice("header: dtype", header["dtype"], native.PROJECTION_DTYPES)
    native.check_targets(header["targets"])
    require(isinstance(header["base"], dict), "header: base", header["base"], "an object")
    form, tasks, seeds = header["form"], header["tasks"], header["seeds"]
    native.check_fields("header: form", form, ("name", "options"), VERSION)
    check_name("header: form.name", form["name"])
    require(isinstance(form["options"], dict), "header: form.options", form["options"], "an object")
    require(isinstance(tasks, list) and 0 < len(tasks) <= _MAX_TASKS, "header: tasks", tasks, "an array of names")
    for task in tasks:
        check_name("header: tasks", task)
    require(isinstance(seeds, list), "header: seeds", seeds, "an array")
    for seed in (header["seed"], *seeds):
        check_integer("header: seeds", seed, 0, 2**64 - 1)
    check_integer("header: rank", header["rank"], 1, MAX_ENTRIES)
    check_number("header: alpha", header["alpha"])
    check_flag("header: depends_on_input", header["depends_on_input"])
    check_flag("header: trains_a", header["trains_a"])
    modules = header["modules"]
    require(isinstance(modules, dict) and len(modules) > 0, "header: modules", modules, "an object with a module")
    for name, module in modules.items():
        check_name("header: modules", name)
        _check_module(f"header: module {named(name)}", module)
    if more:
        native.check_saved(header["saved"])


def _check_module(where: str, module: Any) -> None:
    native.check_fields(where, module, _MODULE_FIELDS, VERSION)
    shape = module["shape"]
    require(isinstance(shape, list) and len(shape) == 2, f"{where}: shape", shape, "an array of 2")
    for size in shape:
        check_integer(f"{where}: shape", size, 1, MAX_ENTRIES)
    require(isinstance(module["projections"], list), f"{where}: projections", module["projections"], "an array")
    for hashed in module["projections"]:
        check_hash(f"{where}: projections", hashed)
    require(isinstance(module["tensors"], dict), f"{where}: tensors", module["tensors"], "an object")
    for name, about in module["tensors"].items():
        inside = f"{where}: {named(name)}"
        require(name.isidentifier(), f"{where}: tensors", name, "an identifier")
        native.check_fields(inside, about, _TENSOR_FIELDS, VERSION)
        require(isinstance(about["shape"], list), f"{inside}: shape", about["shape"], "an array")
        for size in about["shape"]:
            check_integer(f"{inside}: shape", size, 1, MAX_ENTRIES)
        check_integer(f"{inside}: kept", about["kept"], 1, MAX_ENTRIES)
        check_hash(f"{inside}: digest", about["digest"])


def _made(header: Mapping[str, Any], where: dict[str, Stored]) -> TaskAdapter:
    """The adapter, its tensors still in the file."""
    form = _form(header)
    adapter = TaskAdapter(
        form=form,
        rank=header["rank"],
        alpha=float(header["alpha"]),
        seed=header["seed"],
        trains_a=header["trains_a"],
        dtype=native.PROJECTION_DTYPES[header["dtype"]],
        shapes={name: (module["shape"][0], module["shape"][1]) for name, module in header["modules"].items()},
        tensors={},
        checksums={name: tuple(module["projections"]) for name, module in header["modules"].items()},
        targets=header["targets"] if isinstance(header["targets"], str) else tuple(header["targets"]),
        base=header["base"],
        generator=header["generator"],
    )
    depends = header["depends_on_input"]
    require(depends == form.is_dependent, "header: depends_on_input", depends, str(form.is_dependent).lower())
    made, dtype, found = adapter.made, native.VALUE_DTYPES[header["values_dtype"]], dict[str, dict[str, Entries]]()
    seeded = sum(
        len(form.tasks) if entry.per_task else 1
        for entry in adapter.sizes(next(iter(adapter.shapes)), made).entries.values()
        if entry.start == "a"
    )
    for module, about in header["modules"].items():
        require(
            len(about["projections"]) == seeded,
            f"header: module {named(module)}: projections",
            about["projections"],
            f"an array of {seeded}",
        )
        found[module] = dict(_entries(adapter.sizes(module, made), about["tensors"], where, dtype))
    saved: dict[str, torch.Tensor | Elsewhere] = {
        name: native.saved_of(name, about, _taken(where, f"{native.SAVED}{name}"), header)
        for name, about in header.get("saved", {}).items()
    }
    if where:
        raise AdapterError(f"tensor {named(min(where))} is not in the header; {DAMAGED}")
    return TaskAdapter(
        **{
            **{name: getattr(adapter, name) for name in TaskAdapter.__dataclass_fields__},
            "tensors": found,
            "saved": saved,
        }
    )


def _form(header: Mapping[str, Any]) -> FormChoice:
    """Raises AdapterError for a form that this program does not have. A file makes nothing be imported."""
    name, known = header["form"]["name"], plugin.names("forms")
    if name not in known:
        raise AdapterError(f"header: form is {shown(name)}, this program has {', '.join(known)}; update lori_dist")
    try:
        return FormChoice(
            name=name,
            options=header["form"]["options"],
            tasks=tuple(header["tasks"]),
            seeds=tuple(header["seeds"]),
        )
    except (AdapterError, ConfigError) as error:
        raise AdapterError(f"header: {error}") from error


def _entries(
    sizes: Sizes, about: Mapping[str, Any], where: dict[str, Stored], dtype: torch.dtype
) -> Iterator[tuple[str, Entries]]:
    module = sizes.site.module
    stored = {name: entry for name, entry in sizes.entries.items() if entry.is_stored}
    for name, of_tensor in about.items():
        place, inside = f"{name} of {named(module)}", f"header: module {named(module)}: {named(name)}"
        if name not in stored:
            raise AdapterError(f"{inside} is not a tensor of this form, which has {', '.join(stored)}; {DAMAGED}")
        shape, num_entries = list(sizes.shape(name)), sizes.numel(name)
        require(of_tensor["shape"] == shape, f"{inside}: shape", of_tensor["shape"], str(shape))
        check_integer(f"{inside}: kept", of_tensor["kept"], 1 if stored[name].sparse else num_entries, num_entries)
        values = _taken(where, _key(module, name))
        mask = _taken(where, f"{_key(module, name)}.mask") if of_tensor["kept"] < num_entries else None
        for tensor, wanted in ((values, dtype), (mask, torch.uint8)):
            if tensor is not None and (tensor.dtype != wanted or len(tensor.shape) != 1):
                raise AdapterError(f"{place} is {tensor.dtype}; it must be {wanted} with one dimension; {DAMAGED}")
        yield (
            name,
            StoredEntries(
                Place(
                    about=place,
                    values=values,
                    mask=mask,
                    kept=of_tensor["kept"],
                    num_entries=num_entries,
                    dtype=dtype,
                    digest=of_tensor["digest"],
                )
            ),
        )


def _taken(where: dict[str, Stored], name: str) -> Stored:
    if name not in where:
        raise AdapterError(f"tensor {named(name)} is missing; {DAMAGED}")
    return where.pop(name)
