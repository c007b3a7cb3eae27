"""The costs of evaluating a run's models, on the placement of the base that evaluate.engine gives."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from lori_dist import jobs, plugin
from lori_dist.cluster.trials import AT_ONCE
from lori_dist.config import Run
from lori_dist.errors import ConfigError
from lori_dist.evaluation._place import engine_of
from lori_dist.gpus import GIB
from lori_dist.plan.cost import Hardware, ranks_of
from lori_dist.plan.model import Counted
from lori_dist.plan.placement import Placement, named, placements, sent
from lori_dist.plan.rows import BYTES_PER_TOKEN, Counter, Lengths
from lori_dist.scores import LOWER_IS_BETTER
from lori_dist.training.cost import FP32, Collective, Held, Load
from lori_dist.training.loss import logits_bytes

MEMORY = (
    "base", "gathered", "adapters", "activations", "logits", "cache", "buffers", "fragmentation",
)  # fmt: skip
"""Kinds of memory. `cache`: keys and values of the tokens that a text, or a label, follows."""

WRITING = ("exact_match", "refusal")
CHOICES = ("choice", "choice_norm", "choice_bytes", "choice_end")
COPIES = 3
"""Times that keys and values exist when rows join a batch or leave it, between forward passes."""
FORWARD = 0.4
"""Share of the operations of training an adapter that its forward pass has: 2 products of 5, A without a gradient."""
ACTIVE = 3
"""Tensors of a block's widest features that exist at once in a forward pass, as in a gated MLP; and one more of the
hidden size than the input."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Batch:
    """The rows that a rank runs at once."""

    rows: int
    """Rows of the data, times the models that each of them meets."""
    longest: int
    """Tokens of the longest row."""
    answer: int
    """Tokens of the longest response, which are those whose logits are made where rows are only read."""
    written: int = 0
    """Most tokens that are written after a row; 0 where rows are only read."""
    adapters: int = 0
    """Bytes of the models' adapters."""
    components: int = 1
    """Pairs of A and B in them."""


def planned(run: Run, model: Counted, hardware: Hardware, counter: Counter) -> dict[str, Any]:
    """The costs of a run's evaluation as plain JSON.

    models: number of evaluated models; passes: how many of them share each pass over the base; placement, engine: where
    the base is; memory: bytes of a device by kind, total, room, fits; seconds: of the gang, over all models, with the
    merges that searches for weights try; gpu_hours; cost; others: total and fits with other engines; uncounted: work
    whose time and memory cannot be counted. Raises ConfigError for an engine that does not fit the ranks, or that does
    not say what it costs.
    """
    ranks = ranks_of(run, hardware)
    rows = {name: counter.of(name, "test", task.test) for name, task in run.tasks.items()}
    placement = placement_of(run, ranks, hardware.nodes)
    groups = _passes(len(components_of(run)), model)
    sizes = {"longest": _longest(run, rows), "answer": _longest_answer(run, rows), "rows": _most_rows(run, rows)}
    memory = most_memory(run, model, placement, hardware, **sizes)
    total = sum(memory.values())
    clock = _Clock(run=run, model=model, hardware=hardware, placement=placement)
    seconds = sum(
        clock.seconds(name, metric, one, _limited(run, one.number), number)
        for name, one in rows.items()
        for metric in run.evaluate.metrics
        for number in _passes(_measured_on(run, name), model)
    )
    for merge in run.merges.values():
        if (search := merge.search) is not None:
            number = min(search.budget, AT_ONCE) if model.is_routable else 1
            seconds += -(-search.budget // number) * sum(
                clock.seconds(name, search.metric, rows[name], search.rows, number) for name in merge.tasks or run.tasks
            )
    hours = seconds * hardware.gpus / 3600
    return {
        "models": sum(groups),
        "passes": groups,
        "placement": placement.name,
        "engine": {"name": placement.engine, **placement.options},
        "memory": memory,
        "total": total,
        "room": round(hardware.room),
        "fits": total <= hardware.room,
        "seconds": seconds,
        "gpu_hours": hours,
        "cost": None if hardware.price is None else hours * hardware.price,
        "others": others(run, model, placement, hardware, **sizes),
        "uncounted": list(_uncounted(run)),
    }


def placement_of(run: Run, ranks: int, nodes: int) -> Placement:
    """The place of the base while a run's models are evaluated, see `evaluate.engine`."""
    return named(*engine_of(run), ranks, nodes)


def refusal(run: Run, evaluated: Mapping[str, Any]) -> str | None:
    """A sentence that an evaluation does not fit, with the remedy; None if it does. evaluated: as `planned` gives."""
    if evaluated["fits"]:
        return None
    fitting = [one for one in evaluated["others"] if one["fits"]]
    remedy = "use more or larger devices, a quantised base (model.quantize), or a smaller evaluate.batch_size"
    if fitting:
        best = min(fitting, key=lambda one: one["total"])
        remedy = f"set evaluate.engine to {best['name']}, which takes {best['total'] / GIB:.1f} GiB"
        if evaluated["memory"]["base"] + evaluated["memory"]["gathered"] <= evaluated["room"]:
            remedy += ", or lower evaluate.batch_size"
    return (
        f"The evaluation does not fit: on {evaluated['placement']}, with evaluate.batch_size "
        f"{run.evaluate.batch_size}, it takes {evaluated['total'] / GIB:.1f} GiB of a device, which has room for "
        f"{evaluated['room'] / GIB:.1f} GiB; {remedy}"
    )


# --- memory ----------------------------------------------------------------------------------------------------------


def most_memory(
    run: Run, model: Counted, placement: Placement, hardware: Hardware, *, longest: int, answer: int, rows: int
) -> dict[str, int]:
    """Bytes of a rank by kind, in the pass and the metric that take the most.

    longest, answer: tokens of the longest row and response. rows: of the largest batch, each of which meets every model
    of a pass.
    """
    found = [
        memory(
            model,
            placement,
            Batch(
                rows=rows * len(components),
                longest=longest,
                answer=answer,
                written=written,
                adapters=sum(components) * adapter_bytes(model),
                components=sum(components),
            ),
            nodes=hardware.nodes,
            fragmentation=hardware.fragmentation,
        )
        for components, metrics in _gatherings(run, model)
        for written in {_written(run, metric) for metric in metrics}
    ]
    return max(found, key=lambda kinds: sum(kinds.values()))


def _gatherings(run: Run, model: Counted) -> Iterator[tuple[list[int], tuple[str, ...]]]:
    """Yields the components of the models that share a pass, and what is measured of them: in the evaluation, and in
    the searches for weights."""
    of_models = list(components_of(run).values())
    yield from ((one, run.evaluate.metrics) for one in ([of_models] if model.is_routable else [[n] for n in of_models]))
    for merge in run.merges.values():
        if merge.search is not None:
            of_merge = len(merge.tasks or run.tasks)
            number = min(merge.search.budget, AT_ONCE) if model.is_routable else 1
            yield [of_merge] * number, (merge.search.metric,)


def _written(run: Run, metric: str) -> int:
    """Most tokens that follow what is kept of a row, 0 where nothing is."""
    if metric in WRITING:
        return run.evaluate.max_new_tokens
    labels = [label for task in run.tasks.values() for label in task.labels or ()]
    return max(map(_tokens, labels), default=0) if metric in CHOICES else 0


def _tokens(label: str) -> int:
    return max(1, len(label.encode()) // BYTES_PER_TOKEN)


def memory(
    model: Counted, placement: Placement, batch: Batch, *, nodes: int = 1, fragmentation: float = 0.0
) -> dict[str, int]:
    """Bytes of a rank by kind while it runs a batch, at the moment that takes the most: in a block, or when there are
    logits. fragmentation: what the allocator wastes, as a share of the rest."""
    held = _held(model, placement, nodes)
    tokens = batch.rows * batch.longest
    hidden = tokens * model.block_input // model.tokens
    cache = batch.rows * (batch.longest + batch.written) * model.key_values * model.dtype if batch.written else 0
    fixed = {
        "base": held.base,
        "adapters": batch.adapters,
        "buffers": batch.components * model.widest_b * (model.dtype + FP32) // model.adapters
        + model.quantized * (model.dtype + FP32),
    }
    in_block = 2 * hidden + ACTIVE * tokens * model.widest * model.dtype + batch.rows * batch.longest**2
    if model.kernel == "eager":  # every score of every head, as training keeps them
        in_block = max(in_block, model.block_activations * tokens // model.tokens)
    if batch.written:  # logits of the last tokens, in fp32 as well, beside those with which they are compared
        logits = batch.rows * model.vocabulary * (model.dtype + 2 * FP32)
    else:
        targets = batch.rows * min(batch.answer, batch.longest)
        of_targets = targets * model.block_input // model.tokens
        logits = logits_bytes(targets, model.vocabulary, of_targets, chunked=model.chunked)
    kept = cache * model.num_blocks
    moments = [
        {"gathered": held.gathered_in_block, "activations": in_block, "logits": 0, "cache": kept},
        {"gathered": held.gathered_at_loss, "activations": hidden, "logits": logits, "cache": kept},
        {"gathered": 0, "activations": 0, "logits": 0, "cache": COPIES * kept},
    ]
    found = max((fixed | moment for moment in moments), key=lambda one: sum(one.values()))
    found["fragmentation"] = round(fragmentation * sum(found.values()))
    return {kind: found[kind] for kind in MEMORY}


def adapter_bytes(model: Counted) -> int:
    """Bytes of one trained adapter on a rank: A, the kept entries of B with their places, and what is trained in
    full."""
    places = FP32 * model.kept if model.kept < model.entries else 0
    return model.of_a + FP32 * (model.kept + model.whole) + places


def _held(model: Counted, placement: Placement, nodes: int) -> Held:
    say = placement.look_up("place_memory") or placement.ask("memory")
    found: Held = say(model, _load(placement, nodes), **placement.options)
    return found


def _load(placement: Placement, nodes: int) -> Load:
    return Load(ranks=placement.ranks, nodes=nodes, trained=0, micro_batches=1)


def components_of(run: Run) -> dict[str, int]:
    """Evaluation -> pairs of A and B of its model, 0 for the base. Of a merge whose method is not known to give one
    pair, as many as it has tasks."""
    planned_jobs = {job.name: job for job in jobs.plan(run)}
    found = {}
    for job in planned_jobs.values():
        if job.kind == "evaluate":
            need = job.settings["adapter"]
            made = None if need is None else planned_jobs[need]
            is_one = made is not None and (made.kind == "train" or run.adapter.share_projection)
            if made is not None and made.kind == "merge" and made.settings["method"]["name"] == "concat":
                is_one = False
            found[job.name] = 0 if made is None else 1 if is_one else len(made.needs)
    return found


def _measured_on(run: Run, task: str) -> int:
    """Number of models that are measured on the rows of a task."""
    return sum(job.kind == "evaluate" and task in job.settings["tasks"] for job in jobs.plan(run))


def _passes(number: int, model: Counted) -> list[int]:
    """Number of models of each pass over the base, of so many models."""
    return [number] if model.is_routable else [1] * number


def _longest(run: Run, rows: Mapping[str, Lengths]) -> int:
    """Tokens of the longest row, as far as all have been counted."""
    found = [int(one.tokens.max()) if one.how != "some" else run.train.max_length for one in rows.values()]
    return max(found)


def _longest_answer(run: Run, rows: Mapping[str, Lengths]) -> int:
    """Tokens of the longest response, or label, as far as all have been counted."""
    found = [one.answer if one.how != "some" else run.train.max_length for one in rows.values()]
    return max(found)


def _most_rows(run: Run, rows: Mapping[str, Lengths]) -> int:
    """Rows of the largest batch."""
    return min(run.evaluate.batch_size, max(_limited(run, one.number) for one in rows.values()))


def others(
    run: Run, model: Counted, own: Placement, hardware: Hardware, *, longest: int, answer: int, rows: int
) -> list[dict[str, Any]]:
    """The name, total and fits of the evaluation with every other engine that can place a base."""
    found: dict[str, dict[str, Any]] = {}
    for one in placements(own.ranks, hardware.nodes):
        try:
            method = plugin.find("engines", one.engine, "place", "evaluate.engine")
        except ConfigError:  # it is for training alone
            continue
        options = {key: value for key, value in one.options.items() if key in method.options}
        other = named(one.engine, method, options, own.ranks, hardware.nodes)
        if other.name != own.name:
            total = sum(most_memory(run, model, other, hardware, longest=longest, answer=answer, rows=rows).values())
            found[other.name] = {"name": other.name, "total": total, "fits": total <= hardware.room}
    return list(found.values())


# --- time ------------------------------------------------------------------------------------------------------------


def _limited(run: Run, number: int) -> int:
    return number if run.evaluate.rows is None else min(number, run.evaluate.rows)


@dataclass(frozen=True, kw_only=True, slots=True)
class _Clock:
    run: Run
    model: Counted
    hardware: Hardware
    placement: Placement

    def seconds(self, task: str, metric: str, lengths: Lengths, number: int, models: int) -> float:
        """Seconds of one metric on the rows of one task, of models that share a pass."""
        batch = min(number, self.run.evaluate.batch_size)
        batches = -(-number // batch)
        turns = -(-batches // self.placement.ranks)
        of_row = self._row(lengths.mean)
        labels = self.run.tasks[task].labels
        if metric in LOWER_IS_BETTER:
            return turns * self._forward(batch * models * of_row)
        if metric in CHOICES:
            if labels is None:
                return 0.0
            of_labels = sum(self._row(_tokens(label)) for label in labels)
            return turns * (self._forward(batch * models * of_row) + self._forward(batch * models * of_labels))
        if metric in WRITING:  # each token that is written is a forward pass
            written = self.run.evaluate.max_new_tokens * self._forward(batch * models * self._row(1))
            return turns * (self._forward(batch * models * of_row) + written)
        return 0.0

    def _row(self, length: float) -> float:
        """Operations of a forward pass over one row."""
        model = self.model
        of_token = (model.flops or 4.0 * model.parameters) / 2 + FORWARD * model.adapter_flops
        return of_token * length + sum(layer.per_pair * layer.pairs(round(length)) for layer in model.attention)

    def _forward(self, operations: float) -> float:
        """Seconds of one forward pass: it computes, reads every weight, and gathers those of other ranks."""
        hardware, bytes_per_second = self.hardware, self.hardware.bandwidth * 1e9
        compute = operations / (hardware.tflops * 1e12 * hardware.efficiency)
        compute = max(compute, self.model.base / bytes_per_second) + self.model.dequantized / bytes_per_second
        return max(compute, sum(map(self._sending, self._traffic())))

    def _traffic(self) -> Sequence[Collective]:
        say = self.placement.look_up("place_traffic") or self.placement.ask("traffic")
        load = _load(self.placement, self.hardware.nodes)
        found: list[Collective] = say(self.model, load, **self.placement.options)
        return [one for one in found if one.owner == "base" and (one.group > 1 or one.kind == "copy")]

    def _sending(self, collective: Collective) -> float:
        size = sent(collective) / 1e9
        if collective.kind == "copy":
            return size / self.hardware.host
        between = collective.rings * size / self.hardware.network if collective.spans_nodes else 0.0
        return max(size / self.hardware.link, between)


def _uncounted(run: Run) -> Iterator[str]:
    if run.evaluate.lm_eval is not None:
        settings = run.evaluate.lm_eval
        limits = f" of {settings.rows} rows" if settings.rows is not None else ""
        shots = f" with {settings.num_fewshot} examples" if settings.num_fewshot is not None else ""
        yield f"lm-eval's tasks {', '.join(settings.tasks)}{limits}{shots}"
    own = [metric for metric in run.evaluate.metrics if metric not in ("loss", *WRITING, *CHOICES)]
    if own:
        yield f"the metrics {', '.join(own)}"
