"""The configuration of a run: frozen data, checked as a whole before anything heavy is imported."""

import contextlib
import copy
import functools
import importlib.util
import itertools
import json
import os
import re
import string
import types
import typing
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields, is_dataclass, replace
from pathlib import Path
from typing import Annotated, Any, Literal

import pydantic
import yaml

from lori_dist import plugin, storage, tables
from lori_dist.errors import ConfigError
from lori_dist.files import read_regular

Name = Annotated[str, pydantic.Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9_-]{0,63}$")]
"""Names become folder names: nothing in them can leave the run's folder."""


def _number(value: Any) -> Any:
    """Refuses what YAML makes of `yes` and `on`, which would pass for 1."""
    if isinstance(value, bool):
        raise ValueError("wanted a number, and YAML reads yes, no, on and off as true and false")
    return value


def _off(value: Any) -> Any:
    """YAML reads `off` as false."""
    return "off" if value is False else value


def _seconds(value: Any) -> Any:
    """Of `11h30m`."""
    if not isinstance(value, str) or value.replace(".", "", 1).isdecimal():
        return value
    found = re.fullmatch(r"(?:(\d+)d)?(?:(\d+)h)?(?:(\d+)m)?(?:(\d+)s)?", value)
    if found is None or not value:
        raise ValueError("wanted a duration such as 11h30m, 90m, or 3600 for so many seconds")
    return sum(int(number or 0) * unit for number, unit in zip(found.groups(), (86400, 3600, 60, 1), strict=True))


NotBool = pydantic.BeforeValidator(_number)
Positive = Annotated[int, pydantic.Field(gt=0), NotBool]
Count = Annotated[int, pydantic.Field(ge=0), NotBool]
Number = Annotated[float, pydantic.Field(allow_inf_nan=False), NotBool]
Rate = Annotated[float, pydantic.Field(gt=0, allow_inf_nan=False), NotBool]
Duration = Annotated[float, pydantic.Field(gt=0, allow_inf_nan=False), NotBool, pydantic.BeforeValidator(_seconds)]
Fraction = Annotated[float, pydantic.Field(gt=0, le=1), NotBool]
Decay = Annotated[float, pydantic.Field(ge=0, lt=1), NotBool]
Seed = Annotated[int, pydantic.Field(ge=0, lt=2**53), NotBool]
"""Below 2**53, so that every reader of JSON keeps it."""
Dtype = Literal["float32", "bfloat16", "float16"]
FilePath = Annotated[str, pydantic.AfterValidator(os.path.expanduser)]
Text = Annotated[str, pydantic.Field(min_length=1)]


T = typing.TypeVar("T")


@typing.dataclass_transform(frozen_default=True, kw_only_default=True, field_specifiers=(field,))
def section(cls: type[T]) -> type[T]:
    """A part of the configuration: a frozen dataclass that refuses keys it does not know."""
    cls.__pydantic_config__ = pydantic.ConfigDict(extra="forbid")  # type: ignore[attr-defined]
    return dataclass(frozen=True, kw_only=True, slots=True)(cls)


@section
class Choice:
    """A method chosen by name. Written as `magnitude`, or with options as `{name: deepspeed, stage: 3}`."""

    name: str
    options: dict[str, Any] = field(default_factory=dict)


def _choice(value: Any) -> Any:
    if isinstance(value, str):
        return {"name": value}
    if isinstance(value, dict):
        return {"name": value.get("name"), "options": {key: item for key, item in value.items() if key != "name"}}
    return value


Chosen = Annotated[Choice, pydantic.BeforeValidator(_choice)]


def _listed(value: Any) -> Any:
    return [value] if isinstance(value, str) and value != "all-linear" else value


@section
class Model:
    """The frozen base model."""

    path: FilePath
    """A folder with a transformers model and its tokenizer, or a name on the hub."""
    dtype: Dtype = "float32"
    """Of the base. Trained values are float32 whatever it is."""
    quantize: Literal["nf4", "int8"] | None = None
    """What the weights of its linear layers are kept in: 4 bits (QLoRA) or 8."""
    attention: Literal["eager", "sdpa", "flex_attention", "flash_attention_2", "flash_attention_3"] | None = None
    """What computes attention, in training and in evaluation, by transformers' name; null: as transformers chooses."""


@section
class Adapter:
    """Shape and sparsity of every task's adapter."""

    rank: Positive = 16
    alpha: Rate = 32.0
    """The update is (alpha / rank) * B A."""
    targets: Annotated[
        Literal["all-linear"] | Annotated[tuple[Text, ...], pydantic.Field(min_length=1)],
        pydantic.BeforeValidator(_listed),
    ] = "all-linear"
    """Names (`q_proj`), paths or patterns (`model.layers.*.mlp.*`) of linear layers, or `all-linear`."""
    density: Fraction = 0.1
    """Kept entries of B over all of them. 1.0 stops after the dense phase (LoRI-D)."""
    mask: Chosen = field(default_factory=lambda: Choice(name="magnitude"))
    """How the kept entries are chosen after calibration."""
    seed: Seed = 0
    """Each task's A follows from this and the task's name."""
    share_projection: bool = False
    """One A for all tasks: merges keep the rank, tasks are kept apart only by their B."""
    dtype: Dtype = "float32"
    """Of A."""
    projection: Literal["cached", "recomputed", "trained"] = "cached"
    """A stays in memory, rank * in_features entries a layer, or is made anew in each product, which takes time; or it
    is trained, as in LoRA, and is then part of the file."""
    modules_to_save: Annotated[tuple[Text, ...], pydantic.BeforeValidator(_listed)] = ()
    """Paths, or their last parts, of modules that are trained whole and stored with the adapter."""


@section
class Template:
    """How a row becomes text: `{field}` stands for a field of the row."""

    prompt: str = "{prompt}"
    response: str = "{response}"
    messages: Text | None = None
    """Instead of both: the field with a list of messages, `role` and `content` each, of which the tokenizer's chat
    template makes text. The last, the assistant's, is the response; those before are the prompt."""


@section
class Task:
    """One task: its rows and how they read. Rows are in JSON lines, JSON, CSV or Parquet files, or `hub:NAME:SPLIT`."""

    train: FilePath
    test: FilePath
    validation: FilePath | None = None
    """For train.validate_every, and for the search for weights of merges, which never sees test rows."""
    mixture: dict[FilePath, Fraction] = field(default_factory=dict)
    """More files to train on: path -> share of the rows that are trained on. `train` has the rest."""
    template: Template = field(default_factory=Template)
    labels: tuple[str, ...] | None = None
    """For classification: all values of the one field in template.response. Choice accuracy is measured over them."""
    seed: Seed | None = None
    """Of this task's A; by default it follows from adapter.seed and the task's name."""
    start: Text | None = None
    """An adapter of one task, a file or folder, whose training goes on: its kept entries from the values they have, on
    its own A. Then there is no calibration, and none of rank, alpha, density and targets in `adapter` counts."""
    steps: Positive | None = None
    epochs: Rate | None = None
    """Of this task, one of both, in the place of what `train` has."""
    lr: Rate | None = None
    """Of this task, in the place of train.lr."""


@section
class Calibrate:
    """The dense phase, which finds the mask."""

    steps: Positive | None = None
    epochs: Rate | None = None
    """Give one of steps and epochs, or neither for the length of the sparse phase."""
    lr: Rate | None = None
    """By default a tenth of train.lr (LoRI's scripts); with density 1.0, train.lr itself."""


@section
class Train:
    """How each task is trained."""

    engine: Chosen = field(default_factory=lambda: Choice(name="ddp"))
    """`ddp`, `fsdp`, or `{name: deepspeed, stage: 3}`: where base and values are; `lori show` lists the options."""
    steps: Positive | None = None
    epochs: Rate | None = None
    """Give exactly one of steps and epochs."""
    batch_size: Positive = 32
    """Rows of one optimizer step, over all ranks."""
    micro_batch_size: Positive = 8
    """Rows a rank runs at once; more are accumulated."""
    max_length: Annotated[int, pydantic.Field(ge=2), NotBool] = 512
    """Tokens of a row, at least 2. Longer prompts lose their beginning, longer responses their end."""
    pack: bool = False
    """Short rows of a micro-batch share a sequence of up to max_length tokens, without seeing each other."""
    lr: Rate = 5e-4
    schedule: Literal["constant", "linear", "cosine"] = "constant"
    warmup_steps: Count = 0
    weight_decay: Annotated[float, pydantic.Field(ge=0, allow_inf_nan=False), NotBool] = 0.0
    betas: tuple[Decay, Decay] = (0.9, 0.999)
    eps: Rate = 1e-8
    clip: Rate | None = 1.0
    """Largest global gradient norm; null for none."""
    activation_checkpointing: bool = False
    compile: bool = False
    """Transformer blocks as torch.compile makes them, at the first steps."""
    deterministic: bool = False
    """Only kernels that give the same bits every time, where others are faster."""
    on_divergence: Literal["stop", "skip", "rollback"] = "stop"
    """Where a step's loss or gradient is not finite, or its loss is a spike: end with an error, leave the update out,
    or go back to the last checkpoint and on with the rows after the step's."""
    spike: Annotated[float, pydantic.Field(gt=1, allow_inf_nan=False), NotBool] | None = None
    """A loss is one that is more than so many times the median of the last 32, of which there must be 8; null: none."""
    validate_every: Positive | None = None
    """Steps between measurements of the loss on the tasks' `validation` rows; null: none."""
    early_stop: Positive | None = None
    """Ends after so many measurements without a lower loss, and keeps the values that had the lowest."""
    calibrate: Calibrate = field(default_factory=Calibrate)
    checkpoint_every: Positive | None = 100
    """Steps between checkpoints; null for none."""
    keep: Positive = 2
    """Checkpoints kept."""
    time_limit: Duration | None = None
    """Seconds, or `11h30m`, from the start of the process, `lori train` or `lori run`, after which what is in training
    is saved and the process ends with code 3; the same command goes on from there. null: none."""
    seed: Seed = 0
    """Of the order of the rows."""


@section
class Search:
    """Weights found on validation rows, by evaluating merges with weights that are tried. It never sees test rows.

    The rows are the first of a task's `validation` file, or, where it has none, the last of its `train` file, which are
    then left out of its training.
    """

    method: Literal["coordinate", "cma"] = "coordinate"
    """Steps along every axis, halved where none helps, or CMA-ES, which needs the extra `search`."""
    per: Literal["task", "projection"] = "task"
    """One number for each task, or for each of its projections (`q_proj`)."""
    rows: Positive = 64
    """Of each task."""
    budget: Positive = 32
    """Evaluations at most. The first is that of equal weights."""
    bounds: tuple[Number, Number] = (0.0, 1.0)
    metric: Literal["loss", "exact_match", "choice"] = "loss"
    """Its mean over the tasks of the merge counts: the lowest loss, or the highest accuracy."""
    seed: Seed = 0
    """Of cma."""


Weight = Number | dict[Text, Number]
"""Of one task: a number, or pattern over module paths -> number."""


@section
class Merge:
    """One merged adapter."""

    method: Chosen
    weights: dict[str, Weight] | tuple[Weight, ...] | None = None
    """By task name, or in the order of the tasks; by default equal weights that sum to one. A task's weight is a number
    or, for layers and modules, a mapping such as `{default: 0.4, layers.0: 0.0, "*.mlp.*": 0.6}`: the last pattern that
    fits a module's path counts, and `default`, which is by default the equal weight, where none does."""
    tasks: tuple[str, ...] | None = None
    """By default all."""
    search: Search | None = None
    """Instead of weights: how they are found."""


@section
class LmEval:
    """Tasks of EleutherAI's lm-eval, which every model is measured on besides. Needs the extra `lm-eval`."""

    tasks: Annotated[tuple[Text, ...], pydantic.Field(min_length=1)]
    """Names of tasks, groups or tags."""
    include: FilePath | None = None
    """A folder with tasks of your own, in lm-eval's YAML."""
    rows: Positive | None = None
    """Only the first so many of a task."""
    num_fewshot: Count | None = None
    """Examples before each question; by default the task's own number."""


@section
class Evaluate:
    """How base, adapters and merges are measured on every task's test rows."""

    metrics: Annotated[tuple[str, ...], pydantic.Field(min_length=1)] = ("loss", "exact_match", "choice")
    """`choice` is measured on tasks that have labels."""
    batch_size: Positive = 32
    rows: Positive | None = None
    """Only the first so many test rows."""
    max_new_tokens: Positive = 64
    lm_eval: LmEval | None = None


@section
class Cluster:
    """Where the jobs run, and on how much of it."""

    address: str = "local"
    """`local` starts Ray on this machine; `auto` or host:port joins a cluster."""
    bind: Literal["127.0.0.1", "0.0.0.0"] = "127.0.0.1"
    """Where Ray of `local` listens: for this machine only, or on all interfaces. Whoever connects needs a token."""
    workers: Positive = 1
    """Ranks of each train job."""
    min_workers: Positive | None = None
    """Where nodes are lost, a train job goes on with as few as that; by default it waits for `workers`."""
    cpus_per_worker: Rate = 1.0
    gpus_per_worker: Count = 0
    """A rank computes on the first of them; with 0 on a CPU, whatever GPUs there are."""
    placement: Literal["pack", "spread", "strict_pack", "strict_spread"] = "pack"
    """A gang on few nodes, on many, on one, or on as many as it has workers: Ray's placement strategies."""
    max_concurrent: Positive | None = None
    """Jobs that run side by side; by default as many as there is room for."""
    retries: Count = 1
    """How often a failed gang is started again; it continues from its last checkpoint."""
    patience: Rate = 600.0
    """Seconds that a job waits for nodes that the cluster has lost."""
    packing: Annotated[
        Literal["off", "auto"] | Annotated[int, pydantic.Field(ge=2), NotBool], pydantic.BeforeValidator(_off)
    ] = "off"
    """Trainings of several tasks in one gang, over one copy of the base: as many as that at once, or all that could
    start. Each task gets the adapter it gets alone."""


@section
class Run:
    """Several tasks' trainings, the merges of their adapters, and the evaluation of all of them."""

    name: Name
    output: FilePath = "runs"
    """The run's results are in output/name. A path that all nodes see, or a URL that fsspec knows."""
    model: Model
    tasks: dict[Name, Task]
    adapter: Adapter = field(default_factory=Adapter)
    train: Train = field(default_factory=Train)
    merges: dict[Name, Merge] = field(default_factory=dict)
    evaluate: Evaluate = field(default_factory=Evaluate)
    cluster: Cluster = field(default_factory=Cluster)
    trackers: Annotated[tuple[str, ...], pydantic.BeforeValidator(_listed)] = ("tensorboard",)
    """Who gets the metrics besides metrics.jsonl: names of TRACKERS."""
    multitask: Chosen = field(default_factory=lambda: Choice(name="independent"))

    @property
    def folder(self) -> Path:
        """Where it is, or where this machine's mirror of it is."""
        if storage.is_url(self.output):
            return storage.mirror_folder(self.output, self.name)
        return Path(self.output).absolute() / self.name


Rule = Callable[[Run], Iterator[str]]
"""Gives every mistake of one kind."""


def held_out(run: Run, task: str) -> int:
    """How many of the last rows of a task's `train` file its training leaves out: those that searches for weights
    measure on. 0 where it has `validation`."""
    if run.tasks[task].validation is not None:
        return 0
    searches = [merge.search for merge in run.merges.values() if task in (merge.tasks or run.tasks)]
    return max((search.rows for search in searches if search is not None), default=0)


def load(path: str | Path, overrides: Sequence[str] = (), *, elsewhere: bool = False) -> Run:
    """The run described by a YAML file, with dotted overrides such as `train.lr=1e-4` applied.

    Relative paths in it are relative to the current directory. elsewhere: the run works on other machines, so that this
    one need not have its inputs. Raises ConfigError that lists every mistake by its path, with the nearest valid name.
    """
    tree, problems = _read(path, overrides)
    run, others = _check(tree, [rule for rule in RULES if not (elsewhere and rule in OF_THIS_MACHINE)])
    return _unless(problems + others, run)


def text(path: str | Path, overrides: Sequence[str] = ()) -> str:
    """YAML of a configuration with overrides applied, and else as it was written. Raises ConfigError."""
    tree, problems = _read(path, overrides)
    if problems:
        raise ConfigError("\n".join(problems))
    return yaml.safe_dump(tree, sort_keys=False, allow_unicode=True)


def _read(path: str | Path, overrides: Sequence[str]) -> tuple[dict[str, Any], list[str]]:
    """The tree in a YAML file with overrides applied, and what is wrong with these and its keys."""
    try:
        text = Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: cannot be read ({error}); give the path of a YAML file") from error
    tree, problems = _parse(text, str(path))
    if not isinstance(tree, dict):
        raise ConfigError(f"{path}: holds {type(tree).__name__}, wanted a mapping with name, model and tasks")
    for override in overrides:
        problems += _override(tree, override)
    return tree, problems


def validate(tree: Mapping[str, Any]) -> Run:
    """The run a plain tree describes. Raises ConfigError that lists every mistake."""
    run, problems = _check(copy.deepcopy(dict(tree)), RULES)
    return _unless(problems, run)


def _unless(problems: Sequence[str], run: Run) -> Run:
    if problems:
        raise ConfigError("\n".join(problems))
    return run


def dump(run: Run) -> dict[str, Any]:
    """The plain tree of a run; `validate` of it gives the run back."""
    return typing.cast(dict[str, Any], _plain(run))


def _plain(value: Any) -> Any:
    if isinstance(value, Choice):
        return {"name": value.name, **value.options}
    if is_dataclass(value):
        return {item.name: _plain(getattr(value, item.name)) for item in fields(value)}
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    return value


# --- reading ---------------------------------------------------------------------------------------------------------


class _Loader(yaml.SafeLoader):
    """Safe YAML that notices repeated keys and reads `5e-4` as the number it is."""

    def __init__(self, stream: str) -> None:
        super().__init__(stream)
        self.repeated: list[str] = []


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"^[-+]?[0-9]+(\.[0-9]*)?[eE][-+]?[0-9]+$"), list("-+0123456789")
)


def _mapping(loader: _Loader, node: yaml.MappingNode) -> dict[Any, Any]:
    lines: dict[str, list[int]] = {}
    for key, _ in node.value:
        lines.setdefault(str(key.value), []).append(key.start_mark.line + 1)
    loader.repeated += [
        f"{key} is given in lines {' and '.join(map(str, places))}" for key, places in lines.items() if len(places) > 1
    ]
    loader.flatten_mapping(node)
    return {
        loader.construct_object(key, deep=True): loader.construct_object(item, deep=True) for key, item in node.value
    }


_Loader.add_constructor(yaml.resolver.BaseResolver.DEFAULT_MAPPING_TAG, _mapping)


def _parse(text: str, source: str) -> tuple[Any, list[str]]:
    """What a YAML text holds, and the keys that it gives more than once."""
    loader = None
    try:
        loader = _Loader(text)
        tree = loader.get_single_data()
    except (yaml.YAMLError, ValueError, TypeError) as error:  # dates that do not exist, keys that are lists
        raise ConfigError(f"{source}: is not valid YAML: {error}") from error
    finally:
        if loader is not None:
            loader.dispose()
    return tree, [f"{source}: {item}; leave one" for item in loader.repeated]


def value(text: str, where: str) -> Any:
    """What a text given on the command line means, read as a configuration's values are. Raises ConfigError."""
    found, problems = _parse(text, where)
    if problems:
        raise ConfigError("\n".join(problems))
    return found


def _override(tree: dict[str, Any], override: str) -> list[str]:
    """Applies `path.to.key=value` to the tree. Returns what is wrong with it."""
    path, equals, text = override.partition("=")
    *parents, last = path.split(".")
    if not equals or not all((*parents, last)):
        return [f"{override}: an override reads path.to.key=value, such as train.lr=1e-4"]
    place = tree
    for depth, key in enumerate(parents):
        below = place.get(key)
        if below is None:
            below = place[key] = {}
        elif isinstance(below, str) and _kind(parents[: depth + 1]) is Choice:
            below = place[key] = {"name": below}  # `engine: deepspeed` and `train.engine.stage=3` name one choice
        if not isinstance(below, dict):
            where = ".".join(parents[: depth + 1])
            return [f"{override}: {where} is {below!r}, which has nothing below it; override {where} itself"]
        place = below
    try:
        place[last], problems = _parse(text, override)
    except ConfigError as error:
        return [str(error)]
    return problems


# --- what is wrong, all at once --------------------------------------------------------------------------------------


def _check(tree: dict[str, Any], rules: Iterable[Rule]) -> tuple[Run, list[str]]:
    """The run, and every mistake in it.

    The rules need a whole run, so places of the wrong form are mended first, in a copy that is thrown away: a
    misspelt key and a misspelt method are then reported together.
    """
    places_of_keys = _take_strange_keys(tree)
    problems = [f"{'.'.join(place)}: the key is no text; put it in quotes" for place in places_of_keys]
    mended = set(places_of_keys)
    run = None
    while run is None:  # mending a section can uncover the keys missing in it
        try:
            run = _schema().validate_python(tree)
        except pydantic.ValidationError as error:
            places = _places(error)
            problems += [_problem(place, errors) for place, errors in places.items() if not _within(place, mended)]
            mended |= places.keys()
            for place, errors in places.items():
                _mend(tree, place, is_missing=errors[0]["type"] in MISSING)
    for rule in rules:
        if rule is _merges and any(place[0] == "tasks" and len(place) <= 2 for place in mended):
            continue  # it would miss the tasks that were mended away
        problems += [
            problem
            for problem in rule(run)
            if not any(_touched(path.split("."), mended) for path in problem.partition(": ")[0].split(", "))
        ]
    return run, problems


@functools.cache
def _schema() -> pydantic.TypeAdapter[Run]:
    return pydantic.TypeAdapter(Run)


def _take_strange_keys(tree: dict[Any, Any], place: tuple[str, ...] = ()) -> list[tuple[str, ...]]:
    """Takes out what stands under keys that are no text, such as 1 or what YAML makes of `no`. Returns their paths."""
    strange = [key for key in tree if not isinstance(key, str)]
    for key in strange:
        del tree[key]
    return [(*place, str(key)) for key in strange] + [
        below
        for key, item in tree.items()
        if isinstance(item, dict)
        for below in _take_strange_keys(item, (*place, key))
    ]


MISSING = ("missing", "missing_argument", "missing_keyword_only_argument")
UNKNOWN = ("unexpected_keyword_argument", "extra_forbidden")


def _places(error: pydantic.ValidationError) -> dict[tuple[str, ...], list[Any]]:
    """The errors by place. Where a value fits none of several kinds, those that got furthest into it count."""
    skipped = ("function-", "literal[", "tuple[", "dict[", "[key]")  # the kind of value that was tried
    places: dict[tuple[str, ...], list[Any]] = {}
    for item in error.errors():
        place = tuple(str(part) for part in item["loc"] if not str(part).startswith(skipped))
        places.setdefault(place, []).append(item)
    return {
        place: items
        for place, items in places.items()
        if not any(len(other) > len(place) and other[: len(place)] == place for other in places)
    }


def _within(place: Sequence[str], places: set[tuple[str, ...]]) -> bool:
    return any(tuple(place[:depth]) in places for depth in range(len(place) + 1))


def _touched(place: Sequence[str], mended: set[tuple[str, ...]]) -> bool:
    """Whether a rule saw something mended there: in it, or, in a list or mapping of values, below it."""
    return _within(place, mended) or (len(place) >= 3 and any(other[: len(place)] == tuple(place) for other in mended))


def _mend(tree: dict[Any, Any], place: Sequence[str], *, is_missing: bool) -> None:
    """Gives a missing key any value of its kind; takes out a wrong one, or the mapping that should hold it."""
    holder, held = tree, tree
    holding = ""
    for depth, part in enumerate(place):
        if part not in held and is_missing and depth == len(place) - 1:
            kind = _kind(place)
            held[part] = (
                {} if (is_dataclass(kind) and kind is not Choice) or typing.get_origin(kind) is dict else "missing"
            )
            return
        if part not in held:
            break
        holder, holding = held, part
        if not isinstance(held[part], dict):
            break
        held = held[part]
    del holder[holding]


def _problem(place: Sequence[str], errors: Sequence[Any]) -> str:
    """One mistake: its path, what was found, what was wanted."""
    path, error = ".".join(place), errors[0]
    if error["type"] in UNKNOWN:
        known = [item.name for item in fields(_kind(place[:-1]))]
        return f"{path}: there is no such key; there are {', '.join(known)}.{plugin.nearest(place[-1], known)}"
    if error["type"] in MISSING:
        return f"{path}: is missing; give it a value"
    if error["type"] == "string_pattern_mismatch":
        return f"{path}: {error['input']!r} was given; names are at most 64 letters, digits, - and _"
    return f"{path}: {_found(error['input'])} was given; {' or '.join(_wanted(place, error) for error in errors)}"


def _found(value: Any) -> str:
    return {dict: "a mapping", list: "a list", type(None): "nothing"}.get(type(value), repr(value))


def _wanted(place: Sequence[str], error: Any) -> str:
    match error["type"]:
        case "literal_error":
            names = re.findall(r"'([^']*)'", error["ctx"]["expected"])
            return f"wanted {' or '.join(names)}" + plugin.nearest(str(error["input"]), names).replace(" Did", ". Did")
        case "dataclass_type" if _kind(place) is Choice:
            return "wanted a method's name, or a mapping with its name and options"
        case "dataclass_type" | "dict_type":
            return "wanted a mapping, key: value"
        case "tuple_type":
            return "wanted a list"
        case "string_type":
            return "wanted text" + ("; put it in quotes" if error["input"] is not None else "")
        case "value_error":
            return str(error["msg"]).removeprefix("Value error, ")
        case _:
            return str(error["msg"]).replace("Input should be", "it should be")


def _kind(place: Sequence[str]) -> Any:
    """What the annotations want at a path: follows the sections, and mappings by any key."""
    kind: Any = Run
    for part in place:
        if is_dataclass(kind):
            kind = typing.get_type_hints(kind).get(part)
            if typing.get_origin(kind) is types.UnionType:  # a section that may be left out
                kind = next((other for other in typing.get_args(kind) if is_dataclass(other)), kind)
        else:
            kind = typing.get_args(kind)[1] if typing.get_origin(kind) is dict else None
    return kind


def _methods(run: Run) -> Iterator[str]:
    chosen = [
        ("masks", run.adapter.mask, "mask", "adapter.mask"),
        ("engines", run.train.engine, "build", "train.engine"),
        ("multitask", run.multitask, "plan", "multitask"),
        *(("merges", merge.method, "merge", f"merges.{name}.method") for name, merge in run.merges.items()),
        *(("evaluation", Choice(name=metric), "score", "evaluate.metrics") for metric in run.evaluate.metrics),
    ]
    for folder, choice, role, path in chosen:
        try:
            plugin.find(folder, choice.name, role, path).bind(choice.options, path)
        except ConfigError as error:
            yield from str(error).split("\n")


def _projections(run: Run) -> Iterator[str]:
    if run.adapter.projection != "trained":
        return
    if run.adapter.share_projection:
        yield (
            "adapter.share_projection: makes one A for all tasks, and with adapter.projection trained each adapter "
            "gets its own; leave one out"
        )
    if run.adapter.dtype != "float32":
        yield f"adapter.dtype: {run.adapter.dtype} was given, and a trained A is float32; leave it out"


def _quantized(run: Run) -> Iterator[str]:
    if run.model.quantize == "nf4" and not _is_installed("bitsandbytes"):
        yield (
            "model.quantize: nf4 needs the package bitsandbytes, which is not installed; "
            "pip install 'lori_dist[quantize]', or use int8"
        )


FLASH = {
    "flash_attention_2": ("flash_attn", "flash-attn"),
    "flash_attention_3": ("flash_attn_interface", "flash-attn-3"),
}
"""Attention -> the package it is in, and what pip calls that."""


def _attention(run: Run) -> Iterator[str]:
    attention = run.model.attention
    if attention not in FLASH:
        return
    if run.model.dtype == "float32":
        yield (
            f"model.attention: {attention} was given, which computes in half precision, and model.dtype is float32; "
            "set that to bfloat16, or use sdpa"
        )
    if run.train.pack:
        yield (
            f"model.attention: {attention} was given, which lets packed rows see each other in a batch of several "
            "sequences; leave out train.pack, or use sdpa"
        )


def _attention_is_there(run: Run) -> Iterator[str]:
    package, name = FLASH.get(str(run.model.attention), (None, None))
    if package is not None and not _is_installed(package):
        yield (
            f"model.attention: {run.model.attention} needs the package {package}, which is not installed; "
            f"pip install {name}, or use sdpa"
        )


def _compiled(run: Run) -> Iterator[str]:
    if not run.train.compile:
        return
    engine = run.train.engine
    if engine.name == "deepspeed" and engine.options.get("stage") == 3:
        yield (
            "train.compile: is given with stage 3 of deepspeed, whose hooks around each layer leave too little of a "
            "block to compile; leave it out, or use fsdp"
        )
    if run.cluster.packing != "off":
        yield "train.compile: is given with cluster.packing, whose layers are told each batch's tasks; leave one out"
    if run.multitask.name == "joint" and run.multitask.options.get("projection") != "none":
        yield (
            "train.compile: is given with multitask joint, whose layers keep each task's gradient apart; leave it out, "
            "or set multitask.projection to none"
        )


def _saved(run: Run) -> Iterator[str]:
    if not run.adapter.modules_to_save:
        return
    if run.multitask.name != "independent":
        yield (
            f"adapter.modules_to_save: is given with multitask {run.multitask.name}, where tasks would share what is "
            "trained whole; train them independent, or leave it out"
        )
    if run.merges:
        yield (
            f"adapter.modules_to_save: is given, and merges.{next(iter(run.merges))} cannot merge what each task has "
            "trained whole; leave one of them out"
        )
    if run.model.dtype != "float32":
        yield f"adapter.modules_to_save: needs model.dtype float32, {run.model.dtype} was given"


def _lengths(run: Run) -> Iterator[str]:
    if (run.train.steps is None) == (run.train.epochs is None):
        given = "neither is given" if run.train.steps is None else "both are given"
        yield f"train.steps, train.epochs: {given}; give exactly one"
    if run.train.calibrate.steps is not None and run.train.calibrate.epochs is not None:
        yield "train.calibrate.steps, train.calibrate.epochs: both are given; give one, or neither"
    for path, steps in (("train.steps", run.train.steps), ("train.calibrate.steps", run.train.calibrate.steps)):
        if steps is not None and run.train.warmup_steps >= steps:
            yield f"train.warmup_steps: {run.train.warmup_steps} was given, {path} is {steps}; give fewer than those"
    for name, task in run.tasks.items():
        where = f"tasks.{name}"
        own = {key for key in ("steps", "epochs", "lr") if getattr(task, key) is not None}
        if {"steps", "epochs"} <= own:
            yield f"{where}.steps, {where}.epochs: both are given; give one, or neither"
        if task.steps is not None and run.train.warmup_steps >= task.steps:
            found = f"{run.train.warmup_steps} was given, {where}.steps is {task.steps}"
            yield f"train.warmup_steps: {found}; give fewer than those"
        if own and run.multitask.name == "joint":
            given = ", ".join(f"{where}.{key}" for key in sorted(own))
            yield f"{given}: given with multitask joint, which trains all tasks as one; give train's"


def trained_as(run: Run, task: str) -> Train:
    """`train`, with a task's own settings in the place of those for all."""
    own = run.tasks[task]
    has_length = own.steps is not None or own.epochs is not None
    steps, epochs = (own.steps, own.epochs) if has_length else (run.train.steps, run.train.epochs)
    return replace(run.train, steps=steps, epochs=epochs, lr=run.train.lr if own.lr is None else own.lr)


def _long_runs(run: Run) -> Iterator[str]:
    train = run.train
    if train.early_stop is not None and train.validate_every is None:
        yield "train.early_stop: is given without train.validate_every, which measures for it; give both"
    if train.validate_every is not None:
        for name, task in run.tasks.items():
            if task.validation is None:
                yield f"tasks.{name}.validation: is missing, and train.validate_every measures on its rows; give a file"
    if train.on_divergence == "rollback" and train.checkpoint_every is None:
        yield "train.on_divergence: rollback goes back to a checkpoint; give train.checkpoint_every"


def _tasks(run: Run) -> Iterator[str]:
    if not run.tasks:
        yield "tasks: none is given; give at least one"
    for name, task in run.tasks.items():
        if task.seed is not None and run.adapter.share_projection:
            yield f"tasks.{name}.seed: is given, but adapter.share_projection makes one A for all; leave one out"


def _mixtures(run: Run) -> Iterator[str]:
    for name, task in run.tasks.items():
        if sum(task.mixture.values()) >= 1:
            yield (
                f"tasks.{name}.mixture: its shares add up to {sum(task.mixture.values()):g}; give less than 1, as "
                "train has the rest"
            )
        if task.train in task.mixture:
            yield f"tasks.{name}.mixture: {task.train!r} is also tasks.{name}.train, which has the rest; leave it out"
        if task.mixture and run.multitask.name == "joint":
            yield f"tasks.{name}.mixture: is given with multitask joint, which mixes tasks evenly; leave one out"
        if task.template.messages is not None and task.labels is not None:
            yield f"tasks.{name}.labels: are for template.response, and template.messages is given; leave one out"


def _starts(run: Run) -> Iterator[str]:
    for name, task in run.tasks.items():
        if task.start is None:
            continue
        where = f"tasks.{name}.start"
        if not os.path.exists(task.start):
            yield f"{where}: there is no file or folder {task.start!r}; paths are relative to {Path.cwd()}"
        if task.seed is not None:
            yield f"tasks.{name}.seed: is given with {where}, whose A stays; leave one out"
        if run.multitask.name != "independent":
            yield f"{where}: is given with multitask {run.multitask.name}; use independent, or leave it out"
        if run.adapter.share_projection or run.adapter.projection == "trained" or run.adapter.modules_to_save:
            yield (
                f"{where}: its A stays and its kept entries alone are trained; leave out adapter.share_projection, "
                "adapter.modules_to_save and adapter.projection: trained"
            )


PACKED = (
    "gemma", "gemma2", "gpt2", "gpt_neox", "llama", "mistral", "mixtral", "phi", "phi3", "qwen2", "qwen3", "qwen3_moe",
)  # fmt: skip
"""Model types whose attention keeps packed rows apart, as tests show; others, such as gpt_oss, do not."""


def _packed_rows(run: Run) -> Iterator[str]:
    if not run.train.pack:
        return
    if run.multitask.name == "joint":
        yield "train.pack: is given with multitask joint, which tells tasks apart by their rows; leave one out"
    with contextlib.suppress(OSError, ValueError, AttributeError):  # the job says what is wrong with config.json
        settings = json.loads(read_regular(Path(run.model.path) / "config.json"))
        yield from unpackable(str(settings.get("model_type")))


def unpackable(model_type: str) -> Iterator[str]:
    """What is wrong with packing rows for a model."""
    if model_type not in PACKED:
        yield (
            f"train.pack: it is not known that {model_type} keeps packed rows apart, as {', '.join(PACKED)} do; "
            "leave it out"
        )


def _inputs(run: Run) -> Iterator[str]:
    for name, task in run.tasks.items():
        for part, path in files(task):
            if problem := tables.problem_of(path):
                yield f"tasks.{name}.{part}: {problem}"
            elif not tables.is_hub(path) and not os.path.isfile(path):
                kind = "regular file" if os.path.exists(path) else "file"
                yield f"tasks.{name}.{part}: there is no {kind} {path!r}; paths are relative to {Path.cwd()}"
    is_hub_name = run.model.path.count("/") == 1 and not run.model.path.startswith((".", "/", "~"))
    is_local = not is_hub_name or Path(run.model.path).parent.is_dir()
    if is_local and not os.path.isfile(Path(run.model.path) / "config.json"):
        yield f"model.path: there is no config.json in {run.model.path!r}; give a model's folder or its name on the hub"
    place = run.folder
    while not os.path.lexists(place):
        place = place.parent
    if not place.is_dir() or not os.access(place, os.W_OK | os.X_OK):
        found = f"{str(place)!r} is no folder that can be written to"
        yield f"output: {str(run.folder)!r} cannot be made, as {found}; give another"


def _in_a_job(run: Run) -> Iterator[str]:
    """A job of Ray works in a copy of what was submitted, which is deleted after it."""
    if (
        in_a_job()
        and not storage.is_url(run.output)
        and (not Path(run.output).is_absolute() or run.folder.is_relative_to(Path.cwd()))
    ):
        yield (
            f"output: {run.output!r} was given, which would be lost with the folder of this Ray job; give an absolute "
            "path that all nodes see"
        )


def in_a_job() -> bool:
    """Whether this process was started by `ray job submit`."""
    return "RAY_JOB_CONFIG_JSON_ENV_VAR" in os.environ


def relative_paths(run: Run) -> Iterator[str]:
    """What is wrong with a run that is to work on machines which share no current directory with this one."""
    paths = {"output": run.output, "model.path": run.model.path}
    if run.evaluate.lm_eval is not None and run.evaluate.lm_eval.include is not None:
        paths["evaluate.lm_eval.include"] = run.evaluate.lm_eval.include
    paths |= {f"tasks.{name}.start": task.start for name, task in run.tasks.items() if task.start is not None}
    paths |= {f"tasks.{name}.{part}": path for name, task in run.tasks.items() for part, path in files(task)}
    for place, path in paths.items():
        is_hub_name = place == "model.path" and path.count("/") == 1 and not path.startswith(".")
        is_elsewhere = (place == "output" and storage.is_url(path)) or tables.is_hub(path)
        if not (Path(path).is_absolute() or is_hub_name or is_elsewhere):
            yield f"{place}: {path!r} was given, which no other machine finds; give an absolute path that all nodes see"


def _positions(run: Run) -> Iterator[str]:
    if "exact_match" not in run.evaluate.metrics:
        return
    with contextlib.suppress(OSError, ValueError, AttributeError):  # the job says what is wrong with config.json
        settings = json.loads(read_regular(Path(run.model.path) / "config.json"))
        positions, asked = settings.get("max_position_embeddings"), run.evaluate.max_new_tokens
        if isinstance(positions, int) and asked >= positions:
            yield f"evaluate.max_new_tokens: {asked} was given, the model has {positions} positions; give less"


def _templates(run: Run) -> Iterator[str]:
    for name, task in run.tasks.items():
        for part in ("prompt", "response"):
            template = getattr(task.template, part)
            try:
                found = [item for item in string.Formatter().parse(template) if item[1] is not None]
                names = [name for _, name, _, _ in found if name is not None]
                strange = [
                    f"{name}{'!' if conversion else ''}{conversion or ''}{':' if form else ''}{form or ''}"
                    for _, name, form, conversion in found
                    if name is None or not name.isidentifier() or form or conversion
                ]
            except ValueError as error:
                yield f"tasks.{name}.template.{part}: {template!r} is no template ({error}); write {{{{ for a brace"
                continue
            if strange:
                yield f"tasks.{name}.template.{part}: {{{strange[0]}}} is no field; use plain names such as {{text}}"
            elif part == "response" and task.labels is not None and len(names) != 1:
                yield (
                    f"tasks.{name}.labels: are values of the one field in template.response, and {template!r} has "
                    f"{len(names)}; leave one field there, or leave out labels"
                )


def _fields(run: Run) -> Iterator[str]:
    """Looks at the first row only: the usual mistake shows there, and a file may have gigabytes."""
    for name, task in run.tasks.items():
        rows = {part: _first_row(path) for part, path in files(task)}
        messages = task.template.messages
        for text in ("prompt", "response") if messages is None else ("messages",):
            for wanted in _names(getattr(task.template, text)) if messages is None else [messages]:
                lacking = [part for part, row in rows.items() if row is not None and wanted not in row]
                if lacking:
                    row = rows[lacking[0]] or {}
                    yield (
                        f"tasks.{name}.template.{text}: takes the field {wanted!r}, which the first row of "
                        f"tasks.{name}.{lacking[0]} lacks; it has {', '.join(row)}.{plugin.nearest(wanted, row)}"
                    )


def _labels(run: Run) -> Iterator[str]:
    for name, task in run.tasks.items():
        names = _names(task.template.response)
        if task.labels is not None and (len(task.labels) < 2 or len(set(task.labels)) < len(task.labels)):
            yield f"tasks.{name}.labels: {list(task.labels)} was given; give at least two, each of them once"
            continue
        if task.labels is None or len(names) != 1:
            continue
        rows = ((part, *row) for part, path in files(task) for row in _rows(path, LOOKED_AT))
        found = ((part, number, row.get(names[0])) for part, number, row in rows)
        for part, number, label in found:
            if isinstance(label, str) and label not in task.labels:
                yield (
                    f"tasks.{name}.labels: row {number} of tasks.{name}.{part} has {label!r}, wanted one of "
                    f"{', '.join(task.labels)}.{plugin.nearest(label, task.labels)}"
                )
                break


PARTS = ("train", "test", "validation")


def files(task: Task) -> Iterator[tuple[str, str]]:
    """Place in the task's section, and path."""
    for part in PARTS:
        if getattr(task, part) is not None:
            yield part, getattr(task, part)
    yield from (("mixture", path) for path in task.mixture)


LOOKED_AT = 10_000
"""Rows of a file whose labels are compared before anything starts: a fraction of a second."""


def _first_row(path: str) -> dict[str, Any] | None:
    return next((row for _, row in _rows(path, 1)), None)


def _num_rows(path: str, most: int) -> int:
    """Rows, counted up to `most`; 0 if there is no such file."""
    with contextlib.suppress(OSError, ConfigError):
        return sum(1 for _ in itertools.islice(tables.read(path), most))
    return 0


def _rows(path: str, count: int) -> Iterator[tuple[int, dict[str, Any]]]:
    """Those of the first rows, numbered, that are some. What is wrong with the others is for the job to say."""
    if tables.is_hub(path):
        return  # which takes a network, and time
    with contextlib.suppress(OSError, ConfigError):
        for number, row in itertools.islice(tables.read(path), count):
            if isinstance(row, dict):
                yield number, row


def _names(template: str) -> list[str]:
    try:
        return [name for _, name, _, _ in string.Formatter().parse(template) if name and name.isidentifier()]
    except ValueError:
        return []


def _merges(run: Run) -> Iterator[str]:
    for name, merge in run.merges.items():
        path = f"merges.{name}"
        if name in run.tasks or name == "base":
            yield f"{path}: is also the name of a task or of the base; give the merge another name"
        tasks = merge.tasks if merge.tasks is not None else tuple(run.tasks)
        repeated = sorted({task for task in tasks if tasks.count(task) > 1})
        if repeated:
            yield f"{path}.tasks: {', '.join(repeated)} is given twice; leave one"
        if merge.tasks == ():
            yield f"{path}.tasks: none is given; name at least one, or leave it out for all"
        for task in tasks:
            if task not in run.tasks:
                listing = f"there are {', '.join(run.tasks)}.{plugin.nearest(task, run.tasks)}"
                yield f"{path}.tasks: there is no task {task!r}; {listing}"
        if merge.weights is not None and len(merge.weights) != len(tasks):
            yield (
                f"{path}.weights: {len(merge.weights)} given for {len(tasks)} adapters ({', '.join(tasks)}); "
                "give one weight per adapter, or leave it out for equal weights"
            )
        elif isinstance(merge.weights, dict) and set(merge.weights) != set(tasks):
            yield f"{path}.weights: are for {', '.join(merge.weights)}; wanted one for each of {', '.join(tasks)}"
    if "base" in run.tasks:
        yield "tasks.base: the name stands for the model without an adapter; give the task another name"


def _cluster(run: Run) -> Iterator[str]:
    least, most = run.cluster.min_workers, run.cluster.workers
    if least is not None and least > most:
        yield f"cluster.min_workers: {least} was given for {most} workers; give at most cluster.workers"
    if run.cluster.bind != "127.0.0.1" and run.cluster.address != "local":
        yield (
            f"cluster.bind: is given, but the cluster at {run.cluster.address!r} was started before and listens where "
            "it was told to; leave it out"
        )


def _packing(run: Run) -> Iterator[str]:
    if run.cluster.packing == "off":
        return
    if run.adapter.projection != "cached":
        yield (
            f"cluster.packing: {run.cluster.packing} was given, and packed adapters have a cached A, not a "
            f"{run.adapter.projection} one; set it to off, or adapter.projection to cached"
        )
    if run.adapter.modules_to_save:
        yield (
            f"cluster.packing: {run.cluster.packing} was given, and what adapter.modules_to_save trains whole is not "
            "packed; leave one out"
        )
    guarded = [name for name in ("spike", "validate_every") if getattr(run.train, name) is not None]
    guarded += ["on_divergence"] if run.train.on_divergence != "stop" else []
    if guarded:
        yield (
            f"cluster.packing: {run.cluster.packing} was given, and trainings with train.{guarded[0]} are not packed; "
            "leave one out"
        )
    if run.train.pack:
        yield (
            f"cluster.packing: {run.cluster.packing} was given, and rows of several tasks do not share sequences, as "
            "with train.pack; leave one out"
        )
    if storage.is_url(run.output):
        yield f"cluster.packing: {run.cluster.packing} was given, with an output that is a URL; set it to off"


def _searches(run: Run) -> Iterator[str]:
    for name, merge in run.merges.items():
        search, path = merge.search, f"merges.{name}"
        if search is None:
            continue
        tasks = {task: run.tasks[task] for task in merge.tasks or run.tasks if task in run.tasks}
        if merge.weights is not None:
            yield f"{path}.weights: are given, and {path}.search finds them; leave one out"
        if search.bounds[0] >= search.bounds[1]:
            low, high = search.bounds
            yield f"{path}.search.bounds: [{low:g}, {high:g}] was given; the second must be larger than the first"
        for task_name, task in tasks.items():
            found = _num_rows(task.train, search.rows + 1) if task.validation is None else None
            if found is not None and 0 < found <= search.rows:
                yield (
                    f"{path}.search.rows: {search.rows} was given, and tasks.{task_name}.train, whose last rows are "
                    f"held out for it, has {found}; give fewer, or tasks.{task_name}.validation"
                )
        if search.metric == "choice" and not any(task.labels for task in tasks.values()):
            yield f"{path}.search.metric: choice is measured on tasks that have labels, and none has; use loss"
        if search.method == "cma" and search.per == "task" and len(tasks) == 1:
            yield f"{path}.search.method: cma needs two weights, there is one; use coordinate"
        if search.method == "cma" and not _is_installed("cma"):
            yield (
                f"{path}.search.method: cma needs the package of this name, which is not installed; "
                "pip install 'lori_dist[search]', or use coordinate"
            )


def _lm_eval(run: Run) -> Iterator[str]:
    settings = run.evaluate.lm_eval
    if settings is None:
        return
    if not _is_installed("lm_eval"):
        yield "evaluate.lm_eval: lm-eval is not installed; pip install 'lori_dist[lm-eval]', or leave it out"
    if settings.include is not None and not os.path.isdir(settings.include):
        yield f"evaluate.lm_eval.include: there is no folder {settings.include!r}; paths are relative to {Path.cwd()}"


def _is_installed(package: str) -> bool:
    """A folder of that name in the current one is no package."""
    return getattr(importlib.util.find_spec(package), "origin", None) is not None


TRACKERS = ("aim", "clearml", "comet_ml", "dvclive", "mlflow", "swanlab", "tensorboard", "trackio", "wandb")
"""Those of accelerate. Each is in the package of its name."""


def _trackers(run: Run) -> Iterator[str]:
    for name in sorted(set(run.trackers)):
        if name not in TRACKERS:
            listing = f"there are {', '.join(TRACKERS)}.{plugin.nearest(name, TRACKERS)}"
            yield f"trackers: there is nothing called {name!r}; {listing}"
        elif not _is_installed(name):
            package = name.replace("_", "-")
            yield f"trackers: {name} is not installed; pip install {package}, or leave it out"
        if run.trackers.count(name) > 1:
            yield f"trackers: {name} is given twice; leave one"


RULES: tuple[Rule, ...] = (
    _methods,
    _projections,
    _saved,
    _quantized,
    _attention,
    _attention_is_there,
    _compiled,
    _lengths,
    _long_runs,
    _tasks,
    _mixtures,
    _starts,
    _packed_rows,
    _inputs,
    _in_a_job,
    _positions,
    _templates,
    _fields,
    _labels,
    _merges,
    _searches,
    _cluster,
    _packing,
    _lm_eval,
    _trackers,
)

OF_THIS_MACHINE = (_inputs, _in_a_job, _trackers, _attention_is_there)
"""What is so for this machine alone."""
