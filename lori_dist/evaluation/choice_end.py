"""Share of rows whose label, with the token that ends it, the model finds likelier than the other labels."""

from lori_dist.evaluation import Subject
from lori_dist.evaluation._choices import accuracy


def score(subject: Subject) -> float | None:
    """Scores as `choice` does, with the end token's log-probability added: a short label needs its end where a longer
    one begins alike."""
    return accuracy(subject, with_end=True)
