"""What holds for every balance, found as the configuration finds it."""

import inspect
import json
from typing import Any

import pytest
import torch
from torch import Tensor

from lori_dist import plugin
from lori_dist.balances import State
from tests.balances.made import gradients


@pytest.fixture(params=plugin.names("balances"))
def method(request: pytest.FixtureRequest) -> plugin.Method:
    return plugin.find("balances", request.param, "balance", "multitask.balance")


def steps(method: plugin.Method, gram: Tensor, losses: Tensor, number: int = 3) -> tuple[list[Tensor], State]:
    """Weights of several steps, whose losses fall unequally."""
    found, state = list[Tensor](), dict[str, Any]()
    for step in range(number):
        falling = losses * torch.linspace(1.0, 0.5, len(losses), dtype=losses.dtype) ** step
        weights, state = method.load()(gram, falling, state, seed=4, step=step)  # type: ignore[assignment]
        found.append(weights)
    return found, state


def grams(own: Tensor, units: int = 2) -> Tensor:
    return torch.stack([part @ part.t() for part in own.tensor_split(units, dim=1)])


LOSSES = torch.tensor([2.0, 0.5, 1.0, 3.0], dtype=torch.float64)


def test_the_signature_is_the_one_documented(method: plugin.Method) -> None:
    balance = method.load()
    *first, seed, step = list(inspect.signature(balance).parameters.values())[:5]
    assert [parameter.name for parameter in (*first, seed, step)] == ["gram", "losses", "state", "seed", "step"]
    assert balance.__doc__ is not None and "Source:" in balance.__doc__
    assert set(method.constants["GRANULARITY"]) <= {"matrix", "layer", "type", "global"}


def test_weights_are_of_every_unit_and_task_and_do_not_need_large_gradients(method: plugin.Method) -> None:
    own = gradients(1, 4, 12)
    found, state = steps(method, grams(own), LOSSES)
    for weights in found:
        assert weights.shape == (2, 4)
        assert weights.dtype == torch.float64
        assert bool(weights.isfinite().all())
    scaled, _ = steps(method, grams(own * 1e-4), LOSSES)
    for one, other in zip(found, scaled, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-8, atol=1e-8)
    assert json.loads(json.dumps(dict(state))) == dict(state)


def test_a_state_that_was_saved_gives_the_same_bits(method: plugin.Method) -> None:
    gram = grams(gradients(2, 4, 12))
    [*_, last], _ = steps(method, gram, LOSSES, 4)
    _, state = steps(method, gram, LOSSES, 3)
    falling = LOSSES * torch.linspace(1.0, 0.5, 4, dtype=torch.float64) ** 3
    again, _ = method.load()(gram, falling, json.loads(json.dumps(dict(state))), seed=4, step=3)
    assert torch.equal(again, last)


def test_tasks_may_come_in_any_order(method: plugin.Method) -> None:
    """But for the order in which `ortho` and `pcgrad` let them give way, which is drawn for places."""
    if method.name in ("ortho", "pcgrad"):
        pytest.skip("the order of the tasks is part of the method")
    own, turned = gradients(3, 4, 12), [2, 0, 3, 1]
    found, _ = steps(method, grams(own), LOSSES)
    gram = grams(own[turned])
    state: Any = {}
    for step, wanted in enumerate(found):
        falling = LOSSES * torch.linspace(1.0, 0.5, 4, dtype=torch.float64) ** step
        weights, state = method.load()(gram, falling[turned], state, seed=4, step=step)
        torch.testing.assert_close(weights, wanted[:, turned], rtol=1e-9, atol=1e-9)


def test_a_task_without_a_gradient_and_none_at_all_give_finite_weights(method: plugin.Method) -> None:
    own = gradients(5, 4, 12)
    own[2] = 0
    for gram in (grams(own), torch.zeros(2, 4, 4, dtype=torch.float64)):
        found, _ = steps(method, gram, LOSSES)
        assert all(bool(weights.isfinite().all()) for weights in found)


def test_equal_tasks_have_equal_weights(method: plugin.Method) -> None:
    own = gradients(6, 1, 12).expand(3, -1)
    weights, _ = method.load()(grams(own), torch.ones(3, dtype=torch.float64), {}, seed=0, step=0)
    torch.testing.assert_close(weights, weights[:, :1].expand(-1, 3), rtol=1e-9, atol=1e-9)


def test_opposite_gradients_do_not_explode(method: plugin.Method) -> None:
    own = gradients(7, 2, 12)
    own[1] = -0.5 * own[0]
    found, _ = steps(method, grams(own), LOSSES[:2])
    for weights in found:
        for unit, part in zip(weights, own.tensor_split(2, dim=1), strict=True):
            assert float((unit @ part).norm()) < 10 * float(part.norm())
