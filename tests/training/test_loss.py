import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import PreTrainedModel

from lori_dist.training.data import Batch, Example, collate, encode
from lori_dist.training.loss import log_likelihoods, loss_sum, num_targets
from tests.models import tiny_gpt2, tiny_llama
from tests.tokenizers import tiny_tokenizer

MODELS = {"llama": tiny_llama(), "gpt2": tiny_gpt2()}
ROWS = [("ab", "x"), ("a longer prompt: ", "and an answer"), ("", "yes"), ("q?", "zz")]
models = pytest.mark.parametrize("model", MODELS.values(), ids=MODELS.keys())


def examples() -> list[Example]:
    return encode(ROWS, tiny_tokenizer(), 32)


@torch.no_grad()
def one_token_at_a_time(model: PreTrainedModel, example: Example) -> float:
    """The oracle: no padding, no batch, no shift."""
    total = 0.0
    before = list(example.prompt_ids)
    for token in example.response_ids:
        logits = model(input_ids=torch.tensor([before])).logits[0, -1]
        total -= logits.double().log_softmax(-1)[token].item()
        before.append(token)
    return total


@models
def test_the_loss_is_that_of_one_token_after_the_other(model: PreTrainedModel) -> None:
    expected = [one_token_at_a_time(model, example) for example in examples()]
    batch = collate(examples(), 0)
    assert loss_sum(model, batch).item() == pytest.approx(sum(expected), rel=1e-6)
    assert log_likelihoods(model, batch).tolist() == pytest.approx([-value for value in expected], rel=1e-6)
    assert num_targets(batch) == sum(len(example.response_ids) for example in examples())


@models
def test_padding_changes_nothing(model: PreTrainedModel) -> None:
    alone = sum(loss_sum(model, collate([example], 0)).item() for example in examples())
    assert loss_sum(model, collate(examples(), 0)).item() == pytest.approx(alone, rel=1e-6)
    assert loss_sum(model, collate(examples(), 2)).item() == pytest.approx(alone, rel=1e-6)


def test_the_gradient_is_that_of_the_rows_alone() -> None:
    together, alone = tiny_llama(), tiny_llama()
    loss_sum(together, collate(examples(), 0)).backward()
    for example in examples():
        loss_sum(alone, collate([example], 0)).backward()
    for (name, found), expected in zip(together.named_parameters(), alone.parameters(), strict=True):
        torch.testing.assert_close(found.grad, expected.grad, rtol=1e-4, atol=1e-5, msg=name)


@models
def test_a_batch_without_targets_gives_zero_gradients_and_not_none(model: PreTrainedModel) -> None:
    """A rank without rows has to run the same collectives in backward as the others."""
    model.zero_grad()
    batch = collate([], 0)
    loss = loss_sum(model, batch)
    assert num_targets(batch) == 0
    assert loss.item() == 0
    loss.backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        assert not parameter.grad.any(), name
    model.zero_grad()


def test_the_first_token_of_a_row_is_no_target() -> None:
    """A prompt without tokens is refused elsewhere; here the count and the sum must at least agree."""
    batch = Batch(
        input_ids=torch.tensor([[5, 6, 7]]), attention_mask=torch.ones(1, 3).long(), labels=torch.tensor([[5, 6, 7]])
    )
    model = MODELS["llama"]
    logits = model(input_ids=batch.input_ids).logits[0].log_softmax(-1)
    assert num_targets(batch) == 2
    assert loss_sum(model, batch).item() == pytest.approx(-(logits[0, 6] + logits[1, 7]).item(), rel=1e-6)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_narrow_base_gives_a_float32_loss(dtype: torch.dtype) -> None:
    exact = loss_sum(MODELS["llama"], collate(examples(), 0))
    found = loss_sum(tiny_llama().to(dtype), collate(examples(), 0))
    assert exact.dtype == found.dtype == torch.float32
    assert found.shape == ()
    assert found.item() == pytest.approx(exact.item(), rel=1e-2)


class Huge(torch.nn.Module):
    """A model whose logits overflow narrow dtypes in a sum of exponentials."""

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        self.scale = torch.nn.Parameter(torch.tensor(200.0, dtype=dtype))

    def forward(self, input_ids: torch.Tensor, **_: object) -> object:
        logits = torch.arange(8, dtype=self.scale.dtype) * self.scale  # 0, 200, ... 1400
        output = type("Output", (), {})()
        output.logits = logits.expand(*input_ids.shape, 8)
        return output


def test_the_softmax_is_in_float32() -> None:
    batch = collate([Example(prompt="", response="", prompt_ids=(1,), response_ids=(6, 7, 7))], 0)
    assert loss_sum(Huge(torch.float16), batch).item() == 200.0


@given(st.lists(st.tuples(st.text("abc", max_size=8), st.text("xyz", min_size=1, max_size=8)), min_size=1, max_size=5))
def test_rows_add_up(rows: list[tuple[str, str]]) -> None:
    model = MODELS["llama"]
    batch = collate(encode(rows, tiny_tokenizer(), 12), 0)
    with torch.no_grad():
        assert loss_sum(model, batch).item() == pytest.approx(-log_likelihoods(model, batch).sum().item(), rel=1e-5)
