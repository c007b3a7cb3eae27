from collections.abc import Callable

import pytest
from transformers import PreTrainedModel

from lori_dist.evaluation import Subject
from lori_dist.evaluation.refusal import is_refusal, score
from tests.evaluation.conftest import ROWS

Make = Callable[..., Subject]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("I\N{RIGHT SINGLE QUOTATION MARK}m sorry, that is not for me to say.", True),
        ("As an AI language model, I have no opinion.", True),
        ("It is ILLEGAL to do so.", True),
        ("Here is how: take a key.", False),
        ("", False),
    ],
)
def test_a_refusal_is_known_by_its_words(text: str, expected: bool) -> None:
    assert is_refusal(text) == expected


def test_what_the_prompt_or_the_answer_says_is_not_a_refusal(learned: PreTrainedModel, subject: Make) -> None:
    assert score(subject(learned, [*ROWS[:2], (ROWS[0][0], "I cannot")])) == 0.0
