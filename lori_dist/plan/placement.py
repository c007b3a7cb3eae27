"""What a rank holds and sends under each engine and placement of the base, from what `model.count` has counted."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from lori_dist.plan.model import Counted

LIVE = 10**9
"""Entries that DeepSpeed's stage 3 keeps gathered (stage3_max_live_parameters, max_reuse_distance)."""
FP32 = 4
MEMORY = (
    "base", "gathered", "projections", "positions", "values", "gradients", "moments", "activations", "logits",
    "buffers", "fragmentation",
)  # fmt: skip
"""Kinds of memory, in the order of tables and pictures."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Placement:
    """An engine with its options, on so many ranks."""

    engine: str
    options: Mapping[str, Any]
    ranks: int
    base_shards: int
    """Ranks that a copy of the base is divided among."""
    value_shards: int
    """Ranks that values and gradients are divided among, where they are."""

    @property
    def name(self) -> str:
        shown = ", ".join(f"{key}={value}" for key, value in self.options.items())
        return f"{self.engine} ({shown})" if shown else self.engine


def placements(ranks: int, nodes: int) -> Iterator[Placement]:
    """All there are, those of one node and of hybrids only where there is more than one rank, or node."""

    def made(engine: str, base_shards: int, value_shards: int, **options: Any) -> Placement:
        return Placement(
            engine=engine, options=options, ranks=ranks, base_shards=base_shards, value_shards=value_shards
        )

    yield made("ddp", 1, 1)
    yield made("fsdp", ranks, ranks)
    if ranks > nodes > 1:
        yield made("fsdp", ranks // nodes, ranks // nodes, replicas=nodes)
    yield made("fsdp", 1, ranks, **{"base": "replicated"})
    yield made("deepspeed", 1, 1, stage=1)
    yield made("deepspeed", 1, 1, stage=2)  # whose gradients of an adapter are one bucket, whole until it is reduced
    yield made("deepspeed", ranks, ranks, stage=3)
    if ranks > nodes > 1:
        yield made("deepspeed", ranks, ranks, stage=3, hpz=ranks // nodes)


# --- memory ----------------------------------------------------------------------------------------------------------


def memory(
    model: Counted, placement: Placement, *, kept: int, checkpointing: bool, projection: str, fragmentation: float = 0.0
) -> dict[str, int]:
    """Bytes of a rank by kind, at the most in a step, which is when the backward pass begins.

    kept: entries that are trained. fragmentation: what the allocator wastes, as a share of the rest.
    """
    moments = -(-2 * FP32 * kept // _moment_shards(placement))
    found = {
        "base": _base(model, placement),
        "gathered": _gathered(model, placement),
        "projections": model.projections if projection != "recomputed" else 0,
        "positions": FP32 * kept if kept < model.entries else 0,
        "values": _values(placement, kept),
        "gradients": -(-FP32 * kept // placement.value_shards),
        "moments": moments,
        "activations": activations(model, checkpointing=checkpointing),
        # What the head gives, the targets' part of it, that in fp32, and its log-softmax.
        "logits": model.tokens * model.vocabulary * (2 * model.dtype + 2 * FP32),
        "buffers": (model.widest_b + model.quantized) * (model.dtype + FP32)
        + FP32 * min(kept, 25_000_000) * (placement.engine != "fsdp"),
    }
    return {**found, "fragmentation": round(fragmentation * sum(found.values()))}


def activations(model: Counted, *, checkpointing: bool) -> int:
    if checkpointing:
        return model.num_blocks * model.block_input + model.block_activations + model.other_activations
    return model.num_blocks * model.block_activations + model.other_activations


def _base(model: Counted, placement: Placement) -> int:
    second = -(-model.base // placement.options["hpz"]) if "hpz" in placement.options else 0
    return -(-model.base // placement.base_shards) + second


def _gathered(model: Counted, placement: Placement) -> int:
    """Of the base, whole at once: a block that computes, and the next, as it arrives."""
    if placement.base_shards == 1:
        return 0
    rest = model.base - model.blocks  # embeddings and head
    if placement.engine == "fsdp":  # what arrives is copied into place; the root stays from forward to backward
        return rest + 3 * model.block
    return min(model.base, LIVE * model.dtype)


def _values(placement: Placement, kept: int) -> int:
    """What is updated, and, where that is sharded by DeepSpeed, what computes."""
    if placement.engine == "ddp":
        return FP32 * kept
    share = -(-FP32 * kept // placement.ranks)
    if placement.engine == "deepspeed":
        return share + (share if placement.options["stage"] == 3 else FP32 * kept)
    return -(-FP32 * kept // placement.value_shards)


def _moment_shards(placement: Placement) -> int:
    return placement.ranks if placement.engine == "deepspeed" else placement.value_shards


# --- traffic ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True, slots=True)
class Collective:
    """Bytes of the whole tensors that are made or reduced in a step."""

    kind: str
    """gather or reduce."""
    owner: str
    """base or adapter."""
    bytes: int
    group: int
    """Ranks that take part."""
    spans_nodes: bool


def traffic(model: Counted, placement: Placement, *, kept: int, micro_batches: int, nodes: int) -> list[Collective]:
    """Of one step of so many micro-batches."""
    ranks, values, found = placement.ranks, FP32 * kept, []
    if ranks == 1:
        return []
    spans, inside = nodes > 1, placement.base_shards < ranks or "hpz" in placement.options

    def add(kind: str, owner: str, size: int, group: int, spans_nodes: bool) -> None:
        if group == 1:
            return
        found.append(Collective(kind=kind, owner=owner, bytes=size, group=group, spans_nodes=spans_nodes))

    if placement.engine == "ddp":
        add("reduce", "adapter", values, ranks, spans)
    elif placement.engine == "fsdp":
        group = placement.value_shards
        crosses = spans and group == ranks
        if placement.base_shards > 1:
            rest = model.base - model.blocks
            add("gather", "base", micro_batches * (2 * model.blocks + rest), group, crosses)
            add("gather", "adapter", micro_batches * 2 * values, group, crosses)
        else:
            add("gather", "adapter", values, group, crosses)
        add("reduce", "adapter", values, group, crosses)
        if group < ranks:
            add("reduce", "adapter", -(-values // group), ranks // group, spans)
    elif placement.options["stage"] < 3:
        add("reduce", "adapter", values, ranks, spans)
        add("gather", "adapter", values, ranks, spans)
    else:
        times = 1 if model.parameters <= LIVE else 2
        add("gather", "base", micro_batches * model.base, ranks, spans)
        if times == 2:  # again in the backward pass, of the node's own copy where there is one
            add("gather", "base", micro_batches * model.base, placement.options.get("hpz", ranks), spans and not inside)
        add("gather", "adapter", micro_batches * times * values, ranks, spans)
        add("reduce", "adapter", values, ranks, spans)
    return found


def sent(collective: Collective) -> int:
    """Bytes that a rank sends in a ring: twice as much where all get what is reduced."""
    return round(collective.bytes * (collective.group - 1) / max(1, collective.group))
