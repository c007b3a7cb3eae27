"""Forms that take some of the ranks for each token: by A x itself (fly), and by a router (smora)."""

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from lori_dist.adapter.attach import adapted
from lori_dist.adapter.form_states import end_step, states_of, take
from lori_dist.adapter.formed import formed
from lori_dist.errors import ConfigError
from lori_dist.forms import fly, smora
from lori_dist.training.engine import trained
from tests.forms.made import Case, backward, batch_of, counts_of, fill, rows_of_step

X = torch.randn(9, 6, generator=torch.Generator().manual_seed(3))
FORMS = {"fly": fly.form, "smora": smora.form}


def tensors(gates: int = 4) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(2)
    shapes = {"a": (4, 6), "b": (5, 4), "router": (gates, 6)}
    return {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}


def made(name: str, **options: Any) -> Any:
    return FORMS[name](rank=4, alpha=8.0, trains_a=False, **options)


def updated(one: Any, t: dict[str, Tensor], x: Tensor) -> Tensor:
    found: Tensor = one.update(t, x, one.choose(t, x))
    return found


@pytest.mark.parametrize("bias", [0.0, 0.1])
def test_fly_is_the_formula_token_by_token(bias: float) -> None:
    t = tensors() | {"bias": torch.tensor([0.3, -0.2, 0.1, 0.2])}
    for token, found in zip(X, updated(made("fly", active=2, bias=bias), t, X), strict=True):
        reduced = t["a"] @ token
        score = reduced + t["bias"] if bias else reduced
        largest = sorted(range(4), key=lambda one: -abs(float(score[one])))[:2]
        torch.testing.assert_close(found, 2.0 * sum(t["b"][:, one] * reduced[one] for one in largest))


@pytest.mark.parametrize("bias", [0.0, 0.1])
def test_smora_is_the_formula_token_by_token(bias: float) -> None:
    t = tensors() | {"bias": torch.tensor([0.3, -0.2, 0.1, 0.2])}
    for token, found in zip(X, updated(made("smora", active=3, bias=bias), t, X), strict=True):
        gates, reduced = torch.sigmoid(t["router"] @ token) + (t["bias"] if bias else 0), t["a"] @ token
        largest = sorted(range(4), key=lambda one: -float(gates[one]))[:3]
        shares = {one: 3 * gates[one] / sum(gates[other] for other in largest) for one in largest}
        assert float(sum(shares.values())) == pytest.approx(3.0)
        wanted = 8.0 / 3 * sum(t["b"][:, one] * shares[one] * reduced[one] for one in largest)
        torch.testing.assert_close(found, wanted)


@pytest.mark.parametrize("name", FORMS)
def test_all_ranks_with_equal_gates_are_plain_lora(name: str) -> None:
    t = tensors() | {"router": torch.zeros(4, 6), "bias": torch.zeros(4)}
    torch.testing.assert_close(updated(made(name, active=4), t, X), 2.0 * X @ t["a"].t() @ t["b"].t())


def test_ranks_of_a_partition_have_one_gate() -> None:
    t = tensors(2)
    repeated = t | {"router": t["router"].repeat_interleave(2, dim=0)}
    found = updated(made("smora", active=2, partition=2, bias=0.0), t, X)
    torch.testing.assert_close(found, updated(made("smora", active=2, bias=0.0), repeated, X))


@given(st.sampled_from(list(FORMS)), st.integers(1, 4), st.permutations(range(9)))
def test_a_token_s_update_does_not_depend_on_the_others(name: str, active: int, order: list[int]) -> None:
    t, one = tensors() | {"bias": torch.zeros(4)}, made(name, active=active)
    torch.testing.assert_close(updated(one, t, X[order]), updated(one, t, X)[order])


def test_a_router_learns_once_b_is_not_zero() -> None:
    for scale in (0.0, 1.0):
        t = tensors()
        router = t["router"].requires_grad_()
        updated(made("smora", active=2, bias=0.0), t | {"b": scale * t["b"]}, X).square().sum().backward()
        assert bool(router.grad.any()) == (scale > 0)


BIASED = Case(name="smora", options={"active": 2, "bias": 0.25})


@pytest.mark.parametrize("name", FORMS)
def test_a_bias_moves_by_its_step_against_how_often_a_rank_was_taken(name: str) -> None:
    one, t = made(name, active=2, bias=0.25), {"bias": torch.tensor([0.5, 0.0, -0.5, 1.0])}
    found = one.after_step(t, torch.tensor([5, 3, 0, 4]))
    assert found["bias"].tolist() == [0.25, 0.0, -0.25, 0.75]
    assert one.after_step(t, torch.zeros(4, dtype=torch.int64))["bias"].tolist() == t["bias"].tolist()


def test_tokens_are_counted_in_backward_passes_without_padding() -> None:
    model = fill(BIASED.model())
    assert not any("bias" in name for name in trained(model))
    batch = batch_of(rows_of_step(0), counts_of(0))
    real = int(batch.attention_mask.sum())
    assert real < batch.attention_mask.numel()
    deltas = [delta for delta in formed(adapted(model)).values() if not delta.is_empty]
    counts = deltas[0].counts
    assert counts is not None
    with torch.no_grad():
        model(batch.input_ids, labels=batch.labels)
    assert counts.sums == {}  # nothing is learned from what is only evaluated
    backward(model, 0)
    backward(model, 0, [1])
    more = int(batch_of([item for item in rows_of_step(0) if item[1] == 1]).attention_mask.sum())
    assert counts.sums.keys() == {delta.module for delta in deltas}
    assert {int(one.sum()) for one in counts.sums.values()} == {2 * (real + more)}


def test_what_follows_from_counts_is_given_back_and_that_of_a_step_left_out_is_not_there() -> None:
    model = BIASED.model()
    backward(model, 0)
    end_step(model, is_taken=False)
    end_step(model)
    assert all(state["bias"] == [0.0] * 4 for state in states_of(model).values())
    backward(model, 0)
    end_step(model)
    states = states_of(model)
    assert all(set(state["bias"]) <= {-0.25, 0.0, 0.25} and any(state["bias"]) for state in states.values())
    take(model, {})
    assert all(state["bias"] == [0.0] * 4 for state in states_of(model).values())
    take(model, states)
    assert states_of(model) == states


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
