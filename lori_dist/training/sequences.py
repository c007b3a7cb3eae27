"""Sequences that rows of several tasks share, so that no row is padded to the length of another one."""

import enum
import math
from collections.abc import Sequence

from lori_dist import config

FULL = 0.95
"""Share of a batch that rows which share sequences fill at least, padding being the rest."""
MOST = 2048
"""Tokens that a sequence may have whatever the length of rows: an attention mask for so many is small."""


class Share(enum.Enum):
    """Whether rows of several tasks share sequences."""

    NO = "no"
    YES = "yes"
    ONE = "one"
    """All of a batch share one: attention kernels that take rows of any length take one sequence of them."""

    @classmethod
    def of(cls, run: config.Run, model_type: str) -> "Share":
        """What a model's attention can do, and NO where ranks divide rows: then each is a sequence."""
        if run.train.sequence_parallel > 1 or next(config.unpackable(model_type), None) is not None:
            return cls.NO
        return cls.ONE if run.model.attention in config.FLASH else cls.YES


def divide(lengths: Sequence[Sequence[int]], share: Share, max_length: int) -> tuple[list[list[tuple[int, int]]], int]:
    """The rows of each sequence of a batch, as (task, number in the task), and the tokens of a sequence, padding
    included.

    A task's rows follow each other, in one sequence or in several. There are as many sequences as leave at least FULL
    of the batch for rows, because attention costs the square of their length; else as many as leave most.
    lengths: task -> tokens of its rows, at least one, each at most max_length.
    """
    rows = [(task, number) for task, of_task in enumerate(lengths) for number in range(len(of_task))]
    total, longest = sum(map(sum, lengths)), max(map(max, lengths))
    if share is Share.ONE:
        return [rows], max(2, total)
    best, width = [[row] for row in rows], longest
    for number in range(max(1, total // longest), 0, -1):
        limit = min(max(max_length, MOST), max(longest, math.floor(total / number / FULL)))
        found, widest = _filled(lengths, limit)
        if len(found) * widest < len(best) * width:
            best, width = found, widest
        if total >= FULL * len(best) * width:
            break
    return best, max(2, width)


def _filled(lengths: Sequence[Sequence[int]], limit: int) -> tuple[list[list[tuple[int, int]]], int]:
    """Sequences of at most `limit` tokens, each filled with the longest rows of a task that fit, and the most tokens of
    any."""
    found, widths = [list[tuple[int, int]]()], [0]
    for task, of_task in enumerate(lengths):
        remaining = sorted(range(len(of_task)), key=lambda number: -of_task[number])
        while remaining:
            fits = next((number for number in remaining if widths[-1] + of_task[number] <= limit), None)
            if fits is None:
                found.append([])
                widths.append(0)
                continue
            remaining.remove(fits)
            found[-1].append((task, fits))
            widths[-1] += of_task[fits]
    return found, max(widths)
