"""Rows in batches that need little padding."""

from collections.abc import Iterator, Sequence


def by_length(lengths: Sequence[int], batch_size: int) -> Iterator[list[int]]:
    """Row numbers in batches of at most batch_size, longest rows first: what does not fit in memory fails at once."""
    order = sorted(range(len(lengths)), key=lambda row: -lengths[row])
    for first in range(0, len(order), batch_size):
        yield order[first : first + batch_size]
