import threading

import pytest

from lori_dist.training.ahead import Ahead


def test_what_comes_next_is_made_meanwhile_by_another_thread() -> None:
    made, may_end = list[tuple[int, bool]](), threading.Event()

    def make(key: int) -> int:
        made.append((key, threading.current_thread() is threading.main_thread()))
        may_end.wait(10)
        return 2 * key

    ahead = Ahead(make)
    ahead.begin(1)
    may_end.set()
    assert ahead.take(1) == 2
    assert ahead.take(5) == 10  # nothing was begun
    ahead.begin(6)
    assert ahead.take(7) == 14  # another one was
    ahead.begin(8)
    assert ahead.take(8) == 16
    ahead.close()
    assert [one for one in made if one[0] != 6] == [(1, False), (5, True), (7, True), (8, False)]


def test_what_goes_wrong_is_raised_when_it_is_asked_for() -> None:
    def make(key: int) -> int:
        raise ValueError(f"no {key}")

    ahead = Ahead(make)
    ahead.begin(1)
    with pytest.raises(ValueError, match="no 1"):
        ahead.take(1)
    ahead.begin(2)
    ahead.close()  # what is not asked for is nobody's error
