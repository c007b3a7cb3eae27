"""Pico: directions that all tasks share count less, and the norm is the tasks'."""

import functools

import pytest
import torch

from lori_dist import merges
from lori_dist.adapter.adapter import Entries
from tests.merges.made import SHAPES, adapter, block, delta

merge = functools.partial(merges.merge, method="pico")


@pytest.mark.parametrize("inner", ["task_arithmetic", "ties", "tsv"])
@pytest.mark.parametrize("shared", [True, False])
def test_the_norm_is_the_mean_of_the_tasks_norms(inner: str, shared: bool) -> None:
    tasks = [adapter(block(f"t{place}", seed=0 if shared else place, draw=place, rank=2)) for place in range(2)]
    merged = merge(tasks, weights=[0.3, 0.3], options={"inner": inner})
    for module in SHAPES:
        wanted = torch.stack([delta(task, module).norm() for task in tasks]).mean()
        assert torch.allclose(delta(merged, module).norm(), wanted, rtol=0, atol=1e-10)


def test_only_the_ratios_of_the_weights_count() -> None:
    tasks = [adapter(block(f"t{seed}", seed=seed, draw=seed)) for seed in range(2)]
    one, other = merge(tasks, weights=[0.1, 0.2]), merge(tasks, weights=[5.0, 10.0])
    assert all(torch.allclose(delta(one, module), delta(other, module), rtol=0, atol=1e-12) for module in SHAPES)


def test_the_common_direction_is_turned_down() -> None:
    """Four tasks, whose B have one direction in common."""
    generator = torch.Generator().manual_seed(0)
    common = torch.randn(6, 1, dtype=torch.float64, generator=generator)
    module = "layers.0.q_proj"
    tasks = []
    for place in range(4):
        own = torch.randn(6, 2, dtype=torch.float64, generator=generator)
        b = common @ torch.ones(1, 2, dtype=torch.float64) * 3 + own
        entries = {module: Entries(index=None, values=b.flatten())}
        tasks.append(adapter(block(f"t{place}", modules=[module], entries=entries), modules=[module]))
    share = []
    for method in ("linear", "pico"):
        update = delta(merges.merge(tasks, method=method, weights=[1, 1, 1, 1]), module)
        share.append((common.t() @ update).norm() / common.norm() / update.norm())
    assert share[1] < share[0] - 0.01


def test_tasks_on_one_a_give_a_dense_b_on_it() -> None:
    tasks = [adapter(block(f"t{place}", draw=place, density=0.4)) for place in range(2)]
    merged = merge(tasks, weights=[1, 1])
    assert [part.seed for part in merged.blocks] == [0]
    assert merged.kept > tasks[0].kept
