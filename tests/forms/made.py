"""Forms on a tiny model: every one of them, with the options that change what it computes."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from lori_dist.adapter.adapter import Adapter, Spec
from lori_dist.adapter.attach import adapted, attach, extract
from lori_dist.adapter.bases import features
from lori_dist.adapter.formed import formed
from lori_dist.adapter.matching import match
from lori_dist.adapter.task_column import routing_of
from lori_dist.forms import FormChoice, of_one_layer
from lori_dist.training.data import Batch, collate
from lori_dist.training.engine import trained
from lori_dist.training.loss import num_targets, task_loss_sums
from tests.engines.oracle import PAD, examples
from tests.models import tiny_llama

TASKS = ("one", "two", "three")
SEEDS = (21, 22, 23)
WEIGHTS = (1.0, 2.5, 0.7)
STEPS = ((3, 2, 2), (1, 0, 1), (2, 4, 1), (0, 1, 2))
"""Rows of each task in each step: of those with two or three rows, no rank of two has all tasks."""
RATES = (1e-2, 4e-3, 7e-3, 2e-3)


@dataclass(frozen=True, kw_only=True)
class Case:
    name: str
    options: Mapping[str, Any] = field(default_factory=dict)
    a: str = "cached"
    density: float | None = 0.3
    """Of what is sparse; None: dense."""
    before: bool = False
    """Whether earlier tasks have left something."""

    def choice(self, tasks: Sequence[str] = TASKS) -> FormChoice:
        return FormChoice(name=self.name, options=self.options, tasks=tuple(tasks), seeds=SEEDS[: len(tasks)])

    def spec(self, tasks: Sequence[str] = TASKS) -> Spec:
        return Spec(rank=4, alpha=8.0, seed=9, projection=self.a, form=self.choice(tasks))  # type: ignore[arg-type]

    def model(self, tasks: Sequence[str] = TASKS) -> Any:
        """A model to train, whose first layer keeps nothing of what is sparse."""
        model, spec = tiny_llama(), self.spec(tasks)
        attach(model, spec, masks=self.masks(model, tasks), before=earlier() if self.before else None)
        return model

    def masks(self, model: Any, tasks: Sequence[str] = TASKS) -> dict[str, Tensor] | None:
        if self.density is None:
            return None
        generator, made = torch.Generator().manual_seed(11), dict[str, Tensor]()
        form = self.choice(tasks).form(rank=4, alpha=8.0, trains_a=self.a == "trained")
        entries = form.entries(of_one_layer(tuple(tasks)))
        for number, (path, base) in enumerate(match(model, "all-linear").items()):
            for name, entry in entries.items():
                if entry.sparse:
                    rows = (features(base)[0], entry.shape[-1])
                    shape = (len(tasks), *rows) if entry.per_task else rows
                    made[f"{path}:{name}"] = torch.rand(shape, generator=generator) < self.density
                    if number == 0:
                        made[f"{path}:{name}"][:] = False
        return made


CASES = {
    "lori": Case(name="lori"),
    "lori, A trained": Case(name="lori", a="trained"),
    "task_lora, none": Case(name="task_lora", options={"sharing": "none"}),
    "task_lora, a": Case(name="task_lora"),
    "task_lora, b, A trained": Case(name="task_lora", options={"sharing": "b"}, a="trained", density=None),
    "task_lora, extra": Case(name="task_lora", options={"sharing": "extra", "rank_shared": 3}),
    "task_lora, extra, A trained": Case(
        name="task_lora", options={"sharing": "extra", "rank_shared": 2}, a="trained", density=None
    ),
    "mtl_lora": Case(name="mtl_lora", density=None),
    "mtl_lora, diagonal": Case(name="mtl_lora", options={"transform": "diagonal", "heads": 2, "temperature": 0.7}),
    "mtl_lora, A trained": Case(name="mtl_lora", options={"start": "equal"}, a="trained"),
    "thanora": Case(name="thanora", options={"weight": 300.0}),
    "thanora, A trained": Case(name="thanora", options={"weight": 2.0}, a="trained", density=None),
    "lilora": Case(name="lilora"),
    "lilora, A trained": Case(name="lilora", options={"task_rank": 1}, a="trained", density=None),
    "fly": Case(name="fly", options={"active": 2, "bias": 0.05}),
    "smora": Case(name="smora", options={"active": 2, "partition": 2, "bias": 0.05}),
    "mixlora": Case(name="mixlora", options={"experts": 6}),
    "mixlora, as its code": Case(
        name="mixlora", options={"gate": "hard", "condition": "double"}, a="trained", density=None
    ),
    "dac": Case(name="dac"),
    "dac, soft": Case(name="dac", options={"gate": "soft", "keep": 3}, a="trained", density=None),
    "hydra": Case(name="hydra"),
    "hydra, A trained": Case(name="hydra", options={"heads": 2}, a="trained", density=None),
}
DEPENDENT = [title for title, case in CASES.items() if case.choice().is_dependent and not case.choice().settles]
SEQUEL = {"dac, after other tasks": Case(name="dac", options={"weight": 3.0}, before=True)}
"""What is trained on top of what earlier tasks left, which is not nothing at the start."""
PER_TASK = [title for title, case in CASES.items() if case.choice().is_per_task]


def fill(model: Any, seed: int = 5) -> Any:
    """Gives all that is trained values that are no longer those of the start."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in trained(model).values():
            parameter.add_(0.3 * torch.randn(parameter.shape, generator=generator))
    for delta in formed(adapted(model)).values():
        delta.take({name: 0.1 * torch.randn(one.shape, generator=generator) for name, one in delta.states().items()})
    return model


def earlier() -> Adapter:
    """What two earlier tasks left on the same A: two columns of B each."""
    model = tiny_llama()
    attach(model, replace(CASES["lori"].spec(), form=None))
    values = {name: torch.zeros_like(parameter) for name, parameter in trained(model).items()}
    blocks = []
    for number, ranks in enumerate(((0, 2), (2, 3))):
        generator = torch.Generator().manual_seed(number)
        for name, flat in values.items():
            b = torch.zeros(len(flat) // 4, 4)
            b[:, list(ranks)] = 0.1 * torch.randn(len(b), len(ranks), generator=generator)
            values[name] = b.flatten()
        blocks += extract(model, name=f"earlier {number}", values=values).blocks
    return replace(extract(model, name="earlier"), blocks=tuple(blocks))


def rows_of_step(step: int) -> list[tuple[int, int]]:
    """(row, task), task by task."""
    first = sum(sum(counts) for counts in STEPS[:step])
    tasks = [task for task, count in enumerate(STEPS[step]) for _ in range(count)]
    return [((first + place) % 24, task) for place, task in enumerate(tasks)]


def batch_of(chosen: Sequence[tuple[int, int]], counts: Sequence[int] | None = None) -> Batch:
    """counts: targets of each task in the step."""
    rows = examples()
    made = [
        replace(rows[row], response_ids=tuple(3 + (5 * t + 17 * task) % 61 for t in rows[row].response_ids))
        for row, task in chosen
    ]
    weights = None if counts is None else [w / max(1, count) for w, count in zip(WEIGHTS, counts, strict=True)]
    batch = collate(made, PAD)
    width = batch.input_ids.shape[1]
    return replace(
        batch,
        tasks=tuple((task, width) for _, task in chosen) or ((0, width),),
        weights=None if weights is None else torch.tensor(weights),
    )


def counts_of(step: int) -> list[int]:
    chosen = rows_of_step(step)
    of_tasks = [[item for item in chosen if item[1] == task] for task in range(len(TASKS))]
    return [num_targets(batch_of(of_task)) if of_task else 0 for of_task in of_tasks]


def backward(model: Any, step: int, tasks: Sequence[int] = (0, 1, 2)) -> Tensor:
    """The gradients of a step's rows of some tasks. Returns its losses."""
    chosen = [item for item in rows_of_step(step) if item[1] in tasks]
    losses = task_loss_sums(model, batch_of(chosen, counts_of(step)))
    losses.sum().backward()
    return losses.detach()


def descend(model: Any, steps: Sequence[int], tasks: Sequence[int] = (0, 1, 2), lr: float = 0.5) -> None:
    """Steps of plain gradient descent, which makes nothing of rounding."""
    for step in steps:
        backward(model, step, tasks)
        with torch.no_grad():
            for parameter in trained(model).values():
                if parameter.grad is not None:
                    parameter.sub_(lr * parameter.grad)
                    parameter.grad = None


def logits(model: Any, task: str | None = None) -> Tensor:
    batch = batch_of([(row, 0) for row in range(3)])
    routing = routing_of(model)
    if routing is not None and task is not None:
        routing.only(task)
    with torch.no_grad():
        made: Tensor = model(input_ids=batch.input_ids, attention_mask=batch.attention_mask).logits
    return made
