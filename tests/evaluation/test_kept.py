"""Prompts that are read once, and rows that enter and leave a batch: the answers of each row read alone, and no more
work than that."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from transformers import MambaConfig, MambaForCausalLM, PreTrainedModel

from lori_dist.evaluation._answers import Reader
from lori_dist.evaluation._kept import keeps_rows
from lori_dist.evaluation._rows import Continuation, Likelihood
from lori_dist.evaluation._writing import Sampling
from tests.models import KINDS, MIXTURES, tiny, tiny_llama
from tests.tokenizers import tiny_tokenizer

ENDS = [2, *range(40, 52)]
PROMPTS = [
    tuple(3 + (7 * row + 5 * place) % 60 for place in range(length)) for row, length in enumerate((9, 21, 4, 14))
]
LABELS = [(5,), (9, 30), (11, 12, 13)]


def reader(model: PreTrainedModel, batch_size: int = 3, **more: Any) -> Reader:
    if model.generation_config is not None:
        model.generation_config.eos_token_id = ENDS
    device = torch.device("cpu")
    return Reader(model=model, tokenizer=tiny_tokenizer(), batch_size=batch_size, device=device, **more)


def mamba() -> PreTrainedModel:
    sizes = {"vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 2, "state_size": 8, "time_step_rank": 4}
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return MambaForCausalLM(MambaConfig(**sizes, bos_token_id=1, eos_token_id=2, pad_token_id=0)).eval()


@torch.no_grad()
def alone(model: PreTrainedModel, prompt: tuple[int, ...], most: int) -> tuple[int, ...]:
    """Greedy, a token at a time, without a cache."""
    written: list[int] = []
    while len(written) < most:
        logits = model(input_ids=torch.tensor([[*prompt, *written]]), use_cache=False).logits[0, -1]
        if (token := int(logits.argmax())) in ENDS:
            break
        written.append(token)
    return tuple(written)


@contextmanager
def forwards(model: PreTrainedModel) -> Iterator[list[tuple[int, int]]]:
    """The shapes of what the model is given inside."""
    seen: list[tuple[int, int]] = []
    handle = model.register_forward_pre_hook(
        lambda module, args, kwargs: seen.append(tuple(kwargs["input_ids"].shape)), with_kwargs=True
    )
    try:
        yield seen
    finally:
        handle.remove()


@pytest.mark.parametrize("kind", [*KINDS, *MIXTURES])
def test_rows_that_share_a_cache_have_the_answers_of_rows_alone(kind: str) -> None:
    model = tiny(kind)
    assert keeps_rows(model, PROMPTS, 0, torch.device("cpu"))
    asked = [Continuation(prompt, most) for prompt, most in zip(PROMPTS, (8, 3, 12, 5), strict=True)]
    expected = [alone(model, request.prompt_ids, request.max_new_tokens) for request in asked]
    assert reader(model).answers([None], asked)[None] == expected
    labels = [Likelihood(prompt, label) for prompt in PROMPTS for label in LABELS]
    found, apart = reader(model).answers([None], labels)[None], reader(model, 1).apart([None], labels)
    assert found == pytest.approx([apart[0, place] for place in range(len(labels))], rel=1e-5, abs=1e-5)


def test_models_that_keep_a_state_fall_back(caplog: pytest.LogCaptureFixture) -> None:
    model = mamba()
    reading = reader(model, 1)
    asked = [Continuation(prompt, 6) for prompt in PROMPTS]
    labels = [Likelihood(prompt, label) for prompt in PROMPTS for label in LABELS]
    with caplog.at_level("INFO"):
        assert reading.answers([None], asked)[None] == [alone(model, prompt, 6) for prompt in PROMPTS]
        apart = reading.apart([None], labels)
        assert reading.answers([None], labels)[None] == [apart[0, place] for place in range(len(labels))]
    assert caplog.text.count("keeps no keys and values") == 1


def test_a_prompt_that_labels_share_is_read_once() -> None:
    reading = reader(tiny_llama(), 4)
    reading.answers([None], [Continuation(PROMPTS[1], 1)])  # the model is tried out
    prompts = [prompt * 4 for prompt in PROMPTS[:1]] + [tuple(range(3, 39)), tuple(range(4, 40))]
    labels = [(place, place + 1, place + 2) for place in range(3, 9)]
    requests = [Likelihood(prompt, label) for prompt in prompts for label in labels]
    with forwards(reading.model) as seen:
        reading.answers([None], requests)
    assert seen[0] == (3, 36)
    # Of a label all tokens but the last are read, as they predict the next; the first is predicted by the prompt.
    assert sum(rows * length for rows, length in seen[1:]) == len(requests) * 2
    one_token = [Likelihood(prompt, label[:1]) for prompt in prompts for label in labels]
    with forwards(reading.model) as seen:
        reading.answers([None], one_token)
    assert seen == [(3, 36)]


def test_rows_leave_when_they_have_ended_and_others_enter() -> None:
    """Over all groups: no row is computed after its end, and no batch is larger than it may be."""
    model = tiny_llama()
    with torch.no_grad():
        model.lm_head.weight.mul_(20)
    reading = reader(model, 2)
    groups = [[Continuation(prompt, 12) for prompt in PROMPTS], [Continuation(prompt[1:], 7) for prompt in PROMPTS]]
    list(reading.written([([None], groups[0])]))
    expected = [[alone(model, one.prompt_ids, one.max_new_tokens) for one in group] for group in groups]
    with forwards(model) as seen:
        found = list(reading.written([([None], group) for group in groups]))
    assert [[texts[0, place] for place in range(4)] for texts in found] == expected
    assert len({len(text) for group in expected for text in group}) > 2
    prompts, steps = [one for one in seen if one[1] > 1], [rows for rows, length in seen if length == 1]
    assert sum(rows for rows, _ in prompts) == 8
    needed = [
        min(len(text), request.max_new_tokens - 1)
        for texts, group in zip(expected, groups, strict=True)
        for text, request in zip(texts, group, strict=True)
    ]
    assert sum(steps) == sum(needed)
    assert max(steps) == 2
    # Rows of the second group fill the batch while the first one's last is being written.
    assert len(steps) < sum(needed)


def test_what_is_drawn_depends_on_prompt_and_seed_alone() -> None:
    model = tiny_llama()
    with torch.no_grad():
        model.lm_head.weight.mul_(20)
    asked = [Continuation(prompt, 9) for prompt in PROMPTS]
    drawn = Sampling(temperature=2.0, seed=1)
    expected = reader(model, 1, sampling=drawn).answers([None], asked)[None]
    for batch_size in (2, 8):
        assert reader(model, batch_size, sampling=drawn).answers([None], asked[::-1])[None] == expected[::-1]
    other = reader(model, 4, sampling=Sampling(temperature=2.0, seed=2)).answers([None], asked)[None]
    greedy = reader(model, 4).answers([None], asked)[None]
    assert other != expected != greedy
    least = Sampling(temperature=2.0, top_p=1e-6, seed=1)
    assert reader(model, 4, sampling=least).answers([None], asked)[None] == greedy


@pytest.mark.parametrize(("temperature", "top_p"), [(1.0, 1.0), (0.5, 1.0), (1.0, 0.7)])
def test_tokens_are_drawn_as_often_as_they_are_likely(temperature: float, top_p: float) -> None:
    p = torch.tensor([0.1, 0.45, 0.05, 0.4])
    sampling = Sampling(temperature=temperature, top_p=top_p)
    count = 4000
    tokens = sampling.choose(p.log().expand(count, -1), [((row,), 0) for row in range(count)])
    wanted = p ** (1 / temperature)
    wanted = wanted / wanted.sum()
    if top_p < 1:
        wanted[[0, 2]] = 0  # 0.45 alone is less than 0.7, with 0.4 it is more
        wanted = wanted / wanted.sum()
    found = torch.bincount(torch.tensor(tokens), minlength=4) / count
    torch.testing.assert_close(found, wanted, rtol=0, atol=0.03)
