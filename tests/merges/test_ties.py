"""TIES: the vote's laws."""

import functools

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lori_dist import merges
from lori_dist.adapter.adapter import Adapter, Entries
from lori_dist.errors import AdapterError
from lori_dist.merges._entries import vote
from tests.merges.made import SHAPES, adapter, block, delta

MODULE = "layers.0.q_proj"  # 6 x 5
ALL = {"density": 1.0}
merge = functools.partial(merges.merge, method="ties", options=ALL)


def task(name: str, values: dict[int, float]) -> Adapter:
    """On one A for all, with scale 1."""
    index = torch.tensor(sorted(values), dtype=torch.int32)
    kept = torch.tensor([values[place] for place in sorted(values)], dtype=torch.float64)
    part = block(name, rank=2, alpha=2.0, modules=[MODULE], entries={MODULE: Entries(index=index, values=kept)})
    return adapter(part, modules=[MODULE])


def entries(merged: Adapter) -> dict[int, float]:
    kept = merged.blocks[0].entries[MODULE]
    places = range(12) if kept.index is None else kept.index.tolist()
    return dict(zip(places, kept.values.tolist(), strict=True))


def test_equal_tasks_come_back() -> None:
    one = adapter(block("a"))
    merged = merge([one, one, one], weights=[1, 1, 1])
    assert all(torch.allclose(delta(merged, module), delta(one, module), rtol=0, atol=1e-12) for module in SHAPES)


def test_opposite_tasks_give_the_positive_one() -> None:
    merged = merge([task("a", {0: 2.0, 3: -1.0}), task("b", {0: -2.0, 3: 1.0})], weights=[1, 1])
    assert entries(merged) == {0: 2.0, 3: 1.0}


def test_disjoint_supports_give_the_sum_of_weighted_values() -> None:
    merged = merge([task("a", {0: 2.0, 5: -1.0}), task("b", {7: 3.0})], weights=[0.5, 2.0])
    assert entries(merged) == {0: 1.0, 5: -0.5, 7: 6.0}


def test_those_that_agree_are_averaged_and_zeros_do_not_count() -> None:
    tasks = [task("a", {0: 4.0, 1: 1.0}), task("b", {0: 2.0, 1: -3.0}), task("c", {0: -1.0})]
    assert entries(merge(tasks, weights=[1, 1, 1])) == {0: 3.0, 1: -3.0}


def test_the_election_is_on_weighted_entries() -> None:
    tasks = [task("a", {0: 1.0}), task("b", {0: -2.0})]
    assert entries(merge(tasks, weights=[1, 1])) == {0: -2.0}
    assert entries(merge(tasks, weights=[3, 1])) == {0: 3.0}
    assert entries(merge(tasks, weights=[1, -1])) == {0: 1.5}


def test_frequency_elects_the_sign_of_most() -> None:
    tasks = [task("a", {0: 1.0}), task("b", {0: 1.0}), task("c", {0: -9.0})]
    assert entries(merge(tasks, weights=[1, 1, 1])) == {0: -9.0}
    assert entries(merge(tasks, weights=[1, 1, 1], options={**ALL, "elect": "frequency"})) == {0: 1.0}


def test_equal_weights_that_sum_to_one_give_a_part_of_the_mean_unless_divided_by() -> None:
    tasks = [task("a", {0: 1.0}), task("b", {0: 3.0})]
    assert entries(merge(tasks, weights=[0.5, 0.5])) == {0: 1.0}
    assert entries(merge(tasks, weights=[0.5, 0.5], options={**ALL, "divide": "weight"})) == {0: 2.0}
    assert entries(merge(tasks)) == {0: 2.0}
    assert entries(merge(tasks, options={**ALL, "scale": 2.0})) == {0: 4.0}


@given(st.lists(st.lists(st.sampled_from([0.0, 1.0, -1.0, 0.5]), min_size=4, max_size=4), min_size=1, max_size=5))
def test_a_vote_lies_among_the_values_of_its_sign(rows: list[list[float]]) -> None:
    merged = vote([torch.tensor([row], dtype=torch.float64) for row in rows]).flatten().tolist()
    for value, column in zip(merged, zip(*rows, strict=True), strict=True):
        agreeing = [x for x in column if x * value > 0]
        if any(column):
            assert min(agreeing) <= value <= max(agreeing)
            assert value == pytest.approx(sum(agreeing) / len(agreeing))
        else:
            assert value == 0


def test_density_keeps_that_share_of_each_task() -> None:
    tasks = [task("a", {0: 4.0, 1: 1.0, 2: 0.5, 3: 0.1}), task("b", {8: 2.0, 9: -7.0})]
    assert entries(merge(tasks, weights=[1, 1], options={"density": 0.5})) == {0: 4.0, 1: 1.0, 9: -7.0}


def test_b_needs_a_shared_a() -> None:
    tasks = [adapter(block("a")), adapter(block("b", seed=1))]
    with pytest.raises(AdapterError, match=r"^layers\.0\.q_proj: the tasks do not share A, so their B cannot vote"):
        merge(tasks, weights=[1, 1], options={"space": "b"})


def test_the_spaces_give_different_answers_where_signs_differ() -> None:
    tasks = [adapter(block(f"t{place}", draw=place)) for place in range(2)]
    b, dense = (merge(tasks, weights=[1, 1], options={**ALL, "space": space}) for space in ("b", "dense"))
    assert not torch.allclose(delta(b, MODULE), delta(dense, MODULE), atol=1e-3)
