"""Adapters taken apart by module, and put together again."""

import dataclasses

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lori_dist.adapter.update import blocks, split
from lori_dist.errors import AdapterError
from lori_dist.merges import merge
from tests.merges.made import SHAPES, adapter, adapters, block, delta


@given(st.data(), st.booleans())
def test_an_update_has_the_delta_of_the_adapter_in_every_module(data: st.DataObject, is_stored: bool) -> None:
    parts = data.draw(adapters(2))
    whole = merge(parts, method="svd" if is_stored else "concat", weights=[0.5, -1.0])
    for module, shape in SHAPES.items():
        assert torch.allclose(split(whole, module, shape).delta(), delta(whole, module), rtol=0, atol=1e-12)


@given(st.data(), st.booleans())
def test_what_was_taken_apart_comes_together(data: st.DataObject, is_stored: bool) -> None:
    whole = merge(data.draw(adapters(2)), method="svd" if is_stored else "concat", weights=[0.5, -1.0])
    parts = {module: split(whole, module, shape).parts for module, shape in whole.shapes.items()}
    again = dataclasses.replace(whole, blocks=blocks(parts, whole.shapes))
    assert [one.name for one in again.blocks] == [one.name for one in whole.blocks]
    for one, other in zip(again.blocks, whole.blocks, strict=True):
        assert (one.seed, one.rank, one.checksums) == (other.seed, other.rank, other.checksums)
        assert one.scale == pytest.approx(other.scale, rel=1e-15)
        assert all(one.entries[module] is other.entries[module] for module in other.entries)
        assert all(one.projections[module] is other.projections[module] for module in other.projections)
        assert one.entries.keys() == other.entries.keys()


def test_stored_blocks_keep_a_scale_of_their_own() -> None:
    """alpha / rank of the block counts, not the rank that A has in a module."""
    whole = merge([adapter(block("a")), adapter(block("b", seed=1))], method="svd", weights=[1.0, 1.0])
    (part,) = whole.blocks
    odd = dataclasses.replace(whole, blocks=(dataclasses.replace(part, alpha=part.alpha * 3, weight=0.5),))
    for module, shape in SHAPES.items():
        assert torch.allclose(split(odd, module, shape).delta(), 1.5 * delta(whole, module), rtol=0, atol=1e-12)


def test_an_a_that_comes_out_different_is_refused() -> None:
    part = block("a")
    wrong = adapter(dataclasses.replace(part, checksums={**part.checksums, "layers.0.q_proj": "0" * 16}))
    with pytest.raises(
        AdapterError, match=r"^layers\.0\.q_proj: A made from seed 0 has checksum \w{16}, a was trained with 0{16}"
    ):
        merge([wrong], method="svd", weights=[1.0])
