"""Share of rows whose label is likeliest for its length in bytes of UTF-8: `acc_bytes` of lm-eval."""

from collections.abc import Sequence

from lori_dist.evaluation import Subject, _choices, scored
from lori_dist.evaluation._rows import Answer, Likelihood, Row


def ask(subject: Subject) -> list[Likelihood] | None:
    return _choices.requests(subject)


def judge(subject: Subject, answers: Sequence[Answer]) -> list[Row]:
    return _choices.rows(subject, answers, lambda label: len(label.encode()))


def score(subject: Subject) -> float | None:
    """Scores as `choice` does, with log-likelihoods divided by the label's bytes without leading blanks."""
    return scored(subject, ask, judge)
