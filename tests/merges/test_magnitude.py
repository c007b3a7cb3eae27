"""Magnitude: each task's largest entries."""

import functools

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lori_dist import merges
from lori_dist.adapter.adapter import Entries
from lori_dist.errors import ConfigError
from lori_dist.merges._entries import trim
from tests.merges.made import SHAPES, adapter, block, delta

merge = functools.partial(merges.merge, method="magnitude")


@given(st.data())
def test_the_largest_entries_stay_and_ties_go_to_the_earlier(data: st.DataObject) -> None:
    values = data.draw(st.lists(st.sampled_from([0.0, 0.0, 1.0, -1.0, 2.0, -3.0]), min_size=1, max_size=20))
    density = data.draw(st.floats(0.01, 1))
    x = torch.tensor(values, dtype=torch.float64).view(1, -1)
    num_entries = sum(value != 0 for value in values)
    num_kept = min(num_entries, max(1, round(density * num_entries)))
    order = sorted(range(len(values)), key=lambda place: (-abs(values[place]), place))[:num_kept]
    wanted = [value if place in order else 0.0 for place, value in enumerate(values)]
    assert trim(x, density).flatten().tolist() == wanted


def test_density_counts_the_entries_that_are_not_zero() -> None:
    """Over all entries, a density of 0.2 would leave a B at 10% as it is."""
    part = block("a", density=0.1, rank=10)
    merged = merge([adapter(part)], weights=[1.0], options={"density": 0.2})
    kept = {module: len(entries.values) for module, entries in merged.blocks[0].entries.items()}
    assert kept == {module: max(1, round(0.2 * out_features)) for module, (out_features, _) in SHAPES.items()}


def test_tasks_with_an_a_each_can_be_trimmed_in_their_own_b() -> None:
    """An entry's fate depends on no other task, so the result may stay sparse on the tasks' seeds."""
    tasks = [adapter(block(f"t{seed}", seed=seed, draw=seed)) for seed in range(2)]
    merged = merge(tasks, weights=[0.5, -1.0], options={"density": 0.5, "space": "b"})
    assert [part.seed for part in merged.blocks] == [0, 1]
    alone = [merge([task], weights=[1.0], options={"density": 0.5}) for task in tasks]
    for module in SHAPES:
        wanted = 0.5 * delta(alone[0], module) - delta(alone[1], module)
        assert torch.allclose(delta(merged, module), wanted, rtol=0, atol=1e-12)


@pytest.mark.parametrize(("space", "shared", "form"), [("auto", True, "b"), ("auto", False, "a"), ("dense", True, "a")])
def test_the_form_follows_from_the_space(space: str, shared: bool, form: str) -> None:
    tasks = [adapter(block(f"t{place}", seed=0 if shared else place, draw=place)) for place in range(2)]
    merged = merge(tasks, weights=[1, 1], options={"space": space})
    assert [part.seed for part in merged.blocks] == ([0] if form == "b" else [None])


def test_a_dense_result_is_the_best_at_its_rank() -> None:
    tasks = [adapter(block(f"t{seed}", seed=seed, draw=seed)) for seed in range(2)]
    whole = merge(tasks, weights=[1, 1], options={"space": "dense", "rank": 3})
    merged = merge(tasks, weights=[1, 1], options={"space": "dense", "rank": 1})
    assert merged.blocks[0].rank == 1
    for module in SHAPES:
        exact = merge(tasks, weights=[1, 1], options={"space": "dense"})
        s = torch.linalg.svdvals(delta(exact, module))
        for rank, made in ((1, merged), (3, whole)):
            error = (delta(made, module) - delta(exact, module)).norm()
            assert torch.allclose(error, s[rank:].norm(), rtol=0, atol=1e-12)


def test_a_rank_that_a_narrow_module_has_not_is_refused() -> None:
    with pytest.raises(
        ConfigError,
        match=r"^merge\.method\.rank: got 4, and the weight of layers\.1\.up_proj is 3 x 8; give at most 3",
    ):
        merge([adapter(block("a")), adapter(block("b", seed=1))], weights=[1, 1], options={"rank": 4})


def test_ranks_of_modules_may_differ_in_one_block() -> None:
    tasks = [adapter(block(f"t{seed}", seed=seed, draw=seed)) for seed in range(2)]
    (part,) = merge(tasks, weights=[1, 1], options={"density": 1.0}).blocks
    assert (part.rank, part.rank_of("layers.0.q_proj"), part.rank_of("layers.1.up_proj")) == (4, 4, 3)


def test_all_entries_of_one_size_keep_exactly_the_share() -> None:
    entries = {"layers.0.q_proj": Entries(index=None, values=torch.ones(12, dtype=torch.float64))}
    merged = merge([adapter(block("a", entries=entries))], weights=[1.0], options={"density": 0.25})
    index = merged.blocks[0].entries["layers.0.q_proj"].index
    assert index is not None and index.tolist() == [0, 1, 2]
