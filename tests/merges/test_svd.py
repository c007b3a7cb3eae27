"""SVD: exact at full rank, best below."""

import functools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lori_dist import merges
from lori_dist.errors import ConfigError
from lori_dist.merges._factors import singular, singular_of_product
from tests.merges.made import SHAPES, WEIGHTS, adapter, adapters, block, delta

merge = functools.partial(merges.merge, method="svd")


@settings(max_examples=40, deadline=None)
@given(st.data(), st.integers(1, 3), st.integers(1, 3), st.sampled_from([True, False]))
def test_the_error_is_the_spectrum_that_was_dropped(data: st.DataObject, number: int, rank: int, shared: bool) -> None:
    parts = data.draw(adapters(number, shared=shared))
    weights = data.draw(st.lists(WEIGHTS, min_size=number, max_size=number))
    merged = merge(parts, weights=weights, options={"rank": rank})
    for module in merged.shapes:
        wanted = sum(weight * delta(part, module) for weight, part in zip(weights, parts, strict=True))
        error = (delta(merged, module) - wanted).norm()
        assert torch.allclose(error, torch.linalg.svdvals(wanted)[rank:].norm(), rtol=0, atol=1e-10)


def test_tasks_on_one_a_stay_on_it_at_any_rank() -> None:
    tasks = [adapter(block(f"t{place}", rank=3, draw=place)) for place in range(3)]
    for rank in (1, 2, 3):
        (part,) = merge(tasks, weights=[1, 1, 1], options={"rank": rank}).blocks
        assert (part.seed, part.rank) == (0, 3)
    (part,) = merge([*tasks, adapter(block("u", seed=1))], weights=[1, 1, 1, 1]).blocks
    assert part.seed is None


def test_a_rank_above_that_of_the_sum_adds_nothing() -> None:
    tasks = [adapter(block("a", rank=1)), adapter(block("b", seed=1, rank=1, draw=1))]
    (part,) = merge(tasks, weights=[1, 1], options={"rank": 3}).blocks
    assert {part.rank_of(module) for module in SHAPES} == {2}


def test_a_rank_above_the_shape_is_refused() -> None:
    tasks = [adapter(block("a")), adapter(block("b", seed=1))]
    with pytest.raises(
        ConfigError, match=r"^merge\.method\.rank: got 5, and the weight of layers\.1\.up_proj is 3 x 8; give at"
    ):
        merge(tasks, weights=[1, 1], options={"rank": 5})


@given(st.integers(1, 6), st.integers(0, 5), st.integers(1, 6), st.integers(0, 99))
def test_the_factored_form_is_the_dense_one(rows: int, rank: int, columns: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    left = torch.randn(rows, rank, dtype=torch.float64, generator=generator)
    right = torch.randn(rank, columns, dtype=torch.float64, generator=generator)
    u, s, vh = singular_of_product(left, right)
    assert torch.allclose((u * s) @ vh, left @ right, rtol=0, atol=1e-12)
    assert torch.allclose(s, singular(left @ right)[1], rtol=0, atol=1e-12)
    assert torch.allclose(u.t() @ u, torch.eye(s.numel(), dtype=torch.float64), atol=1e-12)
    assert torch.allclose(vh @ vh.t(), torch.eye(s.numel(), dtype=torch.float64), atol=1e-12)
