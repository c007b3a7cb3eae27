"""Tasks of EleutherAI's lm-eval (the package `lm-eval`), on a model that is in memory, whole or sharded over a gang."""

import contextlib
import logging
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import datasets
import torch
import torch.distributed as dist
from lm_eval import simple_evaluate
from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager
from transformers import PreTrainedModel

from lori_dist.config import LmEval
from lori_dist.errors import ConfigError
from lori_dist.evaluation._answers import Reader
from lori_dist.evaluation._batches import hides_padding
from lori_dist.plugin import nearest
from lori_dist.training.data import pad_id
from lori_dist.training.tokens import prompt_ids
from lori_dist.training.world import World, from_first


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


def measure(reader: Reader, tasks: TaskManager, settings: LmEval) -> dict[str, dict[str, float]]:
    """Task or group -> metric -> value. Metrics are called `lm_eval/acc`, with a filter `lm_eval/acc/FILTER`.

    Every rank of the reader's gang calls this; each runs its share of the requests, and all get the figures.
    """
    model, tokenizer, world = reader.model, reader.tokenizer, reader.world
    batch_size = reader.batch_size
    # lm-eval pads the prompts of a batch on the left.
    of_two_lengths = prompt_ids(["a", "a text of several words to be padded to"], tokenizer)
    if batch_size > 1 and not hides_padding(model, of_two_lengths, pad_id(tokenizer), "left"):
        batch_size = 1
    if world is not None and world.size > 1:
        own = batch_size
        batch_size = from_first(world, lambda: own)
    with _quiet():
        divided = _Divided(pretrained=model, tokenizer=tokenizer, batch_size=batch_size)
        divided.divide(reader)
        found = simple_evaluate(
            divided,
            tasks=list(settings.tasks),
            num_fewshot=settings.num_fewshot,
            limit=settings.rows,
            task_manager=tasks,
            bootstrap_iters=0,
            log_samples=False,
        )
    # Of several processes of a machine, lm-eval gives the figures to the first alone.
    values = None if found is None else {name: dict(_values(row)) for name, row in found["results"].items()}
    if world is not None and world.size > 1:
        values = from_first(world, lambda: values)
    assert values is not None
    return values


class _Divided(HFLM):
    """A model of lm-eval whose requests are divided among the ranks of a gang, each of which knows all of them."""

    _world: World | None = None
    _is_sharded = False

    def divide(self, reader: Reader) -> None:
        """Divides what is asked from now on among the reader's ranks."""
        self._world, self._is_sharded, self._device = reader.world, reader.is_sharded, reader.device

    def loglikelihood(self, requests: list[Instance], disable_tqdm: bool = False) -> list[tuple[float, bool]]:
        return self._of_all(super().loglikelihood, requests)

    def loglikelihood_rolling(self, requests: list[Instance], disable_tqdm: bool = False) -> list[float]:
        return self._of_all(super().loglikelihood_rolling, requests)

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        return self._of_all(super().generate_until, requests)

    def _model_generate(self, context: torch.Tensor, max_length: int, stop: list[str], **options: Any) -> torch.Tensor:
        # Where a base is sharded, transformers keeps ranks in step that have as many batches each; see _in_step.
        generated: torch.Tensor = super()._model_generate(context, max_length, stop, synced_gpus=False, **options)
        return generated

    def _of_all(self, answer: Callable[..., list[Any]], requests: list[Instance]) -> list[Any]:
        """The answers to all requests, on every rank, each of which answers its own."""
        world = self._world
        if world is None or world.size == 1:
            return answer(requests, disable_tqdm=True)
        own = _share(requests, world)
        with _in_step(self.model, world) if self._is_sharded else contextlib.nullcontext():
            answers = answer([requests[number] for number in own], disable_tqdm=True) if own else []
        everyone: list[Any] = [None] * world.size
        dist.all_gather_object(everyone, dict(zip(own, answers, strict=True)))
        found = {number: one for of_rank in everyone for number, one in of_rank.items()}
        return [found[number] for number in range(len(requests))]


def _share(requests: Sequence[Instance], world: World) -> list[int]:
    """The numbers of a rank's requests. Those of one context stay together, as lm-eval computes it once for several
    continuations; contexts of about the same length are spread over the ranks."""
    of_context: dict[str, list[int]] = {}
    for number, request in enumerate(requests):
        of_context.setdefault(str(request.args[0]), []).append(number)
    contexts = sorted(of_context, key=lambda text: (-len(text), text))
    return [number for text in contexts[world.rank :: world.size] for number in of_context[text]]


@contextlib.contextmanager
def _in_step(model: PreTrainedModel, world: World) -> Iterator[None]:
    """Inside, every forward pass of a rank is one of all ranks, as it gathers what is sharded: a rank that comes to the
    end runs passes on a single token until all have come there."""
    is_spare = False

    def any_works(is_working: bool) -> bool:
        count = torch.tensor([int(is_working)], device=world.device)
        dist.all_reduce(count)
        return bool(count.item())

    def join(module: Any, args: Any) -> None:
        if not is_spare:
            any_works(True)

    handle = model.register_forward_pre_hook(join, prepend=True)
    try:
        yield
        is_spare = True
        one = torch.zeros(1, 1, dtype=torch.int64, device=world.device)
        while any_works(False):
            with torch.no_grad():
                model(input_ids=one, use_cache=False)
    finally:
        handle.remove()


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
