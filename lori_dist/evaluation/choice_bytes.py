"""Share of rows whose label is likeliest for its length in bytes of UTF-8: `acc_bytes` of lm-eval."""

from lori_dist.evaluation import Subject
from lori_dist.evaluation._choices import accuracy


def score(subject: Subject) -> float | None:
    """Scores as `choice` does, with log-likelihoods divided by the label's bytes without leading blanks."""
    return accuracy(subject, length=lambda label: len(label.encode()))
