"""The memory and traffic of a rank under each engine and placement of the base: the sum of what engines report."""

import dataclasses
import functools
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from lori_dist import plugin
from lori_dist.config import Choice, Run
from lori_dist.errors import ConfigError
from lori_dist.training.cost import FP32, Collective, Counted, Held, Load
from lori_dist.training.loss import logits_bytes

MEMORY = (
    "base", "gathered", "projections", "positions", "values", "gradients", "moments", "activations", "logits",
    "buffers", "fragmentation",
)  # fmt: skip
"""Kinds of memory, in the order of tables and pictures."""

ROUND = 2**24
"""Entries that ranks exchange at once for gradients that are kept apart."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Placement:
    """An engine with its options, on a number of ranks."""

    engine: str
    options: Mapping[str, Any]
    """Options that are not the engine's defaults, and DeepSpeed's stage."""
    ranks: int

    @property
    def name(self) -> str:
        """Name of the engine with its options, for tables."""
        shown = ", ".join(f"{key}={value}" for key, value in self.options.items())
        return f"{self.engine} ({shown})" if shown else self.engine

    def look_up(self, role: str) -> Callable[..., Any] | None:
        """A function in the engine's file; None if it has no such function."""
        return _companion(self.engine, role)

    def ask(self, role: str) -> Callable[..., Any]:
        """The engine's own `memory` or `traffic`. Raises ConfigError if its file has none."""
        found = self.look_up(role)
        if found is None:
            raise ConfigError(
                f"train.engine: {self.engine} cannot be planned, as its file defines no function `{role}`; define "
                "`memory` and `traffic` there, as lori_dist/engines/ddp.py does, or plan another engine with "
                "train.engine=fsdp"
            )
        return found


@functools.cache
def _companion(engine: str, role: str) -> Callable[..., Any] | None:
    """A function beside an engine's `build`, found by parsing the file."""
    return plugin.find("engines", engine, "build", "train.engine").companion(role)


def placements(ranks: int, nodes: int, engine: Choice | None = None) -> Iterator[Placement]:
    """Yields all placements that engines propose, and the run's own if it is not among them, also for an engine outside
    the package.

    Raises ConfigError for a run's own that so many ranks cannot have, or whose engine does not say what it costs.
    """
    names = list(dict.fromkeys([*_ORDER, *plugin.names("engines")]))
    listed = [
        Placement(engine=name, options=options, ranks=ranks)
        for name in names
        for options in _proposed(name, ranks, nodes)
    ]
    yield from listed
    if engine is not None:
        found = own(ranks, nodes, engine)
        if all(found.name != one.name for one in listed):
            yield found


def check_engine(run: Run, ranks: int) -> None:
    """Raises ConfigError if the run's engine says that it cannot train on so many ranks."""
    check = _companion(run.train.engine.name, "check")
    if check is not None and (problems := list(check(run, ranks))):
        raise ConfigError("\n".join(problems))


_ORDER = ("ddp", "fsdp", "deepspeed")
"""Order of the rows, from the engine that shards least to the one that shards most. Others follow."""


def _proposed(name: str, ranks: int, nodes: int) -> Iterator[dict[str, Any]]:
    if _companion(name, "memory") is None or _companion(name, "traffic") is None:
        return
    propose = _companion(name, "placements")
    yield from propose(ranks, nodes) if propose is not None else [{}]


def own(ranks: int, nodes: int, engine: Choice) -> Placement:
    """The placement of a run's own engine. Raises ConfigError as `placements`."""
    method = plugin.find("engines", engine.name, "build", "train.engine")
    bound = method.bind(engine.options, "train.engine")
    settle = method.companion("settled")  # options that a file among them gives
    bound = bound if settle is None else settle(bound)
    found = named(engine.name, method, bound, ranks, nodes)
    for role in ("memory", "traffic"):
        found.ask(role)
    return found


def named(engine: str, method: plugin.Method, bound: Mapping[str, Any], ranks: int, nodes: int) -> Placement:
    """The placement of an engine with options: those that are not defaults, and those that all proposals have."""
    given = {key: bound.get(key, option.default) for key, option in method.options.items()}
    proposed = [set(one) for one in _proposed(engine, ranks, nodes)]
    shown = set.intersection(*proposed) if proposed else set()
    options = {key: value for key, value in given.items() if key in shown or value != method.options[key].default}
    return Placement(engine=engine, options=options, ranks=ranks)


# --- memory ----------------------------------------------------------------------------------------------------------


def memory(
    model: Counted,
    placement: Placement,
    *,
    kept: int,
    checkpointing: bool,
    micro_batches: int = 1,
    fragmentation: float = 0.0,
    nodes: int = 1,
    tasks: int = 0,
) -> dict[str, int]:
    """Bytes of a rank by kind, at the moment of a step that takes the most: when there is a loss, when the gradient is
    in the first of the blocks that it meets, or when gradients of tasks are exchanged.

    kept: entries of B that are trained, of each adapter. fragmentation: what the allocator wastes, as a share of the
    rest. tasks: gradients that are kept apart of each entry, see `Load`.
    """
    load = load_of(model, placement, kept=kept, micro_batches=micro_batches, nodes=nodes, tasks=tasks)
    said: Held = placement.ask("memory")(model, load, **placement.options)
    held = {
        "base": said.base,
        "projections": model.projections,
        "positions": FP32 * kept * model.adapters * (kept < model.entries) + 2 * FP32 * model.before,
        "values": said.values,
        "gradients": said.gradients + FP32 * load.trained * tasks,
        "moments": said.moments,
        "buffers": (model.widest_b + model.quantized) * (model.dtype + FP32) + said.buffers,
    }
    of_blocks = model.num_blocks * model.block_input if checkpointing else model.blocks_activations
    saved = of_blocks + model.other_activations
    again = model.block_activations if checkpointing else 0
    logits = logits_bytes(model.tokens, model.vocabulary, model.block_input, chunked=model.chunked)
    moments = [
        {"activations": saved, "logits": logits, "gathered": said.gathered_at_loss},
        {"activations": saved + again + model.block_gradients, "logits": 0, "gathered": said.gathered_in_block},
    ]
    if tasks and placement.ranks > 1:
        of_all = load.trained * tasks
        sent = FP32 * (min(of_all, ROUND) + -(-of_all // placement.ranks))
        moments.append({"activations": 0, "logits": 0, "gathered": 0, "buffers": held["buffers"] + sent})
    found = max((held | moment for moment in moments), key=lambda one: sum(one.values()))
    found["fragmentation"] = round(fragmentation * sum(found.values()))
    return {kind: found[kind] for kind in MEMORY}


def load_of(
    model: Counted, placement: Placement, *, kept: int, micro_batches: int, nodes: int = 1, tasks: int = 0
) -> Load:
    """The Load that an engine's `memory` and `traffic` take."""
    trained = (kept + model.whole) * model.adapters
    return Load(ranks=placement.ranks, nodes=nodes, trained=trained, micro_batches=micro_batches, tasks=tasks)


OF_ROWS = (
    "block_activations", "blocks_activations", "block_gradients", "block_input", "other_activations", "tokens",
)  # fmt: skip
"""Counts that are proportional to the rows of a micro-batch."""
OF_ADAPTERS = ("projections", "widest_b", *OF_ROWS)
"""Counts that are proportional to the adapters over a base, each of which has rows of its own."""


def with_adapters(model: Counted, number: int) -> Counted:
    """The counts of a model with `number` adapters over the base, each with the rows that one has alone."""
    scaled = {name: getattr(model, name) * number // model.adapters for name in OF_ADAPTERS}
    return dataclasses.replace(model, adapters=number, **scaled)


def with_rows(model: Counted, rows: int, before: int) -> Counted:
    """The counts of a model with micro-batches of `rows` rows, from those with `before` rows."""
    return dataclasses.replace(model, **{name: getattr(model, name) * rows // before for name in OF_ROWS})


# --- traffic ---------------------------------------------------------------------------------------------------------


def traffic(
    model: Counted, placement: Placement, *, kept: int, micro_batches: int, nodes: int, tasks: int = 0
) -> list[Collective]:
    """The collectives of one step. The arguments are those of `memory`."""
    load = load_of(model, placement, kept=kept, micro_batches=micro_batches, nodes=nodes, tasks=tasks)
    found: list[Collective] = list(placement.ask("traffic")(model, load, **placement.options))
    if tasks:
        size = FP32 * load.trained * tasks
        found.append(
            Collective(kind="reduce", owner="adapter", bytes=size, group=placement.ranks, spans_nodes=nodes > 1)
        )
    return [one for one in found if one.group > 1 or one.kind == "copy"]


def sent(collective: Collective) -> int:
    """Bytes that a rank sends in a ring. A sum costs two passes: its shares are summed and then gathered."""
    if collective.kind == "copy":
        return collective.bytes
    rounds = 2 if collective.kind == "all_reduce" else 1
    return round(rounds * collective.bytes * (collective.group - 1) / collective.group)
