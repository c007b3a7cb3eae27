"""Rows of text as batches of tokens: which rows a step takes is a function of the seed and the step alone."""

import codecs
import functools
import json
import logging
import math
import string
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from lori_dist import config
from lori_dist.errors import ConfigError

IGNORED = -100
"""Label of a token that is no target."""
LISTED = 20
"""Malformed rows that an error shows."""

Row = TypeVar("Row")

log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True, slots=True)
class Example:
    """One row: the model reads the prompt and learns the response."""

    prompt: str
    response: str
    prompt_ids: tuple[int, ...]
    """Starts with bos if the tokenizer adds it."""
    response_ids: tuple[int, ...]
    """Ends with eos, unless the response was cut off."""

    @property
    def num_tokens(self) -> int:
        return len(self.prompt_ids) + len(self.response_ids)


@dataclass(frozen=True, kw_only=True, slots=True)
class Batch:
    """Rows of equal length."""

    input_ids: Tensor  # (rows, length), int64
    attention_mask: Tensor  # (rows, length), int64, 0 on padding
    labels: Tensor  # (rows, length), int64, IGNORED outside the response
    tasks: tuple[int, ...] | None = None
    """Of several tasks trained together: each row's, ascending, from 0."""
    weights: Tensor | None = None  # (tasks,): what a target of each counts in the loss

    def to(self, device: torch.device | str) -> "Batch":
        return Batch(
            input_ids=self.input_ids.to(device, non_blocking=True),
            attention_mask=self.attention_mask.to(device, non_blocking=True),
            labels=self.labels.to(device, non_blocking=True),
            tasks=self.tasks,
            weights=None if self.weights is None else self.weights.to(device, non_blocking=True),
        )


# --- files -----------------------------------------------------------------------------------------------------------


def read(path: str, template: config.Template, *, where: str = "") -> list[tuple[str, str]]:
    """The (prompt, response) of every row of a JSON lines file, in its order; blank lines are skipped.

    where: the file's place in the configuration (`tasks.sst2.train`), for messages.
    Raises ConfigError that names every row that cannot be used by its line: not JSON, no object, without a field that
    the template takes, or with an empty response.
    """
    prefix = f"{where}: " if where else ""
    prompt, response = _renderer(template.prompt, prefix), _renderer(template.response, prefix)
    rows, problems = [], []
    try:
        with open(path, "rb") as file:  # as bytes: lines end at \n only, not at the separators inside a JSON string
            for number, raw in enumerate(file, start=1):
                line = raw.removeprefix(codecs.BOM_UTF8).strip()
                if not line:
                    continue
                try:
                    row = _parse(line)
                    rows.append((prompt(row), _not_empty(response(row))))
                except ConfigError as error:
                    problems.append(f"{prefix}{path}:{number}: {error}")
    except OSError as error:
        raise ConfigError(
            f"{prefix}{path} cannot be read ({error.strerror}); give the path of a JSON lines file"
        ) from error
    if len(problems) > LISTED:
        rest = f"{prefix}{path}: {len(problems) - LISTED} more of {len(rows) + len(problems)} rows cannot be used"
        problems = [*problems[:LISTED], rest]
    if problems:
        raise ConfigError("\n".join(problems))
    if not rows:
        raise ConfigError(f"{prefix}{path}: holds no rows; wanted one JSON object a line")
    return rows


def responses(labels: Sequence[str], template: config.Template) -> tuple[str, ...]:
    """The response for each label: template.response with the label in the place of its one field."""
    pieces = list(string.Formatter().parse(template.response))
    return tuple("".join(text + (label if name is not None else "") for text, name, _, _ in pieces) for label in labels)


def _parse(line: bytes) -> dict[str, Any]:
    try:
        # Numbers with a point stay as they are written: 1.50 is not 1.5 in a text.
        row = json.loads(line.decode(), parse_float=str, parse_constant=_refuse_constant)
    except UnicodeDecodeError as error:
        raise ConfigError(f"byte {error.start + 1} is not UTF-8; save the file as UTF-8") from error
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"is not JSON ({error}); wanted one JSON object on each line") from error
    if not isinstance(row, dict):
        raise ConfigError(f"holds {_kind(row)}; wanted a JSON object such as {{'prompt': ..., 'response': ...}}")
    return row


def _refuse_constant(name: str) -> Any:
    raise ValueError(f"{name} is no JSON value; a missing value is often written so")


def _renderer(template: str, prefix: str) -> Callable[[Mapping[str, Any]], str]:
    """Only `{field}`: nothing of a row is looked into or formatted, so a file of rows cannot do anything."""
    pieces = list(string.Formatter().parse(template))
    for _, name, form, conversion in pieces:
        if name is not None and (form or conversion or not name.isidentifier()):
            raise ConfigError(f"{prefix}{template!r} has more than the name of a field in braces; write {{text}}")

    def render(row: Mapping[str, Any]) -> str:
        return "".join(literal + (_text(row, name) if name is not None else "") for literal, name, _, _ in pieces)

    return render


def _text(row: Mapping[str, Any], name: str) -> str:
    if name not in row:
        raise ConfigError(f"has no field {name!r}; there are {', '.join(sorted(row)) or 'none'}")
    value = row[name]
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, int):
        return str(value)
    if not isinstance(value, str):
        raise ConfigError(f"field {name!r} is {_kind(value)}; wanted text or a number")
    if not _encodable(value):
        raise ConfigError(f"field {name!r} has half of a surrogate pair; wanted Unicode text")
    return value


def _encodable(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def _not_empty(response: str) -> str:
    if not response.strip():
        raise ConfigError("its response is empty; wanted text to learn")
    return response


def _kind(value: Any) -> str:
    return (
        "null"
        if value is None
        else {"dict": "an object", "list": "a list", "str": "text"}.get(type(value).__name__, "a number")
    )


# --- tokens ----------------------------------------------------------------------------------------------------------


def encode(
    rows: Sequence[tuple[str, str]], tokenizer: PreTrainedTokenizerBase, max_length: int, *, where: str = ""
) -> list[Example]:
    """Rows of (prompt, response) as tokens, at most max_length of them a row, in their order.

    A response longer than max_length - 1 loses its end (and with it eos); a prompt that does not fit before its
    response loses its beginning, apart from bos. How many did is logged.
    where: the rows' place in the configuration (`tasks.sst2.train`), for messages.
    Raises ConfigError if the tokenizer has no eos, or if a prompt gives no token at all.
    """
    if max_length < 2:
        raise ConfigError(f"train.max_length: {max_length} was given; a prompt and a response need at least 2 tokens")
    prompts = prompt_ids([prompt for prompt, _ in rows], tokenizer)
    responses = response_ids([response for _, response in rows], tokenizer)
    examples = []
    num_cut_prompts = num_cut_responses = 0
    for (prompt, response), before, after in zip(rows, prompts, responses, strict=True):
        kept_after = after[: max_length - 1]
        kept_before = shorten(before, max_length - len(kept_after), tokenizer)
        num_cut_prompts += len(kept_before) < len(before)
        num_cut_responses += len(kept_after) < len(after)
        examples.append(Example(prompt=prompt, response=response, prompt_ids=kept_before, response_ids=kept_after))
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


def prompt_ids(prompts: Sequence[str], tokenizer: PreTrainedTokenizerBase) -> list[tuple[int, ...]]:
    """Tokens of prompts, with bos if the tokenizer adds it. An eos that it adds is dropped: the response follows."""
    found = _tokens(prompts, tokenizer, special=True)
    if _adds_eos(tokenizer):
        found = [ids[:-1] for ids in found]
    for prompt, ids in zip(prompts, found, strict=True):
        if not ids:
            raise ConfigError(
                f"the prompt {prompt!r} gives no tokens, as the tokenizer adds no bos; a response needs at least one "
                "token before it, so begin the template's prompt with some text"
            )
    return found


def response_ids(responses: Sequence[str], tokenizer: PreTrainedTokenizerBase) -> list[tuple[int, ...]]:
    """Tokens of responses, with eos at the end."""
    eos = tokenizer.eos_token_id
    if not isinstance(eos, int):
        raise ConfigError("model.path: the tokenizer has no eos token, so no response could end; set its eos_token")
    return [(*ids, eos) for ids in _tokens(responses, tokenizer, special=False)]


def shorten(ids: tuple[int, ...], length: int, tokenizer: PreTrainedTokenizerBase) -> tuple[int, ...]:
    """A prompt of at most `length` >= 1 tokens: its beginning goes, apart from bos."""
    if len(ids) <= length:
        return ids
    if ids[0] == tokenizer.bos_token_id:
        return ids[:1] + ids[len(ids) - length + 1 :]
    return ids[len(ids) - length :]


def _tokens(texts: Sequence[str], tokenizer: PreTrainedTokenizerBase, *, special: bool) -> list[tuple[int, ...]]:
    if not texts:
        return []
    # verbose: a row longer than the tokenizer's limit is cut here, not warned about there.
    found = tokenizer(list(texts), add_special_tokens=special, return_attention_mask=False, verbose=False)["input_ids"]
    shared: dict[int, int] = {}  # one int object a token of the vocabulary, not one a token of the text
    return [tuple(shared.setdefault(token, token) for token in ids) for ids in found]


def _adds_eos(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Whether it ends a text with eos; a text that itself ends with eos keeps it."""
    [with_special], [without] = (_tokens(["a"], tokenizer, special=special) for special in (True, False))
    return len(with_special) > len(without) and with_special[-1] == tokenizer.eos_token_id


# --- batches ---------------------------------------------------------------------------------------------------------


def pad_id(tokenizer: PreTrainedTokenizerBase) -> int:
    """A token to pad with: pad, else eos, else 0. Any would do, as padding is masked; embeddings are never resized."""
    candidates = (tokenizer.pad_token_id, tokenizer.eos_token_id, 0)
    return next(token for token in candidates if isinstance(token, int))


def collate(examples: Sequence[Example], pad_id: int) -> Batch:
    """Rows padded on the right to the longest. No examples give one row of padding without targets, so that a rank
    with nothing to do can take part in every collective."""
    rows = [(example.prompt_ids, example.response_ids) for example in examples] or [((pad_id, pad_id), ())]
    length = max(len(before) + len(after) for before, after in rows)
    input_ids = np.full((len(rows), length), pad_id, dtype=np.int64)
    attention_mask = np.zeros((len(rows), length), dtype=np.int64)
    labels = np.full((len(rows), length), IGNORED, dtype=np.int64)
    for row, (before, after) in enumerate(rows):
        end = len(before) + len(after)
        input_ids[row, :end] = before + after
        attention_mask[row, :end] = 1
        labels[row, len(before) : end] = after
    return Batch(
        input_ids=torch.from_numpy(input_ids),
        attention_mask=torch.from_numpy(attention_mask),
        labels=torch.from_numpy(labels),
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


def micro_batches(rows: Sequence[Row], world_rank: int, world_size: int, micro_batch_size: int) -> list[list[Row]]:
    """A rank's share of a global batch, in pieces of at most micro_batch_size rows.

    Every rank gets the same number of pieces, as each is a round of collectives; some may be empty.
    """
    largest_share = math.ceil(len(rows) / world_size)
    share = list(rows[world_rank::world_size])
    return [share[first : first + micro_batch_size] for first in range(0, largest_share, micro_batch_size)]


def _total_rows(num_rows: int, epochs: float) -> int:
    return max(1, round(num_rows * epochs))


@functools.lru_cache(maxsize=4)
def _permutation(num_rows: int, seed: int, epoch: int) -> npt.NDArray[np.int64]:
    """Order of the rows in one epoch: ranks of random words. NumPy guarantees Philox's raw stream, but not what a
    Generator makes of it, and a resumed run may meet another NumPy."""
    words = np.random.Philox(key=np.array([seed, epoch], dtype=np.uint64)).random_raw(num_rows)
    return np.argsort(words, kind="stable")
