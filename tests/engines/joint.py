"""Several tasks trained together, as the paper prints it: a backward pass for each task over the whole batch, then the
gradients themselves projected, without inner products of other gradients; and the same with an engine."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from lori_dist import plugin
from lori_dist.adapter.adapter import Spec
from lori_dist.adapter.attach import attach
from lori_dist.adapter.bases import features
from lori_dist.adapter.matching import match
from lori_dist.balances.ortho import order
from lori_dist.training.data import Batch, collate
from lori_dist.training.engine import Engine, StepResult, collect, trained
from lori_dist.training.loss import loss_sum, num_targets
from lori_dist.training.micro_batches import micro_batches
from lori_dist.training.surgery import Surgery, surgery
from lori_dist.training.world import World
from tests.engines import oracle
from tests.engines.oracle import PAD, Course, _state, examples
from tests.models import tiny_llama

TRAIN = replace(oracle.TRAIN, eps=1e-6)
"""With an eps above the rounding of projected gradients, of which Adam would else see signs alone at first."""
TASKS = ("one", "two", "three")
WEIGHTS = (1.0, 2.5, 0.7)
STEPS = 4
RATES = (1e-2, 4e-3, 7e-3, 2e-3)
ROWS = ((3, 2, 2), (1, 1, 1), (2, 4, 1), (1, 1, 3))
"""Of each task in each step."""
SEED = 3


@dataclass(frozen=True, kw_only=True)
class Way:
    """How the tasks are trained."""

    balance: str = "ortho"
    """Or another, or `none`."""
    projection: str = "original"
    granularity: str = "matrix"
    reduce: str = "sum"
    density: float | None = 0.15
    """Of B; None: dense."""
    a: str = "cached"

    def model(self) -> Any:
        model = tiny_llama()
        generator = torch.Generator().manual_seed(11)
        masks = None
        if self.density is not None:
            masks = {
                path: torch.rand(features(base)[0], 4, generator=generator) < self.density
                for path, base in match(model, "all-linear").items()
            }
            masks[next(iter(masks))][:] = False
        attach(model, Spec(rank=4, alpha=8.0, seed=9, projection=self.a), masks=masks)  # type: ignore[arg-type]
        return model

    def surgery(self, model: Any, world: World) -> Surgery | None:
        if self.balance == "none":
            return None
        how: Any = {"granularity": self.granularity, "reduce": self.reduce, "seed": SEED}
        options = {"against": self.projection} if self.balance == "ortho" else {}
        return surgery(model, TASKS, world, balance=self.balance, options=options, **how)

    def unit(self, name: str) -> str:
        module, _, kind = name.partition(":")
        layer = ".".join(module.split(".")[:3])
        return {"matrix": name, "layer": layer, "type": kind, "global": ""}[self.granularity]


def rows_of_step(step: int) -> list[tuple[int, int]]:
    """(row, task), task by task. Labels of the second task are turned round, so that tasks do conflict."""
    first = sum(sum(counts) for counts in ROWS[:step])
    tasks = [task for task, count in enumerate(ROWS[step]) for _ in range(count)]
    return [((first + place) % 24, task) for place, task in enumerate(tasks)]


def batch_of(chosen: list[tuple[int, int]]) -> Batch:
    rows = examples()
    # The same prompts with other responses: what one task learns, another has to unlearn.
    made = [
        replace(rows[row], response_ids=tuple(3 + (5 * t + 17 * task) % 61 for t in rows[0].response_ids[:3]))
        for row, task in chosen
    ]
    return collate(made, PAD)


def counts_of(step: int) -> list[int]:
    chosen = rows_of_step(step)
    return [num_targets(batch_of([item for item in chosen if item[1] == task])) for task in range(len(TASKS))]


def one_process(way: Way, start: Mapping[str, Tensor] | None = None) -> Course:
    model = way.model()
    parameters = trained(model)
    optimizer = torch.optim.AdamW(
        parameters.values(), betas=TRAIN.betas, eps=TRAIN.eps, weight_decay=TRAIN.weight_decay, foreach=False
    )
    results, state = [], dict[str, Any]()
    for step in range(STEPS):
        optimizer.param_groups[0]["lr"] = RATES[step]
        losses, gradients = [], []
        for task, count in enumerate(counts_of(step)):
            optimizer.zero_grad()
            batch = batch_of([item for item in rows_of_step(step) if item[1] == task])
            loss = WEIGHTS[task] * loss_sum(model, batch) / count
            loss.backward()
            losses.append(loss.item())
            gradients.append({name: p.grad.double().clone() for name, p in parameters.items()})  # type: ignore[union-attr]
        if way.balance in ("ortho", "none"):
            made = combined(gradients, way, order(len(TASKS), SEED, step))
        else:
            made, state = balanced(gradients, losses, way, state, step)
        for name, parameter in parameters.items():
            parameter.grad = made[name].to(parameter.dtype)
        norm = torch.nn.utils.clip_grad_norm_(parameters.values(), TRAIN.clip or float("inf"))
        optimizer.step()
        results.append(StepResult(loss=sum(losses), grad_norm=norm.item(), task_losses=tuple(losses)))
    return Course(results=tuple(results), state=_state(STEPS, parameters, optimizer))


def combined(gradients: list[dict[str, Tensor]], way: Way, in_order: list[int]) -> dict[str, Tensor]:
    """Algorithm 1 on the gradients themselves."""
    units: dict[str, list[str]] = {}
    for name in gradients[0]:
        units.setdefault(way.unit(name), []).append(name)
    made = {}
    for names in units.values():
        own = [torch.cat([gradient[name] for name in names]) for gradient in gradients]
        flat = project(own, in_order, way.projection if way.balance == "ortho" else "none")
        total = torch.stack(flat).sum(0) / (len(flat) if way.reduce == "mean" else 1)
        made.update(zip(names, total.split([gradients[0][name].numel() for name in names]), strict=True))
    return {name: made[name].view_as(gradients[0][name]) for name in gradients[0]}


def balanced(
    gradients: list[dict[str, Tensor]], losses: list[float], way: Way, state: Any, step: int
) -> tuple[dict[str, Tensor], Any]:
    """The balance of whole gradients, one after the other."""
    own = torch.stack([torch.cat([g.flatten() for g in gradient.values()]) for gradient in gradients])
    balance = plugin.find("balances", way.balance, "balance", "multitask.balance").load()
    of_losses = torch.tensor(losses, dtype=torch.float64)
    weights, state = balance((own @ own.t()).unsqueeze(0), of_losses, state, seed=SEED, step=step)
    total = (weights[0] @ own).split([g.numel() for g in gradients[0].values()])
    return {name: g.view_as(gradients[0][name]) for (name, g) in zip(gradients[0], total, strict=True)}, state


def project(own: list[Tensor], in_order: list[int], projection: str) -> list[Tensor]:
    flat = [gradient.clone() for gradient in own]
    for i in in_order:
        for j in in_order:
            against = own[j] if projection == "original" else flat[j]
            if i != j and projection != "none" and flat[i] @ against < 0 and against.norm() > 1e-5 * own[j].norm():
                flat[i] = flat[i] - (flat[i] @ against) / (against @ against) * against
    return flat


def run(engine: Engine, tasks: Surgery | None, world: World) -> Course:
    results = do(engine, tasks, world, range(STEPS))
    return Course(results=tuple(results), state=collect(engine, world))


def do(engine: Engine, tasks: Surgery | None, world: World, steps: Iterable[int]) -> list[StepResult]:
    """Steps with an engine, on this rank's rows."""
    results = list[StepResult]()
    for step in steps:
        weights = torch.tensor([weight / count for weight, count in zip(WEIGHTS, counts_of(step), strict=True)])
        chosen = rows_of_step(step)
        batches = []
        for piece in micro_batches(range(len(chosen)), world.rank, world.size, 2):
            mine = [chosen[row] for row in piece]
            batch = batch_of(mine)
            width = batch.input_ids.shape[1]
            batches.append(
                replace(batch, tasks=tuple((task, width) for _, task in mine) or ((0, width),), weights=weights)
            )
        results.append(engine.step(batches, num_targets=1, lr=RATES[step], tasks=tasks))
    return results
