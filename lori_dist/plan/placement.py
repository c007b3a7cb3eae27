"""What a rank holds and sends under each engine and placement of the base, from what `model.count` has counted."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from lori_dist import plugin
from lori_dist.config import Choice
from lori_dist.errors import ConfigError
from lori_dist.plan.model import Counted

Kind = Literal["gather", "reduce", "all_reduce"]
Owner = Literal["base", "adapter"]

LIVE = 10**9
"""Entries that DeepSpeed's stage 3 keeps gathered (stage3_max_live_parameters, max_reuse_distance)."""
FP32 = 4
MEMORY = (
    "base", "gathered", "projections", "positions", "values", "gradients", "moments", "activations", "logits",
    "buffers", "fragmentation",
)  # fmt: skip
"""Kinds of memory, in the order of tables and pictures."""
ENGINES = ("ddp", "fsdp", "deepspeed")
"""That can be planned."""


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


def placements(ranks: int, nodes: int, own: Choice | None = None) -> Iterator[Placement]:
    """All there are, hybrids only where there is more than one node; and a run's own, where it is none of these.

    Raises ConfigError for a run's own that so many ranks cannot have.
    """
    listed = list(_listed(ranks, nodes))
    yield from listed
    if own is not None and own.name in ENGINES:
        found = _own(ranks, own)
        if all(found.name != one.name for one in listed):
            yield found


def _own(ranks: int, own: Choice) -> Placement:
    known = plugin.find("engines", own.name, "build", "train.engine").options
    given = {key: own.options.get(key, option.default) for key, option in known.items()}
    options = {key: value for key, value in given.items() if value != known[key].default}
    if own.name == "deepspeed":
        options.setdefault("stage", known["stage"].default)
    for key in ("replicas", "hpz"):
        if ranks % options.get(key, 1):
            raise ConfigError(
                f"train.engine.{key}: {options[key]} was given for {ranks} GPUs; give a number that divides them"
            )
    if own.name == "ddp" or options.get("base") == "replicated" or options.get("stage", 3) < 3:
        base_shards = 1
    else:
        base_shards = ranks // options.get("replicas", 1)
    value_shards = ranks if options.get("base") == "replicated" else base_shards
    return Placement(engine=own.name, options=options, ranks=ranks, base_shards=base_shards, value_shards=value_shards)


def _listed(ranks: int, nodes: int) -> Iterator[Placement]:
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
    model: Counted,
    placement: Placement,
    *,
    kept: int,
    checkpointing: bool,
    micro_batches: int = 1,
    fragmentation: float = 0.0,
) -> dict[str, int]:
    """Bytes of a rank by kind, at the moment of a step that takes the most: when there is a loss, or when the gradient
    is in the first of the blocks that it meets.

    kept: entries of B that are trained. fragmentation: what the allocator wastes, as a share of the rest.
    """
    trained = kept + model.whole
    # FSDP sums the gradients of micro-batches before they are reduced.
    is_summed = placement.engine == "fsdp" and micro_batches > 1
    is_host = bool(placement.options.get("offload"))  # where the shards wait
    trains_on_host = is_host and placement.engine == "fsdp"
    held = {
        "base": 0 if is_host else _base(model, placement),
        "projections": model.projections,
        "positions": FP32 * kept if kept < model.entries else 0,
        "values": 0 if trains_on_host else _values(placement, trained),
        "gradients": -(-FP32 * trained // placement.value_shards) * (not trains_on_host) + FP32 * trained * is_summed,
        "moments": 0 if trains_on_host else -(-2 * FP32 * trained // _moment_shards(placement)),
        "buffers": (model.widest_b + model.quantized) * (model.dtype + FP32)
        + FP32 * min(trained, 25_000_000) * (placement.engine != "fsdp"),
    }
    kept_of_block = model.block_input if checkpointing else model.block_activations
    saved = model.num_blocks * kept_of_block + model.other_activations
    again = model.block_activations if checkpointing else 0
    moments = (
        # Of the logits in fp32: they, their log-softmax, and the gradient of either.
        {
            "activations": saved,
            "logits": 3 * FP32 * model.tokens * model.vocabulary,
            "gathered": _root(model, placement),
        },
        {"activations": saved + again + model.block_gradients, "logits": 0, "gathered": _gathered(model, placement)},
    )
    most = max(moments, key=lambda moment: sum(moment.values()))
    found = held | most
    found["fragmentation"] = round(fragmentation * sum(found.values()))
    return {kind: found[kind] for kind in MEMORY}


def _base(model: Counted, placement: Placement) -> int:
    second = -(-model.base // placement.options["hpz"]) if "hpz" in placement.options else 0
    return -(-model.base // placement.base_shards) + second


def _gathered(model: Counted, placement: Placement) -> int:
    """Of the base, whole at once: a block that computes, and the next, as it arrives and is copied into place."""
    if placement.engine == "fsdp" and placement.base_shards > 1:
        return _root(model, placement) + 3 * model.block
    return _root(model, placement)


def _root(model: Counted, placement: Placement) -> int:
    """What stays whole from the forward to the backward pass: of FSDP all but blocks, of DeepSpeed the last used."""
    if placement.base_shards == 1:
        return 0
    return model.base - model.blocks if placement.engine == "fsdp" else min(model.base, LIVE * model.dtype)


def _values(placement: Placement, trained: int) -> int:
    """What is updated, and, where that is sharded by DeepSpeed, what computes."""
    if placement.engine == "ddp":
        return FP32 * trained
    share = -(-FP32 * trained // placement.ranks)
    if placement.engine == "deepspeed":
        return share + (share if placement.options["stage"] == 3 else FP32 * trained)
    return -(-FP32 * trained // placement.value_shards)


def _moment_shards(placement: Placement) -> int:
    return placement.ranks if placement.engine == "deepspeed" else placement.value_shards


# --- traffic ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True, slots=True)
class Collective:
    """Bytes of the whole tensors that are made or reduced in a step."""

    kind: Kind
    """reduce: of what is summed, each rank gets its share; all_reduce: all of it."""
    owner: Owner
    bytes: int
    group: int
    """Ranks that take part."""
    spans_nodes: bool
    rings: int = 1
    """Groups that send at the same time from the same node."""


def traffic(model: Counted, placement: Placement, *, kept: int, micro_batches: int, nodes: int) -> list[Collective]:
    """Of one step of so many micro-batches."""
    ranks, values, found = placement.ranks, FP32 * (kept + model.whole), list[Collective]()
    spans = nodes > 1

    def add(kind: Kind, owner: Owner, size: int, group: int, spans_nodes: bool, rings: int = 1) -> None:
        if group > 1:
            found.append(
                Collective(kind=kind, owner=owner, bytes=size, group=group, spans_nodes=spans_nodes, rings=rings)
            )

    if placement.engine == "ddp":
        add("all_reduce", "adapter", values, ranks, spans)
    elif placement.engine == "fsdp":
        group, per_node = placement.value_shards, ranks // nodes
        crosses = spans and group > per_node
        if placement.base_shards > 1:
            rest = model.base - model.blocks
            add("gather", "base", micro_batches * (2 * model.blocks + rest), group, crosses)
            add("gather", "adapter", micro_batches * 2 * values, group, crosses)
        else:
            add("gather", "adapter", micro_batches * values, group, crosses)
        add("reduce", "adapter", values, group, crosses)
        # A rank's share is that of one rank of every other group, with which it is summed.
        add("all_reduce", "adapter", -(-values // group), ranks // group, spans, min(group, per_node))
    elif placement.options["stage"] < 3:
        times = micro_batches if placement.options["stage"] == 2 else 1
        add("all_reduce", "adapter", times * values, ranks, spans)
        add("gather", "adapter", values, ranks, spans)
    else:
        times = 1 if model.parameters <= LIVE else 2
        near = placement.options.get("hpz", 1)
        add("gather", "base", micro_batches * model.base, ranks, spans)
        if times == 2:  # again in the backward pass, of the neighbours' own copy where there is one
            is_near = 1 < near <= ranks // nodes
            add("gather", "base", micro_batches * model.base, near if near > 1 else ranks, spans and not is_near)
        add("gather", "adapter", micro_batches * times * values, ranks, spans)
        add("reduce", "adapter", micro_batches * values, ranks, spans)
    return found


def sent(collective: Collective) -> int:
    """Bytes that a rank sends in a ring: to get all of what is summed, its shares are summed and then gathered."""
    rounds = 2 if collective.kind == "all_reduce" else 1
    return round(rounds * collective.bytes * (collective.group - 1) / collective.group)
