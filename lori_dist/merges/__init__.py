"""Merges of adapters, one per file, and merging from file to file."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from lori_dist import plugin
from lori_dist.adapter import file

__all__ = ["merge_files"]


def merge_files(
    paths: Sequence[Path],
    out: Path,
    *,
    method: str,
    options: Mapping[str, Any] | None = None,
    weights: Sequence[float] | None = None,
) -> dict[str, Any]:
    """Merges adapter files into one, which appears at `out` only when it is complete.

    method: a file of this folder, or `package.module`. options: of the method, by name. weights: one per adapter; by
    default equal ones that sum to one.
    Returns {"path", "kept", "total", "bytes", "rank"} of the merge; rank is the sum over its blocks.
    Raises ConfigError for a method, options or weights that do not exist or fit, AdapterError for adapters that cannot
    be read or merged.
    """
    chosen = plugin.find("merges", method, "merge", "merge.method")
    bound = chosen.bind(options or {}, "merge.method")
    adapters = [file.load(path) for path in paths]
    shares = [1 / len(adapters) for _ in adapters] if weights is None else weights
    merged = chosen.load()(adapters, weights=shares, **bound)
    file.save(merged, out)
    return {
        "path": str(out),
        "kept": merged.kept,
        "total": merged.total,
        "bytes": out.stat().st_size,
        "rank": sum(block.rank for block in merged.blocks),
    }
