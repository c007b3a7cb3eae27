"""A plan's memory as stacked bars, one for each placement without and with activation checkpointing."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.figure import Figure

from lori_dist.plan.placement import MEMORY

GIB = 2**30
_SHADES = matplotlib.color_sequences["tab20"]  # pairs of a dark and a light shade of one colour
COLOURS = dict(zip(MEMORY, [*_SHADES[::2], *_SHADES[1::2]], strict=False))
"""One colour for each kind of memory."""


def save(plan: Mapping[str, Any], path: Path) -> None:
    """Writes a PNG. Its line is the memory that a device has for training."""
    found = plan["placements"]
    figure = Figure(figsize=(9, 1.2 + 0.55 * len(found)), layout="constrained")
    axes = figure.subplots()
    left = [0.0] * (2 * len(found))
    for kind in MEMORY:
        sizes = [one[which][kind] / GIB for one in found for which in ("memory", "memory_with_checkpointing")]
        axes.barh(range(len(left)), sizes, left=left, label=kind, color=COLOURS[kind])
        left = [start + size for start, size in zip(left, sizes, strict=True)]
    axes.axvline(found[0]["room"] / GIB, color="black", linestyle="--")
    names = [f"{one['name']}{suffix}" for one in found for suffix in ("", ", checkpointing")]
    axes.set_yticks(range(len(left)), names, fontsize=8)
    axes.set_xlim(0, min(max(left), 3 * found[0]["room"] / GIB) * 1.05)
    axes.invert_yaxis()
    axes.set_xlabel("GiB of a device; dashed: the room there is")
    figure.legend(fontsize=7, ncols=6, loc="outside lower center")
    figure.savefig(path, format="png", dpi=120)
