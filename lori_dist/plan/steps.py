"""The trainings of a run, gang by gang: the number of their steps, and the work of the slowest rank in one."""

import collections
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from lori_dist import formats
from lori_dist.adapter.adapter import Adapter
from lori_dist.cluster import schedule
from lori_dist.config import FLASH, Run, Train, held_out, trained_as
from lori_dist.errors import AdapterError, ConfigError
from lori_dist.jobs import Job, plan, tasks_of
from lori_dist.plan.rows import Counter, Lengths
from lori_dist.training import data
from lori_dist.training.cost import Counted
from lori_dist.training.data import Example
from lori_dist.training.flops import BACKWARD, Attention, of_attention
from lori_dist.training.joint import balance_of, counts_in_batch, shares_of
from lori_dist.training.micro_batches import divided, num_micro_batches
from lori_dist.training.phases import CALIBRATE, Phase, phases
from lori_dist.training.sequences import Share, divide

DRAWN = 2**18
"""Number of rows that are drawn to see what batches are like."""
DRAWN_PACKED = 2**12
"""Number of drawn rows if each is put into a sequence."""
DRAWS = 16
"""Largest number of batches that are drawn for a phase."""
AGAIN = 0.5
"""Share of attention's products of the forward pass, the scores, that a fused kernel repeats in the backward pass."""
SKIPPING = ("flex_attention", *FLASH)
"""Attention implementations that leave out what their mask hides; sdpa does if no row of a batch is padded."""

Tokens = npt.NDArray[np.int64]


@dataclass(frozen=True, kw_only=True, slots=True)
class Stream:
    """The rows of one adapter, or of one task of a joint training; of a cluster, those of all tasks."""

    parts: tuple[Lengths, ...]
    shares: tuple[float, ...]
    """Shares of the rows that are trained on, by part."""

    @property
    def number(self) -> int:
        """Number of rows in all parts."""
        return sum(part.number for part in self.parts)

    @property
    def mean(self) -> float:
        """Mean tokens of a row."""
        return sum(share * part.mean for part, share in zip(self.parts, self.shares, strict=True))

    def draw(self, count: int, generator: np.random.Generator) -> Tokens:
        """Tokens of `count` rows drawn at random, of shape (count,)."""
        which = generator.choice(len(self.parts), size=count, p=self.shares) if len(self.parts) > 1 else np.zeros(count)
        drawn = np.empty(count, dtype=np.int64)
        for number, part in enumerate(self.parts):
            places = which == number
            drawn[places] = part.tokens[generator.integers(len(part.tokens), size=int(places.sum()))]
        return drawn


@dataclass(frozen=True, kw_only=True, slots=True)
class Member:
    """One adapter's training."""

    name: str
    """A task, or `joint`, or a cluster."""
    train: Train
    streams: tuple[Stream, ...]
    """One stream, or one for each task of a joint training."""
    phases: tuple[Phase, ...]
    sampling: Mapping[str, Any] = field(default_factory=dict)
    """Numbers of rows of each task in a batch, as a joint job's settings give them."""
    validation: tuple[Lengths, ...] = ()

    @property
    def number(self) -> int:
        """Number of rows of an epoch."""
        return sum(stream.number for stream in self.streams)

    @property
    def mean(self) -> float:
        """Mean tokens of a row."""
        if len(self.streams) == 1:
            return self.streams[0].mean
        counts = self._counts(self.train.batch_size)
        means = [stream.mean for stream in self.streams]
        return sum(count * mean for count, mean in zip(counts, means, strict=True)) / sum(counts)

    def _counts(self, batch: int) -> list[int]:
        shares = shares_of(self.sampling, [stream.number for stream in self.streams])
        return counts_in_batch(shares, len(self.streams), batch)

    def rows(self, phase: Phase) -> int:
        """Number of rows that all steps of a phase take."""
        most = phase.num_steps * self.train.batch_size
        return most if phase.epochs is None or len(self.streams) > 1 else min(most, round(self.number * phase.epochs))

    def draw(self, batch: int, generator: np.random.Generator) -> Tokens:
        """The rows of one step, in their order."""
        counts = self._counts(batch)
        return np.concatenate([s.draw(count, generator) for s, count in zip(self.streams, counts, strict=True)])


@dataclass(frozen=True, kw_only=True, slots=True)
class Gang:
    """Trainings that share a base."""

    members: tuple[Member, ...]
    apart: int = 0
    """Number of gradients that are kept of each trained entry: one for every task of a joint training that projects
    them, and one if several adapters share the base."""
    earlier: int = 0
    """Number of tasks whose entries were trained before."""
    start: str | None = None
    """The path of the adapter whose training continues."""

    @property
    def adapters(self) -> int:
        """Number of adapters over the base."""
        return len(self.members)


@dataclass(frozen=True, kw_only=True, slots=True)
class Work:
    """The work of one step, on average."""

    micro_batches: int
    tokens: float
    """Tokens of all ranks, without padding."""
    computed: float
    """Tokens that the slowest rank computes, padding included."""
    attention: float
    """Operations of attention's products in one forward pass of that rank."""
    model_attention: float
    """Operations of attention that the result needs, forward and backward, on all ranks."""


# --- gangs -----------------------------------------------------------------------------------------------------------


def trainings(run: Run) -> list[Job]:
    """The jobs of the run's plan that train, in the order in which they are done."""
    return [job for job in plan(run) if job.kind == "train"]


def gangs(run: Run, counter: Counter) -> list[Gang]:
    """The gangs that train over one base each, in their order."""
    jobs = trainings(run)
    names = {job.name for job in jobs}
    first = [job for job in jobs if not names & set(job.needs)]
    packs = [*schedule.packs(first, run.cluster.packing), *((job,) for job in jobs if job not in first)]
    return [_gang(run, pack, counter) for pack in packs]


def _gang(run: Run, jobs: Sequence[Job], counter: Counter) -> Gang:
    members = tuple(_member(run, job, counter) for job in jobs)
    settings = jobs[0].settings
    if len(jobs) > 1:
        return Gang(members=members, apart=1)
    joint, sequel = settings.get("joint"), settings.get("sequel")
    if joint is not None:
        return Gang(members=members, apart=0 if balance_of(joint)[0] == "none" else len(joint["tasks"]))
    start = run.tasks[settings["task"]].start if "start" in settings else None
    return Gang(members=members, earlier=0 if sequel is None else len(sequel["before"]), start=start)


def _member(run: Run, job: Job, counter: Counter) -> Member:
    joint, cluster = job.settings.get("joint"), job.settings.get("cluster")
    task: str = job.settings["task"]
    tasks = tasks_of(job)
    train = trained_as(run, task) if task in run.tasks else run.train
    density = 1.0 if "start" in job.settings else run.adapter.density
    needs_number = train.steps is None or (density < 1 and train.calibrate.epochs is not None)
    needs_number |= cluster is not None or (joint is not None and "sampling" in joint)
    streams = tuple(_stream(run, name, counter, needs_number) for name in tasks)
    if cluster is not None:
        streams = (_of_cluster(streams, cluster["clusters"]),)
    number = sum(stream.number for stream in streams)
    validation = () if run.train.validate_every is None else tuple(_validation(run, name, counter) for name in tasks)
    return Member(
        name=task,
        train=train,
        streams=streams,
        sampling={} if joint is None else joint,
        phases=tuple(phases(train, density, number)),
        validation=validation,
    )


def _of_cluster(streams: Sequence[Stream], clusters: int) -> Stream:
    """The rows of all tasks as one stream, of a cluster that is as large as the others."""
    parts = tuple(replace(one, number=max(1, one.number // clusters)) for stream in streams for one in stream.parts)
    total = sum(one.number for one in parts)
    return Stream(parts=parts, shares=tuple(one.number / total for one in parts))


def _stream(run: Run, name: str, counter: Counter, needs_number: bool) -> Stream:
    task = run.tasks[name]
    own = counter.of(name, "train", task.train, needs_number=needs_number or bool(task.mixture))
    if spare := held_out(run, name):
        kept = own.tokens[: len(own.tokens) - spare] if own.how == "all" and len(own.tokens) > spare else own.tokens
        own = Lengths(number=max(1, own.number - spare), tokens=kept, how=own.how, is_rough=own.is_rough)
    others = [counter.of(name, "mixture", path, needs_number=needs_number) for path in task.mixture]
    shares = (1 - sum(task.mixture.values()), *task.mixture.values())
    return Stream(parts=(own, *others), shares=tuple(share / sum(shares) for share in shares))


def _validation(run: Run, name: str, counter: Counter) -> Lengths:
    return counter.of(name, "validation", str(run.tasks[name].validation))


def adapter_at(run: Run, gang: Gang) -> Adapter | None:
    """The adapter whose training continues; None if the gang starts from new ones."""
    if gang.start is None:
        return None
    try:
        found = formats.load(Path(gang.start))
        if len(found.blocks) != 1:
            raise AdapterError(f"{gang.start}: is a merge of {len(found.blocks)} blocks, which cannot be trained")
    except AdapterError as error:
        raise ConfigError(f"tasks.{gang.members[0].name}.start: {error}") from error
    return found


def segments(gang: Gang, phase: str) -> Iterator[tuple[int, tuple[Member, ...]]]:
    """Yields numbers of steps of a phase with the members that train in them: a member that has done its own drops
    out."""
    lengths = {
        member.name: next((one.num_steps for one in member.phases if one.name == phase), 0) for member in gang.members
    }
    done = 0
    for end in sorted({length for length in lengths.values() if length}):
        yield end - done, tuple(member for member in gang.members if lengths[member.name] >= end)
        done = end


# --- a step ----------------------------------------------------------------------------------------------------------


def work(model: Counted, members: Sequence[Member], phase: str, ranks: int) -> Work:
    """The work of a step in which these members train, from batches drawn at random as training draws them."""
    train = members[0].train
    ranks = train.groups(ranks)  # those of a group compute with the same rows
    generator = np.random.default_rng(0)
    batches = [_batch(member, phase) for member in members]
    num_micro = max(num_micro_batches(batch, ranks, train.rows_at_once) for batch in batches)
    share = model.share if len(members) > 1 or len(members[0].streams) > 1 else Share.NO
    most = max(1, (DRAWN_PACKED if train.pack or share is not Share.NO else DRAWN) // len(members))
    is_packed = train.pack or share is not Share.NO
    # Rows of several tasks that are padded to the longest of all are divided by their number.
    length = train.max_length if is_packed else 0 if len(members) == 1 else None
    drawn_ranks = min(ranks, most)
    rows = min(train.rows_at_once, math.ceil(max(batches) / ranks))
    drawn_rows = min(rows, max(1, most // drawn_ranks))
    drawn_micro = min(num_micro, max(1, most // (drawn_ranks * drawn_rows)))
    size = drawn_ranks * drawn_rows * drawn_micro
    is_whole = (drawn_ranks, drawn_rows, drawn_micro) == (ranks, rows, num_micro)
    constant = all(len(part.tokens) == 1 for member in members for s in member.streams for part in s.parts)
    draws = 1 if constant else max(1, min(DRAWS, most // size))
    tokens = sum(batch * member.mean for batch, member in zip(batches, members, strict=True))
    computed = attention = needed = 0.0
    for _ in range(draws):
        pieces = [
            _pieces(train, length, member.draw(batch if is_whole else size, generator), drawn_ranks, drawn_rows)
            for member, batch in zip(members, batches, strict=True)
        ]
        found = _slowest(model, train, pieces, share)
        computed, attention = computed + found[0], attention + found[1]
        needed += of_attention(model.attention, (length for piece in pieces for length in piece[piece > 0].tolist()))
    scale = 1.0 if is_whole else sum(batches) / (size * len(members))
    per_rank = scale if is_whole else scale * drawn_ranks / ranks
    return Work(
        micro_batches=num_micro,
        tokens=tokens,
        computed=computed / draws * per_rank / train.sequence_parallel,
        attention=attention / draws * per_rank / train.sequence_parallel,
        model_attention=needed / draws * scale,
    )


def full(model: Counted, gang: Gang, ranks: int) -> Work:
    """The work of a step whose rows all have train.max_length tokens."""
    length = gang.members[0].train.max_length
    row = Lengths(number=1, tokens=np.array([length]), how="given")
    stream = Stream(parts=(row,), shares=(1.0,))
    members = [
        Member(name=m.name, train=m.train, streams=(stream,), phases=tuple(_whole(one) for one in m.phases))
        for m in gang.members
    ]
    return work(model, members, members[0].phases[-1].name, ranks)


def _whole(phase: Phase) -> Phase:
    return Phase(name=phase.name, num_steps=phase.num_steps, epochs=None, lr=phase.lr)


def _batch(member: Member, phase: str) -> int:
    """Rows of a step on average, rounded up: the last step of an epoch may have fewer."""
    one = next(one for one in member.phases if one.name == phase)
    return min(member.train.batch_size, max(1, math.ceil(member.rows(one) / max(1, one.num_steps))))


def _pieces(train: Train, pack: int | None, lengths: Tokens, ranks: int, rows: int) -> Tokens:
    """Tokens of each row, of shape (micro-batches, rows, ranks), 0 for a missing row. pack: tokens of a sequence that
    rows share, 0 where they are padded; None: rows are divided by their number."""
    if pack is not None:
        of_ranks = divided(lengths.tolist(), ranks, rows, most_tokens=train.micro_batch_tokens, pack=pack or None)
        most = max(len(piece) for pieces in of_ranks for piece in pieces)
        found = np.zeros((len(of_ranks[0]), most, ranks), dtype=np.int64)
        for rank, pieces in enumerate(of_ranks):
            for micro, piece in enumerate(pieces):
                found[micro, : len(piece), rank] = lengths[piece]
        return found
    per_rank = math.ceil(len(lengths) / ranks)
    num_micro = math.ceil(per_rank / rows)
    padded = np.zeros(num_micro * rows * ranks, dtype=np.int64)
    padded[: len(lengths)] = lengths
    return padded.reshape(num_micro, rows, ranks)  # a rank takes every ranks-th row


def _slowest(model: Counted, train: Train, pieces: Sequence[Tokens], share: Share) -> tuple[float, float]:
    """Tokens and operations of attention of the slowest rank, summed over micro-batches. share: whether rows of the
    tasks share sequences."""
    count = max(len(piece) for piece in pieces)
    places = [np.pad(piece, ((0, count - len(piece)), (0, 0), (0, 0))) for piece in pieces]
    together = np.concatenate(places, axis=1)  # (micro-batches, rows, ranks)
    num_rows = (together > 0).sum(1)
    if train.pack or share is not Share.NO:
        rows, width = _shapes(places, train.max_length, share)
        skips = rows == num_rows
    else:
        most = np.max([(piece > 0).sum(1) for piece in places], axis=0)  # (micro-batches, ranks)
        rows, width = len(pieces) * np.maximum(1, most), np.maximum(2, together.max(1))
        is_even = (np.where(together > 0, together, width[:, None, :]) == width[:, None, :]).all(1)
        skips = is_even & (rows == num_rows)
    tokens = rows * width
    if model.kernel in FLASH and (share is Share.ONE or not train.pack):  # these compute rows, not what fills them up
        attention = _pairs(model, together, True).sum(1)
    else:
        may_skip = np.where(model.kernel in SKIPPING, True, skips & (model.kernel != "eager"))
        attention = rows * np.where(may_skip, _pairs(model, width, True), _pairs(model, width, False))
    cost = (model.flops or 4.0 * model.parameters) / 2 * tokens + attention
    slowest = cost.argmax(1)
    number = np.arange(len(cost))
    return float(tokens[number, slowest].sum()), float(attention[number, slowest].sum())


def _shapes(places: Sequence[Tokens], length: int, share: Share) -> tuple[Tokens, Tokens]:
    """Sequences of each micro-batch and rank, and their tokens, as training makes them of rows that share some."""
    num_micro, _, ranks = places[0].shape
    rows, width = np.ones((num_micro, ranks), dtype=np.int64), np.full((num_micro, ranks), 2, dtype=np.int64)
    for micro in range(num_micro):
        for rank in range(ranks):
            lengths = [[int(tokens) for tokens in of_task[micro, :, rank] if tokens] for of_task in places]
            if share is not Share.NO:
                sequences, width[micro, rank] = divide([of_task or [1] for of_task in lengths], share, length)
                rows[micro, rank] = len(sequences)
            elif found := [tokens for of_task in lengths for tokens in of_task]:
                examples = [Example(prompt="", response="", prompt_ids=(0,) * one, response_ids=()) for one in found]
                rows[micro, rank], width[micro, rank] = data.collate(examples, 0, length).input_ids.shape
    return rows, width


def _pairs(model: Counted, lengths: Tokens, skips: bool) -> npt.NDArray[np.float64]:
    """Operations of attention in a forward pass of a row of each length."""
    distinct, inverse = np.unique(lengths, return_inverse=True)
    layers = collections.Counter(model.attention).items()
    found = [
        sum(
            number * layer.per_pair * layer.pairs(int(length), skips=skips and _may(layer, int(length), model))
            for layer, number in layers
        )
        for length in distinct
    ]
    return np.array(found, dtype=np.float64)[inverse].reshape(lengths.shape)


def _may(layer: Attention, length: int, model: Counted) -> bool:
    """Whether a layer may skip what is masked: sdpa has no window of its own, so it gets a mask once a row is
    longer."""
    return model.kernel in SKIPPING or layer.window is None or length <= layer.window


def passes(model: Counted, checkpointing: bool) -> float:
    """Operations of attention in a step as a multiple of those in one forward pass."""
    return 1 + BACKWARD + (0.0 if model.kernel == "eager" else AGAIN) + checkpointing


def totals(gang: Gang) -> Mapping[str, float]:
    """Member -> tokens of all its steps, without padding."""
    return {member.name: sum(member.rows(phase) for phase in member.phases) * member.mean for member in gang.members}


def num_checkpoints(member: Member) -> int:
    """Number of checkpoints that a member's phases write, with the calibrated state."""
    every = member.train.checkpoint_every
    written = sum((phase.num_steps - 1) // every for phase in member.phases) if every is not None else 0
    return written + sum(phase.name == CALIBRATE for phase in member.phases)
