"""The likelihood of every label of every row, which the forms of `choice` compare."""

from collections.abc import Callable, Sequence

from lori_dist.errors import ConfigError
from lori_dist.evaluation import Subject
from lori_dist.evaluation._rows import Answer, Likelihood, Row
from lori_dist.training.data import Example
from lori_dist.training.model import check
from lori_dist.training.tokens import eos_id, pairs, shorten


def requests(subject: Subject, *, with_end: bool = False) -> list[Likelihood] | None:
    """The likelihood of every label, row by row. with_end: whether the token that ends a response counts too.

    None for a task without labels. Raises ConfigError for a row whose response is not a label, and for a label that
    gives no tokens.
    """
    if subject.labels is None:
        return None
    for number in range(len(subject.examples)):
        _answer(subject, number)
    candidates = _candidates(subject, with_end=with_end)
    check(candidates, subject.model)  # a label can be longer than any row's own response
    return [Likelihood(candidate.prompt_ids, candidate.response_ids) for candidate in candidates]


def rows(subject: Subject, answers: Sequence[Answer], length: Callable[[str], float] = lambda label: 1.0) -> list[Row]:
    """The score of each row: whether its own label has the highest log-likelihood after the prompt, over the label's
    length.

    length: of a label's text, without the blanks it begins with. Of equally likely labels, the first counts.
    """
    assert subject.labels is not None
    labels, found = subject.labels, []
    for number, example in enumerate(subject.examples):
        of_row = [float(answer) for answer in answers[number * len(labels) :][: len(labels)]]  # type: ignore[arg-type]
        scores = [score / length(label.lstrip()) for score, label in zip(of_row, labels, strict=True)]
        chosen = scores.index(max(scores))
        is_right = chosen == _answer(subject, number)
        found.append(
            Row(prompt=example.prompt, response=labels[chosen], answer=example.response, score=float(is_right))
        )
    return found


def _answer(subject: Subject, number: int) -> int:
    assert subject.labels is not None
    response = subject.examples[number].response
    if response not in subject.labels:
        raise ConfigError(
            f"tasks.{subject.task}.labels: the response of test row {number + 1} is {response!r}; "
            f"wanted one of {', '.join(repr(label) for label in subject.labels)}"
        )
    return subject.labels.index(response)


def _candidates(subject: Subject, *, with_end: bool) -> list[Example]:
    """Every row with every label. All labels of a row follow the same prompt, short enough for the longest label and
    the end, whether it counts or not."""
    assert subject.labels is not None
    eos, longest = eos_id(subject.tokenizer), subject.max_length
    texts = [(example.prompt, label) for example in subject.examples for label in subject.labels]
    tokens = pairs(texts, subject.tokenizer)
    candidates = []
    for first in range(0, len(texts), len(subject.labels)):
        of_row = [
            (before, (*after, eos)[: longest - 1]) for before, after in tokens[first : first + len(subject.labels)]
        ]
        too_many = max(0, *(len(before) + len(after) - longest for before, after in of_row))
        for (prompt, label), (_, whole), (before, after) in zip(texts[first:], tokens[first:], of_row, strict=False):
            if not whole:
                raise ConfigError(f"tasks.{subject.task}.labels: {label!r} gives no tokens; give labels with text")
            candidates.append(
                Example(
                    prompt=prompt,
                    response=label,
                    prompt_ids=shorten(before, max(1, len(before) - too_many), subject.tokenizer),
                    response_ids=after if with_end else after[: len(whole)],
                )
            )
    return candidates
