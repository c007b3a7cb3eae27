import dataclasses
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from lori_dist.adapter.adapter import Spec
from lori_dist.adapter.attach import attach, trainable
from lori_dist.training import loss
from lori_dist.training.data import IGNORED, Batch, Example, collate, encode, packed
from lori_dist.training.loss import is_chunked, log_likelihoods, logits_bytes, loss_sum, num_targets, task_loss_sums
from tests.models import tiny_gpt2, tiny_llama
from tests.tokenizers import tiny_tokenizer

MODELS = {"llama": tiny_llama(), "gpt2": tiny_gpt2()}
ROWS = [("ab", "x"), ("a longer prompt: ", "and an answer"), ("", "yes"), ("q?", "zz")]
models = pytest.mark.parametrize("model", MODELS.values(), ids=MODELS.keys())


SPANS = tuple((row // 2, max(one.num_tokens for one in encode(ROWS, tiny_tokenizer(), 32))) for row in range(4))
"""Two rows of each of two tasks."""


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


# --- logits of the targets alone, in chunks --------------------------------------------------------------------------

SIZES: dict[str, Any] = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 44,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
    "initializer_range": 0.2,
}
HEADS: dict[str, tuple[dict[str, Any], bool]] = {
    "llama": ({}, True),
    "gemma": ({"head_dim": 8, "tie_word_embeddings": True}, True),
    "phi": ({}, True),  # with a bias
    "gpt2": ({"n_embd": 32, "n_layer": 2, "n_head": 2, "n_positions": 64}, True),
    "mamba": ({"state_size": 8, "time_step_rank": 4}, True),
    "gemma2": ({"head_dim": 8, "final_logit_softcapping": 2.0}, False),
    "cohere": ({"logit_scale": 0.3}, False),
    "granite": ({"logits_scaling": 7.0}, False),
}
"""Model type -> settings, and whether its logits are the product of its head."""
TRAINED = {"adapted": Spec(rank=2, alpha=4.0, seed=0, targets=("q_proj", "lm_head"))} | {
    "saved": Spec(rank=2, alpha=4.0, seed=0, targets=("q_proj",), modules_to_save=("lm_head",))
}
"""Heads that training changes."""


def frozen(kind: str) -> PreTrainedModel:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        settings = AutoConfig.for_model(
            "llama" if kind in TRAINED else kind, **{**SIZES, **HEADS.get(kind, ({}, 0))[0]}
        )
        model: PreTrainedModel = AutoModelForCausalLM.from_config(settings).eval().requires_grad_(False)
        attach(model, TRAINED.get(kind, Spec(rank=2, alpha=4.0, seed=0)))
        for values in trainable(model).values():
            torch.nn.init.normal_(values, std=0.1)
    return model


def of_all_logits(model: PreTrainedModel, batch: Batch) -> Tensor:
    """The oracle: a loss of every token of the batch, of which the others are left out at the end."""
    mask = {"attention_mask": batch.attention_mask} if batch.position_ids is None else {}
    positions = {} if batch.position_ids is None else {"position_ids": batch.position_ids}
    logits = model(input_ids=batch.input_ids, use_cache=False, **mask, **positions).logits[:, :-1]
    return functional.cross_entropy(
        logits.flatten(0, 1), batch.labels[:, 1:].flatten(), ignore_index=IGNORED, reduction="none"
    ).view(logits.shape[:2])


@pytest.mark.parametrize("kind", [*HEADS, *TRAINED])
def test_logits_of_targets_alone_give_the_losses_and_gradients_of_all(
    kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(loss, "CHUNK", 64 * 5)  # of five targets, so that the last chunk is smaller
    found, wanted = frozen(kind), frozen(kind)
    assert is_chunked(found) == HEADS.get(kind, ({}, False))[1]
    batch = dataclasses.replace(collate(examples(), 0), tasks=SPANS, weights=torch.tensor([0.7, 2.0]))
    seen: list[int] = []
    head = found.get_output_embeddings()
    head.register_forward_hook(lambda module, inputs, output: seen.append(output.shape[0]))
    sums, losses = task_loss_sums(found, batch), of_all_logits(wanted, batch)
    assert seen == [num_targets(batch)]
    expected = torch.stack([0.7 * losses[:2].sum(), 2.0 * losses[2:].sum()])
    torch.testing.assert_close(sums, expected, rtol=1e-6, atol=1e-6)
    (3 * sums.sum()).backward()
    (3 * expected.sum()).backward()
    for (name, parameter), other in zip(found.named_parameters(), wanted.parameters(), strict=True):
        if other.requires_grad:
            scale = other.grad.abs().max()
            assert (parameter.grad - other.grad).abs().max() <= 1e-6 * scale + 1e-9, name
    with torch.inference_mode():
        assert log_likelihoods(found, batch).tolist() == pytest.approx((-losses.sum(1)).tolist(), rel=1e-6)
        assert "forward" not in vars(head)


def test_packed_rows_in_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loss, "CHUNK", 64)
    batch = packed(examples(), 0, 24)
    model = frozen("llama")
    assert loss_sum(model, batch).item() == pytest.approx(of_all_logits(model, batch).sum().item(), rel=1e-6)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_chunks_of_a_narrow_base_have_a_float32_loss_and_the_gradient_of_all_logits(dtype: torch.dtype) -> None:
    found, wanted = frozen("llama").to(dtype), frozen("llama").to(dtype)
    batch = collate(examples(), 0)
    total = loss_sum(found, batch)
    logits = wanted(input_ids=batch.input_ids, attention_mask=batch.attention_mask).logits[:, :-1].float()
    expected = functional.cross_entropy(
        logits.transpose(1, 2), batch.labels[:, 1:], ignore_index=IGNORED, reduction="sum"
    )
    assert total.dtype == torch.float32
    assert total.item() == pytest.approx(expected.item(), rel=1e-6)
    total.backward()
    expected.backward()
    for parameter, other in zip(trainable(found).values(), trainable(wanted).values(), strict=True):
        assert (parameter.grad - other.grad).norm() <= 0.02 * other.grad.norm()


def test_a_head_that_fails_is_a_head_again() -> None:
    model = frozen("llama")
    batch = collate(examples(), 0)
    broken = dataclasses.replace(batch, labels=torch.where(batch.labels == IGNORED, IGNORED, 1000))
    with pytest.raises((IndexError, RuntimeError)):
        loss_sum(model, broken)
    assert model(input_ids=batch.input_ids).logits.shape[-1] == 64


def test_the_bytes_of_chunks_do_not_grow_with_the_vocabulary() -> None:
    gib = logits_bytes(4096, 128_256, 4096 * 4096 * 2, chunked=True) / 2**30
    assert gib <= 0.2
    assert logits_bytes(4096, 128_256, 4096 * 4096 * 2, chunked=False) / 2**30 == pytest.approx(5.87, abs=0.01)
