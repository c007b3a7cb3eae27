"""A pool of ranks, of which those that rows take most often are left."""

from typing import Any

import pytest
import torch
from torch import Tensor

from lori_dist.adapter.attach import adapted, attach
from lori_dist.adapter.form_states import end_step, states_of
from lori_dist.adapter.formed import formed
from lori_dist.adapter.splitting import split
from lori_dist.adapter.task_adapter import extract_formed
from lori_dist.errors import AdapterError, ConfigError
from lori_dist.forms import Site
from lori_dist.forms.dac import form
from lori_dist.training.engine import trained
from tests.forms.made import CASES, SEQUEL, TASKS, Case, backward, descend, earlier, fill, logits, rows_of_step
from tests.models import tiny_llama

X = torch.randn(9, 6, generator=torch.Generator().manual_seed(3))
SITE = Site(module="layer", in_features=6, out_features=5, tasks=("one",))


def tensors() -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(2)
    shapes = {"a": (4, 6), "b": (5, 4), "router": (4, 7)}
    return {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}


def made(**options: Any) -> Any:
    return form(rank=4, alpha=8.0, trains_a=False, **options)


@pytest.mark.parametrize("gate", ["hard", "soft"])
def test_it_is_the_formula_row_by_row(gate: str) -> None:
    t, one = tensors(), made(active=3, gate=gate)
    found = one.update(t, X, one.choose(t, X))
    for row in range(len(X)):
        p = torch.softmax(t["router"][:, :6] @ X[row] + t["router"][:, 6], 0)
        ranks = sorted(range(4), key=lambda rank: -float(p[rank]))[:3]
        gates = {rank: 1.0 if gate == "hard" else float(3 * p[rank] / p[ranks].sum()) for rank in ranks}
        wanted = 2.0 * sum(gates[rank] * t["b"][:, rank] * (t["a"][rank] @ X[row]) for rank in ranks)
        torch.testing.assert_close(found[row], wanted, rtol=1e-4, atol=1e-5)


def test_all_ranks_with_hard_gates_are_lora() -> None:
    t, one = tensors(), made(active=4)
    torch.testing.assert_close(one.update(t, X, one.choose(t, X)), 2.0 * X @ t["a"].t() @ t["b"].t())


def test_a_router_learns_from_soft_gates_alone() -> None:
    t, one = tensors(), made(active=2, gate="soft")
    router = t["router"].requires_grad_()
    one.update(t, X, one.choose(t, X)).square().sum().backward()
    assert bool(router.grad.any())  # type: ignore[union-attr]
    assert made(gate="soft").entries(SITE)["router"].trained
    assert not made().entries(SITE)["router"].trained


@pytest.mark.parametrize(
    ("votes", "keep", "wanted"), [([1, 5, 5, 9], 2, {1, 3}), ([2, 2, 2, 2], 3, {0, 1, 2}), ([0, 0, 1, 0], 2, {0, 2})]
)
def test_what_is_left_are_the_ranks_with_most_votes_and_of_as_many_the_first(
    votes: list[int], keep: int, wanted: set[int]
) -> None:
    t = tensors() | {"votes": torch.tensor(votes).float()}
    b, a = made(keep=keep).settled(t)
    assert a is t["a"]
    for rank in range(4):
        assert torch.equal(b[:, rank], 2.0 * t["b"][:, rank] if rank in wanted else torch.zeros(5))


def test_the_penalty_is_of_the_ranks_with_most_votes_and_of_what_earlier_tasks_left() -> None:
    t = tensors() | {"votes": torch.tensor([0.0, 7.0, 9.0, 1.0])}
    assert made(keep=2).penalty(t, SITE) is None
    past, b = torch.randn(5, 3), t["b"].requires_grad_()
    found = made(keep=2, weight=0.5).penalty(t | {"past": past}, SITE)
    torch.testing.assert_close(found, 0.5 * (b[:, [1, 2]].t() @ past).abs().sum())
    found.backward()
    assert b.grad is not None
    assert not b.grad[:, [0, 3]].any()
    assert b.grad[:, [1, 2]].all()
    apart = torch.zeros(5, 1)
    apart[4] = 1.0
    with torch.no_grad():
        b[4] = 0.0
    assert float(made(keep=2).penalty(t | {"past": apart}, SITE).detach()) == 0


@pytest.mark.parametrize("options", [{"active": 5}, {"keep": 5}])
def test_numbers_that_do_not_fit_the_rank_are_refused(options: dict[str, int]) -> None:
    with pytest.raises(ConfigError, match=r"got 5, and adapter\.rank is 4; give at most that"):
        made(**options)


def test_votes_are_as_many_as_the_ranks_of_all_rows_that_are_trained_on() -> None:
    model = CASES["dac"].model()
    for step in (0, 2):
        backward(model, step)
        end_step(model)
    num_rows = len(rows_of_step(0)) + len(rows_of_step(2))
    states = states_of(model)
    assert len(states) == sum(not delta.is_empty for delta in formed(adapted(model)).values())
    assert {sum(state["votes"]) for state in states.values()} == {2 * num_rows}  # two of four ranks each


def test_it_settles_into_an_ordinary_adapter() -> None:
    model = fill(Case(name="dac", options={"active": 4, "keep": 2}, density=None).model())
    of_tasks = split(extract_formed(model))
    one = of_tasks[TASKS[0]]
    for path, delta in formed(adapted(model)).items():
        votes = delta.states()["votes"]
        dense = one.blocks[0].entries[path].dense(delta.out_features, 4)
        ranks = sorted(votes.topk(2).indices.tolist())
        assert dense.any(0).nonzero().flatten().tolist() == ranks
        with torch.no_grad():
            flat = trained(model)[f"{path}:b"].view(-1, 4)
            torch.testing.assert_close(dense[:, ranks], flat[:, ranks])
            others = [rank for rank in range(4) if rank not in ranks]
            flat[:, others] = 0.0  # all ranks are taken here, so the model is then what is left
    alone = tiny_llama()
    attach(alone, one)
    torch.testing.assert_close(logits(alone), logits(model), rtol=1e-4, atol=1e-5)


def test_what_earlier_tasks_left_is_part_of_the_model_and_stays() -> None:
    case = SEQUEL["dac, after other tasks"]
    model, before = case.model(), tiny_llama()
    attach(before, earlier())
    torch.testing.assert_close(logits(model), logits(before), rtol=1e-4, atol=1e-5)
    past = [delta._buffers["past"].clone() for delta in formed(adapted(model)).values()]  # type: ignore[union-attr]
    descend(model, range(3))
    for found, delta in zip(past, formed(adapted(model)).values(), strict=True):
        assert torch.equal(delta._buffers["past"], found)  # type: ignore[arg-type]


def test_a_step_follows_the_penalty_too_of_the_mean_over_layers() -> None:
    """At the start B is zero, and so is the gradient of the penalty."""

    def after(steps: int, weight: float) -> Any:
        model = Case(name="dac", options={"weight": weight}, before=True, density=None).model()
        descend(model, range(steps))
        return model

    plain, found, once = after(2, 0.0), trained(after(2, 5.0)), after(1, 0.0)
    penalties = [
        form(rank=4, alpha=8.0, trains_a=False, weight=5.0).penalty(delta._of_tasks()(0), SITE)
        for delta in formed(adapted(once)).values()
    ]
    gradients = torch.autograd.grad(torch.stack(penalties).mean(), list(trained(once).values()))
    assert any(bool(one.any()) for one in gradients)  # none where no row has taken the rank with most votes
    for (name, parameter), gradient in zip(trained(plain).items(), gradients, strict=True):
        torch.testing.assert_close(found[name], parameter - 0.5 * gradient, rtol=1e-4, atol=1e-6)


def test_another_form_or_a_trained_a_is_not_added_to_what_was_there() -> None:
    with pytest.raises(AdapterError, match="before: the form hydra cannot be added to what was trained earlier"):
        attach(tiny_llama(), CASES["hydra"].spec(), before=earlier())
    with pytest.raises(AdapterError, match="projection: trained gives each task its own A, and before has another"):
        attach(tiny_llama(), CASES["dac, soft"].spec(), before=earlier())
