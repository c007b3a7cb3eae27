"""Share of rows whose label the model finds likelier than the other labels: `acc` of lm-eval."""

from lori_dist.evaluation import Subject
from lori_dist.evaluation._choices import accuracy


def score(subject: Subject) -> float | None:
    """Accuracy of the label whose text has the highest log-likelihood after the prompt, without the end token.

    Of equally likely labels, the first counts. None for a task without labels.
    Raises ConfigError for a row whose response is not a label.
    """
    return accuracy(subject)
