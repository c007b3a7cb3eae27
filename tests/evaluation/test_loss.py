import math
from collections.abc import Callable

import pytest
import torch
from transformers import PreTrainedModel

from lori_dist.evaluation import Subject
from lori_dist.evaluation.loss import score
from lori_dist.training.data import collate
from lori_dist.training.loss import loss_sum
from tests.models import tiny_llama

Make = Callable[..., Subject]


def test_it_is_the_mean_over_tokens_and_not_over_rows(learned: PreTrainedModel, subject: Make) -> None:
    rows = [("1+2=", "3"), ("who? ", "nobody I know of, and nowhere")]
    asked = subject(learned, rows)
    sums = [loss_sum(learned, collate([example], 0)).item() for example in asked.examples]
    assert score(asked) == pytest.approx(sum(sums) / (2 + 30), rel=1e-6)


@pytest.mark.parametrize("batch_size", [1, 3, 32])
def test_it_does_not_depend_on_the_batch_size(learned: PreTrainedModel, subject: Make, batch_size: int) -> None:
    assert score(subject(learned, batch_size=batch_size)) == pytest.approx(
        score(subject(learned, batch_size=2)), rel=1e-5
    )


def test_a_model_that_knows_nothing_needs_the_logarithm_of_the_vocabulary(subject: Make) -> None:
    model = tiny_llama()
    torch.nn.init.zeros_(model.get_output_embeddings().weight)
    assert score(subject(model)) == pytest.approx(math.log(64))
