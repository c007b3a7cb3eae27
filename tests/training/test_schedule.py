import itertools
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lori_dist.training.schedule import DECAYS, learning_rate

schedules = pytest.mark.parametrize("schedule", ["constant", "linear", "cosine"])


def rates(schedule: str, *, num_steps: int, warmup_steps: int = 0, lr: float = 1.0) -> list[float]:
    return [
        learning_rate(step, num_steps=num_steps, lr=lr, schedule=schedule, warmup_steps=warmup_steps)
        for step in range(num_steps)
    ]


def test_schedules_without_warm_up() -> None:
    assert rates("constant", num_steps=4) == [1, 1, 1, 1]
    assert rates("linear", num_steps=4) == [1, 0.75, 0.5, 0.25]
    assert rates("cosine", num_steps=4) == pytest.approx([1, 0.5 + math.sqrt(0.125), 0.5, 0.5 - math.sqrt(0.125)])


def test_warm_up_rises_to_the_rate_and_the_rest_falls_over_what_remains() -> None:
    assert rates("constant", num_steps=6, warmup_steps=3) == [0.25, 0.5, 0.75, 1, 1, 1]
    assert rates("linear", num_steps=5, warmup_steps=1) == [0.5, 1, 0.75, 0.5, 0.25]


@schedules
@given(num_steps=st.integers(1, 60), warmup_steps=st.integers(0, 80), lr=st.floats(1e-8, 10), data=st.data())
def test_laws_of_all_schedules(
    schedule: str, num_steps: int, warmup_steps: int, lr: float, data: st.DataObject
) -> None:
    found = rates(schedule, num_steps=num_steps, warmup_steps=warmup_steps, lr=lr)
    assert all(0 < rate <= lr for rate in found)
    rising, falling = found[: warmup_steps + 1], found[warmup_steps:]
    assert all(earlier < later for earlier, later in itertools.pairwise(rising))
    assert all(earlier >= later for earlier, later in itertools.pairwise(falling))
    if num_steps > warmup_steps:
        assert max(found) == lr
    # Linear in lr: a rate follows from the step alone, so a resumed run goes on where it was.
    step = data.draw(st.integers(0, num_steps - 1))
    doubled = learning_rate(step, num_steps=num_steps, lr=2 * lr, schedule=schedule, warmup_steps=warmup_steps)
    assert doubled == pytest.approx(2 * found[step])


@schedules
def test_a_falling_schedule_would_reach_zero_one_step_later(schedule: str) -> None:
    last = DECAYS[schedule](1.0)
    assert last == (1.0 if schedule == "constant" else 0.0)
