"""A B that all tasks share and one of low rank that each has."""

import pytest
import torch
from torch import Tensor

from lori_dist.forms import Site
from lori_dist.forms.lilora import form
from lori_dist.training.engine import trained
from tests.forms.made import TASKS, Case, backward

OPTIONS = {"rank": 4, "alpha": 8.0, "trains_a": False}


def tensors(task_rank: int = 2) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(3)
    shapes = {"a": (4, 6), "b": (5, 4), "p": (5, task_rank), "q": (task_rank, 4), "f": (1,)}
    return {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}


def product(t: dict[str, Tensor], task_rank: int = 2) -> Tensor:
    b, a = form(**OPTIONS, task_rank=task_rank).factors(t)  # type: ignore[arg-type]
    return b @ a


def test_it_is_the_formula() -> None:
    t = tensors()
    share = 1 / (1 + torch.exp(-t["f"]))
    wanted = 2.0 * (share * t["b"] + (1 - share) * t["p"] @ t["q"]) @ t["a"]
    torch.testing.assert_close(product(t), wanted)


@pytest.mark.parametrize(("weight", "wanted"), [(100.0, "shared"), (-100.0, "own")])
def test_the_weight_chooses_between_what_is_shared_and_what_is_a_task_s_own(weight: float, wanted: str) -> None:
    t = tensors() | {"f": torch.tensor([weight])}
    b = t["b"] if wanted == "shared" else t["p"] @ t["q"]
    torch.testing.assert_close(product(t), 2.0 * b @ t["a"])


def test_a_task_rank_as_large_as_the_rank_reaches_every_b() -> None:
    t, target = tensors(4), torch.randn(5, 4, generator=torch.Generator().manual_seed(8))
    t |= {"f": torch.tensor([-100.0]), "p": target @ torch.linalg.inv(t["q"])}
    torch.testing.assert_close(product(t, 4), 2.0 * target @ t["a"], rtol=1e-4, atol=1e-4)


def test_it_has_as_many_parameters_as_the_formula() -> None:
    found = form(rank=128, alpha=1.0, trains_a=True).entries(
        Site(module="layer", in_features=4096, out_features=4096, tasks=("one", "two"))
    )
    sizes = {name: torch.Size(entry.shape).numel() for name, entry in found.items()}
    assert sum(size for name, size in sizes.items() if found[name].per_task) == 270_337
    assert sizes["a"] + sizes["b"] == 1_048_576


def test_at_the_start_a_task_s_rows_move_what_is_shared_and_their_own_p() -> None:
    model = Case(name="lilora", density=None).model()
    backward(model, 0, tasks=[0])
    moved = {name.rpartition(":")[2] for name, one in trained(model).items() if one.grad is not None and one.grad.any()}
    assert moved == {"b", "p"}
    for name, one in trained(model).items():
        if name.endswith(":p"):
            of_tasks = one.grad.view(len(TASKS), -1)
            assert of_tasks[0].any()
            assert not of_tasks[1:].any()
