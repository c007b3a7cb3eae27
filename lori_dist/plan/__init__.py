"""What a run would take of a cluster: memory, traffic, time and cost, for every engine and placement of the base.

From the configuration and the model's config.json alone. What is assumed beside: a ring for every collective, a share
of the devices' peak rate that products reach, that gathering the base and computing go on at the same time, and a share
of memory that the allocator wastes.
"""

import dataclasses
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from lori_dist import tables
from lori_dist.config import Run, Train, held_out, trained_as
from lori_dist.errors import ConfigError
from lori_dist.jobs import JOINT
from lori_dist.plan.model import Counted, count
from lori_dist.plan.placement import Placement, memory, placements, sent, traffic
from lori_dist.training.train import phases

__all__ = ["DEVICES", "Hardware", "plan"]

GIB = 2**30

DEVICES: Mapping[str, Mapping[str, float]] = {
    "h100": {"gpu_memory": 80 * GIB, "tflops": 989, "link": 450, "network": 400},
    "h200": {"gpu_memory": 141 * GIB, "tflops": 989, "link": 450, "network": 400},
    "a100": {"gpu_memory": 80 * GIB, "tflops": 312, "link": 300, "network": 200},
    "a100-40": {"gpu_memory": 40 * GIB, "tflops": 312, "link": 300, "network": 200},
    "l40s": {"gpu_memory": 48 * GIB, "tflops": 362, "link": 32, "network": 50},
    "a6000": {"gpu_memory": 48 * GIB, "tflops": 155, "link": 32, "network": 25},
}
"""Name -> what is usual of such devices: NVIDIA's data sheets, dense bfloat16, NVLink or PCIe 4 in one direction, and
one network adapter of 400 or 200 Gb/s for each device, or one for a node. Clouds differ: say what you know of yours."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Hardware:
    """Of a cluster whose devices are all alike."""

    gpus: int
    """In all."""
    nodes: int
    gpu_memory: float
    """Bytes of each."""
    tflops: float
    """Peak of dense products in the base's dtype."""
    link: float
    """GB/s that a device sends to another of its node."""
    network: float
    """GB/s that a node sends to another, over all of its adapters."""
    efficiency: float = 0.5
    """Share of the peak that a training reaches."""
    fragmentation: float = 0.1
    """Share of what is used that the allocator wastes beside it."""
    reserved: float = 1.5 * GIB
    """Bytes of each device that CUDA, NCCL and libraries take."""
    price: float | None = None
    """Of a device's hour."""

    def __post_init__(self) -> None:
        """Raises ConfigError for devices that do not divide among the nodes."""
        if self.gpus % self.nodes:
            raise ConfigError(f"--nodes: {self.nodes} was given for {self.gpus} GPUs; give a number that divides them")


def plan(run: Run, hardware: Hardware) -> dict[str, Any]:
    """What the run takes under every placement, and which is to be used.

    Returns a tree of plain JSON: model, adapter, training and hardware as counted or given; `placements`, each with
    memory (bytes of a rank by kind, without and with activation checkpointing), fits, traffic (bytes of a step by
    owner and by link), seconds of a step and what they are of, tokens_per_second, gpu_hours of all of the run's
    trainings, cost, and how many tasks' trainings would fit at once (`cluster.packing`); and `recommended`.
    Raises ConfigError for a model whose configuration cannot be read or counted.
    """
    own = placements(hardware.gpus, hardware.nodes, run.train.engine)
    model = count(run, ranks=hardware.gpus)
    steps = _steps(run)
    found = [_placed(run, model, hardware, placement, steps) for placement in own]
    return {
        "model": {"path": run.model.path, **{key: getattr(model, key) for key in ("parameters", "base", "num_blocks")}},
        "adapter": {
            "entries": model.entries,
            "kept": model.kept,
            "whole": model.whole,
            "projections": model.projections,
            "file": file_bytes(model),
            "checkpoint": 3 * 4 * (model.kept + model.whole),
        },
        "training": {"steps": steps, "tokens_per_step": _tokens(run), "tasks": list(run.tasks)},
        "hardware": dataclasses.asdict(hardware),
        "placements": found,
        "recommended": recommended(found, run.train.activation_checkpointing),
    }


def recommended(found: list[dict[str, Any]], checkpointing: bool) -> dict[str, Any]:
    """The fastest that fits, without activation checkpointing where that fits and is not asked for; and why."""
    fitting = [one for one in found if one["fits"] or one["fits_with_checkpointing"]]
    if not fitting:
        least = min(found, key=lambda one: one["total_with_checkpointing"])
        lacking = least["total_with_checkpointing"] - least["room"]
        return {
            "placement": None,
            "reason": f"nothing fits: {least['name']} takes the least, and lacks {lacking / GIB:.1f} GiB a device; use "
            "more devices, a quantised base (model.quantize), fewer tokens (train.micro_batch_size, train.max_length)",
        }
    best = min(fitting, key=lambda one: one["seconds"])
    is_saving = checkpointing or not best["fits"]
    needs = ", with train.activation_checkpointing: true," if is_saving else ""
    bound = "computing" if best["step"]["compute"] >= best["step"]["traffic"] else "traffic"
    others = [one["name"] for one in found if one not in fitting]
    short = f"; {', '.join(others)} would not fit" if others else ""
    return {
        "placement": best["name"],
        "engine": best["engine"],
        "activation_checkpointing": is_saving,
        "reason": f"{best['name']}{needs} is the fastest of {len(fitting)} that fit, bound by {bound}{short}",
    }


def _placed(
    run: Run, model: Counted, hardware: Hardware, placement: Placement, steps: Mapping[str, Mapping[str, int]]
) -> dict[str, Any]:
    def of_rank(checkpointing: bool) -> dict[str, int]:
        return memory(
            model,
            placement,
            kept=model.entries,  # the dense phase, which finds the mask, takes more than the sparse one
            checkpointing=checkpointing,
            micro_batches=_micro_batches(run, model, hardware),
            fragmentation=hardware.fragmentation,
        )

    plain, saving = of_rank(False), of_rank(True)
    room = hardware.gpu_memory - hardware.reserved
    fits, fits_saving = sum(plain.values()) <= room, sum(saving.values()) <= room
    is_saving = not fits or run.train.activation_checkpointing
    phases = {
        name: _step(run, model, hardware, placement, kept, is_saving)
        for name, kept in (("calibrate", model.entries), ("train", model.kept))
    }
    seconds = sum(count * phases[phase]["seconds"] for of_task in steps.values() for phase, count in of_task.items())
    hours = seconds * hardware.gpus / 3600
    step = phases["train"]
    return {
        "name": placement.name,
        "engine": {"name": placement.engine, **placement.options},
        "memory": plain,
        "memory_with_checkpointing": saving,
        "total": sum(plain.values()),
        "total_with_checkpointing": sum(saving.values()),
        "room": round(room),
        "fits": fits,
        "fits_with_checkpointing": fits_saving,
        "traffic": step["sent"],
        "step": {key: step[key] for key in ("compute", "traffic")},
        "seconds": step["seconds"],
        "tokens_per_second": _tokens(run) / step["seconds"],
        "gpu_hours": hours,
        "cost": None if hardware.price is None else hours * hardware.price,
        "packed_tasks": _packed(model, saving if is_saving else plain, room, is_saving),
    }


def _step(
    run: Run, model: Counted, hardware: Hardware, placement: Placement, kept: int, checkpointing: bool
) -> dict[str, Any]:
    """Seconds of one, and bytes a rank sends by owner and link."""
    micro = _micro_batches(run, model, hardware)
    sends: dict[str, dict[str, int]] = {owner: {"inside": 0, "between": 0} for owner in ("base", "adapter")}
    seconds = 0.0
    for one in traffic(model, placement, kept=kept, micro_batches=micro, nodes=hardware.nodes):
        size = sent(one)
        sends[one.owner]["inside"] += size
        slowest = size / hardware.link
        if one.spans_nodes:  # a ring leaves each node once
            sends[one.owner]["between"] += size
            slowest = max(slowest, one.rings * size / hardware.network)
        seconds += slowest / 1e9
    flops = model.flops or 4.0 * model.parameters
    tokens = micro * model.tokens
    compute = flops * (1.5 if checkpointing else 1.0) * tokens / (hardware.tflops * 1e12 * hardware.efficiency)
    return {"sent": sends, "compute": compute, "traffic": seconds, "seconds": max(compute, seconds)}


def _micro_batches(run: Run, model: Counted, hardware: Hardware) -> int:
    """Of a rank in a step, at most."""
    rows = model.tokens // run.train.max_length
    return math.ceil(run.train.batch_size / (hardware.gpus * rows))


def _packed(model: Counted, used: Mapping[str, int], room: float, checkpointing: bool) -> int:
    """Tasks at once, each with as many rows as one alone."""
    own = ("projections", "positions", "values", "gradients", "moments", "activations", "logits")
    fixed = sum(size for kind, size in used.items() if kind not in own)
    of_one = sum(used[kind] for kind in own)
    return max(0, int((room - fixed) // of_one))


def _tokens(run: Run) -> int:
    """Of a step, at most: rows are shorter than max_length."""
    return run.train.batch_size * run.train.max_length


def _steps(run: Run) -> dict[str, dict[str, int]]:
    """Task, or `joint` -> phase -> steps."""
    if run.multitask.name == "joint":
        return {JOINT: _phases(run.train, [task.train for task in run.tasks.values()], run.adapter.density)}
    return {
        # Of an adapter whose training goes on, the entries are known.
        name: _phases(
            trained_as(run, name),
            [task.train, *task.mixture],
            1.0 if task.start else run.adapter.density,
            held_out(run, name),
        )
        for name, task in run.tasks.items()
    }


def _phases(train: Train, files: Iterable[str], density: float, num_held_out: int = 0) -> dict[str, int]:
    is_told = train.steps is not None and train.calibrate.epochs is None
    num_rows = 0 if is_told else sum(1 for path in files for _ in tables.read(path)) - num_held_out
    return {one.name: one.num_steps for one in phases(train, density, num_rows)}


HEADER = 400
"""Bytes of an adapter file that say something of a module."""


def file_bytes(model: Counted) -> int:
    """Values in fp32, and a mask, whose bits cost their entropy."""
    density = model.kept / model.entries
    fixed = 4 * (model.kept + model.whole) + HEADER * model.num_modules
    if density == 1:
        return fixed
    entropy = -(density * math.log2(density) + (1 - density) * math.log2(1 - density))
    return fixed + round(model.entries * entropy / 8)
