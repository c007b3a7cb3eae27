from collections.abc import Callable
from typing import Any

import pytest
import torch
from transformers import PreTrainedModel

from lori_dist.errors import ConfigError
from lori_dist.evaluation import Subject, choice_bytes, choice_end, choice_norm
from lori_dist.evaluation.choice import score
from tests.evaluation.conftest import LABELS
from tests.models import tiny_gpt2, tiny_llama

Make = Callable[..., Subject]
PROMPTS = ["", "a", "is it so?", "a longer prompt that needs padding of others", "x y z", "12", "3", "no"]
MODELS = {"llama": tiny_llama(), "gpt2": tiny_gpt2()}
models = pytest.mark.parametrize("model", MODELS.values(), ids=MODELS.keys())


@torch.no_grad()
def likeliest(
    subject: Subject,
    prompt_ids: tuple[int, ...],
    labels: tuple[str, ...],
    end: tuple[int, ...] = (),
    length: Callable[[str], float] = lambda label: 1.0,
) -> str:
    """The oracle: one label of one row at a time, token by token."""

    def likelihood(label: str) -> float:
        tokens, total = list(prompt_ids), 0.0
        for token in [*subject.tokenizer(label, add_special_tokens=False)["input_ids"], *end]:
            logits = subject.model(input_ids=torch.tensor([tokens])).logits[0, -1]
            total += logits.log_softmax(-1)[token].item()
            tokens.append(token)
        return total / length(label)

    return max(labels, key=likelihood)


@models
@pytest.mark.parametrize("batch_size", [1, 3, 32])
@pytest.mark.parametrize("labels", [("yes", "nay", "may"), ("b", "c"), ("a", "ab", "a bit longer")])
def test_the_choice_is_that_of_one_label_at_a_time(
    model: PreTrainedModel, subject: Make, labels: tuple[str, ...], batch_size: int
) -> None:
    for label in labels:
        asked = subject(model, [(prompt, label) for prompt in PROMPTS], labels=labels, batch_size=batch_size)
        hits = sum(likeliest(asked, example.prompt_ids, labels) == label for example in asked.examples)
        assert score(asked) == hits / len(PROMPTS)


@models
def test_the_forms_of_choice_differ_in_the_end_and_the_length(model: PreTrainedModel, subject: Make) -> None:
    labels = ("a", "ab", "a bit longer", "~~")
    forms: dict[Callable[[Subject], float | None], dict[str, Any]] = {
        score: {},
        choice_end.score: {"end": (2,)},
        choice_norm.score: {"length": len},
        choice_bytes.score: {"length": lambda label: len(label.encode())},
    }
    for form, options in forms.items():
        for label in labels:
            asked = subject(model, [(prompt, label) for prompt in PROMPTS], labels=labels, batch_size=5)
            hits = sum(likeliest(asked, example.prompt_ids, labels, **options) == label for example in asked.examples)
            assert form(asked) == hits / len(PROMPTS)


def test_what_is_known_by_heart_is_chosen(learned: PreTrainedModel, subject: Make) -> None:
    known = [("is a rose red?", "yes"), ("is a crow white?", "no")]
    assert score(subject(learned, known, labels=LABELS)) == 1.0
    assert (
        score(subject(learned, [*known, ("is a rose red?", "no"), ("is a crow white?", "maybe so")], labels=LABELS))
        == 0.5
    )


def test_of_equal_labels_the_first_counts(subject: Make) -> None:
    model = tiny_llama()
    torch.nn.init.zeros_(model.get_output_embeddings().weight)  # every token is as likely as any other
    rows = [("q", "ab"), ("q", "cd"), ("q", "ef")]
    assert score(subject(model, rows[:1], labels=("ab", "cd", "ef"))) == 1.0
    assert score(subject(model, rows[1:], labels=("ab", "cd", "ef"))) == 0.0
    assert score(subject(model, [("q", "abc")], labels=("abc", "de"))) == 0.0  # the shorter is likelier: a sum, no mean


def test_it_does_not_apply_without_labels(subject: Make) -> None:
    assert score(subject(MODELS["llama"])) is None


def test_a_response_that_is_no_label_is_named(subject: Make) -> None:
    rows = [("a", "yes"), ("b", "Yes")]
    with pytest.raises(
        ConfigError, match=r"^tasks.t.labels: the response of test row 2 is 'Yes'; wanted one of 'yes', 'no'$"
    ):
        score(subject(MODELS["llama"], rows, labels=("yes", "no")))


def test_all_labels_follow_the_same_prompt_and_fit(subject: Make) -> None:
    """GPT-2 has 64 positions: with the longest label the row is longer than with its own response."""
    labels = ("x", "a label of thirty characters..")
    long, short = "abcdefgh" * 9, ("abcdefgh" * 9)[-(64 - 31 - 1) :]
    model = MODELS["gpt2"]
    for label in labels:
        cut, fitting = (subject(model, [(prompt, label)], labels=labels) for prompt in (long, short))
        assert len(cut.examples[0].prompt_ids) >= len(fitting.examples[0].prompt_ids)
        assert score(cut) == score(fitting)


def test_a_label_longer_than_the_model_is_refused(subject: Make) -> None:
    asked = subject(MODELS["gpt2"], [("a question", "x")], labels=("x", "y" * 70), max_length=80)
    with pytest.raises(ConfigError, match=r"^train.max_length: a row has 79 tokens, the model has 64 positions"):
        score(asked)


def test_labels_longer_than_a_row_are_cut_as_in_training(subject: Make) -> None:
    labels = ("abcdefghij", "klmnopqrst")
    asked = [subject(MODELS["llama"], [("q", label)], labels=labels, max_length=6) for label in labels]
    assert sorted(score(item) for item in asked) == [0.0, 1.0]
