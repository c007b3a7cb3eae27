"""How well a model does on a task's test rows. Each metric is one file with one function,
`score(subject) -> float | None`; None says that the metric does not apply to the task."""

import contextlib
import functools
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from itertools import product
from pathlib import Path

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from lori_dist import config, plugin
from lori_dist.adapter import attach, packed, source
from lori_dist.adapter.adapter import Adapter
from lori_dist.errors import AdapterError, ConfigError
from lori_dist.rows import responses
from lori_dist.training.data import Example, Segments, encode, read
from lori_dist.training.metrics import Record
from lori_dist.training.model import check, check_base, load_model, load_tokenizer

__all__ = ["Subject", "check_adapter", "evaluate", "evaluate_all"]


@dataclass(frozen=True, kw_only=True, slots=True)
class Subject:
    """What a metric measures: a model on the test rows of one task."""

    task: str
    """Its name, for messages."""
    model: PreTrainedModel
    """In evaluation mode, with its adapter if it has one."""
    tokenizer: PreTrainedTokenizerBase
    examples: tuple[Example, ...]
    labels: tuple[str, ...] | None
    """All responses there are, for classification."""
    batch_size: int
    """Rows run at once: no result depends on it."""
    max_length: int
    """Tokens of a row, as in training."""
    max_new_tokens: int
    """Of a generated response."""


Rows = list[Segments]  # (prompt, response)
Measure = Callable[[PreTrainedModel, PreTrainedTokenizerBase], Mapping[str, Mapping[str, float]]]
"""Gives task -> metric -> value."""


def evaluate(
    run: config.Run,
    adapter: Path | None,
    *,
    device: torch.device | str = "cpu",
    progress: Callable[[str, int, int], None] | None = None,
    record: Callable[[Record], None] = lambda record: None,
) -> dict[str, dict[str, float]]:
    """Every metric of the run on every task's test rows: task -> metric -> value, without those that do not apply.

    adapter: an adapter file, trained or merged, or a LoRA folder of PEFT; None measures the base. progress: called with
    what is measured next, how many measurements are done, and how many there are. record: gets metric, task, value and
    seconds of each.
    Raises ConfigError for test rows that cannot be used, and AdapterError if the adapter was trained on another base.
    """
    tokenizer = load_tokenizer(run.model)
    rows, more = _test_rows(run, tokenizer), _more(run)
    model = _model(run.model, adapter).to(device)
    return _measured(run, rows, more, model, tokenizer, progress=progress, record=record)


def evaluate_all(
    run: config.Run,
    adapters: Mapping[str, Path | None],
    *,
    device: torch.device | str = "cpu",
    progress: Callable[[str, str, int, int], None] | None = None,
) -> Iterator[tuple[str, dict[str, dict[str, float]]]]:
    """As `evaluate`, for several adapters on one copy of the base, one after the other: name and values.

    adapters: by name; None measures the base. progress: gets the name first, else what that of `evaluate` gets.
    """
    tokenizer = load_tokenizer(run.model)
    rows, more = _test_rows(run, tokenizer), _more(run)
    loaded = {name: source.load(path) for name, path in adapters.items() if path is not None}
    for name, adapter in loaded.items():
        path = adapters[name]
        assert path is not None
        check_base(path, adapter.base, run.model)
    model = load_model(run.model).to(device)
    with_one = _one_at_a_time(model, loaded)
    for name in adapters:
        shown = None if progress is None else functools.partial(progress, name)
        with with_one(name):
            measured = _measured(run, rows, more, model, tokenizer, progress=shown, record=lambda record: None)
        yield name, measured


def _one_at_a_time(
    model: PreTrainedModel, adapters: dict[str, Adapter]
) -> Callable[[str], contextlib.AbstractContextManager[None]]:
    """What puts one of the adapters to work: all are attached and one is told, or, where that cannot be, attached."""
    if not packed.is_routable(model, adapters):
        return lambda name: _attached(model, adapters.get(name))
    routing = packed.attach_several(model, adapters) if adapters else None
    known = set(adapters)
    adapters.clear()  # their entries are in the model now

    def tell(name: str) -> contextlib.AbstractContextManager[None]:
        if routing is not None:
            routing.only(name if name in known else None)
        return contextlib.nullcontext()

    return tell


@contextlib.contextmanager
def _attached(model: PreTrainedModel, adapter: Adapter | None) -> Iterator[None]:
    if adapter is not None:
        attach.attach(model, adapter)
    try:
        yield
    finally:
        if adapter is not None:
            attach.detach(model)


def _measured(
    run: config.Run,
    rows: Mapping[str, Rows],
    more: Measure | None,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    *,
    progress: Callable[[str, int, int], None] | None,
    record: Callable[[Record], None],
) -> dict[str, dict[str, float]]:
    metrics = {
        name: plugin.find("evaluation", name, "score", "evaluate.metrics").load() for name in run.evaluate.metrics
    }
    subjects = {name: _subject(run, name, rows[name], model, tokenizer) for name in run.tasks}
    values: dict[str, dict[str, float]] = {name: {} for name in run.tasks}
    measurements = list(product(subjects, metrics))
    total = len(measurements) + (more is not None)
    for done, (name, metric) in enumerate(measurements):
        if progress is not None:
            progress(f"{metric} of {name}", done, total)
        start = time.monotonic()
        with torch.inference_mode():
            value = metrics[metric](subjects[name])
        if value is not None:
            values[name][metric] = value
            record({"metric": metric, "task": name, "value": value, "seconds": time.monotonic() - start})
    if more is not None:
        if progress is not None:
            progress("lm-eval", total - 1, total)
        start = time.monotonic()
        for name, found in more(model, tokenizer).items():
            values.setdefault(name, {}).update(found)
            for metric, value in found.items():
                record({"metric": metric, "task": name, "value": value, "seconds": time.monotonic() - start})
    return values


def _more(run: config.Run) -> Measure | None:
    """What measures the tasks of lm-eval, where the run has any."""
    settings = run.evaluate.lm_eval
    if settings is None:
        return None
    from lori_dist.evaluation import _lm_eval  # an extra

    tasks, batch_size = _lm_eval.find(settings), run.evaluate.batch_size
    return lambda model, tokenizer: _lm_eval.measure(model, tokenizer, tasks, settings, batch_size=batch_size)


def _subject(
    run: config.Run, name: str, rows: Rows, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase
) -> Subject:
    examples = tuple(encode(rows, tokenizer, run.train.max_length, where=f"tasks.{name}.test"))
    check(examples, model)
    return Subject(
        task=name,
        model=model,
        tokenizer=tokenizer,
        examples=examples,
        labels=_labels(run.tasks[name]),
        batch_size=run.evaluate.batch_size,
        max_length=run.train.max_length,
        max_new_tokens=run.evaluate.max_new_tokens,
    )


def _labels(task: config.Task) -> tuple[str, ...] | None:
    return None if task.labels is None else responses(task.labels, task.template)


def _model(settings: config.Model, adapter: Path | None) -> PreTrainedModel:
    if adapter is None:
        return load_model(settings)
    loaded = source.load(adapter)
    check_base(adapter, loaded.base, settings)
    model = load_model(settings)
    attach.attach(model, loaded)
    # Folded, it runs at the base's speed. A narrower dtype would round the update away; tied weights cannot be folded.
    if model.dtype == torch.float32 and settings.quantize is None:
        with contextlib.suppress(AdapterError):
            attach.fold(model)
    return model


def check_adapter(adapter: Path, model: config.Model) -> None:
    """Raises AdapterError if there is no adapter, or that of another base. Cheap: looks at no tensor of a file."""
    check_base(adapter, source.base(adapter), model)


def _test_rows(run: config.Run, tokenizer: PreTrainedTokenizerBase) -> dict[str, Rows]:
    """Read before anything slow happens, with the mistakes of all tasks at once."""
    rows: dict[str, Rows] = {}
    problems: list[str] = []
    for name, task in run.tasks.items():
        try:
            found = read(
                task.test, task.test_template, where=f"tasks.{name}.test", tokenizer=tokenizer, labels=task.labels
            )
            rows[name] = found[: run.evaluate.rows]
        except ConfigError as error:
            problems.append(str(error))
    if problems:
        raise ConfigError("\n".join(problems))
    return rows
