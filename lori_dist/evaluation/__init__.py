"""How well models do on the tasks' test rows: base, adapters and merges in one pass over a base that may be sharded.

Each metric is one file with a function `score(subject) -> float | None`; None says that the metric does not apply to
the task. The metrics here have two more: `ask(subject)` gives what to ask of the model, and `judge(subject, answers)`
what that says of each row. So the requests of all models share the batches, and these are divided among the ranks.
"""

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from lori_dist import config, formats, plugin
from lori_dist.adapter.adapter import Adapter
from lori_dist.adapter.formed import TaskAdapter
from lori_dist.errors import ConfigError
from lori_dist.evaluation._answers import BASE, Reader
from lori_dist.evaluation._passes import attached, passes_of
from lori_dist.evaluation._place import place
from lori_dist.evaluation._rows import Answer, Ask, Judge, Row, interval, mean
from lori_dist.evaluation._store import LM_EVAL, Key, Measured, Store
from lori_dist.rows import responses
from lori_dist.scores import LOWER_IS_BETTER
from lori_dist.training.data import Example, Segments, encode, read
from lori_dist.training.metrics import Record
from lori_dist.training.model import check, check_base, load_tokenizer
from lori_dist.training.world import World, from_first

__all__ = ["Found", "Store", "Subject", "check_adapter", "evaluate", "evaluate_all", "scored"]


@dataclass(frozen=True, kw_only=True, slots=True)
class Subject:
    """The subject of a metric: a model on the test rows of one task."""

    task: str
    """Name of the task, for messages."""
    model: PreTrainedModel
    """Model in evaluation mode, with its adapter if it has one."""
    tokenizer: PreTrainedTokenizerBase
    examples: tuple[Example, ...]
    labels: tuple[str, ...] | None
    """All responses there are, for classification."""
    batch_size: int
    """Rows run at once: no result depends on it."""
    max_length: int
    """Tokens of a row, as in training."""
    max_new_tokens: int
    """Most tokens of a generated response."""


def scored(subject: Subject, ask: Ask, judge: Judge) -> float | None:
    """The value of a metric of requests for one model, computed in this process alone."""
    requests = ask(subject)
    if requests is None:
        return None
    return mean(judge(subject, answered(subject, requests)))


def answered(subject: Subject, requests: Sequence[Any]) -> list[Answer]:
    """The answers of one model, in this process alone."""
    reader = Reader(
        model=subject.model, tokenizer=subject.tokenizer, batch_size=subject.batch_size, device=subject.model.device
    )
    return reader.answers(BASE, requests)[None]


Values = dict[str, dict[str, float]]
"""Task -> metric -> value."""
Rows = list[Segments]  # (prompt, response)
LmEval = Callable[[PreTrainedModel, PreTrainedTokenizerBase], Mapping[str, Mapping[str, float]]]


@dataclass(frozen=True, kw_only=True, slots=True)
class Found:
    """The results of one model's evaluation."""

    values: Values = field(default_factory=dict)
    """Without metrics that do not apply to a task."""
    intervals: dict[str, dict[str, list[float]]] = field(default_factory=dict)
    """Task -> metric -> lowest and highest value of an accuracy, see `_rows.interval`."""


def evaluate(
    run: config.Run,
    adapter: Path | None,
    *,
    device: torch.device | str = "cpu",
    progress: Callable[[str, int, int], None] | None = None,
) -> Values:
    """Every metric of the run on every task's test rows, of one model in one process; else as `evaluate_all`.

    adapter: an adapter file, trained or merged, or a LoRA folder of PEFT; None measures the base. Where a file has an
    update for each task, rows of a task meet that task's.
    """
    return evaluate_all(run, {"": adapter}, device=device, progress=progress)[""].values


def evaluate_all(
    run: config.Run,
    adapters: Mapping[str, Path | None],
    *,
    world: World | None = None,
    device: torch.device | str = "cpu",
    progress: Callable[[str, int, int], None] | None = None,
    record: Callable[[str, Record], None] = lambda name, record: None,
    stores: Mapping[str, Store] | None = None,
) -> dict[str, Found]:
    """Every metric of the run on every task's test rows, of several models on one copy of the base: name -> figures.

    adapters: by name; None measures the base. world: the gang whose ranks all call this; it shards the base as the
    run's engine says, and divides the rows. None: this process holds the base on the device. progress: called with what
    is measured next, how many measurements are done, and how many there are. record: gets a model's name, and metric,
    task, value and seconds of each measurement. stores: of models, where what is measured is kept; what is there is not
    measured again.
    progress, record and stores are for rank 0, and figures equal on all ranks.
    Raises ConfigError for test rows that cannot be used, and AdapterError if an adapter was trained on another base.
    """
    tokenizer = load_tokenizer(run.model)
    rows, more = _test_rows(run, tokenizer), _more(run)
    loaded, owners = _loaded(run, adapters)
    matrix = _Matrix(
        run=run, tokenizer=tokenizer, world=world, names=tuple(adapters), stores=stores or {}, record=record
    )
    metrics = [_Metric.found(name) for name in run.evaluate.metrics]
    measurements = [(task, metric) for task in run.tasks for metric in metrics]
    total = len(measurements) + (more is not None)
    keys = [(task, metric.name) for task, metric in measurements] + ([LM_EVAL] if more is not None else [])
    if matrix.lack(keys):
        base = place(run, world, torch.device(device))
        try:
            subjects = {task: _subject(run, task, rows[task], base.model, tokenizer) for task in run.tasks}
            reader = Reader(
                model=base.model,
                tokenizer=tokenizer,
                batch_size=run.evaluate.batch_size,
                device=torch.device(device) if world is None else world.device,
                world=world,
                is_sharded=base.is_sharded,
            )
            passes = passes_of(base.model, loaded, list(owners))
            for turn, one in enumerate(passes):
                with attached(reader, one) as names:
                    for number, (task, metric) in enumerate(measurements):
                        if progress is not None:
                            progress(f"{metric.name} of {task}", turn * total + number, total * len(passes))
                        of_task = {
                            owners[label][0]: name for label, name in names.items() if owners[label][1] in (None, task)
                        }
                        matrix.measure(reader, of_task, subjects[task], metric)
                    if more is not None:
                        if progress is not None:
                            progress("lm-eval", (turn + 1) * total - 1, total * len(passes))
                        matrix.measure_more(reader, names, more)
        finally:
            base.close()
    return {name: matrix.of(name, keys) for name in adapters}


Owner = tuple[str, str | None]
"""A model, and the task whose rows meet an adapter of it; None: rows of all tasks do."""


def _loaded(
    run: config.Run, adapters: Mapping[str, Path | None]
) -> tuple[dict[str, Adapter | TaskAdapter], dict[str, Owner]]:
    """Label -> adapter, and label -> owner, which models without an adapter have too.

    Where a model has an update for each task, these are adapters of their own, of which those of the run's tasks count.
    Raises ConfigError for a task of the run, or of lm-eval, for which a model has none.
    """
    loaded, owners = dict[str, Adapter | TaskAdapter](), dict[str, Owner]()
    for name, path in adapters.items():
        if path is None:
            owners[name] = name, None
            continue
        by_task = formats.by_task_or_whole(path)
        lacks = [f"tasks.{task}" for task in run.tasks if task not in by_task]
        if run.evaluate.lm_eval is not None:
            lacks.append("evaluate.lm_eval")
        if None not in by_task and lacks:
            raise ConfigError(
                f"{lacks[0]}: {path} has updates for the tasks {', '.join(map(str, by_task))} alone; add @TASK to its "
                f"path to measure one of them on everything, or remove {lacks[0]}"
            )
        for task, adapter in by_task.items():
            check_base(path, adapter.base, run.model)
            if task is None or task in run.tasks:
                label = name if task is None else f"{name}@{task}"
                loaded[label], owners[label] = adapter, (name, task)
    return loaded, owners


# --- what is measured ------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True, slots=True)
class _Metric:
    name: str
    score: Callable[[Subject], float | None]
    ask: Ask | None
    judge: Judge | None
    """Absent from a metric of the user's own that has a score alone."""

    @classmethod
    def found(cls, name: str) -> "_Metric":
        method = plugin.find("evaluation", name, "score", "evaluate.metrics")
        ask, judge = method.companion("ask"), method.companion("judge")
        return cls(name=name, score=method.load(), ask=ask if judge else None, judge=judge if ask else None)

    @property
    def is_accuracy(self) -> bool:
        return self.name.rpartition(".")[2] not in LOWER_IS_BETTER


@dataclass(kw_only=True, slots=True)
class _Matrix:
    """The results of all models, as far as they are known."""

    run: config.Run
    tokenizer: PreTrainedTokenizerBase
    world: World | None
    names: tuple[str, ...]
    stores: Mapping[str, Store]
    record: Callable[[str, Record], None]
    known: dict[str, dict[Key, Measured]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.known = {name: {} for name in self.names}
        self.known |= self._from_first(lambda: {name: store.read() for name, store in self.stores.items()})

    def lack(self, keys: Sequence[Key]) -> bool:
        """Whether anything is still to be measured."""
        return any(key not in self.known[name] for name in self.names for key in keys)

    def of(self, name: str, keys: Sequence[Key]) -> Found:
        found = Found(values={task: {} for task in self.run.tasks})
        for key in keys:
            measured = self.known[name][key]
            for task, values in measured.values.items():
                found.values.setdefault(task, {}).update(values)
            if measured.interval is not None:
                found.intervals.setdefault(key[0], {})[key[1]] = list(measured.interval)
        return found

    def measure(self, reader: Reader, names: Mapping[str, str | None], subject: Subject, metric: _Metric) -> None:
        """One metric of one task, of all models of a pass that lack it."""
        key = (subject.task, metric.name)
        left = {name: routed for name, routed in names.items() if key not in self.known[name]}
        if not left:
            return
        start = time.monotonic()
        for name, value, rows in self._scores(reader, left, subject, metric):
            values = {} if value is None else {subject.task: {metric.name: value}}
            limits = interval(rows) if rows and metric.is_accuracy else None
            self._keep(name, key, Measured(values=values, interval=limits), rows, time.monotonic() - start)

    def _scores(
        self, reader: Reader, names: Mapping[str, str | None], subject: Subject, metric: _Metric
    ) -> Iterator[tuple[str, float | None, list[Row]]]:
        if metric.ask is None or metric.judge is None:
            for name, routed in names.items():
                with reader.only(routed):
                    yield name, metric.score(subject), []
            return
        requests = metric.ask(subject)
        if requests is None:
            yield from ((name, None, []) for name in names)
            return
        answers = reader.answers(list(names.values()), requests)
        for name, routed in names.items():
            rows = metric.judge(subject, answers[routed])
            yield name, mean(rows), rows

    def measure_more(self, reader: Reader, names: Mapping[str, str | None], more: LmEval) -> None:
        for name, routed in names.items():
            if LM_EVAL not in self.known[name]:
                start = time.monotonic()
                with reader.only(routed):
                    values = {task: dict(of_task) for task, of_task in more(reader.model, self.tokenizer).items()}
                self._keep(name, LM_EVAL, Measured(values=values), [], time.monotonic() - start)

    def _keep(self, name: str, key: Key, measured: Measured, rows: Sequence[Row], seconds: float) -> None:
        self.known[name][key] = measured
        if self.world is not None and self.world.rank > 0:
            return
        if name in self.stores:
            self.stores[name].write(key, measured, rows)
        for task, values in measured.values.items():
            for metric, value in values.items():
                self.record(name, {"metric": metric, "task": task, "value": value, "seconds": seconds})

    def _from_first(self, make: Callable[[], Any]) -> Any:
        return make() if self.world is None else from_first(self.world, make)


def _more(run: config.Run) -> LmEval | None:
    """The function that measures the tasks of lm-eval; None if the run has none."""
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


def check_adapter(adapter: Path, model: config.Model) -> None:
    """Raises AdapterError if there is no adapter, or that of another base. Cheap: looks at no tensor of a file."""
    check_base(adapter, formats.base(adapter), model)


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
