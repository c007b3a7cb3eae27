"""Share of rows whose response the model writes itself."""

import logging
from collections.abc import Sequence

from transformers import PreTrainedTokenizerBase

from lori_dist.errors import ConfigError
from lori_dist.evaluation import Subject, answered, scored
from lori_dist.evaluation._rows import Answer, Continuation, Row
from lori_dist.training.data import Example
from lori_dist.training.model import num_positions
from lori_dist.training.tokens import Ids, continuation, prompt_ids, shorten

log = logging.getLogger(__name__)


def ask(subject: Subject) -> list[Continuation]:
    _warn_of_unwritable(subject)
    return [Continuation(prompt, subject.max_new_tokens) for prompt in _prompts(subject)]


def judge(subject: Subject, answers: Sequence[Answer]) -> list[Row]:
    pairs = zip(_texts(subject, answers), subject.examples, strict=True)
    return [
        Row(
            prompt=example.prompt,
            response=text,
            answer=example.response,
            score=float(text.strip() == example.response.strip()),
        )
        for text, example in pairs
    ]


def score(subject: Subject) -> float | None:
    """Share of rows for which greedy generation from the prompt gives the response; white space around it is free."""
    return scored(subject, ask, judge)


def complete(subject: Subject) -> list[str]:
    """The model's text after each prompt, up to eos or max_new_tokens.

    A prompt that leaves less than max_new_tokens of the model's positions loses its beginning, apart from bos.
    """
    prompts = _prompts(subject)
    return _texts(subject, answered(subject, [Continuation(prompt, subject.max_new_tokens) for prompt in prompts]))


def _texts(subject: Subject, answers: Sequence[Answer]) -> list[str]:
    prompts = _prompts(subject, warns=False)
    return [
        continuation(prompt, answer, subject.tokenizer)
        for prompt, answer in zip(prompts, answers, strict=True)
        if isinstance(answer, tuple)
    ]


def _warn_of_unwritable(subject: Subject) -> None:
    """A tokenizer without a token for some sign cannot give a response that has it, whatever the model does."""
    num_lost = sum(not _is_writable(example, subject.tokenizer) for example in subject.examples)
    if num_lost:
        log.warning(
            "tasks.%s.test: %d of %d responses are cut by train.max_length or have characters that the tokenizer "
            "lacks: "
            "they cannot match",
            subject.task,
            num_lost,
            len(subject.examples),
        )


def _is_writable(example: Example, tokenizer: PreTrainedTokenizerBase) -> bool:
    """Whether the response's tokens are its text, but for that of a prompt whose end shares a token with it."""
    ids = [token for token in example.response_ids if token != tokenizer.eos_token_id]
    return continuation(example.prompt_ids, ids, tokenizer).rstrip().endswith(example.response.strip())


def _prompts(subject: Subject, *, warns: bool = True) -> list[Ids]:
    """Tokenised alone, as a served model reads them: a token that prompt and response share is not given away."""
    positions = num_positions(subject.model)
    alone = prompt_ids([example.prompt for example in subject.examples], subject.tokenizer)
    prompts = [
        shorten(ids, subject.max_length - len(example.response_ids), subject.tokenizer)
        for ids, example in zip(alone, subject.examples, strict=True)
    ]
    if positions is None:
        return prompts
    if positions <= subject.max_new_tokens:
        raise ConfigError(
            f"evaluate.max_new_tokens: got {subject.max_new_tokens}, the model has {positions} positions for "
            "prompt and response; give less"
        )
    shortened = [shorten(prompt, positions - subject.max_new_tokens, subject.tokenizer) for prompt in prompts]
    num_cut = sum(len(after) < len(before) for before, after in zip(prompts, shortened, strict=True))
    if num_cut and warns:
        log.warning(
            "tasks.%s.test: %d of %d prompts lost their beginning to leave evaluate.max_new_tokens=%d of %d positions",
            subject.task,
            num_cut,
            len(prompts),
            subject.max_new_tokens,
            positions,
        )
    return shortened
