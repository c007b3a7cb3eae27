import copy
from collections.abc import Callable

import pytest
import torch
from transformers import GenerationConfig, PreTrainedModel

from lori_dist.errors import ConfigError
from lori_dist.evaluation import Subject
from lori_dist.evaluation.exact_match import complete, score
from tests.evaluation.conftest import ROWS
from tests.models import tiny_gpt2, tiny_llama
from tests.tokenizers import tiny_tokenizer

Make = Callable[..., Subject]


def chatty(make: Callable[[], PreTrainedModel]) -> PreTrainedModel:
    """A model that writes about anything and stops after a while: random, with a liking for eos."""
    model = make()
    with torch.no_grad():
        output = model.get_output_embeddings()
        output.weight = torch.nn.Parameter(output.weight * 10)
        output.weight[2] *= 2
    return model


MODELS = {"llama": chatty(tiny_llama), "gpt2": chatty(tiny_gpt2)}
models = pytest.mark.parametrize("model", MODELS.values(), ids=MODELS.keys())


@torch.no_grad()
def one_row_at_a_time(subject: Subject, eos: tuple[int, ...] = (2,)) -> list[str]:
    """The oracle: no batch, no padding, no cache, no `generate`."""
    completions = []
    for example in subject.examples:
        tokens = list(example.prompt_ids)
        for _ in range(subject.max_new_tokens):
            token = int(subject.model(input_ids=torch.tensor([tokens])).logits[0, -1].argmax())
            if token in eos:
                break
            tokens.append(token)
        completions.append(subject.tokenizer.decode(tokens[len(example.prompt_ids) :]))
    return completions


@models
@pytest.mark.parametrize("batch_size", [1, 3, 32])
def test_completions_are_those_of_one_row_at_a_time(model: PreTrainedModel, subject: Make, batch_size: int) -> None:
    asked = subject(model, batch_size=batch_size)
    expected = one_row_at_a_time(asked)
    assert complete(asked) == expected
    lengths = {len(tiny_tokenizer()(text)["input_ids"]) for text in expected}
    assert len(lengths) > 2  # some stop early, some do not: or this would test little


def test_what_is_known_by_heart_matches(learned: PreTrainedModel, subject: Make) -> None:
    assert score(subject(learned, ROWS[:6])) == 1.0
    assert score(subject(learned, [*ROWS[:3], ("1+2=", "4")])) == 0.75
    assert score(subject(learned, [(prompt, "other") for prompt, _ in ROWS])) == 0.0


def test_white_space_around_is_free_and_inside_is_not(learned: PreTrainedModel, subject: Make) -> None:
    assert score(subject(learned, [("1+2=", " 3\n"), ("who? ", "nobody\nat all ")])) == 1.0
    assert score(subject(learned, [("who? ", "nobody at all"), ("say it twice: ab ", "ab  ab")])) == 0.0


def test_a_response_that_only_begins_right_does_not_match(learned: PreTrainedModel, subject: Make) -> None:
    assert score(subject(learned, [("say it twice: ab ", "ab"), ("1+2=", "33")])) == 0.0
    assert score(subject(learned, [("say it twice: ab ", "ab ab")], max_new_tokens=3)) == 0.0


def test_an_unknown_token_is_not_nothing(learned: PreTrainedModel, subject: Make) -> None:
    asked = subject(learned, [("tilde: ", "bc"), ("tilde: ", "b~c")])
    assert complete(asked) == ["b<unk>c"] * 2
    assert score(asked) == 0.0


def test_the_prompt_is_no_part_of_the_completion(learned: PreTrainedModel, subject: Make) -> None:
    assert score(subject(learned, [("1+2=", "1+2=3")])) == 0.0
    assert complete(subject(learned, [("1+2=", "3")])) == ["3"]


@models
@pytest.mark.parametrize(
    "settings",
    [
        {"do_sample": True, "temperature": 3.0, "top_k": 7},
        {"repetition_penalty": 5.0},
        {"no_repeat_ngram_size": 1},
        {"min_new_tokens": 12},
        {"min_length": 40},
        {"num_beams": 3},
        {"suppress_tokens": list(range(3, 40))},
        {"max_length": 20},
        {"forced_eos_token_id": 2, "max_new_tokens": 2},
        {"use_cache": False},
    ],
    ids=lambda settings: ",".join(settings),
)
def test_the_bases_own_generation_settings_do_not_count(
    model: PreTrainedModel, subject: Make, settings: dict[str, object]
) -> None:
    expected = one_row_at_a_time(subject(model))
    model = copy.deepcopy(model)
    own = model.generation_config = GenerationConfig(eos_token_id=2, pad_token_id=0, bos_token_id=1, **settings)
    assert complete(subject(model)) == expected
    assert model.generation_config is own


@pytest.mark.parametrize("own", [[2, 40], 40])
def test_the_bases_own_ends_are_ends_too(subject: Make, own: int | list[int]) -> None:
    """Chat models end a turn with another token than the tokenizer's eos."""
    model = copy.deepcopy(MODELS["llama"])
    token = tiny_tokenizer().convert_tokens_to_ids(complete(subject(model))[0][1])
    own = token if own == 40 else [2, token]
    model.generation_config.eos_token_id = own
    assert complete(subject(model)) == one_row_at_a_time(subject(model), eos=(2, token))
    assert complete(subject(model)) != one_row_at_a_time(subject(model))


def test_a_narrow_base_writes_too(learned: PreTrainedModel, subject: Make) -> None:
    narrow = copy.deepcopy(learned).to(torch.bfloat16)
    for batch_size in (1, 32):
        assert score(subject(narrow, ROWS[:6], batch_size=batch_size)) == 1.0


def test_long_prompts_leave_room_for_the_response(subject: Make, caplog: pytest.LogCaptureFixture) -> None:
    """GPT-2 has a table of 64 positions, and an index outside of it would be an error deep inside."""
    rows = [("abcdefghij" * 6, "x"), ("short", "x")]
    asked = subject(MODELS["gpt2"], rows, max_new_tokens=20)
    assert len(asked.examples[0].prompt_ids) == 61
    shorter = subject(MODELS["gpt2"], [(rows[0][0][-43:], "x"), rows[1]], max_new_tokens=20)
    assert len(shorter.examples[0].prompt_ids) == 44
    expected = complete(shorter)
    assert not caplog.records
    assert complete(asked) == expected
    assert "tasks.t.test: 1 of 2 prompts lost their beginning" in caplog.text


@pytest.mark.parametrize("max_new_tokens", [64, 100])
def test_more_new_tokens_than_positions_are_refused(subject: Make, max_new_tokens: int) -> None:
    with pytest.raises(ConfigError, match=rf"^evaluate.max_new_tokens: got {max_new_tokens}, the model has 64 pos"):
        complete(subject(MODELS["gpt2"], max_new_tokens=max_new_tokens))


def test_nothing_is_printed(subject: Make, capfd: pytest.CaptureFixture[str]) -> None:
    complete(subject(MODELS["llama"]))
    assert capfd.readouterr() == ("", "")
