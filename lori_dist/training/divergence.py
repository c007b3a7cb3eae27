"""Steps that go wrong: a loss or a gradient that is no number, or a loss far above the last ones."""

import math
import statistics
from collections import deque
from collections.abc import Mapping, Sequence
from typing import Any

from lori_dist.training.engine import StepResult
from lori_dist.training.metrics import Record

WINDOW, LEAST = 32, 8
"""Losses that a spike is told by: the last of them, and how many there must be."""
MOST = 10
"""Steps in a row that may go wrong; more are no accident."""
UPDATE = "update"
"""Key in the record of a step that went wrong: what was done instead of its update."""


class Divergence:
    """Looks at each step before its update, on every rank, with the same answer."""

    def __init__(self, spike: float | None, records: Sequence[Record]) -> None:
        """spike: a loss that is so many times the median of the last is one; None: none is. records: of the steps
        before, which a training that goes on has."""
        self.spike = spike
        self.problem: str | None = None
        """Description of what is wrong with the last step; None if nothing is."""
        self.losses = deque((line["loss"] for line in records if UPDATE not in line), maxlen=WINDOW)
        wrong = [UPDATE in line for line in reversed(records)]
        self.in_a_row = wrong.index(False) if False in wrong else len(wrong)

    @classmethod
    def noted(cls, spike: float | None, notes: Mapping[str, Any]) -> "Divergence":
        """Restores the state from its `notes`."""
        made = cls(spike, [])
        made.losses.extend(notes["losses"])
        made.in_a_row = notes["in_a_row"]
        return made

    def notes(self) -> dict[str, Any]:
        """The state that a resumed training needs, as plain JSON."""
        return {"losses": list(self.losses) if self.spike is not None else [], "in_a_row": self.in_a_row}

    def accepts(self, result: StepResult) -> bool:
        """Whether its update is to be done."""
        self.problem = self._problem(result)
        if self.problem is None:
            self.losses.append(result.loss)
            self.in_a_row = 0
        else:
            self.in_a_row += 1
        return self.problem is None

    def _problem(self, result: StepResult) -> str | None:
        problem = not_finite(result.loss, result.grad_norm)
        if problem is not None or self.spike is None or len(self.losses) < LEAST:
            return problem
        median = statistics.median(self.losses)
        if result.loss <= self.spike * median:
            return None
        return f"the loss is {result.loss:.4g}, and the median of the last {len(self.losses)} {median:.4g}"


def not_finite(loss: float, norm: float) -> str | None:
    """Description of a loss or gradient norm that is not finite; None if both are."""
    if math.isfinite(loss) and math.isfinite(norm):
        return None
    return f"the loss is {loss} and the gradient's norm {norm}"
