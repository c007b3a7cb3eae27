"""Share of rows whose response the model writes itself."""

import logging
from collections.abc import Sequence

from transformers import GenerationConfig, PreTrainedTokenizerBase

from lori_dist.errors import ConfigError
from lori_dist.evaluation import Subject
from lori_dist.evaluation._batches import by_length, hides_padding, left_padded, without_settings
from lori_dist.training.data import Example, pad_id
from lori_dist.training.device import put
from lori_dist.training.model import num_positions
from lori_dist.training.tokens import continuation, prompt_ids, shorten

log = logging.getLogger(__name__)


def score(subject: Subject) -> float:
    """Share of rows for which greedy generation from the prompt gives the response; white space around it is free."""
    _warn_of_unwritable(subject)
    completions = complete(subject)
    pairs = zip(completions, subject.examples, strict=True)
    hits = sum(completion.strip() == example.response.strip() for completion, example in pairs)
    return hits / len(subject.examples)


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


def complete(subject: Subject) -> list[str]:
    """What the model writes after each prompt, up to eos or max_new_tokens.

    A prompt that leaves less than max_new_tokens of the model's positions loses its beginning, apart from bos.
    """
    prompts = _prompts(subject)
    eos = _eos(subject)
    pad = pad_id(subject.tokenizer)
    completions: list[list[int]] = [[] for _ in prompts]
    # Greedy and nothing else: of the settings left out here, each has its neutral value.
    settings = GenerationConfig(
        do_sample=False,
        num_beams=1,
        use_cache=True,
        eos_token_id=eos,
        pad_token_id=pad,
        max_new_tokens=subject.max_new_tokens,
    )
    with without_settings(subject.model):
        is_padded = subject.batch_size == 1 or hides_padding(
            subject.model, prompts, pad, "left", steps=subject.max_new_tokens
        )
        for rows in by_length([len(prompt) for prompt in prompts], subject.batch_size, is_padded=is_padded):
            input_ids, attention_mask = left_padded([prompts[row] for row in rows], pad)
            device = subject.model.device
            output = subject.model.generate(
                input_ids=put(input_ids, device), attention_mask=put(attention_mask, device), generation_config=settings
            )
            for row, tokens in zip(rows, output[:, input_ids.shape[1] :].tolist(), strict=True):
                completions[row] = _until(tokens, eos)
    pairs = zip(prompts, completions, strict=True)
    return [continuation(prompt, tokens, subject.tokenizer) for prompt, tokens in pairs]


def _prompts(subject: Subject) -> list[tuple[int, ...]]:
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
    if num_cut:
        log.warning(
            "tasks.%s.test: %d of %d prompts lost their beginning to leave evaluate.max_new_tokens=%d of %d positions",
            subject.task,
            num_cut,
            len(prompts),
            subject.max_new_tokens,
            positions,
        )
    return shortened


def _eos(subject: Subject) -> list[int]:
    """The token that training ends responses with, and those that the base's own authors end them with."""
    own = subject.model.generation_config.eos_token_id if subject.model.generation_config is not None else None
    return sorted({subject.tokenizer.eos_token_id, *([own] if isinstance(own, int) else own or [])})


def _until(tokens: list[int], eos: Sequence[int]) -> list[int]:
    end = next((place for place, token in enumerate(tokens) if token in eos), len(tokens))
    return tokens[:end]
