"""KnOTS: the sum where it sums, and entry by entry in a common basis."""

import functools

import pytest
import torch

from lori_dist import merges
from lori_dist.errors import AdapterError
from tests.merges.made import SHAPES, adapter, block, delta

merge = functools.partial(merges.merge, method="knots")
EACH = [adapter(block(f"t{seed}", seed=seed, draw=seed)) for seed in range(3)]
SHARED = [adapter(block(f"t{place}", rank=3, draw=place)) for place in range(3)]
SUM = {"inner": "task_arithmetic", "density": 1.0}


@pytest.mark.parametrize("space", ["b", "dense"])
def test_with_a_sum_it_is_linear_in_either_space(space: str) -> None:
    merged = merge(SHARED, weights=[0.5, -1, 2], options={**SUM, "space": space})
    wanted = merges.merge(SHARED, method="linear", weights=[0.5, -1, 2])
    assert all(torch.allclose(delta(merged, module), delta(wanted, module), rtol=0, atol=1e-12) for module in SHAPES)
    assert [part.seed for part in merged.blocks] == [0]


def test_the_forms() -> None:
    assert [part.seed for part in merge(EACH, weights=[1, 1, 1]).blocks] == [None]
    assert [part.seed for part in merge(SHARED, weights=[1, 1, 1]).blocks] == [0]
    assert [part.seed for part in merge(SHARED, weights=[1, 1, 1], options={"space": "dense"}).blocks] == [None]


def test_the_result_lies_in_the_columns_of_the_tasks() -> None:
    tasks = [adapter(block(f"t{seed}", seed=seed, draw=seed, rank=1)) for seed in range(2)]
    merged = merge(tasks, weights=[1, 1])
    for module in SHAPES:
        columns = torch.cat([delta(task, module) for task in tasks], dim=1)
        inside = columns @ torch.linalg.pinv(columns)
        assert torch.allclose(inside @ delta(merged, module), delta(merged, module), rtol=0, atol=1e-12)


def test_small_singular_values_are_dropped() -> None:
    whole = merge(EACH, weights=[1, 1, 1], options=SUM)
    few = merge(EACH, weights=[1, 1, 1], options={**SUM, "tolerance": 1.0})
    assert few.blocks[0].rank < whole.blocks[0].rank
    assert not any(
        delta(merge(EACH, weights=[1, 1, 1], options={**SUM, "tolerance": 1e9}), module).any() for module in SHAPES
    )


def test_b_needs_a_shared_a() -> None:
    with pytest.raises(AdapterError, match=r"^layers\.0\.q_proj: the tasks do not share A, so their B are not in one"):
        merge(EACH, weights=[1, 1, 1], options={"space": "b"})
