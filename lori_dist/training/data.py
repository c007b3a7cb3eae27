"""Rows of text as batches of tokens: which rows a step takes is a function of the seed and the step alone."""

import dataclasses
import datetime
import functools
import logging
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar, cast

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.nn import functional
from transformers import PreTrainedTokenizerBase

from lori_dist import config, rows
from lori_dist.errors import ConfigError
from lori_dist.training import tokens
from lori_dist.training.device import put
from lori_dist.training.sequences import Share, divide

IGNORED = -100
"""Label of a token that is not a target."""

CLOCK = """
{%- macro strftime_now(format) %}
    {%- set text = namespace(now=format) %}
    {%- for form, written in lori_today.items() %}{% set text.now = text.now.replace(form, written) %}{% endfor %}
    {{- text.now }}
{%- endmacro %}{{ "" }}"""
"""Before a chat template that asks for today's date: gives it a date that does not change. transformers takes no other
clock. The last expression keeps a line break that the template begins with."""
FORMS = [f"%{form}" for form in ("-d", "-m", "-H", "-I", "-M", "-S", "-y", "-j", *"aAbBcdfGHIjmMpSuUVwWxXyYzZ%")]
"""Formats of Python's strftime."""

Row = TypeVar("Row")
Segments = tuple[str, ...]
"""A row's text in pieces that are read and learned by turns: (prompt, response), or more where a chat has several
answers that are learned."""
Spans = tuple[tuple[int, int], ...]
"""(task, tokens that follow each other): whose the tokens of a batch are, in its order."""

log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True, slots=True)
class Example:
    """One row: the model reads the prompt and learns the response."""

    prompt: str
    response: str
    prompt_ids: tuple[int, ...]
    """Starts with bos if the tokenizer adds it."""
    response_ids: tuple[int, ...]
    """Tokens from the first one that has a character of the response. Ends with eos, unless the response was cut
    off."""
    read_only: tuple[tuple[int, int], ...] = ()
    """Ranges of response_ids that are not learned: what stands between the answers of a chat."""

    @property
    def num_tokens(self) -> int:
        return len(self.prompt_ids) + len(self.response_ids)

    @property
    def num_targets(self) -> int:
        """Tokens that are learned."""
        return len(self.response_ids) - sum(end - start for start, end in self.read_only)

    def labels(self) -> npt.NDArray[np.int64]:
        """The response's tokens, IGNORED where they are not learned."""
        found = np.array(self.response_ids, dtype=np.int64)
        for start, end in self.read_only:
            found[start:end] = IGNORED
        return found


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


# --- files -----------------------------------------------------------------------------------------------------------


def read(
    path: str,
    template: config.Template,
    *,
    where: str = "",
    tokenizer: PreTrainedTokenizerBase | None = None,
    labels: Sequence[str] | None = None,
) -> list[Segments]:
    """The segments of every row of a file, in its order; blank lines are skipped.

    where: the file's place in the configuration (`tasks.sst2.train`), for messages. tokenizer: whose chat template
    makes text of messages; bos and eos, which `encode` adds, are left out. labels: all values that the template's
    response may have.
    Raises ConfigError as `rows.read`, and for messages that the tokenizer cannot make text of.
    """
    texts = rows.read(path, template, where=where, labels=labels)
    if template.chat is None:
        return cast(list[Segments], texts)
    assert tokenizer is not None
    prefix = f"{where}: " if where else ""
    if not tokenizer.chat_template:
        key = "template.messages needs" if template.layout is None else f"template.layout {template.layout} needs"
        raise ConfigError(f"{prefix}model.path: the tokenizer has no chat template, which {key}")
    render = _Renderer(tokenizer, template, prefix)
    found = []
    for number, chat in enumerate(texts, start=1):
        try:
            found.append(render(cast(rows.Chat, chat)))
        except Exception as error:  # templates raise errors of their own
            raise ConfigError(f"{prefix}{path}: row {number}: the chat template refuses it ({error})") from error
    return found


class _Renderer:
    """Makes a chat's segments with a tokenizer's chat template."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, template: config.Template, prefix: str) -> None:
        today = datetime.date.fromisoformat(template.date or rows.DATE)
        self.tokenizer, self.settings, self.prefix = tokenizer, template, prefix
        self.bos = str(tokenizer.bos_token) if tokens.adds_bos(tokenizer) else ""
        self.eos = str(tokenizer.eos_token)
        self.named: dict[str, Any] = dict(template.arguments)
        self.template = tokenizer.get_chat_template()
        # The template takes a date for today, or its text would be another one tomorrow.
        if "strftime_now" in self.template:
            self.template = CLOCK + self.template
            self.named["lori_today"] = {form: today.strftime(form) for form in FORMS}
        if template.date is not None:
            self.named["date_string"] = today.strftime("%d %b %Y")  # as templates call it that have one of their own

    def __call__(self, chat: rows.Chat) -> Segments:
        messages = chat.messages
        learned = [len(messages) - 1]
        if self.settings.train_on == "all":
            learned = [place for place, message in enumerate(messages) if message["role"] == "assistant"]
        whole = self._text(chat, len(messages)).rstrip("\n").removesuffix(self.eos)
        found, done = [], 0
        for place in learned:
            start, end = self._answer(chat, place, whole)
            found += [whole[done:start], whole[start:end]]
            done = end
        return (found[0].removeprefix(self.bos), *found[1:])

    def prompt(self, messages: Sequence[rows.Message]) -> str:
        """The text that asks for the answer to messages."""
        return self._text(rows.Chat(messages=messages), len(messages), opens=True).removeprefix(self.bos)

    def _answer(self, chat: rows.Chat, place: int, whole: str) -> tuple[int, int]:
        """The start and the end of a message's answer in the text of all messages."""
        before, opened = self._text(chat, place), self._text(chat, place, opens=True)
        if place == len(chat.messages) - 1:
            end = len(whole)
        else:
            after = self._text(chat, place + 1)
            end = len(after.rstrip("\n"))
            if not whole.startswith(after):
                raise ConfigError(
                    f"it changes the text of message {place + 1} when others follow, so its answer cannot be found "
                    "there; set template.train_on to last"
                )
        start = _num_common(opened, whole)
        if start < len(opened):
            if not whole.startswith(before) or start <= len(before):
                raise ConfigError(
                    "it changes the earlier text when an answer follows, so the answer cannot be separated from the "
                    "prompt"
                )
            _warn_of_opening(self.prefix, opened[start:])
        if not whole[start:end].strip():
            raise ConfigError(f"it makes no text of the answer in message {place + 1}, so nothing could be learned")
        return start, end

    def _text(self, chat: rows.Chat, count: int, *, opens: bool = False) -> str:
        """The text of the first messages. opens: whether it ends with what an answer begins with."""
        if count == 0 and not opens:
            return ""
        return str(
            self.tokenizer.apply_chat_template(
                list(chat.messages[:count]),
                tools=None if chat.tools is None else list(chat.tools),
                chat_template=self.template,
                tokenize=False,
                add_generation_prompt=opens,
                **self.named,
            )
        )


def chat_prompt(
    messages: Sequence[rows.Message], tokenizer: PreTrainedTokenizerBase, template: config.Template | None = None
) -> str:
    """The text after which a model writes its answer to messages, without the bos that the tokenizer adds by itself.

    template: gives the chat template's date and arguments; None: as training has them by default. Raises ConfigError
    if the chat template refuses the messages.
    """
    try:
        return _Renderer(tokenizer, template or config.Template(), "").prompt(messages)
    except Exception as error:  # templates raise errors of their own
        raise ConfigError(f"prompt: the chat template refuses it ({error})") from error


def _num_common(one: str, other: str) -> int:
    """Characters that both begin with."""
    differing = (place for place, (a, b) in enumerate(zip(one, other, strict=False)) if a != b)
    return next(differing, min(len(one), len(other)))


@functools.cache
def _warn_of_opening(prefix: str, opening: str) -> None:
    log.warning(
        "%sthe chat template opens an answer with %r, which it does not write before an answer that is there; rows are "
        "learned, and answers written, without it",
        prefix,
        opening,
    )


# --- tokens ----------------------------------------------------------------------------------------------------------


def encode(
    rows: Sequence[Segments], tokenizer: PreTrainedTokenizerBase, max_length: int, *, where: str = ""
) -> list[Example]:
    """Rows of (prompt, response), or of more segments, as tokens, at most max_length of them a row, in their order.

    A row's tokens are those of its text, see `tokens.segments`, and eos. A response longer than max_length - 1
    loses its end (and with it eos); a prompt that does not fit before its response loses its beginning, apart from
    bos. How many did is logged, and a warning where a prompt's last blank changes its tokens.
    where: the rows' place in the configuration (`tasks.sst2.train`), for messages.
    Raises ConfigError if the tokenizer has no eos, or if a prompt gives no token at all.
    """
    if max_length < 2:
        raise ConfigError(f"train.max_length: got {max_length}; a prompt and a response need at least 2 tokens")
    eos = tokens.eos_id(tokenizer)
    examples = []
    num_cut_prompts = num_cut_responses = 0
    for (prompt, *others), (before, *pieces) in zip(rows, tokens.segments(rows, tokenizer), strict=True):
        after = tuple(token for piece in pieces for token in piece)
        kept_after = (*after, eos)[: max_length - 1]
        kept_before = tokens.shorten(before, max_length - len(kept_after), tokenizer)
        num_cut_prompts += len(kept_before) < len(before)
        num_cut_responses += len(kept_after) <= len(after)
        examples.append(
            Example(
                prompt=prompt,
                response="".join(others),
                prompt_ids=kept_before,
                response_ids=kept_after,
                read_only=tuple(_read_only(pieces, len(kept_after))),
            )
        )
    tokens.warn_of_blanks([(row[0], "".join(row[1:])) for row in rows], tokenizer, where)
    if num_cut_prompts or num_cut_responses:
        log.warning(
            "%sof %d rows, %d prompts lost their beginning and %d responses their end to fit train.max_length=%d",
            f"{where}: " if where else "",
            len(rows),
            num_cut_prompts,
            num_cut_responses,
            max_length,
        )
    return examples


def _read_only(pieces: Sequence[Sequence[int]], length: int) -> Iterator[tuple[int, int]]:
    """Yields the ranges of every second piece, from the second one on, in what `length` leaves of all."""
    start = 0
    for number, piece in enumerate(pieces):
        end = min(start + len(piece), length)
        if number % 2 and end > start:
            yield start, end
        start = end


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


def _total_rows(num_rows: int, epochs: float) -> int:
    return max(1, round(num_rows * epochs))


@functools.lru_cache(maxsize=16)
def _permutation(num_rows: int, seed: int, epoch: int) -> npt.NDArray[np.int64]:
    """Order of the rows in one epoch: ranks of random words. NumPy guarantees Philox's raw stream, but not what a
    Generator makes of it, and a resumed run may meet another NumPy."""
    words = np.random.Philox(key=np.array([seed, epoch], dtype=np.uint64)).random_raw(num_rows)
    return np.argsort(words, kind="stable")
