"""Projected gradients: the form with inner products against the gradients themselves, and what must hold of either."""

from itertools import permutations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from lori_dist.balances.ortho import Against, coefficients, order
from lori_dist.training.surgery import cosines, summed, unit_of
from tests.engines.joint import project

PROJECTIONS: tuple[Against, ...] = ("original", "in_place")
projections = pytest.mark.parametrize("projection", PROJECTIONS)


def gradients(seed: int, num_tasks: int, size: int) -> Tensor:
    """Of very different lengths, (tasks, size), float64."""
    generator = torch.Generator().manual_seed(seed)
    scales = torch.randn(num_tasks, 1, generator=generator, dtype=torch.float64).exp()
    return torch.randn(num_tasks, size, generator=generator, dtype=torch.float64) * scales


def projected(own: Tensor, in_order: list[int], projection: Against) -> Tensor:
    """By inner products, (tasks, size)."""
    return coefficients((own @ own.t()).unsqueeze(0), in_order, projection)[0] @ own


@projections
@given(seed=st.integers(0, 10**6), num_tasks=st.integers(1, 6), size=st.integers(7, 30))
def test_inner_products_give_what_the_gradients_themselves_give(
    projection: Against, seed: int, num_tasks: int, size: int
) -> None:
    own, in_order = gradients(seed, num_tasks, size), order(num_tasks, seed, 3)
    wanted = torch.stack(project(list(own), in_order, projection))
    assert torch.allclose(projected(own, in_order, projection), wanted, rtol=1e-9, atol=1e-9 * float(own.norm()))


@projections
@given(seed=st.integers(0, 10**6), num_tasks=st.integers(1, 6))
def test_without_a_conflict_each_gradient_stays_as_it_is(projection: Against, seed: int, num_tasks: int) -> None:
    own = gradients(seed, num_tasks, 9).abs()
    made = coefficients((own @ own.t()).unsqueeze(0), order(num_tasks, seed, 0), projection)
    assert torch.equal(made[0], torch.eye(num_tasks, dtype=torch.float64))


@given(seed=st.integers(0, 10**6), size=st.integers(2, 20))
def test_of_two_tasks_the_step_opposes_neither(seed: int, size: int) -> None:
    own = gradients(seed, 2, size)
    total = projected(own, [0, 1], "original").sum(0)
    assert bool((own @ total >= -1e-9 * own.norm(dim=1) * total.norm()).all())


@pytest.mark.parametrize(("projection", "wanted"), [("original", (0.64, 8.48)), ("in_place", (-5.36, 8.48))])
def test_the_example_in_which_the_two_differ(projection: Against, wanted: tuple[float, float]) -> None:
    own = torch.tensor([[1.0, 0.0], [-6.0, 8.0]], dtype=torch.float64)
    assert projected(own, [0, 1], projection).sum(0).tolist() == pytest.approx(wanted)


@projections
def test_a_task_without_a_gradient_changes_nothing(projection: Against) -> None:
    own = torch.tensor([[1.0, 2.0], [0.0, 0.0], [-2.0, 1.0]], dtype=torch.float64)
    assert torch.equal(projected(own, [2, 1, 0], projection), own)
    nothing = torch.zeros(3, 4, dtype=torch.float64)
    assert torch.equal(projected(nothing, [0, 1, 2], projection), nothing)


@projections
def test_what_is_left_of_opposite_gradients_is_nothing_to_give_way_to(projection: Against) -> None:
    own = torch.tensor([[3.0, 1.0], [-6.0, -2.0], [1.0, -5.0]], dtype=torch.float64)
    for in_order in permutations(range(3)):
        made = projected(own, list(in_order), projection)
        assert bool(made.isfinite().all())
        assert float(made.norm()) <= float(own.norm())


def test_disjoint_gradients_never_meet() -> None:
    own = torch.block_diag(*torch.randn(3, 1, 4, dtype=torch.float64).unbind())
    made = coefficients((own @ own.t()).unsqueeze(0), [2, 0, 1], "original")
    assert torch.equal(made[0], torch.eye(3, dtype=torch.float64))


def test_units_are_projected_apart() -> None:
    own = gradients(5, 3, 12)
    parts = own.split(4, dim=1)
    grams = torch.stack([part @ part.t() for part in parts])
    apart = coefficients(grams, [0, 1, 2], "original")
    for number, part in enumerate(parts):
        assert torch.allclose(apart[number] @ part, projected(part, [0, 1, 2], "original"))
    whole = summed(grams, torch.tensor([0, 0, 0]))
    assert torch.allclose(coefficients(whole, [0, 1, 2], "original")[0] @ own, projected(own, [0, 1, 2], "original"))


@pytest.mark.parametrize(
    ("granularity", "units"),
    [
        ("matrix", ("model.layers.0.mlp.up_proj", "model.layers.0.mlp.up_proj:A", "model.layers.11.mlp.up_proj")),
        ("layer", ("model.layers.0", "model.layers.0", "model.layers.11")),
        ("type", ("B", "A", "B")),
        ("global", ("", "", "")),
    ],
)
def test_units(granularity: str, units: tuple[str, ...]) -> None:
    names = ("model.layers.0.mlp.up_proj", "model.layers.0.mlp.up_proj:A", "model.layers.11.mlp.up_proj")
    assert tuple(unit_of(name, granularity) for name in names) == units  # type: ignore[arg-type]


def test_the_order_is_of_seed_and_step_alone() -> None:
    drawn = [order(5, 1, step) for step in range(50)]
    assert drawn == [order(5, 1, step) for step in range(50)]
    assert all(sorted(one) == list(range(5)) for one in drawn)
    assert len({tuple(one) for one in drawn}) > 20
    assert drawn != [order(5, 2, step) for step in range(50)]


def test_a_cosine_with_nothing_is_zero() -> None:
    own = torch.tensor([[1.0, 0.0], [-2.0, 0.0], [0.0, 0.0]], dtype=torch.float64)
    assert cosines(own @ own.t())[0].tolist() == [1.0, -1.0, 0.0]
