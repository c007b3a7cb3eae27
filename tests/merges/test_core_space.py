"""Core Space: lossless, in a basis as large as the tasks need."""

import functools

import pytest
import torch

from lori_dist import merges
from lori_dist.adapter.update import split
from lori_dist.errors import ConfigError
from lori_dist.merges._cores import in_core_space
from tests.merges.made import SHAPES, adapter, block, delta

merge = functools.partial(merges.merge, method="core_space")


@pytest.mark.parametrize("shared", [True, False])
def test_nothing_is_lost_before_the_merge(shared: bool) -> None:
    tasks = [adapter(block(f"t{place}", seed=0 if shared else place, draw=place)) for place in range(3)]
    for module, shape in SHAPES.items():
        updates = [split(task, module, shape) for task in tasks]
        u, v, cores = in_core_space(updates)
        assert v.shape[1] == (2 if shared else min(6, shape[1]))
        for task, core in zip(tasks, cores, strict=True):
            back = u @ core @ v.t()
            assert torch.allclose(back, delta(task, module), rtol=0, atol=1e-12)


def test_directions_are_kept_by_tsv_alone() -> None:
    with pytest.raises(ConfigError, match=r"^merge\.method\.keep: got 1, and only inner=tsv keeps directions"):
        merge([adapter(block("a"))], weights=[1.0], options={"keep": 1})


def test_equalized_singular_values_are_their_mean() -> None:
    one = adapter(block("a"))
    merged = merge([one], weights=[1.0], options={"equalize": True})
    for module in SHAPES:
        before, after = (torch.linalg.svdvals(delta(what, module)) for what in (one, merged))
        rank = int((before > 1e-10).sum())
        assert torch.allclose(after[:rank], before[:rank].mean().expand(rank), rtol=0, atol=1e-10)


def test_entry_by_entry_methods_differ_from_the_sum() -> None:
    tasks = [adapter(block(f"t{seed}", seed=seed, draw=seed)) for seed in range(2)]
    module = "layers.0.q_proj"
    made = {
        inner: delta(merge(tasks, weights=[1, 1], options={"inner": inner, "density": 0.6}), module)
        for inner in ("task_arithmetic", "ties", "dare", "dare_ties")
    }
    for one in made:
        for other in made:
            assert (one == other) == torch.equal(made[one], made[other])
