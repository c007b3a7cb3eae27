"""What PEFT's linear is: the sum of updates, and cross terms."""

import functools

import pytest
import torch

from lori_dist import merges
from lori_dist.errors import AdapterError
from tests.merges.made import SHAPES, adapter, block, delta

merge = functools.partial(merges.merge, method="peft_linear")


@pytest.mark.parametrize("num_tasks", [2, 4])
def test_equal_tasks_on_one_a_come_back_that_many_times(num_tasks: int) -> None:
    tasks = [adapter(block(f"t{place}", draw=place)) for place in range(num_tasks)]
    merged = merge(tasks)
    exact = merges.merge(tasks, method="linear")
    for module in SHAPES:
        assert torch.allclose(delta(merged, module), num_tasks * delta(exact, module), rtol=0, atol=1e-12)
    assert merged.blocks[0].seed == 0


def test_with_an_a_each_the_error_is_the_cross_terms() -> None:
    tasks = [adapter(block("a", alpha=2.0)), adapter(block("b", seed=1, draw=1, alpha=2.0))]
    merged = merge(tasks, weights=[1.0, 1.0])
    for module, (_, in_features) in SHAPES.items():
        exact = sum(delta(task, module) for task in tasks)
        (one,), (other,) = tasks[0].blocks, tasks[1].blocks
        b = [part.entries[module].dense(SHAPES[module][0], 2) for part in (one, other)]
        a = [part.projection(module, in_features).double() for part in (one, other)]
        cross = b[0] @ a[1] + b[1] @ a[0]
        assert torch.allclose(delta(merged, module), exact + cross, rtol=0, atol=1e-12)
    (part,) = merged.blocks
    assert part.seed is None and part.entries["layers.0.q_proj"].index is not None


def test_unequal_ranks_are_refused() -> None:
    with pytest.raises(AdapterError, match=r"^layers\.0\.q_proj: the ranks differ \(a 2, b 3\), and so A has no sum"):
        merge([adapter(block("a")), adapter(block("b", seed=1, rank=3))], weights=[1, 1])


def test_a_negative_weight_is_a_sign_once() -> None:
    one = adapter(block("a"))
    merged = merge([one], weights=[-2.0])
    assert all(torch.allclose(delta(merged, module), -2 * delta(one, module), atol=1e-12) for module in SHAPES)
