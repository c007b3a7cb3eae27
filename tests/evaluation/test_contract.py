"""Laws of every metric, found as the configuration finds them."""

import copy
import inspect
from collections.abc import Callable

import pytest
import torch
from transformers import PreTrainedModel

from lori_dist import plugin
from lori_dist.evaluation import Subject
from tests.evaluation.conftest import LABELS, ROWS

Make = Callable[..., Subject]
metrics = pytest.mark.parametrize("metric", plugin.names("evaluation"))


def scored(metric: str) -> Callable[[Subject], float | None]:
    return plugin.find("evaluation", metric, "score", "evaluate.metrics").load()


def test_the_metrics_are_known() -> None:
    assert {"loss", "exact_match", "choice"} <= set(plugin.names("evaluation"))


@metrics
def test_a_metric_takes_a_subject_and_says_what_it_is(metric: str) -> None:
    function = scored(metric)
    assert list(inspect.signature(function).parameters) == ["subject"]
    assert plugin.find("evaluation", metric, "score", "evaluate.metrics").summary


@metrics
def test_a_metric_is_a_number_that_does_not_depend_on_the_batch(
    learned: PreTrainedModel, subject: Make, metric: str
) -> None:
    rows = [(prompt, label) for prompt, _ in ROWS for label in LABELS]
    values = [scored(metric)(subject(learned, rows, labels=LABELS, batch_size=size)) for size in (1, 3, 32, 32)]
    assert all(type(value) is float for value in values)
    assert values[2] == values[3]
    assert values == pytest.approx([values[0]] * 4, rel=1e-5)


@metrics
def test_a_metric_leaves_the_model_as_it_was(learned: PreTrainedModel, subject: Make, metric: str) -> None:
    model = copy.deepcopy(learned)
    generation = copy.deepcopy(model.generation_config.to_dict())
    scored(metric)(subject(model, [("q", "yes")], labels=LABELS))
    assert model.generation_config.to_dict() == generation
    assert not model.training
    for (name, after), before in zip(model.named_parameters(), learned.parameters(), strict=True):
        assert torch.equal(after, before), name


@metrics
def test_a_metric_draws_no_random_numbers(learned: PreTrainedModel, subject: Make, metric: str) -> None:
    state = torch.get_rng_state()
    scored(metric)(subject(learned, [("q", "yes")], labels=LABELS))
    assert torch.equal(torch.get_rng_state(), state)
