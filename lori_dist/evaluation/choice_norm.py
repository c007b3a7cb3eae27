"""Share of rows whose label is likeliest for its length in characters: `acc_norm` of lm-eval."""

from lori_dist.evaluation import Subject
from lori_dist.evaluation._choices import accuracy


def score(subject: Subject) -> float | None:
    """Scores as `choice` does, with log-likelihoods divided by the label's characters without leading blanks."""
    return accuracy(subject, length=len)
