"""Task arithmetic: a scaled sum, and tasks taken away."""

import functools

import pytest
import torch

from lori_dist import merges
from lori_dist.errors import ConfigError
from tests.merges.made import SHAPES, adapter, block, delta

merge = functools.partial(merges.merge, method="task_arithmetic")
ONE, OTHER = adapter(block("math")), adapter(block("toxic", seed=1, draw=1))


def test_the_sum_is_scaled_and_tasks_are_taken_away() -> None:
    merged = merge([ONE, OTHER], weights=[1.0, 0.5], options={"scale": 0.3, "negate": ["toxic"]})
    for module in SHAPES:
        wanted = 0.3 * (delta(ONE, module) - 0.5 * delta(OTHER, module))
        assert torch.allclose(delta(merged, module), wanted, rtol=0, atol=1e-12)
    assert [part.seed for part in merged.blocks] == [0, 1]


def test_a_task_negated_twice_cancels_with_itself() -> None:
    merged = merge([ONE, adapter(block("again"))], weights=[1.0, 1.0], options={"negate": ["again"]})
    assert not any(delta(merged, module).any() for module in SHAPES)


def test_an_unknown_name_is_refused_with_the_nearest() -> None:
    with pytest.raises(
        ConfigError,
        match=r"^merge\.method\.negate: unknown adapter 'toxik'; there are math, toxic\. Did you mean 'toxic'\?",
    ):
        merge([ONE, OTHER], weights=[1, 1], options={"negate": ["toxik"]})
