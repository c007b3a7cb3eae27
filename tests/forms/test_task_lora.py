"""A pair of factors for each task, with A, B or a further pair in common."""

from typing import Any

import pytest
import torch
from torch import Tensor

from lori_dist.adapter.adapter import Spec
from lori_dist.adapter.attach import attach, extract
from lori_dist.adapter.splitting import split
from lori_dist.adapter.task_adapter import extract_formed
from lori_dist.forms import FormChoice
from lori_dist.forms.task_lora import form
from tests.forms.made import SEEDS, TASKS, Case, descend, fill
from tests.models import tiny_llama


def made(sharing: Any, trains_a: bool = False, rank_shared: int | None = None) -> Any:
    return form(rank=4, alpha=8.0, trains_a=trains_a, sharing=sharing, rank_shared=rank_shared)


def tensors(*names: str, ranks: tuple[int, int] = (4, 4)) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(3)
    shapes = {"a": (4, 6), "b": (5, ranks[0]), "own_a": (4, 6), "own_b": (5, ranks[1])}
    return {name: torch.randn(shapes[name], generator=generator) for name in names}


def product(of: Any, t: dict[str, Tensor]) -> Tensor:
    b, a = of.factors(t)
    made: Tensor = b @ a
    return made


@pytest.mark.parametrize("trains_a", [False, True])
def test_of_one_task_all_are_plain_lora(trains_a: bool) -> None:
    t = tensors("a", "b")
    for sharing in ("none", "a", "b"):
        torch.testing.assert_close(product(made(sharing, trains_a), t), 2.0 * t["b"] @ t["a"])
    t = tensors("a", "b", "own_a", "own_b") if trains_a else tensors("a", "b", "own_b")
    wanted = 2.0 * (t["b"] @ t["a"] + t["own_b"] @ t["own_a" if trains_a else "a"])
    torch.testing.assert_close(product(made("extra", trains_a), t), wanted)


def test_an_extra_pair_alone_is_a_joint_training_and_without_it_each_task_has_its_own() -> None:
    t = tensors("a", "b", "own_b")
    only_shared, only_own = {**t, "own_b": torch.zeros(5, 4)}, {**t, "b": torch.zeros(5, 4)}
    torch.testing.assert_close(product(made("extra"), only_shared), 2.0 * t["b"] @ t["a"])
    own = {"a": t["a"], "b": t["own_b"]}
    torch.testing.assert_close(product(made("extra"), only_own), product(made("a"), own))


@pytest.mark.parametrize(("trains_a", "rank"), [(False, 4), (True, 6)])
def test_the_rank_of_a_task_s_adapter(trains_a: bool, rank: int) -> None:
    case = Case(
        name="task_lora",
        options={"sharing": "extra", "rank_shared": 2},
        a="trained" if trains_a else "cached",
        density=None,
    )
    of_tasks = split(extract_formed(fill(case.model())))
    assert {block.rank for adapter in of_tasks.values() for block in adapter.blocks} == {rank}
    assert {block.scale for adapter in of_tasks.values() for block in adapter.blocks} == {2.0}


def test_sharing_nothing_gives_each_task_what_it_gets_alone() -> None:
    model = Case(name="task_lora", options={"sharing": "none"}, density=None).model()
    descend(model, range(4))
    of_tasks = split(extract_formed(model))
    for number, (task, seed) in enumerate(zip(TASKS, SEEDS, strict=True)):
        alone = tiny_llama()
        attach(alone, Spec(rank=4, alpha=8.0, seed=seed))
        descend(alone, range(4), [number])
        wanted = extract(alone, name=task)
        assert of_tasks[task].blocks[0].seed == seed
        for module in wanted.shapes:
            torch.testing.assert_close(of_tasks[task].delta(module), wanted.delta(module), rtol=1e-3, atol=1e-6)


def test_masks_on_other_rows_make_updates_orthogonal() -> None:
    case = Case(name="task_lora", density=1.0)
    model = tiny_llama()
    masks = case.masks(model)
    assert masks is not None
    for mask in masks.values():
        for task, of_task in enumerate(mask):
            of_task[:] = (torch.arange(len(of_task)) % len(TASKS) == task)[:, None]
    attach(model, case.spec(), masks=masks)
    descend(model, range(4))
    one, two, _ = split(extract_formed(model)).values()
    for module in one.shapes:
        assert float(one.delta(module).norm()) > 0
        assert float((one.delta(module) * two.delta(module)).sum()) == 0


def test_an_a_for_each_task_needs_a_seed_for_each() -> None:
    spec = Spec(rank=4, alpha=8.0, seed=9, form=FormChoice(name="task_lora", options={"sharing": "none"}, tasks=TASKS))
    with pytest.raises(Exception, match="give their seeds"):
        attach(tiny_llama(), spec)
