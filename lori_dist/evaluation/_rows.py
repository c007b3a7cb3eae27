"""The requests of a metric to a model, and its values for the rows."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from lori_dist.training.tokens import Ids

SAMPLES = 1000
"""Number of samples of a bootstrap."""
LEVEL = 0.95
"""Confidence of the intervals."""
SEED = 0
"""Seed of the bootstrap: the same rows always give the same interval."""
AT_ONCE = 2**22
"""Draws that are in memory at a time."""


@dataclass(frozen=True, slots=True)
class Likelihood:
    """Asks for log p(response | prompt), in nats: a float."""

    prompt_ids: Ids
    response_ids: Ids

    @property
    def num_tokens(self) -> int:
        return len(self.prompt_ids) + len(self.response_ids)


@dataclass(frozen=True, slots=True)
class Continuation:
    """Asks for the tokens that a model writes after a prompt, without the one that ends them."""

    prompt_ids: Ids
    max_new_tokens: int

    @property
    def num_tokens(self) -> int:
        return len(self.prompt_ids)


Request = Likelihood | Continuation
Answer = float | Ids


@dataclass(frozen=True, kw_only=True, slots=True)
class Row:
    """A metric's value for a model on one row."""

    prompt: str
    response: str | None
    """The model's; None where it is not asked for one."""
    answer: str
    """The right one."""
    score: float
    weight: float = 1.0
    """Weight in the mean over the rows, which is the metric's value."""


Ask = Callable[..., Sequence[Request] | None]
"""Takes a Subject; gives what to ask of its model, None where the metric does not apply to the task."""
Judge = Callable[..., list[Row]]
"""Takes a Subject and the answers, in the order of the requests."""


def mean(rows: Sequence[Row]) -> float:
    """The value of a metric."""
    return sum(row.score * row.weight for row in rows) / sum(row.weight for row in rows)


def interval(rows: Sequence[Row]) -> tuple[float, float]:
    """Interval of the value with a confidence of LEVEL, by a bootstrap over the rows (percentiles of SAMPLES means)."""
    weights = np.array([row.weight for row in rows])
    scores = np.array([row.score for row in rows]) * weights
    random = np.random.default_rng(SEED)
    means: list[float] = []
    while len(means) < SAMPLES:
        count = min(SAMPLES - len(means), max(1, AT_ONCE // len(rows)))
        drawn = random.integers(len(rows), size=(count, len(rows)))
        means += (scores[drawn].sum(1) / weights[drawn].sum(1)).tolist()
    low, high = np.quantile(means, [(1 - LEVEL) / 2, (1 + LEVEL) / 2]).tolist()
    return low, high
