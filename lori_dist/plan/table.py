"""A plan as text for a terminal."""

from collections.abc import Mapping, Sequence
from typing import Any

from lori_dist.plan.placement import MEMORY

GIB, MB = 2**30, 10**6


def table(plan: Mapping[str, Any]) -> str:
    """The placements side by side, their memory by kind, and the recommendation."""
    model, adapter, training = plan["model"], plan["adapter"], plan["training"]
    steps = sum(sum(of_task.values()) for of_task in training["steps"].values())
    hardware = plan["hardware"]
    parts = [
        f"{model['path']}: {model['parameters'] / 1e9:.3g} billion weights in {model['num_blocks']} blocks, "
        f"{model['base'] / GIB:.3g} GiB",
        f"adapter: {adapter['kept']:,} of {adapter['entries']:,} entries of B, {adapter['file'] / MB:.3g} MB a file, "
        f"{adapter['checkpoint'] / MB:.3g} MB a checkpoint",
        f"{len(training['tasks'])} tasks, {steps:,} steps in all, of at most {training['tokens_per_step']:,} tokens, "
        f"on {hardware['gpus']} devices of {hardware['gpu_memory'] / GIB:.3g} GiB on {hardware['nodes']} nodes",
        "",
        _lines([_HEAD, *(_row(one) for one in plan["placements"])]),
        "",
        "GiB of a device, with activation checkpointing in the lower lines:",
        _lines(
            [
                ["", *MEMORY, "all"],
                *(_memory(one, "memory") for one in plan["placements"]),
                *(_memory(one, "memory_with_checkpointing") for one in plan["placements"]),
            ]
        ),
        "",
        f"recommended: {plan['recommended']['reason']}",
    ]
    return "\n".join(parts)


_HEAD = [
    "placement", "GiB", "with checkpointing", "fits", "s/step", "tokens/s", "base MB in node", "between",
    "adapter MB", "between", "GPU hours", "cost", "tasks at once",
]  # fmt: skip


def _row(one: Mapping[str, Any]) -> list[str]:
    base, adapter = one["traffic"]["base"], one["traffic"]["adapter"]
    fits = "yes" if one["fits"] else "with checkpointing" if one["fits_with_checkpointing"] else "no"
    return [
        one["name"],
        f"{one['total'] / GIB:.1f}",
        f"{one['total_with_checkpointing'] / GIB:.1f}",
        fits,
        f"{one['seconds']:.3g}",
        f"{one['tokens_per_second']:,.0f}",
        *(f"{size / MB:,.0f}" for size in (base["inside"], base["between"], adapter["inside"], adapter["between"])),
        f"{one['gpu_hours']:,.1f}",
        "-" if one["cost"] is None else f"{one['cost']:,.0f}",
        str(one["packed_tasks"]),
    ]


def _memory(one: Mapping[str, Any], which: str) -> list[str]:
    sizes = [one[which][kind] for kind in MEMORY]
    return [one["name"], *(f"{size / GIB:.2f}" for size in (*sizes, sum(sizes)))]


def _lines(rows: Sequence[Sequence[str]]) -> str:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join(
        "  ".join(cell.rjust(width) if place else cell.ljust(width) for place, (cell, width) in enumerate(pairs))
        for pairs in (list(zip(row, widths, strict=True)) for row in rows)
    )
