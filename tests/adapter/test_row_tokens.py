"""The rows that the tokens of a batch are of."""

from typing import Any

import pytest
import torch
from torch import Tensor
from transformers.cache_utils import DynamicCache

from lori_dist import attach, detach
from lori_dist.adapter.row_tokens import Rows, rows_of
from lori_dist.errors import AdapterError
from tests.forms.made import CASES, fill, logits
from tests.models import tiny_llama

N = -100


def begun(shape: tuple[int, int], **named: Any) -> Rows:
    rows = Rows(choose=True)
    rows.begin(shape, torch.device("cpu"), {name: torch.tensor(value) for name, value in named.items()})
    return rows


def where(mask: Tensor) -> list[int]:
    found: list[int] = mask.nonzero().flatten().tolist()
    return found


def test_each_sequence_is_a_row_whose_prompt_ends_at_its_first_target() -> None:
    tokens = begun(
        (3, 4),
        attention_mask=[[1, 1, 1, 0], [1, 1, 1, 1], [0, 0, 1, 1]],
        labels=[[N, N, 7, N], [N, 5, N, 6], [N, N, N, N]],
    ).tokens
    assert tokens is not None
    assert tokens.row.tolist() == [0] * 4 + [1] * 4 + [2] * 4
    assert where(tokens.in_prompt) == [0, 1, 4, 10, 11]  # without targets, all of a row is its prompt
    assert where(tokens.counts) == [0, 1, 2, 4, 5, 6, 7]
    assert tokens.rows_that_count().tolist() == [True, True, False]


def test_rows_that_share_a_sequence_begin_at_position_0() -> None:
    tokens = begun((1, 7), position_ids=[[0, 1, 2, 0, 1, 0, 1]], labels=[[N, N, 7, 5, 6, N, N]]).tokens
    assert tokens is not None
    assert tokens.row.tolist() == [0, 0, 0, 1, 1, 2, 2]
    assert where(tokens.in_prompt) == [0, 1, 3, 4, 5, 6]  # the second row has no prompt
    assert where(tokens.counts) == [0, 1, 2, 3, 4]


def test_positions_of_padded_rows_begin_none() -> None:
    tokens = begun((1, 4), position_ids=[[0, 0, 0, 1]], attention_mask=[[0, 0, 1, 1]]).tokens
    assert tokens is not None
    assert tokens.num_rows == 1


def test_means_are_of_prompts() -> None:
    tokens = begun((2, 3), attention_mask=[[1, 1, 1], [0, 0, 0]], labels=[[N, N, 4], [N, N, N]]).tokens
    assert tokens is not None
    x = torch.arange(12.0).view(6, 2)
    assert tokens.means(x).tolist() == [[1.0, 2.0], [0.0, 0.0]]  # of a row of padding, nothing


def test_rows_are_continued_by_those_whose_prompts_were_read() -> None:
    model, ids = fill(CASES["mixlora"].model()), torch.tensor([[5, 6, 7, 8], [9, 8, 4, 3]])
    with torch.no_grad():
        whole = model(ids, labels=torch.tensor([[N, N, N, 8], [N, N, N, 3]])).logits
        cache = model(ids[:, :3], past_key_values=DynamicCache(), use_cache=True).past_key_values
        step = model(ids[:, 3:], past_key_values=cache, use_cache=True).logits
        torch.testing.assert_close(step[:, 0], whole[:, 3], rtol=1e-5, atol=1e-5)
        model(ids[:1, :3])
        with pytest.raises(AdapterError, match="got 2 rows to continue, whose prompts were not the last"):
            model(ids[:, 3:], past_key_values=cache, use_cache=True)


def test_a_layer_that_does_not_see_all_tokens_is_named() -> None:
    model = fill(CASES["mixlora"].model())
    layer = model.model.layers[1].mlp.up_proj
    with pytest.raises(
        AdapterError, match=r"model\.layers\.1\.mlp\.up_proj: has an input of shape \(1, 3, 36\) for an"
    ):
        layer(torch.zeros(1, 3, 36))


def test_a_model_is_watched_while_it_has_the_adapter() -> None:
    model = tiny_llama()
    assert rows_of(model) is None
    attach(model, CASES["mixlora"].spec())
    assert rows_of(model) is not None
    detach(model)
    assert rows_of(model) is None
    assert torch.equal(logits(model), logits(tiny_llama()))
    attach(model, CASES["hydra"].spec())
    assert rows_of(model) is None
