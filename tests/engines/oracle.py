"""The one-process answer, a plain loop over whole batches without any engine, and the task engines share with it."""

import random
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from lori_dist.adapter.adapter import Spec
from lori_dist.adapter.attach import attach
from lori_dist.adapter.bases import features
from lori_dist.adapter.matching import match
from lori_dist.config import Train
from lori_dist.training.data import Batch, Example, collate
from lori_dist.training.engine import Engine, State, StepResult, collect, trained
from lori_dist.training.micro_batches import micro_batches
from lori_dist.training.world import World

SPEC = Spec(rank=4, alpha=8.0, seed=9)
"""A seed for which no entry's first gradient is near Adam's eps, where Adam makes much of its rounding."""
TRAIN = Train(steps=6, micro_batch_size=2, clip=0.12, betas=(0.9, 0.99), weight_decay=0.01)
"""Some steps are clipped and some are not."""

RATES = (1e-2, 4e-3, 7e-3, 2e-3, 9e-3, 5e-3)
"""Learning rate of each step."""
BATCHES = ((0, 1, 2, 3, 4), (5,), (6, 7, 8, 9, 10, 11, 12), (13, 14), (15, 16, 17, 18, 19, 20), (21, 22, 23))
"""Rows of each step. Ranks hold unequal numbers of them, and some steps leave ranks with none."""
PAD = 0


def examples() -> list[Example]:
    """Rows of random tokens, of very different lengths."""
    draw = random.Random(5)

    def tokens(longest: int) -> tuple[int, ...]:
        return tuple(draw.randrange(3, 64) for _ in range(draw.randint(1, longest)))

    return [Example(prompt="", response="", prompt_ids=tokens(9), response_ids=tokens(12)) for _ in range(24)]


def adapt(model: Any, *, kept: int | None = None, modules_to_save: tuple[str, ...] = ()) -> Any:
    """Attaches an adapter that keeps some entries of most modules, all of one and none of another.

    kept: keeps only so many of the whole adapter, in its last module.
    """
    generator = torch.Generator().manual_seed(11)
    masks: dict[str, Tensor] = {}
    for path, base in match(model, SPEC.targets, modules_to_save).items():
        masks[path] = torch.rand(features(base)[0], SPEC.rank, generator=generator) < 0.15
    first, second, *_, last = masks
    masks[first][:] = False
    masks[second][:] = True
    if kept is not None:
        masks = {path: torch.zeros_like(mask) for path, mask in masks.items()}
        masks[last].view(-1)[:kept] = True
    attach(model, replace(SPEC, modules_to_save=modules_to_save), masks=masks)
    return model


@dataclass(frozen=True, kw_only=True)
class Course:
    """What a training went through."""

    results: tuple[StepResult, ...]
    """Of each step."""
    state: State
    """At the end; of an engine's course, on rank 0 alone."""


def one_process(model: nn.Module, num_steps: int, *, clip: float | None = TRAIN.clip) -> Course:
    """Trains on one process: whole batches, plain torch."""
    parameters = trained(model)
    optimizer = torch.optim.AdamW(
        parameters.values(), betas=TRAIN.betas, eps=TRAIN.eps, weight_decay=TRAIN.weight_decay, foreach=False
    )
    rows, results = examples(), list[StepResult]()
    for rate, batch in list(zip(RATES, BATCHES, strict=True))[:num_steps]:
        optimizer.param_groups[0]["lr"] = rate
        loss = _mean_loss(model, collate([rows[row] for row in batch], PAD))
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(parameters.values(), float("inf") if clip is None else clip)
        if not results:
            assert all(bool((p.grad.abs() > 10 * TRAIN.eps).all()) for p in parameters.values() if p.grad is not None)
        optimizer.step()
        optimizer.zero_grad()
        results.append(StepResult(loss=loss.item(), grad_norm=norm.item()))
    return Course(results=tuple(results), state=_state(num_steps, parameters, optimizer))


def run(engine: Engine, world: World, steps: Sequence[int]) -> Course:
    """The same steps with an engine, on this rank's rows."""
    rows, results = examples(), list[StepResult]()
    for step in steps:
        pieces = micro_batches(BATCHES[step], world.rank, world.size, TRAIN.micro_batch_size)
        batches = [collate([rows[row] for row in piece], PAD) for piece in pieces]
        num_targets = sum(len(rows[row].response_ids) for row in BATCHES[step])
        results.append(engine.step(batches, num_targets=num_targets, lr=RATES[step]))
    return Course(results=tuple(results), state=collect(engine, world))


def difference(state: State, reference: State) -> float:
    """Largest |x - reference| / |reference| of values and moments, each taken over all entries as one vector."""
    errors = []
    for quantity in ("values", "exp_avg", "exp_avg_sq"):
        found, wanted = getattr(state, quantity), getattr(reference, quantity)
        assert list(found) == list(wanted)
        x, y = torch.cat(list(found.values())), torch.cat(list(wanted.values()))
        errors.append(float((x - y).norm() / y.norm()))
    return max(errors)


def _mean_loss(model: nn.Module, batch: Batch) -> Tensor:
    logits = (
        model(input_ids=batch.input_ids, attention_mask=batch.attention_mask, use_cache=False).logits[:, :-1].float()
    )
    labels = batch.labels[:, 1:]
    return functional.cross_entropy(logits.transpose(1, 2), labels, ignore_index=-100)


def _state(step: int, parameters: dict[str, nn.Parameter], optimizer: torch.optim.Optimizer) -> State:
    return State(
        step=step,
        values={path: p.detach().flatten().clone() for path, p in parameters.items()},
        exp_avg={path: optimizer.state[p]["exp_avg"].flatten().clone() for path, p in parameters.items()},
        exp_avg_sq={path: optimizer.state[p]["exp_avg_sq"].flatten().clone() for path, p in parameters.items()},
    )
