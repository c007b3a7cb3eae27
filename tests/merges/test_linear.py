"""Linear: exact, at the rank of the tasks where they share A."""

import dataclasses
import functools

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lori_dist import merges
from lori_dist.adapter.adapter import Entries
from lori_dist.errors import AdapterError
from tests.merges.made import SHAPES, WEIGHTS, adapter, adapters, block, delta

merge = functools.partial(merges.merge, method="linear")


@given(st.data(), st.integers(1, 4), st.sampled_from([True, False, None]))
def test_the_merge_is_the_weighted_sum_of_updates(data: st.DataObject, number: int, shared: bool | None) -> None:
    parts = data.draw(adapters(number, shared=shared))
    weights = data.draw(st.lists(WEIGHTS, min_size=number, max_size=number))
    merged = merge(parts, weights=weights)
    for module in SHAPES:
        wanted = sum(weight * delta(part, module) for weight, part in zip(weights, parts, strict=True))
        assert torch.allclose(delta(merged, module), wanted, rtol=0, atol=1e-12)
        if module in merged.shapes:
            assert torch.allclose(merged.delta(module).double(), wanted, rtol=0, atol=1e-4)
    blocks = [part.blocks[0] for part in parts]
    assert len(merged.blocks) == len({(part.seed, part.rank, part.dtype) for part in blocks})
    if shared:
        (only,) = merged.blocks
        assert only.rank == 2


@given(st.data())
def test_the_support_of_a_shared_a_is_the_union(data: st.DataObject) -> None:
    parts = data.draw(adapters(3, shared=True))
    (merged,) = merge(parts, weights=[1.0, -1.0, 0.5]).blocks
    for module, (out_features, _) in SHAPES.items():
        num_entries = out_features * 2
        union = torch.zeros(num_entries, dtype=torch.bool)
        for part in parts:
            if module in part.blocks[0].entries:
                index = part.blocks[0].entries[module].index
                union[slice(None) if index is None else index.long()] = True
        if not union.any():
            assert module not in merged.entries
            continue
        index = merged.entries[module].index
        assert (index is None) == bool(union.all())
        if index is not None:
            assert index.dtype == torch.int32
            assert index.tolist() == union.nonzero().flatten().tolist()


def test_opposite_tasks_cancel_and_stay_in_the_support() -> None:
    one, other = block("a", draw=1), block("b", draw=1)
    merged = merge([adapter(one), adapter(other)], weights=[0.5, -0.5])
    assert merged.kept == adapter(one).kept
    assert all(not entries.values.any() for entries in merged.blocks[0].entries.values())


def test_equal_scales_keep_alpha_and_unequal_ones_are_multiplied_in() -> None:
    one, other = adapter(block("a", alpha=4.0)), adapter(block("b", alpha=4.0, draw=1))
    (merged,) = merge([one, other], weights=[0.5, 0.5]).blocks
    assert (merged.name, merged.alpha, merged.weight) == ("a+b", 4.0, 1.0)
    (merged,) = merge([one, adapter(block("b", alpha=1.0))], weights=[0.5, 0.5]).blocks
    assert (merged.alpha, merged.rank, merged.weight) == (2.0, 2, 1.0)


@pytest.mark.parametrize("difference", [{"seed": 1}, {"rank": 3}, {"dtype": torch.bfloat16}])
def test_blocks_of_another_a_stay_side_by_side_to_the_bit(difference: dict[str, object]) -> None:
    one, other = block("a"), block("b", **difference)  # type: ignore[arg-type]
    merged = merge([adapter(one), adapter(other)], weights=[0.5, 2])
    assert [(part.name, part.weight) for part in merged.blocks] == [("a", 0.5), ("b", 2.0)]
    assert all(merged.blocks[1].entries[module] is other.entries[module] for module in SHAPES)


@pytest.mark.parametrize(
    ("given", "wanted"),
    [
        ((torch.float32, torch.float32), torch.float32),
        ((torch.bfloat16, torch.bfloat16), torch.float32),
        ((torch.float16, torch.float64), torch.float64),
    ],
)
def test_values_are_summed_in_float64_and_kept_in_no_less_than_fp32(
    given: tuple[torch.dtype, torch.dtype], wanted: torch.dtype
) -> None:
    blocks = [block(f"task{place}", draw=place, values_dtype=dtype) for place, dtype in enumerate(given)]
    merged = merge([adapter(part) for part in blocks], weights=[0.3, 0.7])
    assert all(entries.values.dtype == wanted for entries in merged.blocks[0].entries.values())
    for module in SHAPES:
        exact = 0.3 * delta(adapter(blocks[0]), module) + 0.7 * delta(adapter(blocks[1]), module)
        assert torch.allclose(delta(merged, module), exact, rtol=0, atol=1e-6)


def test_a_concat_of_tasks_on_one_a_comes_together() -> None:
    both = adapter(block("a"), block("b", draw=1, weight=0.5))
    merged = merge([both], weights=[1.0])
    assert len(merged.blocks) == 1
    assert all(torch.allclose(delta(merged, module), delta(both, module), rtol=0, atol=1e-12) for module in SHAPES)


def test_one_a_with_two_checksums_is_refused() -> None:
    one = block("a")
    other = dataclasses.replace(block("b"), checksums={**one.checksums, "layers.1.q_proj": "0" * 16})
    with pytest.raises(
        AdapterError, match=r"^layers\.1\.q_proj: A of b has checksum 0000000000000000, another of the same"
    ):
        merge([adapter(one), adapter(other)], weights=[1, 1])


def test_entries_given_out_of_one_index_land_where_they_belong() -> None:
    def entries(index: list[int] | None, values: list[float]) -> dict[str, Entries]:
        place = None if index is None else torch.tensor(index, dtype=torch.int32)
        return {"layers.0.q_proj": Entries(index=place, values=torch.tensor(values))}

    sparse = block("a", alpha=2.0, entries=entries([1, 4, 11], [1.0, 2.0, 3.0]))
    other = block("b", alpha=2.0, entries=entries([0, 4], [10.0, 20.0]))
    (merged,) = merge([adapter(sparse), adapter(other)], weights=[1, 1]).blocks
    kept = merged.entries["layers.0.q_proj"]
    assert kept.index is not None
    assert (kept.index.tolist(), kept.values.tolist()) == ([0, 1, 4, 11], [10.0, 1.0, 22.0, 3.0])
    dense = block("c", alpha=2.0, entries=entries(None, [100.0] * 12))
    (merged,) = merge([adapter(sparse), adapter(dense)], weights=[1, 1]).blocks
    kept = merged.entries["layers.0.q_proj"]
    assert kept.index is None
    rest = block("d", alpha=2.0, entries=entries([0, 2, 3, 5, 6, 7, 8, 9, 10], [1.0] * 9))
    (full,) = merge([adapter(sparse), adapter(rest)], weights=[1, 1]).blocks
    assert full.entries["layers.0.q_proj"].index is None
    assert kept.values.tolist() == [100.0, 101.0, 100.0, 100.0, 102.0, *[100.0] * 6, 103.0]
