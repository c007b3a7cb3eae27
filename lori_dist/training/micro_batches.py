"""Rows of a step, divided among ranks and micro-batches: by their tokens, or by their number alone."""

import heapq
import itertools
import math
from collections.abc import Iterator, Sequence
from typing import TypeVar

Row = TypeVar("Row")
Piece = list[int]
"""Places of rows in a global batch, ascending: a micro-batch."""

Best = tuple[int, list[int]]
"""A sum, negative if there is none, and ends of pieces."""

MOST_TRIED = 50_000
"""Divisions of a step's rows that are compared: some milliseconds."""


def micro_batches(rows: Sequence[Row], world_rank: int, world_size: int, micro_batch_size: int) -> list[list[Row]]:
    """A rank's share of a global batch, in pieces of at most micro_batch_size rows.

    Every rank gets the same number of pieces, as each is a round of collectives; some may be empty.
    """
    share, size = list(rows[world_rank::world_size]), micro_batch_size
    return [
        share[number * size : (number + 1) * size] for number in range(num_micro_batches(len(rows), world_size, size))
    ]


def num_micro_batches(num_rows: int, world_size: int, micro_batch_size: int) -> int:
    """The number of pieces that each rank computes of a global batch: those of the rank with the largest share."""
    return math.ceil(math.ceil(num_rows / world_size) / micro_batch_size)


def divided(
    lengths: Sequence[int],
    world_size: int,
    most_rows: int,
    *,
    most_tokens: int | None = None,
    pack: int | None = None,
) -> list[list[Piece]]:
    """Each rank's micro-batches of a global batch. All ranks get as many, of which some may be empty.

    What a micro-batch computes is its rows times its longest row, padding included; the micro-batches that ranks
    compute at the same time are alike in this, and few: as many as if each had `most_rows` rows. None computes more
    than `most_rows` rows of the longest length would.
    lengths: tokens of each row. most_tokens: of a micro-batch, in place of `most_rows`; at least those of any row.
    pack: rows share sequences of at most so many tokens, so that the sum of their tokens counts.
    """
    if pack is not None:
        rounds = _packed(lengths, world_size, most_rows, most_tokens, pack)
    else:
        rounds = _padded(lengths, world_size, most_rows, most_tokens)
    ranks: list[list[Piece]] = [[] for _ in range(world_size)]
    loads = [0] * world_size

    def cost(piece: Piece) -> int:
        return _area(piece, lengths) if pack is None else sum(lengths[row] for row in piece)

    for of_round in rounds:
        pieces = sorted((sorted(piece) for piece in of_round), key=lambda piece: (-cost(piece), piece))
        # The largest goes to the rank that has had least.
        for rank, piece in zip(sorted(range(world_size), key=lambda one: (loads[one], one)), pieces, strict=True):
            ranks[rank].append(piece)
            loads[rank] += cost(piece)
    return ranks


def _area(piece: Piece, lengths: Sequence[int]) -> int:
    return len(piece) * max((lengths[row] for row in piece), default=0)


# --- padded rows -----------------------------------------------------------------------------------------------------


def _padded(lengths: Sequence[int], world_size: int, most_rows: int, most_tokens: int | None) -> list[list[Piece]]:
    order = sorted(range(len(lengths)), key=lambda row: (-lengths[row], row))
    longest_first = [max(1, lengths[row]) for row in order]
    longest = longest_first[0] if order else 1
    if most_tokens is None:
        count, limit = max(1, num_micro_batches(len(order), world_size, most_rows)), most_rows * longest
    else:
        limit = most_tokens
        count = max(1, math.ceil(sum(1 for _ in _filled(longest_first, 0, limit)) / world_size))
    ends = _best(longest_first, world_size, count, limit) or _even(longest_first, world_size, count, limit)
    pieces = [[order[place] for place in range(*piece)] for piece in zip([0, *ends], ends, strict=False)]
    pieces += [[] for _ in range(count * world_size - len(pieces))]
    pieces.sort(key=lambda piece: -_area(piece, lengths))
    return [pieces[first : first + world_size] for first in range(0, len(pieces), world_size)]


def _filled(lengths: Sequence[int], start: int, limit: int) -> Iterator[int]:
    """Yields the ends of pieces of rows, longest first, each as large as the limit lets it be."""
    while start < len(lengths):
        start = min(len(lengths), start + max(1, limit // lengths[start]))
        yield start


def _even(lengths: Sequence[int], world_size: int, count: int, limit: int) -> list[int]:
    """The ends of pieces, the largest of which is as small as it can be."""
    low, high = lengths[0] if lengths else 1, limit
    while low < high:
        middle = (low + high) // 2
        if sum(1 for _ in _filled(lengths, 0, middle)) <= count * world_size:
            high = middle
        else:
            low = middle + 1
    return list(_filled(lengths, 0, low))


def _best(lengths: Sequence[int], world_size: int, count: int, limit: int) -> list[int] | None:
    """The ends of pieces for which the sum over rounds of the largest is smallest; None if it takes long to say."""
    number = len(lengths)
    per_piece = 2 * math.ceil(number / (count * world_size)) + 1
    if number * count * per_piece * world_size > MOST_TRIED:
        return None
    # By the rows that are left: the least sum, and the ends of the pieces of the round that begins there.
    best: list[Best] = [(0, []) if start == number else (-1, []) for start in range(number + 1)]
    for _ in range(count):
        now: list[Best] = [*itertools.repeat((-1, []), number), (0, [])]
        for start in range(number):
            sizes = {size * lengths[start] for size in range(1, per_piece + 1)}
            found: Best | None = None
            for size in sorted(sizes):
                if size > limit and size > lengths[start]:
                    break
                ends: list[int] = []
                for end in _filled(lengths, start, size):
                    ends.append(end)
                    if len(ends) == world_size:
                        break
                rest, later = best[ends[-1]]
                if rest >= 0 and (found is None or size + rest < found[0]):
                    found = size + rest, ends + later
            if found is not None:
                now[start] = found
        best = now
    return best[0][1] if best[0][0] >= 0 else None


# --- packed rows -----------------------------------------------------------------------------------------------------


def _packed(
    lengths: Sequence[int], world_size: int, most_rows: int, most_tokens: int | None, pack: int
) -> list[list[Piece]]:
    order = sorted(range(len(lengths)), key=lambda row: (-lengths[row], row))
    if most_tokens is None:
        count, most = max(1, num_micro_batches(len(order), world_size, most_rows)), len(order)
    else:
        count, most = max(1, math.ceil(sum(lengths) / (world_size * most_tokens))), max(1, most_tokens // pack)
    while True:
        pieces: list[Piece] = [[] for _ in range(count * world_size)]
        heap = [(0, place) for place in range(len(pieces))]
        for row in order:
            load, place = heapq.heappop(heap)
            pieces[place].append(row)
            heapq.heappush(heap, (load + lengths[row], place))
        if all(_num_sequences([lengths[row] for row in piece], pack) <= most for piece in pieces):
            break
        count += 1
    pieces.sort(key=lambda piece: -sum(lengths[row] for row in piece))
    return [pieces[first : first + world_size] for first in range(0, len(pieces), world_size)]


def _num_sequences(lengths: Sequence[int], pack: int) -> int:
    """Sequences of rows that are packed longest first, each into the first with room for it."""
    room: list[int] = []
    for length in lengths:
        place = next((place for place, left in enumerate(room) if left >= length), None)
        if place is None:
            room.append(pack - length)
        else:
            room[place] -= length
    return len(room)
