"""How well models do on the tasks' test rows: base, adapters and merges in one pass over a base that may be sharded.

Each metric is one file with a function `score(subject) -> float | None`; None says that the metric does not apply to
the task. The metrics here have two more: `ask(subject)` gives what to ask of the model, and `judge(subject, answers)`
what that says of each row. So the requests of all models share the batches, and these are divided among the ranks.
"""

import contextlib
import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from lori_dist import config, formats, plugin
from lori_dist.adapter import packed
from lori_dist.adapter.adapter import Adapter
from lori_dist.adapter.task_adapter import TaskAdapter
from lori_dist.errors import ConfigError
from lori_dist.evaluation._answers import BASE, Reader
from lori_dist.evaluation._passes import attached, passes_of
from lori_dist.evaluation._place import place
from lori_dist.evaluation._rows import Answer, Ask, Continuation, Judge, Request, Row, interval, mean
from lori_dist.evaluation._store import LM_EVAL, Key, Measured, Store
from lori_dist.evaluation._writing import GREEDY, Sampling
from lori_dist.rows import responses
from lori_dist.scores import LOWER_IS_BETTER
from lori_dist.training import token_cache
from lori_dist.training.data import Example
from lori_dist.training.metrics import Record
from lori_dist.training.model import check, check_base, load_tokenizer
from lori_dist.training.world import World, from_first

__all__ = ["Found", "Store", "Subject", "check_adapter", "evaluate", "evaluate_all", "measuring", "scored"]


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
    sampling: Sampling = GREEDY
    """How the tokens of a response are chosen."""


def scored(subject: Subject, ask: Ask, judge: Judge) -> float | None:
    """The value of a metric of requests for one model, computed in this process alone."""
    requests = ask(subject)
    if requests is None:
        return None
    return mean(judge(subject, answered(subject, requests)))


def answered(subject: Subject, requests: Sequence[Any]) -> list[Answer]:
    """The answers of one model, in this process alone."""
    reader = Reader(
        model=subject.model,
        tokenizer=subject.tokenizer,
        batch_size=subject.batch_size,
        device=subject.model.device,
        sampling=subject.sampling,
    )
    return reader.answers(BASE, requests)[None]


Values = dict[str, dict[str, float]]
"""Task -> metric -> value."""
Rows = tuple[Example, ...]
LmEval = Callable[[Reader], Mapping[str, Mapping[str, float]]]


@dataclass(frozen=True, kw_only=True, slots=True)
class Found:
    """The results of one model's evaluation."""

    values: Values = field(default_factory=dict)
    """Without metrics that do not apply to a task."""
    intervals: dict[str, dict[str, list[float]]] = field(default_factory=dict)
    """Task -> metric -> lowest and highest value of an accuracy, see `_rows.interval`."""
    rows: dict[str, int] = field(default_factory=dict)
    """Task -> number of its test rows that were measured."""


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
    adapters: Mapping[str, Path | Adapter | None],
    *,
    world: World | None = None,
    device: torch.device | str = "cpu",
    progress: Callable[[str, int, int], None] | None = None,
    record: Callable[[str, Record], None] = lambda name, record: None,
    stores: Mapping[str, Store] | None = None,
    longest: int | None = None,
    tasks: Mapping[str, Collection[str]] | None = None,
) -> dict[str, Found]:
    """Every metric of the run on every task's test rows, of several models on one copy of the base: name -> figures.

    adapters: by name; a file or folder, or an adapter in memory; None measures the base. world: the gang whose ranks
    all call this; it shards the base as the run's engine says, and divides the rows. None: this process holds the base
    on the device. progress: called with what is measured next, how many measurements are done, and how many there are.
    record: gets a model's name, and metric, task, value and seconds of each measurement. stores: of models, where what
    is measured is kept; what is there is not measured again. longest: measure only so many rows of each task, those
    with the longest text; None: all. tasks: of models, the tasks on whose rows they are measured; others are measured
    on all.
    progress, record and stores are for rank 0, and figures equal on all ranks.
    Raises ConfigError for test rows that cannot be used, and AdapterError if an adapter was trained on another base.
    """
    tokenizer = load_tokenizer(run.model)
    rows, more = _test_rows(run, tokenizer, longest), _more(run)
    loaded, owners = _loaded(run, adapters)
    matrix = _Matrix(
        run=run, tokenizer=tokenizer, world=world, names=tuple(adapters), stores=stores or {}, record=record
    )
    measurements = _measurements(run)
    total = len(measurements) + (more is not None)
    own = {name: frozenset((tasks or {}).get(name, run.tasks)) for name in adapters}
    last = [LM_EVAL] if more is not None else []
    keys = {
        name: [(task, metric.name) for task, metric in measurements if task in own[name]] + last for name in adapters
    }
    if matrix.lack(keys):
        with _reading(run, world, torch.device(device), rows, tokenizer) as (reader, subjects):
            passes = passes_of(reader.model, loaded, list(owners))
            for turn, of_models in enumerate(passes):
                with attached(reader, of_models) as names:

                    def say(what: str, done: int, before: int = turn * total, of: int = total * len(passes)) -> None:
                        if progress is not None:
                            progress(what, before + done, of)

                    def of_task(task: str, held: Mapping[str, str | None] = names) -> dict[str, str | None]:
                        return {
                            owners[label][0]: name
                            for label, name in held.items()
                            if owners[label][1] in (None, task) and task in own[owners[label][0]]
                        }

                    matrix.measure(reader, of_task, subjects, measurements, say)
                    if more is not None:
                        say("lm-eval", total - 1)
                        matrix.measure_more(reader, names, more)
    numbers = {task: len(of_task) for task, of_task in rows.items()}
    return {name: replace(matrix.of(name, keys[name]), rows=_some(numbers, own[name])) for name in adapters}


def _some(numbers: Mapping[str, int], tasks: Collection[str]) -> dict[str, int]:
    return {task: number for task, number in numbers.items() if task in tasks}


Owner = tuple[str, str | None]
"""A model, and the task whose rows meet an adapter of it; None: rows of all tasks do."""


def _loaded(
    run: config.Run, adapters: Mapping[str, Path | Adapter | None]
) -> tuple[dict[str, Adapter | TaskAdapter], dict[str, Owner]]:
    """Label -> adapter, and label -> owner, which models without an adapter have too.

    Where a model has an update for each task, these are adapters of their own, of which those of the run's tasks count.
    Raises ConfigError for a task of the run, or of lm-eval, for which a model has none.
    """
    loaded, owners = dict[str, Adapter | TaskAdapter](), dict[str, Owner]()
    for name, path in adapters.items():
        if not isinstance(path, Path):
            owners[name] = name, None
            loaded |= {} if path is None else {name: path}
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


@contextlib.contextmanager
def measuring(
    run: config.Run, *, world: World | None = None, device: torch.device | str = "cpu"
) -> Iterator[Callable[[Mapping[str, Adapter]], dict[str, Values]]]:
    """Gives what measures adapters in memory, name -> adapter, as `evaluate_all` does those in files: again and again
    on one copy of the base, which is placed once. Every rank of the world calls this, and that, alike.

    Adapters that differ from those before in values and weights alone take their place on the model, where nothing else
    changes. Tasks of lm-eval are not measured. Raises as `evaluate_all`.
    """
    tokenizer = load_tokenizer(run.model)
    rows, measurements = _test_rows(run, tokenizer), _measurements(run)
    keys = [(task, metric.name) for task, metric in measurements]
    with (
        _reading(run, world, torch.device(device), rows, tokenizer) as (reader, subjects),
        contextlib.ExitStack() as held,
    ):

        def measure(adapters: Mapping[str, Adapter]) -> dict[str, Values]:
            matrix = _Matrix(
                run=run,
                tokenizer=tokenizer,
                world=world,
                names=tuple(adapters),
                stores={},
                record=lambda name, record: None,
            )

            if packed.update(reader.model, adapters):
                matrix.measure(reader, lambda task: {name: name for name in adapters}, subjects, measurements)
            else:
                held.close()
                for one in passes_of(reader.model, adapters, matrix.names):
                    held.close()
                    names = held.enter_context(attached(reader, one))
                    matrix.measure(reader, lambda task, names=names: names, subjects, measurements)  # type: ignore[misc]
            return {name: matrix.of(name, keys).values for name in adapters}

        yield measure


@contextlib.contextmanager
def _reading(
    run: config.Run,
    world: World | None,
    device: torch.device,
    rows: Mapping[str, Rows],
    tokenizer: PreTrainedTokenizerBase,
) -> Iterator[tuple[Reader, dict[str, Subject]]]:
    """Gives the base where it computes, as a reader, and task -> subject; afterwards the base's memory is free."""
    base = place(run, world, device)
    try:
        reader = Reader(
            model=base.model,
            tokenizer=tokenizer,
            batch_size=run.evaluate.batch_size,
            device=device if world is None else world.device,
            world=world,
            is_sharded=base.is_sharded,
            sampling=_sampling(run),
        )
        yield reader, {task: _subject(run, task, rows[task], base.model, tokenizer) for task in run.tasks}
    finally:
        base.close()


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


def _measurements(run: config.Run) -> list[tuple[str, _Metric]]:
    metrics = [_Metric.found(name) for name in run.evaluate.metrics]
    return [(task, metric) for task in run.tasks for metric in metrics]


@dataclass(frozen=True, kw_only=True, slots=True)
class _Left:
    """One metric of one task, and the models that lack it."""

    subject: Subject
    metric: _Metric
    names: Mapping[str, str | None]
    """Model -> what the reader calls it."""
    requests: Sequence[Request] | None
    """None where the metric asks nothing, or does not apply."""

    @classmethod
    def of(
        cls,
        subject: Subject,
        metric: _Metric,
        names: Mapping[str, str | None],
        known: Mapping[str, Mapping[Key, Measured]],
    ) -> "_Left":
        key = (subject.task, metric.name)
        left = {name: routed for name, routed in names.items() if key not in known[name]}
        asks = metric.ask if left and metric.judge is not None else None
        return cls(subject=subject, metric=metric, names=left, requests=None if asks is None else asks(subject))

    @property
    def key(self) -> Key:
        return self.subject.task, self.metric.name

    @property
    def continuations(self) -> list[Continuation]:
        """What models are asked to write, each once."""
        return list(dict.fromkeys(request for request in self.requests or () if isinstance(request, Continuation)))

    @property
    def is_written(self) -> bool:
        """Whether models write all that the metric asks for."""
        return bool(self.requests) and all(isinstance(request, Continuation) for request in self.requests or ())

    def judged(self, answers: Sequence[Answer]) -> list[Row]:
        assert self.metric.judge is not None
        return self.metric.judge(self.subject, answers)

    def scores(self, reader: Reader) -> Iterator[tuple[str, float | None, list[Row]]]:
        """Model, the metric's value and those of the rows, where there are any."""
        if self.metric.ask is None or self.metric.judge is None:
            for name, routed in self.names.items():
                with reader.only(routed):
                    yield name, self.metric.score(self.subject), []
            return
        if self.requests is None:
            yield from ((name, None, []) for name in self.names)
            return
        answers = reader.answers(list(self.names.values()), self.requests)
        for name, routed in self.names.items():
            rows = self.judged(answers[routed])
            yield name, mean(rows), rows


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

    def lack(self, keys: Mapping[str, Sequence[Key]]) -> bool:
        """Whether anything is still to be measured. keys: of each model."""
        return any(key not in self.known[name] for name in self.names for key in keys[name])

    def of(self, name: str, keys: Sequence[Key]) -> Found:
        found = Found(values={task: {} for task, metric in keys if (task, metric) != LM_EVAL})
        for key in keys:
            measured = self.known[name][key]
            for task, values in measured.values.items():
                found.values.setdefault(task, {}).update(values)
            if measured.interval is not None:
                found.intervals.setdefault(key[0], {})[key[1]] = list(measured.interval)
        return found

    def measure(
        self,
        reader: Reader,
        names: Callable[[str], Mapping[str, str | None]],
        subjects: Mapping[str, Subject],
        measurements: Sequence[tuple[str, _Metric]],
        say: Callable[[str, int], None] = lambda what, done: None,
    ) -> None:
        """The metrics of tasks, of all models of a pass that lack them. What models write comes last, that of all
        tasks together. names: task -> model -> what the reader calls it there. say: is called with what is measured
        next, and how many measurements are done."""
        written: list[_Left] = []
        done = 0
        for task, metric in measurements:
            one = _Left.of(subjects[task], metric, names(task), self.known)
            if one.is_written:
                written.append(one)
                continue
            say(f"{metric.name} of {task}", done)
            start = time.monotonic()
            for name, value, rows in one.scores(reader) if one.names else ():
                self._keep(name, one, value, rows, start)
            done += 1
        groups = [(list(one.names.values()), one.continuations) for one in written]
        texts = reader.written(groups)
        for one, (_, requests) in zip(written, groups, strict=True):
            say(f"{one.metric.name} of {one.subject.task}", done)
            start, found = time.monotonic(), next(texts)
            for which, name in enumerate(one.names):
                answers: dict[Request, Answer] = {
                    request: found[which, place] for place, request in enumerate(requests)
                }
                rows = one.judged([answers[request] for request in one.requests or ()])
                self._keep(name, one, mean(rows), rows, start)
            done += 1

    def measure_more(self, reader: Reader, names: Mapping[str, str | None], more: LmEval) -> None:
        for name, routed in names.items():
            if LM_EVAL not in self.known[name]:
                start = time.monotonic()
                with reader.only(routed):
                    values = {task: dict(of_task) for task, of_task in more(reader).items()}
                self._store(name, LM_EVAL, Measured(values=values), [], time.monotonic() - start)

    def _keep(self, name: str, one: "_Left", value: float | None, rows: Sequence[Row], start: float) -> None:
        values = {} if value is None else {one.subject.task: {one.metric.name: value}}
        limits = interval(rows) if rows and one.metric.is_accuracy else None
        self._store(name, one.key, Measured(values=values, interval=limits), rows, time.monotonic() - start)

    def _store(self, name: str, key: Key, measured: Measured, rows: Sequence[Row], seconds: float) -> None:
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

    tasks = _lm_eval.find(settings)
    return lambda reader: _lm_eval.measure(reader, tasks, settings)


def _sampling(run: config.Run) -> Sampling:
    settings = run.evaluate
    return Sampling(temperature=settings.temperature, top_p=settings.top_p, seed=settings.seed)


def _subject(
    run: config.Run, name: str, rows: Rows, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase
) -> Subject:
    check(rows, model)
    return Subject(
        task=name,
        model=model,
        tokenizer=tokenizer,
        examples=rows,
        labels=_labels(run.tasks[name]),
        batch_size=run.evaluate.batch_size,
        max_length=run.train.max_length,
        max_new_tokens=run.evaluate.max_new_tokens,
        sampling=_sampling(run),
    )


def _labels(task: config.Task) -> tuple[str, ...] | None:
    return None if task.labels is None else responses(task.labels, task.template)


def check_adapter(adapter: Path, model: config.Model) -> None:
    """Raises AdapterError if there is no adapter, or that of another base. Cheap: looks at no tensor of a file."""
    check_base(adapter, formats.base(adapter), model)


def _test_rows(run: config.Run, tokenizer: PreTrainedTokenizerBase, longest: int | None = None) -> dict[str, Rows]:
    """Read before anything slow happens, with the mistakes of all tasks at once."""
    rows: dict[str, Rows] = {}
    problems: list[str] = []
    for name, task in run.tasks.items():
        try:
            found = token_cache.of_part(run, name, "test", task.test, tokenizer)[: run.evaluate.rows]
            if longest is not None:
                found = sorted(found, key=lambda row: -len(row.prompt + row.response))[:longest]
            rows[name] = tuple(found)
        except ConfigError as error:
            problems.append(str(error))
    if problems:
        raise ConfigError("\n".join(problems))
    return rows
