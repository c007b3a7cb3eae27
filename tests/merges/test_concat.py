"""Concat: exact, with nothing but the weights changed."""

import functools

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lori_dist import merges
from tests.merges.made import SHAPES, WEIGHTS, adapter, adapters, block, delta

merge = functools.partial(merges.merge, method="concat")


@given(st.data(), st.integers(1, 4))
def test_the_merge_is_the_weighted_sum_of_updates(data: st.DataObject, number: int) -> None:
    parts = data.draw(adapters(number))
    weights = data.draw(st.lists(WEIGHTS, min_size=number, max_size=number))
    merged = merge(parts, weights=weights)
    for module in SHAPES:
        wanted = sum(weight * delta(part, module) for weight, part in zip(weights, parts, strict=True))
        assert torch.allclose(delta(merged, module), wanted, rtol=0, atol=1e-12)
        if module in merged.shapes:
            assert torch.allclose(merged.delta(module).double(), wanted, rtol=0, atol=1e-4)
    assert merged.kept == sum(part.kept for part in parts)


def test_blocks_keep_all_but_their_weight() -> None:
    one, other = block("nlu", rank=2, alpha=4.0, weight=0.5), block("code", seed=1, rank=3, alpha=1.0)
    merged = merge([adapter(one), adapter(other)], weights=[3, -0.25])
    assert [(part.name, part.seed, part.rank, part.alpha, part.weight) for part in merged.blocks] == [
        ("nlu", 0, 2, 4.0, 1.5),
        ("code", 1, 3, 1.0, -0.25),
    ]
    assert all(merged.blocks[0].entries[module] is one.entries[module] for module in SHAPES)


def test_blocks_of_one_name_are_told_apart() -> None:
    names = ["math", "math", "math-2", "math"]
    merged = merge([adapter(block(name, seed=seed)) for seed, name in enumerate(names)], weights=[1, 1, 1, 1])
    assert [part.name for part in merged.blocks] == ["math", "math-2", "math-2-2", "math-3"]


def test_a_merge_can_be_merged_again() -> None:
    one, two, three = (adapter(block(f"task{seed}", seed=seed, draw=seed)) for seed in range(3))
    nested = merge([merge([one, two], weights=[0.5, 0.5]), three], weights=[0.5, 2.0])
    flat = merge([one, two, three], weights=[0.25, 0.25, 2.0])
    assert all(torch.allclose(delta(nested, module), delta(flat, module), rtol=0, atol=1e-12) for module in SHAPES)
    assert [part.weight for part in nested.blocks] == [0.25, 0.25, 2.0]


def test_a_rank_that_no_weight_has_is_warned_of(caplog: pytest.LogCaptureFixture) -> None:
    few = [adapter(block(f"task{seed}", seed=seed, rank=1)) for seed in range(3)]
    merge(few, weights=[1, 1, 1])
    assert not caplog.records
    merge([*few, adapter(block("one more", seed=3, rank=1))], weights=[1, 1, 1, 1])
    (record,) = caplog.records
    assert record.getMessage().startswith("layers.1.up_proj has rank 4 after the merge, its weight only 3 (1 modules")


def test_targets_that_differ_become_the_modules_of_both() -> None:
    one = adapter(block("a", modules=["layers.0.q_proj"]), modules=["layers.0.q_proj"], targets=("q_proj",))
    other = adapter(block("b", modules=["layers.1.up_proj"]), modules=["layers.1.up_proj"], targets=("up_proj",))
    assert merge([one, other], weights=[1, 1]).targets == ("layers.0.q_proj", "layers.1.up_proj")
    assert merge([one, one], weights=[1, 1]).targets == ("q_proj",)
