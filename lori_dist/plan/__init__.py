"""The memory, traffic, time and cost of a run, for every engine and placement of the base.

`plan` computes them from the configuration, the model's config.json and the files of rows alone. It assumes a ring for
every collective, a share of the devices' peak rate that products reach, that sending and computing overlap, and a share
of memory that the allocator wastes. Each engine says what it holds and sends in its own file; this package adds it up.
No weight is read, and nothing is started.
"""

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

from lori_dist.config import Run
from lori_dist.gpus import DEVICES
from lori_dist.plan import alternatives, evaluation, notes, packing
from lori_dist.plan.cost import Hardware, placed_on, ranks_of, trained_of
from lori_dist.plan.model import Counted
from lori_dist.plan.placement import check_engine, placements
from lori_dist.plan.rows import Counter, Lengths, how_counted
from lori_dist.plan.steps import Member, gangs, num_checkpoints, totals

__all__ = ["DEVICES", "Hardware", "plan"]


def plan(run: Run, hardware: Hardware, *, row_tokens: int | None = None) -> dict[str, Any]:
    """The costs of a run under every placement, and the recommended placement.

    row_tokens: tokens of every row, instead of those that are counted in the run's files.

    Returns a tree of plain JSON: model, adapter, training, evaluation and hardware as counted or given; `placements`,
    each with memory (bytes of a rank by kind, without and with activation checkpointing, for rows of train.max_length
    tokens), fits, traffic (bytes that a rank sends in a step, by owner and by link), `seconds` of a mean step of
    training and what they are of, `full`, the same of a step whose rows all have train.max_length tokens,
    tokens_per_second (no padding), mfu, gpu_hours of all of the run's trainings, cost, and how many tasks'
    trainings would fit at once (`cluster.packing`); `recommended`, with alternatives; and notes.
    Raises ConfigError for a model whose configuration cannot be read or counted, for rows that cannot be used, and for
    an engine that does not say what it costs.
    """
    ranks = ranks_of(run, hardware)
    check_engine(run, ranks)
    own = list(placements(ranks, hardware.nodes, run.train.engine))
    counter = Counter(run, row_tokens)
    run, said = packing.chosen(run, hardware, counter)
    found = gangs(run, counter)
    trained = trained_of(run, found, ranks)
    largest = max(trained, key=lambda one: (one.model.adapters, one.gang.apart, one.gang.earlier))
    model = largest.model
    rows = list(counter.found.values())
    placed = [placed_on(run, trained, hardware, placement) for placement in own]
    members = [member for gang in found for member in gang.members]
    evaluated = evaluation.planned(run, model, hardware, counter)
    return {
        "model": {
            "path": run.model.path,
            **{key: getattr(model, key) for key in ("parameters", "base", "num_blocks")},
            "flops_per_token": model.flops,
            "attention": model.kernel,
        },
        "adapter": {
            "entries": model.entries,
            "kept": model.kept,
            "whole": model.whole,
            "projections": model.projections // model.adapters,
            "file": file_bytes(model),
            "checkpoint": 3 * 4 * (model.kept + model.whole),
        },
        "training": {
            "steps": {member.name: {one.name: one.num_steps for one in member.phases} for member in members},
            "tokens_per_step": _tokens_per_step(run),
            "tokens": {name: round(number) for gang in found for name, number in totals(gang).items()},
            "row_tokens": _row_tokens(members),
            "counted": how_counted(
                [one for member in members for s in member.streams for one in s.parts], run.model.path
            ),
            "tasks": list(run.tasks),
            "ranks": ranks,
            "gangs": [[member.name for member in gang.members] for gang in found],
            "gradients_apart": max(gang.apart for gang in found),
            "checkpoints": sum(num_checkpoints(member) for member in members),
            "disk": _disk(run, model, members),
        },
        "rows": {f"{task}: {path}": _rows(one) for (task, path), one in counter.found.items()},
        "evaluation": evaluated,
        "hardware": dataclasses.asdict(hardware),
        "placements": placed,
        "recommended": alternatives.recommended(run, trained, hardware, placed),
        "notes": [*filter(None, [said]), *notes.of(run, hardware, ranks, trained, placed, rows, evaluated)],
    }


# --- words -----------------------------------------------------------------------------------------------------------


def _tokens_per_step(run: Run) -> int:
    """Largest number of tokens in a step: rows may be shorter than max_length."""
    return run.train.batch_size * run.train.max_length


def _row_tokens(members: Sequence[Member]) -> dict[str, float]:
    lengths = [part.tokens for member in members for stream in member.streams for part in stream.parts]
    means = [member.mean for member in members]
    return {
        "least": min(int(one.min()) for one in lengths),
        "mean": sum(means) / len(means),
        "most": max(int(one.max()) for one in lengths),
    }


def _rows(one: Lengths) -> dict[str, Any]:
    return {
        "rows": one.number, "counted": len(one.tokens), "mean": one.mean, "longest": int(one.tokens.max()),
        "how": one.how,
    }  # fmt: skip


def _disk(run: Run, model: Counted, members: Sequence[Member]) -> int:
    """Largest number of bytes that checkpoints take, when all trainings keep their last ones."""
    held = 0 if run.train.checkpoint_every is None else run.train.keep
    return len(members) * held * 3 * 4 * ((model.entries if run.adapter.density < 1 else model.kept) + model.whole)


HEADER = 400
"""Bytes of an adapter file's header for each module."""


def file_bytes(model: Counted) -> int:
    """Bytes of an adapter file: values in fp32, and a mask, whose bits cost their entropy."""
    density = model.kept / model.entries
    fixed = 4 * (model.kept + model.whole) + HEADER * model.num_modules
    if density == 1:
        return fixed
    entropy = -(density * math.log2(density) + (1 - density) * math.log2(1 - density))
    return fixed + round(model.entries * entropy / 8)
