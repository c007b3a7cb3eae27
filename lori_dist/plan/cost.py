"""The costs of gangs under one placement: memory, seconds of a step, and seconds of all steps."""

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from lori_dist.config import Run
from lori_dist.errors import ConfigError
from lori_dist.gpus import RESERVED
from lori_dist.plan.model import Counted, count
from lori_dist.plan.placement import Placement, memory, sent, traffic, with_adapters, with_rows
from lori_dist.plan.steps import Gang, Member, Work, adapter_at, full, passes, segments, work
from lori_dist.training.micro_batches import num_micro_batches
from lori_dist.training.phases import CALIBRATE, TRAIN
from lori_dist.training.sequence_parallel import own_tokens


@dataclass(frozen=True, kw_only=True, slots=True)
class Hardware:
    """A cluster whose devices are all alike."""

    gpus: int
    """Number of devices in the cluster."""
    nodes: int
    gpu_memory: float
    """Bytes of memory of each device."""
    tflops: float
    """Peak of dense products in the base's dtype, in TFLOP/s."""
    link: float
    """GB/s that a device sends to another of its node."""
    network: float
    """GB/s that a node sends to another, over all of its adapters."""
    bandwidth: float = 2000.0
    """GB/s of a device's memory."""
    host: float = 32.0
    """GB/s that a device reads from its host's memory."""
    efficiency: float = 0.5
    """Share of the peak that products reach."""
    fragmentation: float = 0.1
    """Share of the used memory that the allocator wastes in addition."""
    reserved: float = RESERVED
    """Bytes of each device that CUDA, NCCL and libraries take."""
    price: float | None = None
    """Price of one hour of a device."""
    currency: str = "USD"
    """Currency of the price."""
    name: str = ""
    """Name of the device, as in DEVICES."""
    is_assumed: bool = False
    """Whether the device is the default because nobody has named one."""

    def __post_init__(self) -> None:
        """Raises ConfigError for devices that do not divide among the nodes."""
        if self.gpus % self.nodes:
            raise ConfigError(f"--nodes: got {self.nodes} for {self.gpus} GPUs; give a number that divides them")

    @property
    def room(self) -> float:
        """Bytes of each device that training may use."""
        return self.gpu_memory - self.reserved


@dataclass(frozen=True, kw_only=True, slots=True)
class Trained:
    """A gang with the counts of its model and of its steps."""

    gang: Gang
    model: Counted
    steps: tuple[tuple[str, int, Work], ...]
    """Phase, number of steps, and the work of one of them."""
    full: Work
    validation: Work | None
    """The work of one measurement of the validation loss."""
    num_validations: int


def ranks_of(run: Run, hardware: Hardware) -> int:
    """Number of ranks of the gang: each has cluster.gpus_per_worker devices, and computes on the first of them."""
    per_rank = max(1, run.cluster.gpus_per_worker)
    if (hardware.gpus // hardware.nodes) % per_rank:
        raise ConfigError(
            f"cluster.gpus_per_worker: got {per_rank}, and a node has {hardware.gpus // hardware.nodes} GPUs "
            "(--gpus over --nodes); give a number that divides them"
        )
    return hardware.gpus // per_rank


# --- gangs -----------------------------------------------------------------------------------------------------------


def trained_of(run: Run, gangs: Sequence[Gang], ranks: int) -> list[Trained]:
    """The counts of each gang. Equal ones are counted once."""
    counted: dict[tuple[int, str | None], Counted] = {}
    found = []
    for gang in gangs:
        alike = gang.adapters, gang.start
        if alike not in counted:
            counted[alike] = count(run, ranks=ranks, adapters=gang.adapters, start=adapter_at(run, gang))
        model = dataclasses.replace(counted[alike], before=gang.earlier * counted[alike].kept)
        found.append(_with_steps(model, gang, ranks))
    return found


def with_micro_batches_of(one: Trained, rows: int, ranks: int) -> Trained:
    """The same gang with micro-batches of `rows` rows."""
    members = tuple(
        dataclasses.replace(
            member, train=dataclasses.replace(member.train, micro_batch_size=rows, micro_batch_tokens=None)
        )
        for member in one.gang.members
    )
    model = with_rows(one.model, rows * one.model.adapters, one.model.tokens // own_tokens(members[0].train))
    return _with_steps(model, dataclasses.replace(one.gang, members=members), ranks)


def _with_steps(model: Counted, gang: Gang, ranks: int) -> Trained:
    steps = [
        (phase, number, work(model, members, phase, ranks))
        for phase in (CALIBRATE, TRAIN)
        for number, members in segments(gang, phase)
    ]
    measured = [member for member in gang.members if member.validation]
    return Trained(
        gang=gang,
        model=model,
        steps=tuple(steps),
        full=full(model, gang, ranks),
        validation=_validation(model, measured[0], ranks) if measured else None,
        num_validations=_num_validations(measured[0]) if measured else 0,
    )


def _num_validations(member: Member) -> int:
    every, last = member.train.validate_every, member.phases[-1].num_steps
    return 0 if every is None else last // every + (last % every != 0)


def _validation(model: Counted, member: Member, ranks: int) -> Work:
    """The work of one pass over the validation rows of all tasks."""
    number = sum(one.number for one in member.validation)
    mean, groups = (
        sum(one.number * one.mean for one in member.validation) / number,
        member.train.groups(ranks),
    )
    micro = sum(num_micro_batches(one.number, groups, member.train.rows_at_once) for one in member.validation)
    longest = max(int(one.tokens.max()) for one in member.validation)
    computed = number * (mean + longest) / 2 / ranks  # between no padding and all
    attention = sum(layer.per_pair * layer.pairs(round(mean)) for layer in model.attention) * number / ranks
    return Work(
        micro_batches=micro, tokens=number * mean, computed=computed, attention=attention, model_attention=3 * attention
    )


# --- a placement -----------------------------------------------------------------------------------------------------


def placed_on(run: Run, trained: Sequence[Trained], hardware: Hardware, placement: Placement) -> dict[str, Any]:
    """The costs of a placement, as `plan` returns them."""
    plain, saving = (
        _most(hardware, [_memory(one, hardware, placement, is_saving) for one in trained])
        for is_saving in (False, True)
    )
    room = hardware.room
    fits, fits_saving = sum(plain.values()) <= room, sum(saving.values()) <= room
    is_saving = not fits or run.train.activation_checkpointing
    mean = _mean_step(trained, hardware, placement, is_saving)
    whole = _step(trained[0], hardware, placement, trained[0].model.kept, trained[0].full, is_saving)
    seconds = training_seconds(trained, hardware, placement, is_saving)
    other = training_seconds(trained, hardware, placement, not is_saving)
    hours = seconds * hardware.gpus / 3600
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
        "checkpointing": is_saving,
        "traffic": mean["sent"],
        "step": mean["step"],
        "seconds": mean["seconds"],
        "tokens_per_second": mean["tokens_per_second"],
        "mfu": mean["mfu"],
        "full": whole,
        "training_seconds": seconds,
        "training_seconds_otherwise": other,
        "gpu_hours": hours,
        "cost": None if hardware.price is None else hours * hardware.price,
        "packed_tasks": _at_once(trained[0], hardware, placement, is_saving),
        "longest_row": _longest_row(trained, hardware, placement),
    }


def training_seconds(
    trained: Sequence[Trained], hardware: Hardware, placement: Placement, checkpointing: bool
) -> float:
    """Seconds of all steps of all gangs, with the measurements on validation rows."""
    seconds = 0.0
    for one in trained:
        for phase, number, of_step in one.steps:
            kept = one.model.entries if phase == CALIBRATE and one.gang.start is None else one.model.kept
            seconds += number * _step(one, hardware, placement, kept, of_step, checkpointing)["seconds"]
        if one.validation is not None:
            seconds += one.num_validations * _measured(one, hardware, placement, one.validation)
    return seconds


def _mean_step(
    trained: Sequence[Trained], hardware: Hardware, placement: Placement, checkpointing: bool
) -> dict[str, Any]:
    """Mean over the steps of the phase `train`, of all gangs."""
    steps = [
        (number, _step(one, hardware, placement, one.model.kept, of_step, checkpointing))
        for one in trained
        for phase, number, of_step in one.steps
        if phase == TRAIN
    ]
    total = sum(number for number, _ in steps)

    def mean(values: Sequence[float]) -> float:
        return sum(number * value for (number, _), value in zip(steps, values, strict=True)) / total

    seconds = mean([one["seconds"] for _, one in steps])
    tokens = mean([one["tokens"] for _, one in steps])
    mfus = [one["mfu"] for _, one in steps]
    return {
        "sent": {
            owner: {link: round(mean([one["sent"][owner][link] for _, one in steps])) for link in ("inside", "between")}
            for owner in ("base", "adapter")
        },
        "step": {key: mean([one["step"][key] for _, one in steps]) for key in steps[0][1]["step"]},
        "seconds": seconds,
        "tokens": tokens,
        "tokens_per_second": tokens / seconds,
        "mfu": None if None in mfus else mean([one["mfu"] * one["seconds"] for _, one in steps]) / seconds,
    }


def _step(
    one: Trained, hardware: Hardware, placement: Placement, kept: int, of_step: Work, checkpointing: bool
) -> dict[str, Any]:
    """Seconds of one step, their parts, and the bytes that a rank sends, by owner and link."""
    model = one.model
    sends: dict[str, dict[str, int]] = {owner: {"inside": 0, "between": 0} for owner in ("base", "adapter")}
    seconds = 0.0
    for collective in traffic(
        model, placement, kept=kept, micro_batches=of_step.micro_batches, nodes=hardware.nodes, tasks=one.gang.apart
    ):
        size = sent(collective)
        if collective.kind == "copy":
            seconds += size / hardware.host / 1e9
            continue
        sends[collective.owner]["inside"] += size
        slowest = size / hardware.link
        if collective.spans_nodes:  # a ring leaves each node once
            sends[collective.owner]["between"] += size
            slowest = max(slowest, collective.rings * size / hardware.network)
        seconds += slowest / 1e9
    flops = model.flops or 4.0 * model.parameters
    rate = hardware.tflops * 1e12 * hardware.efficiency
    again = 1.5 if checkpointing else 1.0
    parts = {
        "base": flops * again * of_step.computed / rate,
        "attention": passes(model, checkpointing) * of_step.attention / rate,
        "adapter": model.adapter_flops * again * of_step.computed / rate,
    }
    num_passes = of_step.micro_batches * (3 if checkpointing else 2)
    dequantize = num_passes * model.dequantized / (hardware.bandwidth * 1e9)
    compute = sum(parts.values())
    total = max(compute + dequantize, seconds)
    useful = flops * of_step.tokens + of_step.model_attention
    return {
        "sent": sends,
        "step": {"compute": compute, **parts, "dequantize": dequantize, "traffic": seconds},
        "tokens": of_step.tokens,
        "seconds": total,
        "tokens_per_second": of_step.tokens / total,
        "mfu": None if model.flops is None else useful / (total * placement.ranks * hardware.tflops * 1e12),
    }


def _measured(one: Trained, hardware: Hardware, placement: Placement, of_rows: Work) -> float:
    """Seconds of one measurement of the validation loss: a forward pass."""
    model = one.model
    flops = (model.flops or 4.0 * model.parameters) / 2 * of_rows.computed + of_rows.attention
    gathered = sum(
        sent(collective) / (hardware.network if collective.spans_nodes else hardware.link)
        for collective in traffic(
            model, placement, kept=model.kept, micro_batches=of_rows.micro_batches, nodes=hardware.nodes
        )
        if collective.owner == "base"
    )
    return max(flops / (hardware.tflops * 1e12 * hardware.efficiency), gathered / 2 / 1e9)


# --- memory ----------------------------------------------------------------------------------------------------------


def _memory(one: Trained, hardware: Hardware, placement: Placement, checkpointing: bool) -> dict[str, int]:
    model = one.model
    is_dense = any(phase == CALIBRATE for phase, _, _ in one.steps)
    phases = [model.kept, *([model.entries] if is_dense else [])]
    return _most(
        hardware,
        [
            memory(
                model,
                placement,
                kept=kept,
                checkpointing=checkpointing,
                micro_batches=max(of_step.micro_batches for _, _, of_step in (*one.steps, ("", 0, one.full))),
                fragmentation=hardware.fragmentation,
                nodes=hardware.nodes,
                tasks=one.gang.apart,
            )
            for kept in phases
        ],
    )


def _most(hardware: Hardware, found: Sequence[dict[str, int]]) -> dict[str, int]:
    return max(found, key=lambda kinds: sum(kinds.values()))


STEP = 256
"""Tokens to which the longest row that fits is rounded."""


def _longest_row(trained: Sequence[Trained], hardware: Hardware, placement: Placement) -> int:
    """Tokens of the longest row that fits, one at a time and with activation checkpointing: what a token takes is what
    it takes in rows of train.max_length."""

    def total(one: Trained, rows: int) -> int:
        model = with_rows(one.model, rows * one.model.adapters, one.model.tokens // own)
        return sum(_memory(dataclasses.replace(one, model=model), hardware, placement, True).values())

    found = []
    for one in trained:
        train = one.gang.members[0].train
        own = own_tokens(train)
        first, second = total(one, 1), total(one, 2)
        rows = 1 + (hardware.room - first) / max(1, second - first)
        found.append(int(rows * own * train.sequence_parallel))
    return max(0, min(found) // STEP * STEP)


def _at_once(one: Trained, hardware: Hardware, placement: Placement, checkpointing: bool) -> int:
    """Number of tasks whose adapters would fit over one base, each with as many rows as one alone."""

    def total(number: int) -> int:
        model = with_adapters(one.model, number)
        gang = dataclasses.replace(one.gang, apart=one.gang.apart if number == 1 and one.gang.adapters == 1 else 1)
        return sum(
            _memory(dataclasses.replace(one, model=model, gang=gang), hardware, placement, checkpointing).values()
        )

    if total(1) > hardware.room:
        return 0
    two, three = total(2), total(3)
    if two > hardware.room:
        return 1
    return 2 + int((hardware.room - two) // max(1, three - two))
