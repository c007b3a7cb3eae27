"""Tasks of EleutherAI's lm-eval (the package `lm-eval`), on a model that is in memory."""

import contextlib
import logging
from collections.abc import Iterator
from typing import Any

import datasets
from lm_eval import simple_evaluate
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from lori_dist.config import LmEval
from lori_dist.errors import ConfigError
from lori_dist.evaluation._batches import hides_padding
from lori_dist.plugin import nearest
from lori_dist.training.data import pad_id
from lori_dist.training.tokens import prompt_ids


def find(settings: LmEval) -> TaskManager:
    """The tasks there are. Raises ConfigError for one that is asked for and is not there."""
    if settings.include is not None:  # of which lm-eval makes a list in no time; of its own it takes seconds
        own = TaskManager(include_path=settings.include, include_defaults=False)
        if set(settings.tasks) <= set(own.all_tasks):
            return own
    tasks = TaskManager(include_path=settings.include)
    for name in settings.tasks:
        if name not in tasks.all_tasks:
            where = "lm-eval" if settings.include is None else f"lm-eval and {settings.include}"
            raise ConfigError(
                f"evaluate.lm_eval.tasks: unknown task, group or tag {name!r} in {where}; `lm_eval ls tasks` lists "
                f"those of lm-eval.{nearest(name, tasks.all_tasks)}"
            )
    return tasks


def measure(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    tasks: TaskManager,
    settings: LmEval,
    *,
    batch_size: int,
) -> dict[str, dict[str, float]]:
    """Task or group -> metric -> value. Metrics are called `lm_eval/acc`, with a filter `lm_eval/acc/FILTER`."""
    # lm-eval pads the prompts of a batch on the left.
    of_two_lengths = prompt_ids(["a", "a text of several words to be padded to"], tokenizer)
    if batch_size > 1 and not hides_padding(model, of_two_lengths, pad_id(tokenizer), "left"):
        batch_size = 1
    with _quiet():
        found = simple_evaluate(
            HFLM(pretrained=model, tokenizer=tokenizer, batch_size=batch_size),
            tasks=list(settings.tasks),
            num_fewshot=settings.num_fewshot,
            limit=settings.rows,
            task_manager=tasks,
            bootstrap_iters=0,
            log_samples=False,
        )
    assert found is not None
    return {name: dict(_values(row)) for name, row in found["results"].items()}


def _values(row: dict[str, Any]) -> Iterator[tuple[str, float]]:
    for key, value in row.items():
        metric, comma, of_filter = key.partition(",")
        if comma and not metric.endswith("_stderr") and not isinstance(value, str):
            yield f"lm_eval/{metric}" if of_filter == "none" else f"lm_eval/{metric}/{of_filter}", float(value)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Without bars and remarks on each of its requests."""
    logger, bars = logging.getLogger("lm_eval"), datasets.is_progress_bar_enabled()
    level = logger.level
    logger.setLevel(logging.ERROR)
    datasets.disable_progress_bar()
    try:
        yield
    finally:
        logger.setLevel(level)
        if bars:
            datasets.enable_progress_bar()
