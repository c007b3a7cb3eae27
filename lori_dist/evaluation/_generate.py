"""Text that models write after prompts, side by side."""

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

import torch

from lori_dist import config, formats
from lori_dist.errors import ConfigError
from lori_dist.evaluation._answers import Reader
from lori_dist.evaluation._passes import attached, passes_of
from lori_dist.evaluation._place import place
from lori_dist.evaluation._rows import Answer, Continuation
from lori_dist.evaluation._writing import GREEDY, Sampling
from lori_dist.rows import Message
from lori_dist.training.data import chat_prompt
from lori_dist.training.model import check_base, load_tokenizer, num_positions
from lori_dist.training.tokens import Ids, continuation, prompt_ids, shorten
from lori_dist.training.world import World

Prompt = str | Sequence[Message]
"""Text, or the messages of a conversation."""
Write = Callable[[Sequence[Prompt]], list[dict[str, str]]]
"""Gives, for each prompt, model -> what it writes."""


@contextlib.contextmanager
def writing(
    run: config.Run,
    adapters: Mapping[str, Path | None],
    world: World,
    *,
    max_new_tokens: int,
    sampling: Sampling = GREEDY,
    is_raw: bool = False,
) -> Iterator[Write]:
    """Gives what writes after prompts, with several models on one copy of the base. Every rank calls this, and that.

    adapters: by name; None is the base. max_new_tokens: of a text, which ends earlier where the model ends it.
    sampling: texts that are drawn depend on their prompt, their model and the seed alone. is_raw: gives the model a
    prompt as it is; else a text is the message of a user where the tokenizer has a chat template.
    Raises ConfigError for messages without a chat template, and what `evaluation.evaluate_all` raises.
    """
    tokenizer = load_tokenizer(run.model)
    loaded = {name: formats.load_whole(path) for name, path in adapters.items() if path is not None}
    for name, adapter in loaded.items():
        check_base(Path(str(adapters[name])), adapter.base, run.model)
    base = place(run, world, torch.device("cpu"))
    reader = Reader(
        model=base.model,
        tokenizer=tokenizer,
        batch_size=run.evaluate.batch_size,
        device=world.device,
        world=world,
        is_sharded=base.is_sharded,
        sampling=sampling,
    )
    positions = num_positions(base.model)
    if positions is not None and positions <= max_new_tokens:
        raise ConfigError(
            f"--max-new-tokens: got {max_new_tokens}, the model has {positions} positions for prompt and text; "
            "give less"
        )

    def tokens(prompt: Prompt) -> Ids:
        text = _text(prompt)
        [ids] = prompt_ids([text], tokenizer)
        return ids if positions is None else shorten(ids, positions - max_new_tokens, tokenizer)

    def _text(prompt: Prompt) -> str:
        if not isinstance(prompt, str) and not tokenizer.chat_template:
            raise ConfigError("prompt: has messages, and the tokenizer has no chat template; give text")
        if isinstance(prompt, str) and (is_raw or not tokenizer.chat_template):
            return prompt
        messages = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
        return chat_prompt(messages, tokenizer)

    passes = passes_of(base.model, loaded, list(adapters))
    with contextlib.ExitStack() as stack:
        stack.callback(base.close)
        lasting = stack.enter_context(attached(reader, passes[0])) if len(passes) == 1 else None

        def write(prompts: Sequence[Prompt]) -> list[dict[str, str]]:
            ids = [tokens(prompt) for prompt in prompts]
            requests = [Continuation(of_prompt, max_new_tokens) for of_prompt in ids]
            answers: dict[str, list[Answer]] = {}
            for one in passes:
                with contextlib.nullcontext(lasting) if lasting is not None else attached(reader, one) as names:
                    found = reader.answers(list(names.values()), requests)
                    answers |= {name: found[names[name]] for name in names}
            return [
                {
                    name: continuation(of_prompt, answer, tokenizer)
                    for name in adapters
                    if isinstance(answer := answers[name][number], tuple)
                }
                for number, of_prompt in enumerate(ids)
            ]

        yield write
