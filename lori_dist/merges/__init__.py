"""Merges of adapters, one per file, and what walks over the modules for all of them.

A method is `merge(updates, *, weights, **options) -> Sequence[Part]`, on one module: `updates` has one Update for each
adapter, also for those that do not adapt this module, and the result is the merged update as a sum of scale * B A. A
method sees no other module, so a merge needs the updates of one module at a time and modules can be merged in any order
or place. One that must know something of all of them has a second function, `survey(modules, **options)`: it goes over
their updates, one module after the other, as often as it needs, and returns module -> what each of its updates has as
`surveyed` in `merge`, or None. `merge` and `merge_files` apply a method to adapters in memory and in files; files that
begin with an underscore are shared by methods.
"""

import contextlib
import dataclasses
import functools
import itertools
import logging
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from lori_dist import formats, plugin
from lori_dist.adapter.adapter import Adapter
from lori_dist.adapter.update import Part, Update, blocks, split, told_apart
from lori_dist.atomic import aside
from lori_dist.formats import native
from lori_dist.formats.spool import Spool
from lori_dist.merges import _weights
from lori_dist.merges._inputs import check
from lori_dist.merges._weights import Weight

__all__ = ["Part", "Update", "Weight", "drop", "merge", "merge_files", "reweight"]

Spread = Callable[
    [Callable[[Any], Mapping[str, Sequence[Part]]], Iterable[Any]], Iterable[Mapping[str, Sequence[Part]]]
]
"""A function like the built-in `map`: it applies a function that can be pickled to every item, in their order."""

log = logging.getLogger(__name__)


def merge(
    adapters: Sequence[Adapter],
    *,
    method: str,
    options: Mapping[str, Any] | None = None,
    weights: Sequence[Weight] | None = None,
) -> Adapter:
    """One adapter of several, over the modules of all of them.

    method: a file of this folder, or `package.module`. options: of the method, by name. weights: one per adapter, of
    any sign; by default equal ones that sum to one, or 1 each where the method's file has `UNIT_WEIGHTS`. One that
    differs between modules is a mapping, pattern -> number: the last that fits a module's path counts, `default` where
    none does, and without it the weight by default.
    Adapters may differ in rank, alpha, dtype and targets; a module that one does not adapt gets nothing from it.
    Raises ConfigError for a method, options or weights that do not exist or fit, AdapterError for adapters of different
    bases, shapes or generators, or that the method cannot merge.
    """
    merge_module = _bound(method, options)
    adapters = told_apart(adapters)
    given, shapes = _given(adapters, weights, share := _share(method, options, len(adapters))), _shapes(adapters)
    known = _surveyed(adapters, shapes, method, options)
    parts = {
        module: _merged(merge_module, adapters, module, shape, given, share, known) for module, shape in shapes.items()
    }
    return _join(adapters, shapes, _evened(parts, given))


def drop(merged: Adapter, *names: str) -> Adapter:
    """The concat merge without the tasks `names`, as it would have been without them. Nothing is computed again."""
    return merge([merged], method="concat", weights=[1.0], options={"drop": names})


def reweight(merged: Adapter, weights: Mapping[str, float]) -> Adapter:
    """The concat merge with other weights for some of its tasks. Nothing is computed again."""
    return merge([merged], method="concat", weights=[1.0], options={"reweight": dict(weights)})


def merge_files(
    paths: Sequence[Path],
    out: Path,
    *,
    method: str,
    options: Mapping[str, Any] | None = None,
    weights: Sequence[Weight] | None = None,
    num_ranges: int = 1,
    spread: Spread = map,
) -> dict[str, Any]:
    """Merges adapters into one file, which appears at `out` only when it is complete. Other arguments as of `merge`.

    paths: of adapter files, of LoRA folders of PEFT, and of checkpoints of LoRI's official code, mixed.

    The file has the bytes of `merge` and `file.save`, but the updates of one module at a time are in memory: tensors
    are read from the adapters as a module needs them, what is made of them waits in a file beside `out`, and what
    stays as it was is copied.
    num_ranges: into how many ranges of modules it is divided. spread: does something with each of them, in any place
    that sees the same files; by default here, one after the other. The result is the same bytes.
    Returns {"path", "kept", "total", "bytes", "rank"} of the merge; rank is the sum over its blocks.
    Raises as `merge`, and AdapterError for adapters that cannot be read.
    """
    _bound(method, options)  # before files are read
    adapters = told_apart([formats.open_lazy(path) for path in paths])
    given, shapes = _given(adapters, weights, _share(method, options, len(adapters))), _shapes(adapters)
    ranges, known = _ranges(list(shapes), num_ranges), _surveyed(adapters, shapes, method, options)
    with contextlib.ExitStack() as stack:
        asides = [stack.enter_context(aside(out)) for _ in ranges]
        merge_range = functools.partial(
            _merge_range, adapters, out, method=method, options=options, weights=given, known=known
        )
        parts: dict[str, Sequence[Part]] = {}
        for found in spread(merge_range, zip(ranges, asides, strict=True)):
            parts.update(found)
        merged = _join(adapters, shapes, _evened(parts, given))
        native.save(merged, out)
    return {
        "path": str(out),
        "kept": merged.kept,
        "total": merged.total,
        "bytes": out.stat().st_size,
        "rank": sum(block.rank for block in merged.blocks),
    }


def _merge_range(
    adapters: Sequence[Adapter],
    out: Path,
    work: tuple[Sequence[str], Path],
    *,
    method: str,
    options: Mapping[str, Any] | None,
    weights: Sequence[Weight],
    known: Mapping[str, Sequence[Any]] | None,
) -> dict[str, Sequence[Part]]:
    """The parts of some modules, their tensors in files.

    adapters: opened, so small to send elsewhere. work: modules, and the file for tensors that are new.
    """
    modules, place = work
    merge_module, spool, shapes = _bound(method, options), Spool(path=place, out=out), _shapes(adapters)
    share = _share(method, options, len(adapters))
    found: dict[str, Sequence[Part]] = {}
    for module in modules:
        parts = _merged(merge_module, adapters, module, shapes[module], weights, share, known)
        found[module] = [spool.keep(part) for part in parts]
    return found


def _merged(
    merge_module: Callable[..., Sequence[Part]],
    adapters: Sequence[Adapter],
    module: str,
    shape: tuple[int, int],
    weights: Sequence[Weight],
    share: float,
    known: Mapping[str, Sequence[Any]] | None,
) -> Sequence[Part]:
    """The parts of one module. share: the weight by default."""
    here = [_weights.of(weight, module, share) for weight in weights]
    updates = _updates(adapters, module, shape)
    if known is not None:
        updates = [dataclasses.replace(one, surveyed=of) for one, of in zip(updates, known[module], strict=True)]
    return merge_module(updates, weights=here)


def _updates(adapters: Sequence[Adapter], module: str, shape: tuple[int, int]) -> list[Update]:
    return [split(adapter, module, shape) for adapter in adapters]


class _Modules:
    """The updates of every module, made anew whenever one goes over them: what is read of a module goes with it."""

    def __init__(self, adapters: Sequence[Adapter], shapes: Mapping[str, tuple[int, int]]) -> None:
        self._adapters, self._shapes = adapters, shapes

    def __iter__(self) -> Iterator[list[Update]]:
        return (_updates(self._adapters, module, shape) for module, shape in self._shapes.items())


def _surveyed(
    adapters: Sequence[Adapter],
    shapes: Mapping[str, tuple[int, int]],
    method: str,
    options: Mapping[str, Any] | None,
) -> Mapping[str, Sequence[Any]] | None:
    """Module -> for each of its updates what the method has to know of all modules; None if that is nothing."""
    chosen = plugin.find("merges", method, "merge", "merge.method")
    survey = chosen.companion("survey")
    if survey is None:
        return None
    found: Mapping[str, Sequence[Any]] | None = survey(
        _Modules(adapters, shapes), **chosen.bind(options or {}, "merge.method")
    )
    return found


def _evened(parts: Mapping[str, Sequence[Part]], weights: Sequence[Weight]) -> Mapping[str, Sequence[Part]]:
    return _weights.evened(parts) if any(isinstance(weight, Mapping) for weight in weights) else parts


def _bound(method: str, options: Mapping[str, Any] | None) -> Callable[..., Sequence[Part]]:
    """The merge of one module, with its options. Raises ConfigError for those that do not exist or fit."""
    chosen = plugin.find("merges", method, "merge", "merge.method")
    return functools.partial(chosen.load(), **chosen.bind(options or {}, "merge.method"))


def _share(method: str, options: Mapping[str, Any] | None, num_adapters: int) -> float:
    """The weight of each adapter by default."""
    chosen = plugin.find("merges", method, "merge", "merge.method")
    return plugin.default_weight(chosen, chosen.bind(options or {}, "merge.method"), max(1, num_adapters))


def _given(adapters: Sequence[Adapter], weights: Sequence[Weight] | None, share: float) -> Sequence[Weight]:
    """Weights, one per adapter, once both were checked."""
    given = [share] * len(adapters) if weights is None else weights
    check(adapters, given)
    return given


def _shapes(adapters: Sequence[Adapter]) -> dict[str, tuple[int, int]]:
    return {module: shape for adapter in adapters for module, shape in adapter.shapes.items()}


def _ranges(modules: Sequence[str], num: int) -> list[Sequence[str]]:
    """The modules in at most `num` pieces of nearly equal length, none of them empty."""
    num = min(num, len(modules))
    bounds = [len(modules) * number // num for number in range(num + 1)]
    return [modules[start:stop] for start, stop in itertools.pairwise(bounds)]


def _join(
    adapters: Sequence[Adapter], shapes: Mapping[str, tuple[int, int]], parts: Mapping[str, Sequence[Part]]
) -> Adapter:
    targets = {adapter.targets for adapter in adapters}
    merged = Adapter(
        shapes=shapes,
        blocks=blocks(parts, shapes),
        targets=targets.pop() if len(targets) == 1 else tuple(shapes),
        base=next((adapter.base for adapter in adapters if "weights" in adapter.base), adapters[0].base),
        generator=adapters[0].generator,
    )
    _warn_of_ranks(merged)
    return merged


def _warn_of_ranks(merged: Adapter) -> None:
    ranks = {module: sum(block.rank_of(module) for block in merged.blocks) for module in merged.shapes}
    wide = [module for module, rank in ranks.items() if rank > min(merged.shapes[module])]
    if wide and len(merged.blocks) > 1:
        log.warning(
            "%s has rank %d after the merge, its weight only %d (%d modules in all); svd says the same at that rank",
            wide[0],
            ranks[wide[0]],
            min(merged.shapes[wide[0]]),
            len(wide),
        )
