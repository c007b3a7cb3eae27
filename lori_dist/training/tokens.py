"""Text as tokens: the one place that says which tokens a prompt and a response have, in training and in evaluation.

Many tokenizers put a blank before any text (Llama 2, Mistral, Phi-3, TinyLlama: `▁` before the first word), so a
response that is tokenised by itself begins with a blank that its row does not have. Prompt and response are therefore
tokenised as one text, and the offsets say where the response begins; a token that has characters of both is the
response's.
Byte-level tokenizers (GPT-2, Llama 3, Qwen) put nothing before a text: they tokenise prompt and response apart, so that
the prompt's tokens never depend on the response.
"""

import itertools
import json
import logging
import threading
from collections.abc import Iterator, Sequence
from typing import Any

from transformers import PreTrainedTokenizerBase

from lori_dist import rows as texts
from lori_dist.errors import ConfigError

Ids = tuple[int, ...]
Pair = tuple[str, str]
"""Prompt and response."""

AT_ONCE = 1000
"""Rows whose offsets are in memory at a time: they take more than the tokens."""
LOOKED_AT = 32
"""Prompts that end with a blank of which the tokens are looked at, for a warning."""

log = logging.getLogger(__name__)


def pairs(rows: Sequence[Pair], tokenizer: PreTrainedTokenizerBase) -> list[tuple[Ids, Ids]]:
    """The tokens of each prompt, with bos if the tokenizer adds it, and of its response, without eos.

    Together they are the tokens of prompt + response. Where no token has characters of both, the prompt's are those
    that `prompt_ids` gives for it alone.
    Raises ConfigError for a prompt that gives no token at all.
    """
    before, _ = _around(tokenizer)
    if _is_additive(tokenizer):
        prompts = prompt_ids([prompt for prompt, _ in rows], tokenizer)
        return list(zip(prompts, _tokens([response for _, response in rows], tokenizer), strict=True))
    split = _by_offsets if _has_offsets(tokenizer) else _by_prefix
    found = []
    for (prompt, _), (first, second) in zip(rows, split(rows, tokenizer), strict=True):
        if not before and not first:
            if not _tokens([prompt], tokenizer)[0]:
                raise ConfigError(_no_tokens(prompt))
            # Nothing could predict the first token, so a token of both is the prompt's there.
            first, second = second[:1], second[1:]
        found.append(((*before, *first), second))
    return found


def segments(rows: Sequence[Sequence[str]], tokenizer: PreTrainedTokenizerBase) -> list[tuple[Ids, ...]]:
    """The tokens of each row's segments, of which every second one is learned: of two, those that `pairs` gives.

    Together they are the tokens of the row's text. Raises what `pairs` raises.
    """
    found: list[tuple[Ids, ...]] = list(pairs([(row[0], "".join(row[1:])) for row in rows], tokenizer))
    longer = [place for place, row in enumerate(rows) if len(row) > 2]
    if _is_additive(tokenizer):
        for place in longer:
            found[place] = (found[place][0], *_tokens(rows[place][1:], tokenizer))
        return found
    for place in longer:
        row, whole = rows[place], sum(found[place], ())
        cuts = [("".join(row[:count]), "".join(row[count:])) for count in range(2, len(row))]
        borders = [len(found[place][0])]
        for before, _ in pairs(cuts, tokenizer):
            differing = (i for i, (a, b) in enumerate(zip(whole, before, strict=False)) if a != b)
            borders.append(max(borders[-1], next(differing, min(len(whole), len(before)))))
        found[place] = tuple(whole[start:end] for start, end in zip([0, *borders], [*borders, len(whole)], strict=True))
    return found


def prompt_ids(prompts: Sequence[str], tokenizer: PreTrainedTokenizerBase) -> list[Ids]:
    """The tokens of prompts alone, as a model is given them to write a response: with bos if the tokenizer adds it.

    An eos or separator that it adds at the end is left out, as the response follows. Raises ConfigError for a prompt
    that gives no token at all.
    """
    before, _ = _around(tokenizer)
    found = [(*before, *ids) for ids in _tokens(prompts, tokenizer)]
    for prompt, ids in zip(prompts, found, strict=True):
        if not ids:
            raise ConfigError(_no_tokens(prompt))
    return found


def eos_id(tokenizer: PreTrainedTokenizerBase) -> int:
    """The token that ends a response. Raises ConfigError where the tokenizer has none."""
    eos = tokenizer.eos_token_id
    if not isinstance(eos, int):
        raise ConfigError("model.path: the tokenizer has no eos token, so no response could end; set its eos_token")
    return eos


def adds_bos(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Whether it begins a text with bos by itself."""
    before, _ = _around(tokenizer)
    return before[:1] == (tokenizer.bos_token_id,)


def continuation(prompt: Ids, ids: Sequence[int], tokenizer: PreTrainedTokenizerBase) -> str:
    """The text that tokens add to a prompt's: what they are at the beginning of a text may be something else."""
    before, whole = (_text(tokens, tokenizer) for tokens in (prompt, (*prompt, *ids)))
    # A prompt that ends inside of a character has another text when the rest of the character follows.
    return whole[len(before) :] if whole.startswith(before) else _text(ids, tokenizer)


def _text(ids: Sequence[int], tokenizer: PreTrainedTokenizerBase) -> str:
    # Special tokens stay: a response with <unk> in the middle is not the response without it.
    return str(tokenizer.decode(list(ids), skip_special_tokens=False, clean_up_tokenization_spaces=False))


def shorten(ids: Ids, length: int, tokenizer: PreTrainedTokenizerBase) -> Ids:
    """A prompt of at most `length` >= 1 tokens: its beginning is cut off, apart from bos."""
    if len(ids) <= length:
        return ids
    if ids[0] == tokenizer.bos_token_id:
        return ids[:1] + ids[len(ids) - length + 1 :]
    return ids[len(ids) - length :]


# --- where the response begins ---------------------------------------------------------------------------------------


def _by_offsets(rows: Sequence[Pair], tokenizer: PreTrainedTokenizerBase) -> Iterator[tuple[Ids, Ids]]:
    trimming = {token for token, added in tokenizer.added_tokens_decoder.items() if added.rstrip}
    for first in range(0, len(rows), AT_ONCE):
        some = rows[first : first + AT_ONCE]
        found = _encoded([prompt + response for prompt, response in some], tokenizer, return_offsets_mapping=True)
        for (prompt, response), ids, offsets in zip(some, found["input_ids"], found["offset_mapping"], strict=True):
            border = len(prompt)
            count = next((place for place, (_, end) in enumerate(offsets) if end > border), len(ids)) if border else 0
            # An added token may take the white space after it along, which is then in no token: it stays a token of
            # the prompt where the white space alone is the response's.
            if count < len(ids) and ids[count] in trimming:
                start, end = offsets[count]
                count += start + len((prompt + response)[start:end].rstrip()) <= border
            yield tuple(ids[:count]), tuple(ids[count:])


def _by_prefix(rows: Sequence[Pair], tokenizer: PreTrainedTokenizerBase) -> Iterator[tuple[Ids, Ids]]:
    """Yields the tokens of prompt and response for tokenizers in Python, which know no offsets. The common start of the
    tokens of the prompt alone and of the whole text is the prompt's. Where the tokens of prompt and response apart are
    the text exactly, these are taken, as for byte-level tokenizers."""
    wholes = _tokens([prompt + response for prompt, response in rows], tokenizer)
    prompts, responses = (_tokens([row[part] for row in rows], tokenizer) for part in (0, 1))
    for (prompt, response), whole, alone, after in zip(rows, wholes, prompts, responses, strict=True):
        if _text(alone + after, tokenizer) == prompt + response:
            yield alone, after
        else:
            differing = (place for place, (a, b) in enumerate(zip(whole, alone, strict=False)) if a != b)
            count = next(differing, min(len(whole), len(alone)))
            yield whole[:count], whole[count:]


def _is_additive(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Whether its tokens of two texts, one after the other, are the text of both: that of a byte-level tokenizer."""
    if not _has_offsets(tokenizer):
        return False
    backend: Any = tokenizer.backend_tokenizer
    return texts.is_byte_level(_described(backend.normalizer), _described(backend.pre_tokenizer))


def _has_offsets(tokenizer: PreTrainedTokenizerBase) -> bool:
    return bool(getattr(tokenizer, "is_fast", False))  # that of mistral-common says nothing


def _described(part: Any) -> dict[str, Any] | None:
    """A part of a tokenizer as `tokenizer.json` has it; None for one that only Python knows."""
    try:
        found: dict[str, Any] | None = None if part is None else json.loads(part.__getstate__())
    except Exception:  # of a class that pickles for parts written in Python
        return {"type": "Custom"}
    return found


# --- tokens of texts -------------------------------------------------------------------------------------------------


def _tokens(parts: Sequence[str], tokenizer: PreTrainedTokenizerBase) -> list[Ids]:
    """Tokens of texts, without special tokens around them. Equal texts are tokenised once."""
    unique = list(dict.fromkeys(parts))
    found = {
        text: tuple(ids)
        for first in range(0, len(unique), AT_ONCE)
        for text, ids in zip(
            unique[first : first + AT_ONCE],
            _encoded(unique[first : first + AT_ONCE], tokenizer)["input_ids"],
            strict=True,
        )
    }
    return [found[text] for text in parts]


def _encoded(parts: Sequence[str], tokenizer: PreTrainedTokenizerBase, **options: Any) -> Any:
    # verbose: a row longer than the tokenizer's limit is cut by `encode`, not warned about here.
    return tokenizer(list(parts), add_special_tokens=False, return_attention_mask=False, verbose=False, **options)


def _around(tokenizer: PreTrainedTokenizerBase) -> tuple[Ids, Ids]:
    """The special tokens that it puts before a text and after it."""
    within, bare = (
        tuple(tokenizer(["a"], add_special_tokens=special, return_attention_mask=False)["input_ids"][0])
        for special in (True, False)
    )
    if not bare:  # no letter that it knows
        count = len(within) - (within[-1:] == (tokenizer.eos_token_id,))
        return within[:count], within[count:]
    place = next((i for i in range(len(within)) if within[i : i + len(bare)] == bare), 0)
    return within[:place], within[place + len(bare) :]


def _no_tokens(prompt: str) -> str:
    return (
        f"the prompt {prompt!r} gives no tokens, as the tokenizer adds no bos; a response needs at least one "
        "token before it, so begin the template's prompt with some text"
    )


# --- prompts that end with a blank -----------------------------------------------------------------------------------

_warned: set[str] = set()
_warning = threading.Lock()


def blank_end(rows: Sequence[Sequence[str]], tokenizer: PreTrainedTokenizerBase) -> str | None:
    """The end of a prompt whose last blank makes other tokens than the same text usually has; None if none of the first
    that end with one is such.

    Most tokenizers join a blank to the word after it. A prompt that ends with one is read in training and in
    generation as the model has rarely seen it.
    """
    with_blank = (row for row in rows if row[0][-1:].isspace())
    ending = [(row[0], "".join(row[1:])) for row in itertools.islice(with_blank, LOOKED_AT)]
    if not ending:
        return None
    before, _ = _around(tokenizer)
    alone = prompt_ids([prompt for prompt, _ in ending], tokenizer)
    wholes = _tokens([prompt + response for prompt, response in ending], tokenizer)
    for (prompt, _), ids, whole in zip(ending, alone, wholes, strict=True):
        if (*before, *whole)[: len(ids)] != ids:
            return prompt[-20:]
    return None


def warn_of_blank(end: str | None, where: str) -> None:
    """Logs a warning of the end of a prompt, once a task. where: the rows' place in the configuration
    (`tasks.sst2.train`)."""
    task = where.rpartition(".")[0] or where
    with _warning:
        if end is None or task in _warned:
            return
        _warned.add(task)
    log.warning(
        "%sthe prompt ends with a blank (...%r), which the tokenizer joins to the word that follows in usual text; "
        "results are mostly better where template.prompt ends before the blank and template.response begins with it",
        f"{task}.template: " if task else "",
        end,
    )
