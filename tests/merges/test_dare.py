"""DARE: seeded, unbiased, and not dependent on order."""

import functools

import pytest
import torch

from lori_dist import merges
from lori_dist.adapter.adapter import Adapter
from lori_dist.merges._entries import Draw, thin
from tests.merges.made import SHAPES, adapter, block, delta

TASKS = [adapter(block(f"t{place}", draw=place, density=1.0, rank=3)) for place in range(2)]
WEIGHTS = [0.7, -0.5]


@pytest.fixture(params=["dare", "dare_ties"])
def merge(request: pytest.FixtureRequest) -> functools.partial[Adapter]:
    return functools.partial(merges.merge, TASKS, method=request.param, weights=WEIGHTS)


def exact(module: str) -> torch.Tensor:
    return WEIGHTS[0] * delta(TASKS[0], module) + WEIGHTS[1] * delta(TASKS[1], module)


def test_density_one_is_linear_or_ties() -> None:
    for method, other in (("dare", "linear"), ("dare_ties", "ties")):
        options = {"density": 1.0}
        merged = merges.merge(TASKS, method=method, weights=WEIGHTS, options=options)
        wanted = merges.merge(TASKS, method=other, weights=WEIGHTS, options=options if other == "ties" else {})
        assert all(
            torch.allclose(delta(merged, module), delta(wanted, module), rtol=0, atol=1e-12) for module in SHAPES
        )


def test_the_mean_over_seeds_is_linear() -> None:
    merged = [
        merges.merge(TASKS, method="dare", weights=WEIGHTS, options={"seed": seed, "density": 0.5})
        for seed in range(400)
    ]
    for module in SHAPES:
        deltas = torch.stack([delta(made, module) for made in merged])
        error = (deltas.mean(dim=0) - exact(module)).abs()
        assert (error < 5 * deltas.std(dim=0) / 20).all()


def test_one_seed_gives_the_same_bits_and_another_gives_others(merge: functools.partial[Adapter]) -> None:
    first, second, other = merge(), merge(), merge(options={"seed": 1})
    for module in SHAPES:
        assert torch.equal(first.blocks[0].entries[module].values, second.blocks[0].entries[module].values)
    assert any(not torch.equal(delta(first, module), delta(other, module)) for module in SHAPES)


def test_a_mask_depends_on_seed_module_name_and_place_alone() -> None:
    x = torch.ones(40, 50, dtype=torch.float64)
    kept = thin(x, 0.5, Draw(seed=3, module="m"), "a")
    assert torch.equal(thin(torch.ones(50, 50, dtype=torch.float64), 0.5, Draw(seed=3, module="m"), "a")[:40], kept)
    for seed, module, name in ((4, "m", "a"), (3, "n", "a"), (3, "m", "b")):
        both = ((thin(x, 0.5, Draw(seed=seed, module=module), name) > 0) & (kept > 0)).double().mean()
        assert abs(both - 0.25) < 0.05


@pytest.mark.parametrize("density", [0.01, 0.3, 0.9])
def test_the_share_that_is_kept_is_the_density_and_is_scaled_up(density: float) -> None:
    x = torch.ones(300, 300, dtype=torch.float64)
    kept = thin(x, density, Draw(seed=0, module="m"), "a")
    assert set(kept.flatten().tolist()) == {0.0, 1 / density}
    assert abs((kept > 0).double().mean() - density) < 5 * (density * (1 - density)) ** 0.5 / 300


def test_the_first_bits_of_a_mask_stay_what_they_are() -> None:
    kept = thin(torch.ones(1, 24, dtype=torch.float64), 0.5, Draw(seed=0, module="layers.0.q_proj"), "math")
    assert "".join("1" if value else "0" for value in kept[0]) == "000111010010111000010001"


def test_support_stays_inside_the_tasks() -> None:
    task = adapter(block("a", density=0.3))
    merged = merges.merge([task], method="dare", weights=[1.0])
    for module in SHAPES:
        if module in merged.blocks[0].entries:
            index, inside = merged.blocks[0].entries[module].index, task.blocks[0].entries[module].index
            assert index is not None and inside is not None
            assert set(index.tolist()) <= set(inside.tolist())
