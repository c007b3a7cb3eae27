"""Share of rows whose label, with the token that ends it, the model finds likelier than the other labels."""

from lori_dist.evaluation import Subject
from lori_dist.evaluation._choices import accuracy


def score(subject: Subject) -> float | None:
    """As `choice`, with the end token's log-probability: of labels that begin alike, a short one needs its end."""
    return accuracy(subject, with_end=True)
