from collections.abc import Callable

import pytest
import torch
from transformers import PreTrainedModel

from lori_dist.evaluation import Subject
from lori_dist.training.data import collate, encode
from lori_dist.training.loss import loss_sum, num_targets
from tests.models import tiny_gpt2, tiny_llama
from tests.tokenizers import tiny_tokenizer

ROWS = [
    ("is a rose red?", "yes"),
    ("is a crow white?", "no"),
    ("1+2=", "3"),
    ("say it twice: ab ", "ab ab"),
    ("who? ", "nobody\nat all"),
    ("a long prompt, to be padded by nobody: ", "ok."),
    ("tilde: ", "b~c"),  # one <unk> in the middle
]
LABELS = ("yes", "no", "maybe so")


@pytest.fixture(scope="session", params=[tiny_llama, tiny_gpt2], ids=["llama", "gpt2"])
def learned(request: pytest.FixtureRequest) -> PreTrainedModel:
    """A model that knows ROWS by heart."""
    model = request.param()
    batch = collate(encode(ROWS, tiny_tokenizer(), 64), 0)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for _ in range(60):
        loss = loss_sum(model, batch) / num_targets(batch)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert loss.item() < 0.05
    return model


@pytest.fixture
def subject() -> Callable[..., Subject]:
    """Makes what a metric measures."""

    def make(
        model: PreTrainedModel,
        rows: list[tuple[str, str]] = ROWS,
        *,
        labels: tuple[str, ...] | None = None,
        batch_size: int = 4,
        max_length: int = 64,
        max_new_tokens: int = 16,
    ) -> Subject:
        return Subject(
            task="t",
            model=model,
            tokenizer=tiny_tokenizer(),
            examples=tuple(encode(rows, tiny_tokenizer(), max_length)),
            labels=labels,
            batch_size=batch_size,
            max_length=max_length,
            max_new_tokens=max_new_tokens,
        )

    return make
