"""Merges of adapters, one per file, and what walks over the modules for all of them.

A method is `merge(updates, *, weights, **options) -> Sequence[Part]`, on one module: `updates` has one Update for each
adapter, also for those that do not adapt this module, and the result is the merged update as a sum of scale * B A. A
method sees no other module, so a merge needs the updates of one module at a time and modules can be merged in any order
or place.
"""

import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from lori_dist import plugin
from lori_dist.adapter import file, source
from lori_dist.adapter.adapter import Adapter
from lori_dist.adapter.update import Part, Update, blocks, split, told_apart
from lori_dist.merges import _weights
from lori_dist.merges._inputs import check
from lori_dist.merges._weights import Weight

__all__ = ["Part", "Update", "Weight", "drop", "merge", "merge_files", "reweight"]

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
    any sign; by default equal ones that sum to one. One that differs between modules is a mapping, pattern -> number:
    the last that fits a module's path counts, `default` where none does, and without it the equal share.
    Adapters may differ in rank, alpha, dtype and targets; a module that one does not adapt gets nothing from it.
    Raises ConfigError for a method, options or weights that do not exist or fit, AdapterError for adapters of different
    bases, shapes or generators, or that the method cannot merge.
    """
    chosen = plugin.find("merges", method, "merge", "merge.method")
    bound = chosen.bind(options or {}, "merge.method")
    adapters = told_apart(adapters)
    share = 1 / max(1, len(adapters))
    given: Sequence[Weight] = [share for _ in adapters] if weights is None else weights
    check(adapters, given)
    merge_module = chosen.load()
    shapes = {module: shape for adapter in adapters for module, shape in adapter.shapes.items()}
    parts = {
        module: merge_module(
            [split(adapter, module, shape) for adapter in adapters],
            weights=[_weights.of(weight, module, share) for weight in given],
            **bound,
        )
        for module, shape in shapes.items()
    }
    if any(isinstance(weight, Mapping) for weight in given):
        parts = _weights.evened(parts)
    merged = _join(adapters, shapes, parts)
    _warn_of_ranks(merged)
    return merged


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
) -> dict[str, Any]:
    """Merges adapters into one file, which appears at `out` only when it is complete. Other arguments as of `merge`.

    paths: of adapter files, of LoRA folders of PEFT, and of checkpoints of LoRI's official code, mixed.

    Returns {"path", "kept", "total", "bytes", "rank"} of the merge; rank is the sum over its blocks.
    Raises as `merge`, and AdapterError for adapters that cannot be read.
    """
    plugin.find("merges", method, "merge", "merge.method").bind(options or {}, "merge.method")  # before files are read
    merged = merge([source.load(path) for path in paths], method=method, options=options, weights=weights)
    file.save(merged, out)
    return {
        "path": str(out),
        "kept": merged.kept,
        "total": merged.total,
        "bytes": out.stat().st_size,
        "rank": sum(block.rank for block in merged.blocks),
    }


def _join(
    adapters: Sequence[Adapter], shapes: Mapping[str, tuple[int, int]], parts: Mapping[str, Sequence[Part]]
) -> Adapter:
    targets = {adapter.targets for adapter in adapters}
    return Adapter(
        shapes=shapes,
        blocks=blocks(parts, shapes),
        targets=targets.pop() if len(targets) == 1 else tuple(shapes),
        base=next((adapter.base for adapter in adapters if "weights" in adapter.base), adapters[0].base),
        generator=adapters[0].generator,
    )


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
