"""Share of rows whose label, with the token that ends it, the model finds likelier than the other labels."""

from collections.abc import Sequence

from lori_dist.evaluation import Subject, _choices, scored
from lori_dist.evaluation._rows import Answer, Likelihood, Row


def ask(subject: Subject) -> list[Likelihood] | None:
    return _choices.requests(subject, with_end=True)


def judge(subject: Subject, answers: Sequence[Answer]) -> list[Row]:
    return _choices.rows(subject, answers)


def score(subject: Subject) -> float | None:
    """Scores as `choice` does, with the end token's log-probability added: a short label needs its end where a longer
    one begins alike."""
    return scored(subject, ask, judge)
