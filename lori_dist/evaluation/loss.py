"""Mean negative log-likelihood of the responses."""

from collections.abc import Sequence

from lori_dist.evaluation import Subject, scored
from lori_dist.evaluation._rows import Answer, Likelihood, Row
from lori_dist.training.data import Example


def ask(subject: Subject) -> list[Likelihood]:
    return [Likelihood(example.prompt_ids, example.response_ids) for example in subject.examples]


def judge(subject: Subject, answers: Sequence[Answer]) -> list[Row]:
    """A row's score is the mean over its target tokens, which are its weight."""
    pairs = zip(subject.examples, answers, strict=True)
    return [_row(example, answer) for example, answer in pairs if isinstance(answer, float)]


def _row(example: Example, likelihood: float) -> Row:
    # Nothing predicts the first token of a row.
    count = len(example.response_ids) - (not example.prompt_ids)
    return Row(
        prompt=example.prompt, response=None, answer=example.response, score=-likelihood / max(1, count), weight=count
    )


def score(subject: Subject) -> float | None:
    """Mean over the target tokens of all rows (eos among them), in nats: what training minimises."""
    return scored(subject, ask, judge)
