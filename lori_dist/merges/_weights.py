"""Weights that differ between layers and modules: of one adapter, a number, or patterns over module paths."""

import dataclasses
import fnmatch
from collections.abc import Iterator, Mapping, Sequence

import torch

from lori_dist.adapter import targets
from lori_dist.adapter.adapter import Entries
from lori_dist.adapter.update import Part
from lori_dist.plugin import nearest

DEFAULT = "default"

Weight = float | Mapping[str, float]
"""A number, or pattern -> number: the last pattern that fits a module's path counts, and where none does `default`.

A pattern is one over whole paths (`model.layers.[0-7].*`, `*.mlp.*`), or part of a path (`q_proj`, `layers.0`,
`layers.0.mlp`, `down_proj.3` of an expert). A number alone is a part only where a path begins with it: it would fit the
layer and the expert of that number. Without a `default` it is the share that each adapter has without weights.
"""


def of(weight: Weight, module: str, share: float) -> float:
    """The weight of one module. share: where there is no default."""
    if not isinstance(weight, Mapping):
        return weight
    fitting = [value for pattern, value in weight.items() if pattern != DEFAULT and fits(pattern, module)]
    return fitting[-1] if fitting else weight.get(DEFAULT, share)


def fits(pattern: str, module: str) -> bool:
    if any(character in pattern for character in "*?["):
        return fnmatch.fnmatchcase(module, pattern)
    if targets.is_number(pattern):
        return f"{module}.".startswith(f"{pattern}.")
    return f".{pattern}." in f".{module}."


def unmatched(weight: Weight, modules: Sequence[str]) -> Iterator[str]:
    """Yields the patterns that fit no module, each with the modules that there are."""
    if not isinstance(weight, Mapping):
        return
    short = sorted(set(map(targets.kind, modules)))
    names = sorted({*modules, *short})
    for pattern in weight:
        if pattern != DEFAULT and not any(fits(pattern, module) for module in modules):
            yield (
                f"{pattern!r} matches none of its {len(modules)} modules, which are called {', '.join(short)}, such as "
                f"{modules[0]}.{nearest(pattern, names)}"
            )


def evened(parts: Mapping[str, Sequence[Part]]) -> dict[str, list[Part]]:
    """The same updates with one weight for each task and A: what differs between modules is multiplied into B.

    So a task stays one block, under its name, however many weights it had.
    """
    weights: dict[tuple[object, ...], float] = {}
    for part in (part for module in parts.values() for part in module):
        if part.weight:
            weights.setdefault(_key(part), part.weight)
    return {
        module: [_with_weight(part, weights.get(_key(part), 0.0)) for part in found] for module, found in parts.items()
    }


def _key(part: Part) -> tuple[object, ...]:
    is_stored = part.seed is None
    return (
        (part.name, part.gain, part.dtype) if is_stored else (part.name, part.seed, part.rank, part.alpha, part.dtype)
    )


def _with_weight(part: Part, weight: float) -> Part:
    if part.weight == weight:
        return part
    if part.entries is None or not part.weight:
        return dataclasses.replace(part, weight=weight, entries=None)
    values = part.entries.values
    scaled = (values.double() * (part.weight / weight)).to(torch.promote_types(values.dtype, torch.float32))
    return dataclasses.replace(part, weight=weight, entries=Entries(index=part.entries.index, values=scaled))
