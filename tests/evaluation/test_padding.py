"""Rows of different lengths share a batch only where the model does not see the padding."""

from collections.abc import Callable

import pytest
import torch
from transformers import AutoModelForCausalLM, MiniMaxConfig, PreTrainedModel, RwkvConfig

from lori_dist.evaluation import Subject, choice, loss
from lori_dist.evaluation._batches import by_length, hides_padding
from lori_dist.evaluation.exact_match import complete
from tests.models import tiny_gpt2, tiny_llama

Make = Callable[..., Subject]
ROWS = [("a", "b"), ("a longer prompt that is padded by nobody", "cd"), ("what is it", "d e f"), ("so it is", "x")]
COMMON = {"vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 2, "bos_token_id": 1, "eos_token_id": 2}


def random(config: RwkvConfig | MiniMaxConfig) -> PreTrainedModel:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model: PreTrainedModel = AutoModelForCausalLM.from_config(config).eval()
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.dim() > 1:
                    parameter.mul_(3)
    return model


def rwkv() -> PreTrainedModel:
    return random(RwkvConfig(**COMMON, intermediate_size=48, attention_hidden_size=32, context_length=128))


def linear_attention() -> PreTrainedModel:
    kinds = ["linear_attention", "full_attention"]
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8, "intermediate_size": 48}
    experts = {"num_local_experts": 2, "num_experts_per_tok": 1}
    return random(MiniMaxConfig(**COMMON, **heads, **experts, block_size=16, layer_types=kinds))


@pytest.mark.parametrize("make", [rwkv, linear_attention])
def test_batches_of_a_model_that_sees_padding_are_single_rows(
    make: Callable[[], PreTrainedModel], subject: Make
) -> None:
    model = make()
    alone, together = (
        subject(model, ROWS, labels=tuple(response for _, response in ROWS), batch_size=size) for size in (1, 4)
    )
    prompts = [example.prompt_ids for example in together.examples]
    assert not hides_padding(model, prompts, 0, "left")
    assert hides_padding(model, prompts, 0, "right")
    assert complete(together) == complete(alone)
    assert loss.score(together) == pytest.approx(loss.score(alone), rel=1e-5)
    assert choice.score(together) == choice.score(alone)


@pytest.mark.parametrize("make", [tiny_llama, tiny_gpt2])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_attention_hides_padding(make: Callable[[], PreTrainedModel], dtype: torch.dtype, subject: Make) -> None:
    model = make().to(dtype)
    prompts = [example.prompt_ids for example in subject(model, ROWS).examples]
    assert hides_padding(model, prompts, 0, "left")
    assert hides_padding(model, prompts, 0, "right")


def test_rows_of_one_length_share_a_batch() -> None:
    lengths = [3, 5, 3, 2, 3, 5]
    assert list(by_length(lengths, 2)) == [[1, 5], [0, 2], [4, 3]]
    assert list(by_length(lengths, 2, is_padded=False)) == [[1, 5], [0, 2], [4], [3]]
