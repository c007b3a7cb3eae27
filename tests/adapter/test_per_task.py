"""Each task's gradient from one backward pass, against a backward pass for each task."""

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from lori_dist import attach
from lori_dist.adapter.adapter import Spec
from lori_dist.adapter.attach import separate_tasks, trainable
from lori_dist.adapter.bases import features
from lori_dist.adapter.matching import match
from lori_dist.adapter.per_task import PerTask
from lori_dist.errors import AdapterError
from lori_dist.training.data import Batch, Example, collate
from lori_dist.training.loss import loss_sum
from lori_dist.training.trainer import checkpoint_activations
from tests.engines.oracle import examples
from tests.models import tiny, tiny_gpt2, tiny_llama

TOLERANCE = 1e-12
TASKS = ((0, 0, 0, 1, 1, 2), (0, 2, 2), (1,), (2, 2))
"""Of the rows of each batch; some tasks are missing in some of them."""


def adapted(model: Any, *, density: float = 1.0, projection: str = "cached", checkpointed: bool = False) -> Any:
    """In float64, with values that are not zero."""
    generator = torch.Generator().manual_seed(4)
    masks = {
        path: torch.rand(features(base)[0], 3, generator=generator) < density
        for path, base in match(model, "all-linear").items()
    }
    attach(model, Spec(rank=3, alpha=6.0, seed=2, projection=projection), masks=masks)  # type: ignore[arg-type]
    for values in trainable(model).values():
        values.data.normal_(std=0.2, generator=generator)
    if checkpointed:
        checkpoint_activations(model)
    return model.double()


def batches() -> Iterator[tuple[list[Example], tuple[int, ...]]]:
    rows = iter(examples())
    for tasks in TASKS:
        yield [next(rows) for _ in tasks], tasks


def loss(model: nn.Module, batch: Batch) -> Tensor:
    return loss_sum(model, batch)


def by_separate_passes(model: nn.Module) -> dict[str, Tensor]:
    """Name -> (tasks, entries), each task's rows run by themselves."""
    of_tasks = []
    for task in range(3):
        model.zero_grad()
        for rows, tasks in batches():
            mine = [row for row, other in zip(rows, tasks, strict=True) if other == task]
            if mine:
                loss(model, collate(mine, 0)).backward()
        of_tasks.append({name: p.grad.detach().view(-1).clone() for name, p in trainable(model).items()})  # type: ignore[union-attr]
    model.zero_grad()
    return {name: torch.stack([grads[name] for grads in of_tasks]) for name in of_tasks[0]}


def by_one_pass(model: nn.Module) -> dict[str, Tensor]:
    per_task = separate_tasks(model, 3)
    for rows, tasks in batches():
        batch = collate(rows, 0)
        per_task.begin([(task, batch.input_ids.shape[1]) for task in tasks])
        loss(model, batch).backward()
    assert all(parameter.grad is None for parameter in model.parameters())
    return per_task.sums


VARIANTS = {
    "dense": lambda: adapted(tiny_llama()),
    "sparse": lambda: adapted(tiny_llama(), density=0.15),
    "sparse, A recomputed": lambda: adapted(tiny_llama(), density=0.15, projection="recomputed"),
    "A trained": lambda: adapted(tiny_llama(), projection="trained"),
    "A trained, B sparse": lambda: adapted(tiny_llama(), density=0.15, projection="trained"),
    "checkpointed": lambda: adapted(tiny_llama(), projection="trained", checkpointed=True),
    "gpt2": lambda: adapted(tiny_gpt2(), density=0.5, projection="trained"),
}


@pytest.mark.parametrize("variant", VARIANTS)
def test_one_pass_gives_what_a_pass_for_each_task_gives(variant: str) -> None:
    model = VARIANTS[variant]()
    wanted = by_separate_passes(model)
    found = by_one_pass(model)
    assert set(found) == set(wanted)
    for name, gradients in wanted.items():
        assert gradients.dtype == torch.float64
        assert bool((gradients.norm(dim=1) > 0).all())
        error = (found[name] - gradients).norm(dim=1) / gradients.norm(dim=1)
        assert float(error.max()) < TOLERANCE, name


def test_a_base_that_has_to_be_called_gives_the_same() -> None:
    model = adapted(tiny_llama(), density=0.3, projection="trained")
    wanted = by_separate_passes(model)
    for module in model.modules():
        if type(module) is nn.Linear:
            module.register_forward_hook(lambda module, args, output: None)
    found = by_one_pass(model)
    assert all(torch.allclose(found[name], wanted[name], rtol=1e-10, atol=1e-14) for name in wanted)


@pytest.mark.parametrize("kind", ["mixtral", "gpt_oss"])
def test_experts_that_see_tokens_of_all_tasks_give_the_same(kind: str) -> None:
    model = adapted(tiny(kind), density=0.3, projection="trained")
    wanted = by_separate_passes(model)
    found = by_one_pass(model)
    of_experts = [name for name in wanted if ".experts." in name]
    assert any(bool((wanted[name].norm(dim=1) > 0).all()) for name in of_experts)
    for name, gradients in wanted.items():
        torch.testing.assert_close(found.get(name, torch.zeros_like(gradients)), gradients, rtol=1e-9, atol=1e-12)


@given(st.lists(st.integers(0, 4), min_size=1, max_size=9).map(sorted), st.integers(1, 7))
def test_segments_are_the_tokens_of_each_task(tasks: list[int], length: int) -> None:
    per_task = PerTask(num_tasks=5)
    per_task.begin([(task, length) for task in tasks])
    of_tokens = [task for task in tasks for _ in range(length)]
    found = per_task.of("layer", len(of_tokens))
    assert [task for task, _ in found] == sorted(set(tasks))
    assert [of_tokens[place] for _, place in found] == [
        [task] * tasks.count(task) * length for task in sorted(set(tasks))
    ]


def test_rows_of_a_task_must_follow_each_other() -> None:
    with pytest.raises(AdapterError, match="must follow each other"):
        PerTask(num_tasks=2).begin([(0, 3), (1, 3), (0, 3)])


def test_a_layer_that_sees_some_of_the_tokens_is_refused() -> None:
    model = nn.Sequential(nn.Linear(3, 3))
    attach(model, Spec(rank=2, alpha=2.0, seed=0))
    per_task = separate_tasks(model, 2)
    per_task.begin([(0, 4), (1, 4)])
    with pytest.raises(AdapterError, match=r"^0: sees 5 of the batch's 8 tokens.*adapter\.targets"):
        model(torch.zeros(5, 3))
