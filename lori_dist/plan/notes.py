"""Sentences that a reader of a plan should know besides its figures."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from lori_dist.config import Run
from lori_dist.plan.cost import Hardware, Trained
from lori_dist.plan.evaluation import refusal
from lori_dist.plan.rows import Lengths


def of(
    run: Run,
    hardware: Hardware,
    ranks: int,
    trained: Sequence[Trained],
    placed: Sequence[Mapping[str, Any]],
    rows: Sequence[Lengths],
    evaluation: Mapping[str, Any],
) -> Iterator[str]:
    """Yields the sentences."""
    yield from _of_gangs(run, ranks, trained)
    yield from _of_rows(run, trained, rows)
    yield from _of_length(run, placed)
    yield from _of_training(run, hardware, placed)
    if (reason := refusal(run, evaluation)) is not None:
        yield f"{reason}."
    for what in evaluation["uncounted"]:
        yield f"The time and the memory of {what} are not counted."


def _of_gangs(run: Run, ranks: int, trained: Sequence[Trained]) -> Iterator[str]:
    if run.cluster.workers != ranks:
        yield (
            f"cluster.workers is {run.cluster.workers}; the plan is of gangs of {ranks} "
            f"rank{'s' if ranks != 1 else ''}, one after the other: set cluster.workers to {ranks}."
        )
    most = max(one.gang.adapters for one in trained)
    if most > 1:
        yield f"cluster.packing: up to {most} adapters are trained at once over one copy of the base."
    apart = max(one.gang.apart for one in trained)
    if apart > 1:
        yield f"The gradients of {apart} tasks are kept apart until they are projected, on every rank."


def _of_rows(run: Run, trained: Sequence[Trained], rows: Sequence[Lengths]) -> Iterator[str]:
    length = run.train.max_length
    longest = max(
        int(part.tokens.max())
        for one in trained
        for member in one.gang.members
        for stream in member.streams
        for part in stream.parts
    )
    is_exact = all(one.how == "all" for one in rows)
    if is_exact and longest < length and not run.train.pack:
        yield (
            f"Memory is that of rows of train.max_length, {length:,} tokens; the longest row to train on has "
            f"{longest:,}, so train.max_length={max(2, longest)} takes less."
        )
    if any(one.is_rough for one in rows):
        yield "The number of rows of large files is estimated from their size."


def _of_length(run: Run, placed: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    best = max(placed, key=lambda one: int(one["longest_row"]))
    longest, length = best["longest_row"], run.train.max_length
    if longest < length:
        more = "" if run.train.sequence_parallel > 1 else ", or divide rows among ranks (train.sequence_parallel)"
        yield (
            f"Rows of train.max_length, {length:,} tokens, do not fit even one at a time and with activation "
            f"checkpointing: {best['name']} has room for {longest:,}; use more devices{more}."
        )
    else:
        yield (
            f"Rows may have up to about {longest:,} tokens, one at a time and with activation checkpointing "
            f"({best['name']})."
        )


def _of_training(run: Run, hardware: Hardware, placed: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    train = run.train
    if train.time_limit is not None:
        fitting = [one for one in placed if one["fits"] or one["fits_with_checkpointing"]]
        seconds = min((one["training_seconds"] for one in fitting), default=0.0)
        if seconds > train.time_limit:
            yield (
                f"train.time_limit, {train.time_limit:,.0f} s, ends the run before it is done: it takes "
                f"{-(-seconds // train.time_limit):.0f} starts of the same command."
            )
        else:
            yield f"train.time_limit, {train.time_limit:,.0f} s, is longer than all training takes."
    if train.compile:
        yield "What train.compile saves is not counted."
    if train.deterministic:
        yield "What train.deterministic costs is not counted."
    if train.early_stop is not None:
        yield f"train.early_stop may end training earlier than planned, after {train.early_stop} measurements."
    if run.adapter.projection == "recomputed":
        yield "The time in which adapter.projection: recomputed makes A again is not counted."
    if train.checkpoint_every is not None and train.keep:
        yield f"Checkpoints are written every {train.checkpoint_every} steps; their time on the disk is not counted."
