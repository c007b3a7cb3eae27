"""Examples as batches of tokens: which rows a step takes is a function of the seed and the step alone."""

import dataclasses
import functools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.nn import functional
from transformers import PreTrainedTokenizerBase

from lori_dist.training.device import put
from lori_dist.training.examples import IGNORED as IGNORED
from lori_dist.training.examples import Example as Example
from lori_dist.training.examples import Segments as Segments
from lori_dist.training.examples import chat_prompt as chat_prompt
from lori_dist.training.examples import encode as encode
from lori_dist.training.examples import read as read
from lori_dist.training.sequences import Share, divide

Spans = tuple[tuple[int, int], ...]
"""(task, tokens that follow each other): whose the tokens of a batch are, in its order."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Batch:
    """Rows of equal length."""

    input_ids: Tensor  # (rows, length), int64
    attention_mask: Tensor  # (rows, length), int64, 0 on padding
    labels: Tensor  # (rows, length), int64, IGNORED outside the response
    tasks: Spans | None = None
    """(task, tokens that follow each other), row by row, if several tasks are trained together. Tasks are numbered from
    0 and ascend."""
    weights: Tensor | None = None  # (tasks,): what a target of each counts in the loss
    position_ids: Tensor | None = None  # (rows, length), where rows share sequences or are divided: each row's own
    following: Tensor | None = None  # (rows, length), of rows that are divided: the label after each token

    def next_labels(self) -> Tensor:
        """The label of the token after each one, (rows, length): what the model predicts there."""
        if self.following is not None:
            return self.following
        return functional.pad(self.labels[:, 1:], (0, 1), value=IGNORED)

    def to(self, device: torch.device | str) -> "Batch":
        def there(tensor: Tensor | None) -> Tensor | None:
            return None if tensor is None else put(tensor, device)

        return Batch(
            input_ids=put(self.input_ids, device),
            attention_mask=put(self.attention_mask, device),
            labels=put(self.labels, device),
            tasks=self.tasks,
            weights=there(self.weights),
            position_ids=there(self.position_ids),
            following=there(self.following),
        )


# --- batches ---------------------------------------------------------------------------------------------------------


def pad_id(tokenizer: PreTrainedTokenizerBase) -> int:
    """A token to pad with: pad, else eos, else 0. Any would do, as padding is masked; embeddings are never resized."""
    candidates = (tokenizer.pad_token_id, tokenizer.eos_token_id, 0)
    return next(token for token in candidates if isinstance(token, int))


def collate(examples: Sequence[Example], pad_id: int, pack: int | None = None) -> Batch:
    """Rows padded on the right to the longest. No examples give one row of padding without targets, so that a rank
    with nothing to do can take part in every collective.

    pack: rows share sequences of at most so many tokens, see `packed`.
    """
    if pack is not None and examples:
        return packed(examples, pad_id, pack)
    rows = examples or [Example(prompt="", response="", prompt_ids=(pad_id, pad_id), response_ids=())]
    length = max(example.num_tokens for example in rows)
    input_ids = np.full((len(rows), length), pad_id, dtype=np.int64)
    attention_mask = np.zeros((len(rows), length), dtype=np.int64)
    labels = np.full((len(rows), length), IGNORED, dtype=np.int64)
    for row, example in enumerate(rows):
        end = example.num_tokens
        input_ids[row, :end] = example.prompt_ids + example.response_ids
        attention_mask[row, :end] = 1
        labels[row, len(example.prompt_ids) : end] = example.labels()
    return Batch(
        input_ids=torch.from_numpy(input_ids),
        attention_mask=torch.from_numpy(attention_mask),
        labels=torch.from_numpy(labels),
    )


def together(
    rows: Mapping[int, Sequence[Example]], weights: Tensor, pad_id: int, share: Share, max_length: int
) -> Batch:
    """Rows of several tasks in one batch, task by task.

    rows: task, ascending, from 0 -> its rows, of at most max_length tokens; of a task without any, the batch has a
    token of padding, so that all ranks compute with the same adapters. weights: (tasks,), what a target of each counts
    in the loss. share: whether rows share sequences; else they are padded to the longest.
    """
    nothing = Example(prompt="", response="", prompt_ids=(pad_id,), response_ids=())
    filled = {task: of_task or [nothing] for task, of_task in rows.items()}
    if share is not Share.NO:
        return _ragged(filled, weights, pad_id, share, max_length)
    batch = collate([example for of_task in filled.values() for example in of_task], pad_id)
    width = batch.input_ids.shape[1]
    tasks = tuple((task, len(of_task) * width) for task, of_task in filled.items())
    return dataclasses.replace(batch, tasks=tasks, weights=weights)


def _ragged(
    rows: Mapping[int, Sequence[Example]], weights: Tensor, pad_id: int, share: Share, max_length: int
) -> Batch:
    """Rows one after the other in sequences of equal length, each with positions from 0 on, so that none is padded to
    the length of another one.

    From the positions transformers makes an attention mask in blocks: no row sees another one.
    """
    lengths = [[example.num_tokens for example in of_task] for of_task in rows.values()]
    sequences, width = divide(lengths, share, max_length)
    shape, numbers = (len(sequences), width), list(rows)
    input_ids, labels = np.full(shape, pad_id, dtype=np.int64), np.full(shape, IGNORED, dtype=np.int64)
    position_ids = np.zeros(shape, dtype=np.int64)
    spans: list[tuple[int, int]] = []
    for place, sequence in enumerate(sequences):
        end = 0
        for number, row in sequence:
            example = rows[numbers[number]][row]
            end = _write(example, end, input_ids[place], labels[place], position_ids[place])
            spans.append((numbers[number], example.num_tokens))
        position_ids[place, end:] = np.arange(width - end)  # padding is a row of its own
        spans.append((spans[-1][0], width - end))
    return Batch(
        input_ids=torch.from_numpy(input_ids),
        attention_mask=torch.ones(shape, dtype=torch.int64),
        labels=torch.from_numpy(labels),
        tasks=tuple(span for span in spans if span[1]),
        weights=weights,
        position_ids=torch.from_numpy(position_ids),
    )


def _write(
    example: Example,
    start: int,
    input_ids: npt.NDArray[np.int64],
    labels: npt.NDArray[np.int64],
    position_ids: npt.NDArray[np.int64],
) -> int:
    """Writes a row into a sequence, from `start` on. Returns its end."""
    end = start + example.num_tokens
    input_ids[start:end] = example.prompt_ids + example.response_ids
    labels[start + len(example.prompt_ids) : end] = example.labels()
    position_ids[start:end] = np.arange(end - start)
    return end


def packed(examples: Sequence[Example], pad_id: int, length: int) -> Batch:
    """Rows one after the other in sequences of at most `length` tokens, each with positions from 0 on.

    From these transformers makes an attention mask in blocks, so that no row sees another one; padding is a row of its
    own at the end. Every row goes into the first sequence with room for it, longest first.
    """
    sequences: list[list[Example]] = []
    room: list[int] = []
    for example in sorted(examples, key=lambda one: -one.num_tokens):
        place = next((i for i, left in enumerate(room) if left >= example.num_tokens), None)
        if place is None:
            place = len(room)
            sequences.append([])
            room.append(length)
        sequences[place].append(example)
        room[place] -= example.num_tokens
    width = length - min(room)
    input_ids = np.full((len(sequences), width), pad_id, dtype=np.int64)
    labels = np.full((len(sequences), width), IGNORED, dtype=np.int64)
    position_ids = np.zeros((len(sequences), width), dtype=np.int64)
    for row, sequence in enumerate(sequences):
        start = 0
        for example in sequence:
            start = _write(example, start, input_ids[row], labels[row], position_ids[row])
        position_ids[row, start:] = np.arange(width - start)
    return Batch(
        input_ids=torch.from_numpy(input_ids),
        attention_mask=torch.ones(input_ids.shape, dtype=torch.int64),
        labels=torch.from_numpy(labels),
        position_ids=torch.from_numpy(position_ids),
    )


def num_steps(num_rows: int, batch_size: int, steps: int | None, epochs: float | None) -> int:
    """Optimizer steps of a training. Exactly one of steps and epochs is given."""
    if steps is not None:
        return steps
    assert epochs is not None
    return math.ceil(_total_rows(num_rows, epochs) / batch_size)


def rows_of_step(step: int, *, num_rows: int, batch_size: int, seed: int, epochs: float | None) -> list[int]:
    """The global batch of a step, whatever the number of ranks.

    Every epoch is a fresh permutation of all rows. Batches run on from one epoch into the next, so nothing is
    dropped; with `epochs`, the last batch ends where the epochs end and may be smaller.
    """
    start, end = step * batch_size, (step + 1) * batch_size
    if epochs is not None:
        end = min(end, _total_rows(num_rows, epochs))
    rows: list[int] = []
    while start < end:
        epoch, first = divmod(start, num_rows)
        last = min(num_rows, first + end - start)
        rows.extend(_permutation(num_rows, seed, epoch)[first:last].tolist())
        start += last - first
    return rows


def mixed_rows_of_step(
    step: int,
    *,
    num_rows: tuple[int, ...],
    shares: tuple[float, ...],
    batch_size: int,
    seed: int,
    epochs: float | None,
) -> list[int]:
    """The rows of a step as `rows_of_step` gives them, for rows of several files, one after the other, each with a
    share.

    An epoch is as many rows as there are, of each file its share: the file's rows are taken in permutations that go on
    from one epoch to the next, so that a small share leaves out none and a large one takes them more often.
    """
    total = sum(num_rows)
    counts = _shares(total, shares)
    offsets = np.cumsum((0, *num_rows))
    start, end = step * batch_size, (step + 1) * batch_size
    if epochs is not None:
        end = min(end, _total_rows(total, epochs))
    rows = []
    for place in range(start, end):
        epoch, position = divmod(place, total)
        file, drawn = _draws(total, counts, seed, epoch)
        which = int(file[position])
        draw = epoch * counts[which] + int(drawn[position])
        of_file, row = divmod(draw, num_rows[which])
        rows.append(int(offsets[which] + _permutation(num_rows[which], seed + which + 1, of_file)[row]))
    return rows


def _shares(total: int, shares: tuple[float, ...]) -> tuple[int, ...]:
    """Whole numbers that sum to the total, by largest remainder."""
    exact = [total * share for share in shares]
    counts = [math.floor(number) for number in exact]
    largest = sorted(range(len(exact)), key=lambda i: counts[i] - exact[i])[: total - sum(counts)]
    return tuple(count + (i in largest) for i, count in enumerate(counts))


@functools.lru_cache(maxsize=2)
def _draws(
    total: int, counts: tuple[int, ...], seed: int, epoch: int
) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    """The file of each place in an epoch, and how many of the epoch's rows before it are of the same file."""
    file = np.repeat(np.arange(len(counts)), counts)[_permutation(total, seed, epoch)]
    drawn = np.empty(total, dtype=np.int64)
    for which, count in enumerate(counts):
        drawn[file == which] = np.arange(count)
    return file, drawn


def _total_rows(num_rows: int, epochs: float) -> int:
    return max(1, round(num_rows * epochs))


@functools.lru_cache(maxsize=16)
def _permutation(num_rows: int, seed: int, epoch: int) -> npt.NDArray[np.int64]:
    """Order of the rows in one epoch: ranks of random words. NumPy guarantees Philox's raw stream, but not what a
    Generator makes of it, and a resumed run may meet another NumPy."""
    words = np.random.Philox(key=np.array([seed, epoch], dtype=np.uint64)).random_raw(num_rows)
    return np.argsort(words, kind="stable")
