"""Methods, adapters and figures as text for a terminal."""

import copy
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lori_dist import plugin

if TYPE_CHECKING:  # the list of methods needs no torch
    from lori_dist.adapter.adapter import Adapter
    from lori_dist.forms import Entry

ROLES: Mapping[str, str] = {
    "masks": "mask",
    "merges": "merge",
    "engines": "build",
    "multitask": "plan",
    "forms": "form",
    "balances": "balance",
    "evaluation": "score",
    "benchmarks": "run",
}
"""Name of the function in each plug-in folder's files."""


def methods() -> str:
    """Every method there is, with the first line of its docstring and its options with their defaults."""
    return "\n\n".join("\n".join([f"{folder}:", *_methods(folder, role)]) for folder, role in ROLES.items())


def _methods(folder: str, role: str) -> Iterator[str]:
    found = [plugin.find(folder, name, role, folder) for name in plugin.names(folder)]
    width = max((len(method.name) for method in found), default=0)
    for method in found:
        options = ", ".join(f"{name}={option.default!r}" for name, option in method.options.items())
        yield f"  {method.name:<{width}}  {method.summary}" + (f" Options: {options}" if options else "")


def adapter_file(path: Path) -> str:
    """An adapter file or folder: its size and header, its blocks, and the density of B by layer and projection.

    A tensor at a time is in memory. Raises AdapterError if it is damaged or not an adapter.
    """
    from lori_dist import formats
    from lori_dist.formats import native

    if formats.is_form(path):
        return _form_file(path)
    adapter = formats.open_lazy(path)
    held = _held(adapter)
    if not path.is_file():
        header: Mapping[str, Any] = {"targets": adapter.targets, "base": adapter.base}
        sizes: tuple[int, ...] = (held,)
        num_bytes = sum(item.stat().st_size for item in path.glob("*.safetensors")) or held
    else:
        header, sizes, num_bytes = native.header(path), native.block_bytes(path), path.stat().st_size
    lines = [f"{path}: {size(adapter.kept, adapter.total)}, {num_bytes:,} bytes"]
    forms = [_form(adapter, number) for number in range(len(sizes))]
    lines += [f"  form: {', '.join(_counted(forms, sizes))}"]
    lines += [f"  {key}: {_value_text(value)}" for key, value in header.items() if key not in ("blocks", "modules")]
    rows = [(*_block(adapter, number), f"{sizes[number]:,}", form) for number, form in enumerate(forms)]
    blocks = table(BLOCK_TITLES, rows)
    return "\n".join([*lines, "", blocks, "", "Density of B in percent:", table(*_densities(adapter))])


def _owner(entry: "Entry") -> str:
    """Whose a tensor of a form is."""
    if entry.trained:
        return "of each task" if entry.per_task else "of all tasks"
    return "from counts" if entry.counted else "of a seed"


def _form_file(path: Path) -> str:
    """A file in which each task has an update of its own: its tensors, summed over modules."""
    from lori_dist.formats import forms

    adapter = forms.load(path)
    kept, total = f"{adapter.kept:,}", f"{adapter.total:,}"
    options = ", ".join(f"{name} {value}" for name, value in adapter.form.options.items())
    lines = [
        f"{path}: keeps {kept} of {total} entries that are trained, {path.stat().st_size:,} bytes",
        f"  form: {printable(adapter.form.name)}{f' ({printable(options)})' if options else ''}",
        f"  tasks: {printable(', '.join(adapter.form.tasks))}",
        f"  rank: {adapter.rank}, alpha: {adapter.alpha:g}, A: {'trained' if adapter.trains_a else 'frozen'}",
        f"  base: {_value_text(dict(adapter.base))}",
        f"  modules: {len(adapter.shapes)}",
    ]
    made = adapter.made
    rows: dict[str, list[int]] = {}
    owned: dict[str, str] = {}
    for module in adapter.shapes:
        sizes = adapter.sizes(module, made)
        for name, entry in sizes.entries.items():
            count = rows.setdefault(name, [0, 0])
            there = adapter.tensors[module].get(name)
            count[0] += there.kept if there is not None else 0
            count[1] += sizes.numel(name)
            owned[name] = _owner(entry)
    cells = [
        (name, owned[name], "-" if owned[name] == "of a seed" else f"{count[0]:,}", f"{count[1]:,}")
        for name, count in rows.items()
    ]
    if adapter.form.is_dependent:
        note = "The update depends on the input: it cannot be folded, exported or merged."
    else:
        note = f"{path}@TASK is the adapter of one task; `lori export --format tasks` writes all of them."
    return "\n".join([*lines, "", table(("tensor", "is", "kept", "of"), cells), "", note])


def _held(adapter: "Adapter") -> int:
    """Bytes of A and of the kept values of B in memory. Each tensor is read, which says whether it is damaged."""
    from lori_dist.adapter.adapter import in_memory

    found = 0
    for block in adapter.blocks:
        found += sum(copy.copy(entries).values.nbytes for entries in block.entries.values())  # a copy keeps nothing
        found += sum(in_memory(a).nbytes for a in block.projections.values())
    for tensor in adapter.saved.values():
        in_memory(tensor)
    return found


def size(kept: int, total: int) -> str:
    """The share of B's entries that is kept, in words."""
    return f"keeps {kept:,} of {total:,} entries of B ({100 * kept / max(1, total):.2f}%)"


def _value_text(value: Any) -> str:
    if isinstance(value, dict):
        return printable(", ".join(f"{key} {item}" for key, item in value.items())) or "unknown"
    return printable(", ".join(value) if isinstance(value, list | tuple) else str(value))


BLOCK_TITLES = ("block", "seed", "rank", "alpha", "weight", "dtype of A", "kept", "of", "density", "bytes", "form")


def _form(adapter: "Adapter", number: int) -> str:
    """The form in which the update of a block is stored, which decides its bytes."""
    block = adapter.blocks[number]
    if block.seed is None:
        return "A and B stored"
    full = {module: out_features * block.rank for module, (out_features, _) in adapter.shapes.items()}
    is_dense = bool(block.entries) and all(one.kept == full[module] for module, one in block.entries.items())
    return "dense B on a seed" if is_dense else "sparse B on a seed"


def _counted(forms: Sequence[str], sizes: Sequence[int]) -> Iterator[str]:
    for form in dict.fromkeys(forms):
        chosen = [size for other, size in zip(forms, sizes, strict=True) if other == form]
        yield f"{len(chosen)} x {form} ({sum(chosen):,} bytes)"


def _block(adapter: "Adapter", number: int) -> tuple[str, ...]:
    block = adapter.blocks[number]
    kept = sum(entries.kept for entries in block.entries.values())
    total = max(1, sum(out * block.rank_of(module) for module, (out, _) in adapter.shapes.items()))
    seed = "-" if block.seed is None else str(block.seed)
    settings = (seed, str(block.rank), f"{block.alpha:g}", f"{block.weight:g}")
    dtype = str(block.dtype).removeprefix("torch.")
    return (printable(block.name), *settings, dtype, f"{kept:,}", f"{total:,}", f"{100 * kept / total:.2f}%")


def _densities(adapter: "Adapter") -> tuple[tuple[str, ...], list[tuple[str, ...]]]:
    """Titles and rows: a row per layer, a column per kind of module, over all blocks. Row `-`: modules outside layers.

    A layer is its number, or its path where layers of two stacks have one number.
    """
    from lori_dist.adapter import targets

    kept: dict[tuple[str, str], int] = {}
    total: dict[tuple[str, str], int] = {}
    for module, (out_features, _) in adapter.shapes.items():
        place = targets.place(module)
        entries = [block.entries[module] for block in adapter.blocks if module in block.entries]
        kept[place] = kept.get(place, 0) + sum(item.kept for item in entries)
        total[place] = total.get(place, 0) + sum(out_features * block.rank_of(module) for block in adapter.blocks)
    layers, projections = (
        list(dict.fromkeys(layer for layer, _ in total)),
        list(dict.fromkeys(name for _, name in total)),
    )

    def percent(places: Iterable[tuple[str, str]]) -> str:
        there = [place for place in places if place in total]
        return (
            f"{100 * sum(kept[place] for place in there) / max(1, sum(total[place] for place in there)):.2f}"
            if there
            else ""
        )

    def row(title: str, layers: Sequence[str]) -> tuple[str, ...]:
        each = [percent((layer, name) for layer in layers) for name in projections]
        return (title, *each, percent((layer, name) for layer in layers for name in projections))

    rows = [row(title, [layer]) for title, layer in zip(_titles(layers), layers, strict=True)]
    return ("layer", *projections, "all"), [*rows, row("all", layers)]


def _titles(layers: Sequence[str]) -> list[str]:
    stacks = {layer.rpartition(".")[0] for layer in layers if layer}
    return [(layer.rpartition(".")[2] if len(stacks) == 1 else printable(layer)) or "-" for layer in layers]


def comparisons(found: Sequence[Mapping[str, Any]]) -> str:
    """Rows that one model gets right and another wrong, as `predictions.compared` gives them."""
    if not found:
        return "No metric of these tasks is a share of rows, so no model is right or wrong; name one with --metric."
    return "\n\n".join("\n".join(_comparison(one)) for one in found)


def _comparison(one: Mapping[str, Any]) -> Iterator[str]:
    right, wrong = printable(one["right"]), printable(one["wrong"])
    yield (
        f"{printable(one['task'])}, {printable(one['metric'])}: {right} is right and {wrong} wrong on "
        f"{one['only_right']:,} of {one['rows']:,} rows (both right {one['both']:,}, only {wrong} "
        f"{one['only_wrong']:,}, neither {one['neither']:,})"
    )
    for example in one["examples"]:
        texts = [
            ("prompt", example["prompt"]),
            ("answer", example["answer"]),
            (one["right"], example["right"]),
            (one["wrong"], example["wrong"]),
        ]
        width = max(len(printable(title)) for title, _ in texts)
        for number, (title, text) in enumerate(texts):
            shown = f"score {example['scores'][number - 2]:.4g}" if text is None else text
            lines = [printable(line) for line in str(shown).splitlines()] or [""]
            row = f"  row {example['row']}" if number == 0 else ""
            if row:
                yield row
            yield f"    {printable(title):<{width}}  {lines[0]}"
            yield from (f"    {'':<{width}}  {line}" for line in lines[1:])


def printable(text: Any) -> str:
    """A text out of a file, without what a terminal would take for a command."""
    return "".join(letter if letter.isprintable() else repr(letter)[1:-1] for letter in str(text))


def records(rows: Sequence[Mapping[str, Any]]) -> str:
    """A table of rows that may lack some of the columns."""
    titles = list(dict.fromkeys(title for row in rows for title in row))
    return table(titles, [[str(row.get(title, "")) for title in titles] for row in rows])


def table(titles: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Columns as wide as they must be; those of figures stand to the right."""
    columns = list(zip(titles, *rows, strict=True))
    widths = [max(map(len, column)) for column in columns]
    figures = [all(re.fullmatch(r"[-+\d.,e%]*", cell) for cell in column[1:]) for column in columns]
    lines = [zip(line, widths, figures, strict=True) for line in (titles, *rows)]
    padded = [[cell.rjust(width) if right else cell.ljust(width) for cell, width, right in line] for line in lines]
    return "\n".join("  ".join(line).rstrip() for line in padded)
