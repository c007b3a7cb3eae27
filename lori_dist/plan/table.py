"""A plan as text for a terminal."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from lori_dist.plan.placement import MEMORY

GIB, MB = 2**30, 10**6


def table(plan: Mapping[str, Any]) -> str:
    """Returns the text: the counts and assumptions, the placements side by side, their memory by kind, and the
    recommendation."""
    placements, currency = plan["placements"], plan["hardware"]["currency"]
    parts = [
        *_counted(plan),
        *_assumed(plan["hardware"]),
        "",
        "Per rank and step, in phase train: memory for rows of train.max_length, time for rows as they are.",
        _lines([_head(currency), *(_row(one) for one in placements)]),
        "",
        f"A step whose rows all have train.max_length tokens, {plan['training']['tokens_per_step']:,} in all:",
        _lines([_FULL, *(_full(one) for one in placements)]),
        "",
        "GiB of a device, without activation checkpointing:",
        _memory(placements, "memory"),
        "",
        "GiB of a device, with activation checkpointing:",
        _memory(placements, "memory_with_checkpointing"),
        "",
        *_evaluation(plan),
        *(f"note: {note}" for note in plan["notes"]),
        f"recommended: {plan['recommended']['reason']}",
        *(f"  or: {one}" for one in plan["recommended"]["alternatives"]),
    ]
    return "\n".join(parts)


def plural(number: int, noun: str) -> str:
    """A number with its noun, in the plural if it is not 1."""
    return f"{number:,} {noun}{'' if number == 1 else 's'}"


def _counted(plan: Mapping[str, Any]) -> Iterator[str]:
    model, adapter, training, hardware = plan["model"], plan["adapter"], plan["training"], plan["hardware"]
    yield (
        f"{model['path']}: {model['parameters'] / 1e9:.3g} billion weights in {plural(model['num_blocks'], 'block')}, "
        f"{model['base'] / GIB:.3g} GiB"
    )
    yield (
        f"adapter: {adapter['kept']:,} of {adapter['entries']:,} entries of B, {adapter['file'] / MB:.3g} MB a file, "
        f"{adapter['checkpoint'] / MB:.3g} MB a checkpoint"
    )
    yield f"rows: {training['counted']}"
    steps = sum(sum(of_task.values()) for of_task in training["steps"].values())
    tokens = sum(training["tokens"].values())
    yield (
        f"{plural(len(training['tasks']), 'task')}, {plural(steps, 'step')} and {tokens:,} tokens in all, "
        f"{plural(training['ranks'], 'rank')} on {plural(hardware['nodes'], 'node')}, "
        f"{plural(training['checkpoints'], 'checkpoint')}, {training['disk'] / GIB:.2f} GiB of them kept at most"
    )


def _assumed(hardware: Mapping[str, Any]) -> Iterator[str]:
    name = hardware["name"] or "a device"
    assumed = " (assumed, as there is no --gpu)" if hardware["is_assumed"] else ""
    yield (
        f"assumed: {plural(hardware['gpus'], 'GPU')} as {name}{assumed}: {hardware['gpu_memory'] / GIB:.3g} GiB and "
        f"{hardware['tflops']:,.4g} TFLOP/s each, of which {hardware['efficiency']:.0%} are reached; GB/s: "
        f"{hardware['bandwidth']:,.0f} of its memory, {hardware['link']:,.4g} to another in a node, "
        f"{hardware['network']:,.4g} between nodes, {hardware['host']:,.4g} from the host; "
        f"{hardware['fragmentation']:.0%} of memory lost to fragmentation, {hardware['reserved'] / GIB:.3g} GiB "
        "reserved for CUDA, NCCL and libraries; sending and computing overlap"
    )


def _head(currency: str) -> list[str]:
    return [
        "placement", "GiB", "with checkpointing", "fits", "s/step", "tokens/s", "MFU", "base MB in node",
        "base MB between nodes", "adapter MB in node", "adapter MB between nodes", "GPU hours", f"cost, {currency}",
        "tasks at once",
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
        _share(one["mfu"]),
        *(f"{size / MB:,.0f}" for size in (base["inside"], base["between"], adapter["inside"], adapter["between"])),
        f"{one['gpu_hours']:,.2f}",
        "-" if one["cost"] is None else f"{one['cost']:,.2f}",
        str(one["packed_tasks"]),
    ]


_FULL = [
    "placement", "s/step", "tokens/s", "MFU", "s base", "s attention", "s adapter", "s dequantize", "s traffic",
]  # fmt: skip


def _full(one: Mapping[str, Any]) -> list[str]:
    step = one["full"]["step"]
    return [
        one["name"],
        f"{one['full']['seconds']:.3g}",
        f"{one['full']['tokens_per_second']:,.0f}",
        _share(one["full"]["mfu"]),
        *(f"{step[key]:.3g}" for key in ("base", "attention", "adapter", "dequantize", "traffic")),
    ]


def _share(value: float | None) -> str:
    return "-" if value is None else f"{value:.1%}"


def _memory(placements: Sequence[Mapping[str, Any]], which: str) -> str:
    rows = []
    for one in placements:
        sizes = [one[which][kind] for kind in MEMORY]
        rows.append([one["name"], *(f"{size / GIB:.2f}" for size in (*sizes, sum(sizes)))])
    return _lines([["placement", *MEMORY, "all"], *rows])


def _evaluation(plan: Mapping[str, Any]) -> Iterator[str]:
    found, currency = plan["evaluation"], plan["hardware"]["currency"]
    passes = len(found["passes"])
    cost = "" if found["cost"] is None else f", {found['cost']:,.2f} {currency}"
    yield (
        f"Evaluation, not in the figures above: {plural(found['models'], 'model')} in {passes} "
        f"pass{'' if passes == 1 else 'es'} over the base, at most {found['seconds']:,.3g} s and "
        f"{found['gpu_hours']:,.2f} GPU hours{cost}; GiB of a device, "
        + ("which fits:" if found["fits"] else "WHICH DOES NOT FIT:")
    )
    sizes = [*found["memory"].values(), found["total"]]
    yield _lines(
        [["placement", *found["memory"], "all"], [found["placement"], *(f"{size / GIB:.2f}" for size in sizes)]]
    )
    yield ""


def _lines(rows: Sequence[Sequence[str]]) -> str:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join(
        "  ".join(cell.rjust(width) if place else cell.ljust(width) for place, (cell, width) in enumerate(pairs))
        for pairs in (list(zip(row, widths, strict=True)) for row in rows)
    )
