"""Rows of text as examples: what the model reads and learns of each row, as text and as tokens. Imports no torch, so
that the processes that only do this start at once."""

import datetime
import functools
import itertools
import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, cast

import numpy as np
import numpy.typing as npt
from transformers import PreTrainedTokenizerBase

from lori_dist import config, rows
from lori_dist.adapter.row_tokens import IGNORED as IGNORED
from lori_dist.errors import ConfigError
from lori_dist.training import tokens

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

Segments = tuple[str, ...]
"""A row's text in pieces that are read and learned by turns: (prompt, response), or more where a chat has several
answers that are learned."""

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


# --- text ------------------------------------------------------------------------------------------------------------


@dataclass(kw_only=True, slots=True)
class Segmented:
    """The segments of the rows of a piece."""

    rows: list[Segments] = field(default_factory=list)
    numbers: list[int] = field(default_factory=list)
    """The line of each row."""
    problems: list[tuple[int, str]] = field(default_factory=list)
    """What is wrong with the other rows."""


class Segmenter:
    """Makes segments of a source's texts. Raises ConfigError where the tokenizer has no chat template and it takes one.

    tokenizer: whose chat template makes text of messages; bos and eos, which `encode` adds, are left out.
    """

    def __init__(self, source: rows.Source, tokenizer: PreTrainedTokenizerBase | None) -> None:
        self._chat: _Renderer | None = None
        template = source.template
        if template.chat is not None:
            assert tokenizer is not None
            if not tokenizer.chat_template:
                key = "template.messages needs"
                if template.layout is not None:
                    key = f"template.layout {template.layout} needs"
                raise ConfigError(f"{source.prefix}model.path: the tokenizer has no chat template, which {key}")
            self._chat = _Renderer(tokenizer, template)

    @property
    def openings(self) -> Sequence[str]:
        """What the chat template opened answers with that it did not write before those of the rows so far."""
        return () if self._chat is None else tuple(self._chat.openings)

    def __call__(self, found: rows.Texts) -> Segmented:
        if self._chat is None:
            return Segmented(rows=cast(list[Segments], found.texts), numbers=found.numbers, problems=[*found.problems])
        made = Segmented(problems=[*found.problems])
        for number, chat in zip(found.numbers, found.texts, strict=True):
            try:
                made.rows.append(self._chat(cast(rows.Chat, chat)))
                made.numbers.append(number)
            except Exception as error:  # templates raise errors of their own
                made.problems.append((number, f"the chat template refuses it ({error})"))
        made.problems.sort(key=lambda problem: problem[0])
        return made


def read(
    path: str,
    template: config.Template,
    *,
    where: str = "",
    tokenizer: PreTrainedTokenizerBase | None = None,
    labels: Sequence[str] | None = None,
) -> list[Segments]:
    """The segments of every row of a file, in its order; blank lines are skipped. All of them are in memory.

    where: the file's place in the configuration (`tasks.sst2.train`), for messages. tokenizer: as `Segmenter` takes it.
    labels: all values that the template's response may have.
    Raises ConfigError that names every row that cannot be used by its line.
    """
    source = rows.Source(path=path, template=template, where=where, labels=None if labels is None else tuple(labels))
    render, segment, tally = rows.Renderer(source), Segmenter(source, tokenizer), rows.Tally(source)
    found = []
    for piece in rows.pieces(source):
        texts = render(piece)
        made = segment(texts)
        tally.add(len(made.rows), made.problems, has_tools=texts.has_tools)
        found += made.rows
    tally.check()
    for opening in segment.openings:
        warn_of_opening(source.prefix, opening)
    return found


def first_rows(source: rows.Source, tokenizer: PreTrainedTokenizerBase | None, count: int) -> list[Segments]:
    """The segments of the first rows of a source that can be used."""
    render, segment, found = rows.Renderer(source), Segmenter(source, tokenizer), list[Segments]()
    for piece in rows.pieces(source):
        if len(found) >= count:
            break
        found += segment(render(piece[: count - len(found)])).rows
    return found


class _Renderer:
    """Makes a chat's segments with a tokenizer's chat template."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, template: config.Template) -> None:
        today = datetime.date.fromisoformat(template.date or rows.DATE)
        self.tokenizer, self.settings = tokenizer, template
        self.openings: dict[str, None] = {}
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
            self.openings[opened[start:]] = None
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
        return _Renderer(tokenizer, template or config.Template()).prompt(messages)
    except Exception as error:  # templates raise errors of their own
        raise ConfigError(f"prompt: the chat template refuses it ({error})") from error


def _num_common(one: str, other: str) -> int:
    """Characters that both begin with."""
    differing = (place for place, (a, b) in enumerate(zip(one, other, strict=False)) if a != b)
    return next(differing, min(len(one), len(other)))


@functools.cache
def warn_of_opening(prefix: str, opening: str) -> None:
    """Says, once, what the chat template opens an answer with that it does not write before one."""
    log.warning(
        "%sthe chat template opens an answer with %r, which it does not write before an answer that is there; rows are "
        "learned, and answers written, without it",
        prefix,
        opening,
    )


# --- tokens ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True, slots=True)
class Encoded:
    """Rows as tokens."""

    examples: list[Example]
    whole: list[int]
    """Tokens of each row before it was cut."""
    num_cut_prompts: int
    """Rows whose prompt lost its beginning."""
    num_cut_responses: int
    """Rows whose response lost its end."""


def encoded(rows: Sequence[Segments], tokenizer: PreTrainedTokenizerBase, max_length: int) -> Encoded:
    """Rows of (prompt, response), or of more segments, as tokens, at most max_length of them a row, in their order.

    A row's tokens are those of its text, see `tokens.segments`, and eos. A response longer than max_length - 1
    loses its end (and with it eos); a prompt that does not fit before its response loses its beginning, apart from
    bos. Raises ConfigError if the tokenizer has no eos, or if a prompt gives no token at all.
    """
    if max_length < 2:
        raise ConfigError(f"train.max_length: got {max_length}; a prompt and a response need at least 2 tokens")
    eos = tokens.eos_id(tokenizer)
    examples, whole = [], []
    num_cut_prompts = num_cut_responses = 0
    for (prompt, *others), (before, *pieces) in zip(rows, tokens.segments(rows, tokenizer), strict=True):
        after = pieces[0] if len(pieces) == 1 else tuple(itertools.chain.from_iterable(pieces))
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
        whole.append(len(before) + len(after) + 1)
    return Encoded(examples=examples, whole=whole, num_cut_prompts=num_cut_prompts, num_cut_responses=num_cut_responses)


def encode(
    rows: Sequence[Segments], tokenizer: PreTrainedTokenizerBase, max_length: int, *, where: str = ""
) -> list[Example]:
    """The examples that `encoded` makes. How many rows were cut is logged, and a warning where a prompt's last blank
    changes its tokens.

    where: the rows' place in the configuration (`tasks.sst2.train`), for messages.
    """
    found = encoded(rows, tokenizer, max_length)
    tokens.warn_of_blank(tokens.blank_end(rows, tokenizer), where)
    warn_of_cuts(where, len(rows), found.num_cut_prompts, found.num_cut_responses, max_length)
    return found.examples


def warn_of_cuts(where: str, num_rows: int, num_cut_prompts: int, num_cut_responses: int, max_length: int) -> None:
    """Says how many rows were cut, if any."""
    if num_cut_prompts or num_cut_responses:
        log.warning(
            "%sof %d rows, %d prompts lost their beginning and %d responses their end to fit train.max_length=%d",
            f"{where}: " if where else "",
            num_rows,
            num_cut_prompts,
            num_cut_responses,
            max_length,
        )


def _read_only(pieces: Sequence[Sequence[int]], length: int) -> Iterator[tuple[int, int]]:
    """Yields the ranges of every second piece, from the second one on, in what `length` leaves of all."""
    start = 0
    for number, piece in enumerate(pieces):
        end = min(start + len(piece), length)
        if number % 2 and end > start:
            yield start, end
        start = end
