"""Forms that take some of the ranks for each token: by A x itself (fly), and by a router (smora)."""

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from lori_dist.errors import ConfigError
from lori_dist.forms import fly, smora

X = torch.randn(9, 6, generator=torch.Generator().manual_seed(3))
FORMS = {"fly": fly.form, "smora": smora.form}


def tensors(gates: int = 4) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(2)
    shapes = {"a": (4, 6), "b": (5, 4), "router": (gates, 6)}
    return {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}


def made(name: str, **options: Any) -> Any:
    return FORMS[name](rank=4, alpha=8.0, trains_a=False, **options)


def test_fly_is_the_formula_token_by_token() -> None:
    t = tensors()
    for token, found in zip(X, made("fly", active=2).update(t, X), strict=True):
        reduced = t["a"] @ token
        largest = sorted(range(4), key=lambda one: -abs(float(reduced[one])))[:2]
        torch.testing.assert_close(found, 2.0 * sum(t["b"][:, one] * reduced[one] for one in largest))


def test_smora_is_the_formula_token_by_token() -> None:
    t = tensors()
    for token, found in zip(X, made("smora", active=3).update(t, X), strict=True):
        gates, reduced = torch.sigmoid(t["router"] @ token), t["a"] @ token
        largest = sorted(range(4), key=lambda one: -float(gates[one]))[:3]
        shares = {one: 3 * gates[one] / sum(gates[other] for other in largest) for one in largest}
        assert float(sum(shares.values())) == pytest.approx(3.0)
        wanted = 8.0 / 3 * sum(t["b"][:, one] * shares[one] * reduced[one] for one in largest)
        torch.testing.assert_close(found, wanted)


@pytest.mark.parametrize("name", FORMS)
def test_all_ranks_with_equal_gates_are_plain_lora(name: str) -> None:
    t = tensors() | {"router": torch.zeros(4, 6)}
    torch.testing.assert_close(made(name, active=4).update(t, X), 2.0 * X @ t["a"].t() @ t["b"].t())


def test_ranks_of_a_partition_have_one_gate() -> None:
    t = tensors(2)
    repeated = t | {"router": t["router"].repeat_interleave(2, dim=0)}
    found = made("smora", active=2, partition=2).update(t, X)
    torch.testing.assert_close(found, made("smora", active=2).update(repeated, X))


@given(st.sampled_from(list(FORMS)), st.integers(1, 4), st.permutations(range(9)))
def test_a_token_s_update_does_not_depend_on_the_others(name: str, active: int, order: list[int]) -> None:
    t, one = tensors(), made(name, active=active)
    torch.testing.assert_close(one.update(t, X[order]), one.update(t, X)[order])


def test_a_router_learns_once_b_is_not_zero() -> None:
    for scale in (0.0, 1.0):
        t = tensors()
        router = t["router"].requires_grad_()
        made("smora", active=2).update(t | {"b": scale * t["b"]}, X).square().sum().backward()
        assert bool(router.grad.any()) == (scale > 0)


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("fly", {"active": 5}, r"form\.active: got 5, and adapter\.rank is 4; give at most that"),
        ("smora", {"active": 5}, r"form\.active: got 5, and adapter\.rank is 4; give at most that"),
        ("smora", {"partition": 3}, r"form\.partition: got 3, and adapter\.rank is 4; give a divisor of it"),
    ],
)
def test_numbers_that_do_not_fit_the_rank_are_refused(name: str, options: dict[str, int], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        made(name, **options)
