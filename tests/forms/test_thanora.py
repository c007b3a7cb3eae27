"""One update whose rank is divided among the tasks."""

import pytest
import torch

from lori_dist.adapter.adapter import Spec
from lori_dist.adapter.attach import attach
from lori_dist.errors import AdapterError
from lori_dist.forms import Site
from lori_dist.forms.thanora import Thanora, blocks
from lori_dist.training.engine import trained
from tests.forms.made import Case, descend
from tests.models import tiny_llama

SITE = Site(module="layer", in_features=6, out_features=9, tasks=("one", "two", "three"))


def made(weight: float = 0.5, *, trains_a: bool = False) -> Thanora:
    return Thanora(rank=7, scale=2.0, trains_a=trains_a, weight=weight)


@pytest.mark.parametrize(
    ("rank", "num_tasks", "wanted"), [(7, 3, [2, 2, 2, 1]), (8, 3, [2, 2, 2, 2]), (9, 2, [3, 3, 3]), (2, 2, [1, 1, 0])]
)
def test_blocks_fill_the_rank(rank: int, num_tasks: int, wanted: list[int]) -> None:
    assert blocks(rank, num_tasks) == wanted
    assert sum(wanted) == rank


def test_a_rank_that_gives_a_task_nothing_is_refused() -> None:
    with pytest.raises(AdapterError, match="thanora gives each of 3 tasks a part of the rank, which is 2"):
        blocks(2, 3)


@pytest.mark.parametrize("trains_a", [False, True])
def test_the_penalty_is_that_of_the_tasks_blocks_alone(trains_a: bool) -> None:
    generator = torch.Generator().manual_seed(1)
    t = {"a": torch.randn(7, 6, generator=generator), "b": torch.randn(9, 7, generator=generator)}
    for tensor in t.values():
        tensor.requires_grad_(True)
    penalty = made(trains_a=trains_a).penalty(t, SITE)
    assert penalty is not None
    wanted = torch.zeros(())
    for one, two in ((slice(0, 2), slice(2, 4)), (slice(0, 2), slice(4, 6)), (slice(2, 4), slice(4, 6))):
        wanted = wanted + (t["b"][:, one].t() @ t["b"][:, two]).square().sum()
        if trains_a:
            wanted = wanted + (t["a"][one] @ t["a"][two].t()).square().sum()
    torch.testing.assert_close(penalty, 0.5 * wanted)
    penalty.backward()
    assert t["b"].grad is not None
    assert bool(t["b"].grad[:, :6].all())
    assert not bool(t["b"].grad[:, 6:].any())  # nothing asks the cooperative block for anything


def test_orthogonal_blocks_cost_nothing_and_make_orthogonal_updates() -> None:
    b = torch.zeros(9, 7)
    for task in range(3):
        b[3 * task : 3 * task + 3, 2 * task : 2 * task + 2] = torch.randn(3, 2)
    a = torch.randn(7, 6)
    penalty = made().penalty({"a": a, "b": b}, SITE)
    assert penalty is not None
    assert float(penalty) == 0
    one, two = b[:, :2] @ a[:2], b[:, 2:4] @ a[2:4]
    assert float((one.t() @ two).abs().max()) == 0


def test_without_a_penalty_it_is_joint_lori_bit_for_bit() -> None:
    model, plain = Case(name="thanora", options={"weight": 0.0}, density=None).model(), tiny_llama()
    attach(plain, Spec(rank=4, alpha=8.0, seed=9))
    for one in (model, plain):
        descend(one, range(4))
    found = trained(model)
    for name, parameter in trained(plain).items():
        assert torch.equal(found[f"{name}:b"], parameter)


def test_the_penalty_makes_blocks_more_orthogonal() -> None:
    """And its gradient is that of the mean over layers, once for each step."""

    def total(model: torch.nn.Module, weight: float) -> torch.Tensor:
        form = Thanora(rank=4, scale=2.0, trains_a=False, weight=weight)
        found = [form.penalty({"a": torch.zeros(4, 1), "b": b.view(-1, 4)}, SITE) for b in trained(model).values()]
        return torch.stack([one for one in found if one is not None]).mean()

    case = Case(name="thanora", options={"weight": 0.0}, density=None)
    plain, model = case.model(), Case(name="thanora", options={"weight": 50.0}, density=None).model()
    for one in (plain, model):
        descend(one, range(2))
    added = Case(name="thanora", options={"weight": 0.0}, density=None).model()
    descend(added, [0])
    with torch.enable_grad():
        gradients = torch.autograd.grad(total(added, 50.0), list(trained(added).values()))
    descend(added, [1])
    for (name, parameter), gradient in zip(trained(added).items(), gradients, strict=True):
        torch.testing.assert_close(trained(model)[name], parameter - 0.5 * gradient, rtol=1e-3, atol=1e-6)
    assert float(total(model, 1.0).detach()) < float(total(plain, 1.0).detach())
