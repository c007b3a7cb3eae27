"""Rows of several tasks in sequences that they share."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lori_dist.training.data import IGNORED, Example, collate, together
from lori_dist.training.loss import num_targets
from lori_dist.training.sequences import FULL, MOST, Share, divide

TASKS = st.lists(st.lists(st.integers(2, 60), min_size=1, max_size=20), min_size=1, max_size=4)


@given(TASKS, st.sampled_from(list(Share)[1:]), st.integers(60, 300))
def test_every_row_is_in_one_sequence_task_by_task(tasks: list[list[int]], share: Share, max_length: int) -> None:
    sequences, width = divide(tasks, share, max_length)
    rows = [row for sequence in sequences for row in sequence]
    assert sorted(rows) == [(task, number) for task, lengths in enumerate(tasks) for number in range(len(lengths))]
    assert [task for task, _ in rows] == sorted(task for task, _ in rows)
    widths = [sum(tasks[task][number] for task, number in sequence) for sequence in sequences]
    assert max(widths) == width
    assert all(widths)


@given(TASKS)
def test_sequences_are_full(tasks: list[list[int]]) -> None:
    sequences, width = divide(tasks, Share.YES, 60)
    assert len(sequences) * width <= sum(map(len, tasks)) * max(map(max, tasks))  # as padded rows are at most
    if sum(map(sum, tasks)) <= MOST:
        assert sum(map(sum, tasks)) >= FULL * len(sequences) * width


@pytest.mark.parametrize(
    ("tasks", "wanted"),
    [
        (
            [[5, 5], [5, 5]],
            ([[(0, 0)], [(0, 1)], [(1, 0)], [(1, 1)]], 5),
        ),
        ([[4, 8, 4]], ([[(0, 1)], [(0, 0), (0, 2)]], 8)),
        ([[6, 6], [2, 2, 2]], ([[(0, 0)], [(0, 1)], [(1, 0), (1, 1), (1, 2)]], 6)),
        ([[1]], ([[(0, 0)]], 2)),
    ],
)
def test_as_many_sequences_as_stay_full(tasks: list[list[int]], wanted: object) -> None:
    assert divide(tasks, Share.YES, 20) == wanted


def test_sequences_have_an_end() -> None:
    sequences, width = divide([[900] * 8], Share.YES, 1000)
    assert (len(sequences), width) == (8, 900)


def row(first: int, prompt: int, response: int) -> Example:
    ids = tuple(range(first, first + prompt + response))
    return Example(prompt="", response="", prompt_ids=ids[:prompt], response_ids=ids[prompt:])


@pytest.mark.parametrize("share", list(Share))
def test_a_batch_has_every_token_of_every_task(share: Share) -> None:
    rows = {0: [row(100, 3, 2), row(200, 1, 1)], 2: [row(300, 5, 6)], 3: []}
    weights = torch.tensor([1.0, 0.0, 2.0, 3.0])
    batch = together(rows, weights, 7, share, 32)
    assert batch.tasks is not None
    of_tokens = [task for task, count in batch.tasks for _ in range(count)]
    assert len(of_tokens) == batch.input_ids.numel()
    for task, examples in rows.items():
        found = [
            token for token, owner in zip(batch.input_ids.flatten().tolist(), of_tokens, strict=True) if owner == task
        ]
        wanted = [token for one in examples for token in (*one.prompt_ids, *one.response_ids)]
        assert [token for token in found if token != 7] == wanted
        assert found  # all ranks compute with each of the adapters
    assert num_targets(batch) == num_targets(collate([one for of_task in rows.values() for one in of_task], 7))
    if batch.position_ids is not None:
        starts = batch.input_ids[batch.position_ids == 0].tolist()
        assert {100, 200, 300} <= set(starts)
        assert all(batch.labels[batch.position_ids == 0] == IGNORED)
