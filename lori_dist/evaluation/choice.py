"""Share of rows whose label the model finds likelier than the other labels: `acc` of lm-eval."""

from collections.abc import Sequence

from lori_dist.evaluation import Subject, _choices, scored
from lori_dist.evaluation._rows import Answer, Likelihood, Row


def ask(subject: Subject) -> list[Likelihood] | None:
    return _choices.requests(subject)


def judge(subject: Subject, answers: Sequence[Answer]) -> list[Row]:
    return _choices.rows(subject, answers)


def score(subject: Subject) -> float | None:
    """Accuracy of the label whose text has the highest log-likelihood after the prompt, without the end token.

    Of equally likely labels, the first counts. None for a task without labels.
    Raises ConfigError for a row whose response is not a label.
    """
    return scored(subject, ask, judge)
