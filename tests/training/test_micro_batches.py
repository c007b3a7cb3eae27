import math
import random
from collections.abc import Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lori_dist.training.micro_batches import divided, micro_batches, num_micro_batches

lengths_of_rows = st.lists(st.integers(2, 512), min_size=1, max_size=40)


def area(lengths: Sequence[int], piece: Sequence[int]) -> int:
    return len(piece) * max((lengths[row] for row in piece), default=0)


@given(lengths_of_rows, st.integers(1, 5), st.integers(1, 9), st.sampled_from([None, 512]))
def test_every_row_is_one_ranks_and_no_micro_batch_is_larger_than_rows_of_the_longest(
    lengths: list[int], world_size: int, most_rows: int, pack: int | None
) -> None:
    found = divided(lengths, world_size, most_rows, pack=pack)
    assert sorted(row for pieces in found for piece in pieces for row in piece) == [*range(len(lengths))]
    assert all(piece == sorted(piece) for pieces in found for piece in pieces)
    assert {len(pieces) for pieces in found} == {num_micro_batches(len(lengths), world_size, most_rows)}
    if pack is None:
        assert all(area(lengths, piece) <= most_rows * max(lengths) for pieces in found for piece in pieces)
    assert found == divided(lengths, world_size, most_rows, pack=pack)


@given(lengths_of_rows, st.integers(1, 5), st.integers(512, 4096), st.sampled_from([None, 512]))
def test_a_micro_batch_has_at_most_so_many_tokens(
    lengths: list[int], world_size: int, most_tokens: int, pack: int | None
) -> None:
    found = divided(lengths, world_size, 1, most_tokens=most_tokens, pack=pack)
    assert sorted(row for pieces in found for piece in pieces for row in piece) == [*range(len(lengths))]
    assert len({len(pieces) for pieces in found}) == 1
    for piece in (piece for pieces in found for piece in pieces if len(piece) > 1):
        if pack is None:
            assert area(lengths, piece) <= most_tokens
        else:
            assert sum(lengths[row] for row in piece) <= max(1, most_tokens // pack) * pack


def test_equal_rows_are_divided_by_their_number() -> None:
    found = divided([7] * 24, 2, 4)
    assert [[len(piece) for piece in pieces] for pieces in found] == [[4, 4, 4]] * 2


@pytest.mark.parametrize(("num_rows", "world_size"), [(32, 2), (64, 2), (256, 8)])
def test_ranks_wait_for_each_other_for_less_than_a_twentieth(num_rows: int, world_size: int) -> None:
    """Of what a rank computes, padding included, with lengths as those of questions and of code."""
    draws = random.Random(0)
    rows = [math.ceil(min(512.0, draws.lognormvariate(*kind))) for kind in ((5.0, 0.4), (4.6, 0.7)) for _ in range(900)]
    most = mean = before = 0.0
    for _ in range(40):
        lengths = draws.sample(rows, num_rows)
        found = divided(lengths, world_size, 8)
        loads = [sum(area(lengths, piece) for piece in pieces) for pieces in found]
        most, mean = most + max(loads), mean + sum(loads) / world_size
        by_number = [micro_batches(range(num_rows), rank, world_size, 8) for rank in range(world_size)]
        before += max(sum(area(lengths, piece) for piece in pieces) for pieces in by_number)
    assert 1 - mean / most <= 0.05
    assert most < 0.8 * before
