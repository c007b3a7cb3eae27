"""The configuration of a run: frozen data, checked as a whole before anything heavy is imported."""

import codecs
import contextlib
import datetime
import functools
import importlib.util
import itertools
import json
import math
import os
import re
import string
import types
import typing
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import MISSING, dataclass, field, fields, is_dataclass, replace
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
    """Refuses true and false, which would pass for 1 and 0."""
    if isinstance(value, bool):
        raise ValueError("wanted a number")
    return value


def _off(value: Any) -> Any:
    """YAML reads `off` as false."""
    return "off" if value is False else value


def _seconds(value: Any) -> Any:
    """Of `11h30m`."""
    if not isinstance(value, str) or value.replace(".", "", 1).isdecimal():
        return value
    found = re.fullmatch(r"(?:(\d{1,9})d)?(?:(\d{1,9})h)?(?:(\d{1,9})m)?(?:(\d{1,9})s)?", value)
    if found is None or not value:
        raise ValueError("wanted a duration such as 11h30m, 1m30s, or 3600 for so many seconds")
    return sum(int(number or 0) * unit for number, unit in zip(found.groups(), (86400, 3600, 60, 1), strict=True))


NotBool = pydantic.BeforeValidator(_number)
Positive = Annotated[int, pydantic.Field(gt=0), NotBool]
Count = Annotated[int, pydantic.Field(ge=0), NotBool]
Number = Annotated[float, pydantic.Field(allow_inf_nan=False), NotBool]
Rate = Annotated[float, pydantic.Field(gt=0, allow_inf_nan=False), NotBool]
Duration = Annotated[
    float,
    pydantic.Field(gt=0, allow_inf_nan=False),
    NotBool,
    pydantic.BeforeValidator(_seconds, json_schema_input_type=float | str),
]
Fraction = Annotated[float, pydantic.Field(gt=0, le=1), NotBool]
Decay = Annotated[float, pydantic.Field(ge=0, lt=1), NotBool]
Seed = Annotated[int, pydantic.Field(ge=0, lt=2**53), NotBool]
"""Below 2**53, so that every reader of JSON keeps it."""
Dtype = Literal["float32", "bfloat16", "float16"]
FilePath = Annotated[str, pydantic.AfterValidator(os.path.expanduser)]
Text = Annotated[str, pydantic.Field(min_length=1)]


def _date(value: Any) -> Any:
    """As text, whether YAML has made a date of it or not."""
    if isinstance(value, datetime.date) and not isinstance(value, datetime.datetime):
        return value.isoformat()
    if isinstance(value, str):
        with contextlib.suppress(ValueError):
            return datetime.datetime.strptime(value, "%Y-%m-%d").date().isoformat()
    raise ValueError("wanted a date such as 2026-01-31")


Date = Annotated[str, pydantic.BeforeValidator(_date)]


T = typing.TypeVar("T")


@typing.dataclass_transform(frozen_default=True, kw_only_default=True, field_specifiers=(field,))
def section(cls: type[T]) -> type[T]:
    """A part of the configuration: a frozen dataclass that refuses keys it does not know.

    The text below a key is its description in the JSON schema and in the reference of all settings.
    """
    cls.__pydantic_config__ = pydantic.ConfigDict(extra="forbid", use_attribute_docstrings=True)  # type: ignore[attr-defined]
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


class Methods(typing.NamedTuple):
    """What a Choice chooses from: a folder of methods, and what their functions are called."""

    folder: str
    role: str


MASKS, ENGINES = Methods("masks", "mask"), Methods("engines", "build")
MERGES, PLANS = Methods("merges", "merge"), Methods("multitask", "plan")
Chosen = pydantic.BeforeValidator(_choice)


def _listed(value: Any) -> Any:
    return [value] if isinstance(value, str) and value != "all-linear" else value


Listed = pydantic.BeforeValidator(_listed, json_schema_input_type=Text | tuple[Text, ...])


@section
class Model:
    """The frozen base model."""

    path: FilePath
    """Folder of a transformers model with its tokenizer, or its name on the hub."""
    dtype: Dtype = "float32"
    """Data type of the base model's weights; trained values are always float32."""
    quantize: Literal["nf4", "int8"] | None = None
    """Keep the base's linear layers in 4 bits (nf4, as QLoRA; needs bitsandbytes) or in 8 (int8)."""
    attention: Literal["eager", "sdpa", "flex_attention", "flash_attention_2", "flash_attention_3"] | None = None
    """Attention implementation by its name in transformers, for training and evaluation; null: transformers chooses."""
    trust_remote_code: bool = False
    """Run Python code in the model's folder or repository (`auto_map` in its config.json or tokenizer_config.json), in
    every process of the run; set it only for code that you have read."""


@section
class Adapter:
    """Shape and sparsity of every task's adapter."""

    rank: Positive = 16
    """Rows of A and columns of B in every layer."""
    alpha: Rate = 32.0
    """The update of a layer is (alpha / rank) * B A."""
    targets: Annotated[
        Literal["all-linear"] | Annotated[tuple[Text, ...], pydantic.Field(min_length=1)],
        Listed,
    ] = "all-linear"
    """Linear layers to adapt: all-linear, or names (q_proj), paths and patterns (model.layers.*.mlp.*)."""
    exclude: Annotated[tuple[Text, ...], Listed] = ()
    """Names, paths or patterns of layers, or of modules with layers in them, that are left out of the targets."""
    density: Fraction = 0.1
    """Share of B's entries that are kept and trained; 1.0 stops after the dense phase (LoRI-D)."""
    mask: Annotated[Choice, Chosen, MASKS] = field(default_factory=lambda: Choice(name="magnitude"))
    """Method that chooses the kept entries after the dense phase."""
    seed: Seed = 0
    """Seed of the random A: each task's A follows from this number and the task's name."""
    share_projection: bool = False
    """Give all tasks the same A: linear merges then keep the rank, and only B differs between tasks."""
    dtype: Dtype = "float32"
    """Data type of A."""
    projection: Literal["cached", "recomputed", "trained"] = "cached"
    """How A is held: cached in memory, recomputed in each product (slower, no memory), or trained, as in LoRA."""
    modules_to_save: Annotated[tuple[Text, ...], Listed] = ()
    """Names of modules that are trained in full and stored with the adapter; such runs have no merges."""


@section
class Template:
    """How a row becomes text: `{field}` stands for a field of the row."""

    prompt: str = "{prompt}"
    """Text of the prompt; {field} stands for a field of the row."""
    response: str = "{response}"
    """Text of the response, which is what is learned."""
    messages: Text | None = None
    """Field with a list of chat messages (role, content), used instead of both: the last one is the response."""
    date: Date | None = None
    """Date that a chat template writes as today's, as 2026-01-31; null: 2024-07-26, so that the text of a run is the
    same on every day."""


@section
class Task:
    """One task: its rows and how they read. Rows are in JSON lines, JSON, CSV, TSV or Parquet, or `hub:NAME:SPLIT`."""

    train: FilePath
    """Training rows: a JSON lines, JSON, CSV, TSV or Parquet file, or hub:NAME:SPLIT, which is streamed."""
    test: FilePath
    """Rows to evaluate on, in the same formats."""
    validation: FilePath | None = None
    """Rows for train.validate_every and for searches of merge weights, which never see test rows."""
    mixture: dict[FilePath, Fraction] = field(default_factory=dict)
    """More files to train on, each with its share of the rows; `train` has the rest."""
    template: Template = field(default_factory=Template)
    """How a row becomes a prompt and a response."""
    labels: tuple[str, ...] | None = None
    """For classification: all values of the one field in template.response."""
    seed: Seed | None = None
    """Seed of this task's A; null: it follows from adapter.seed and the task's name."""
    start: Text | None = None
    """Adapter of one task, a file or folder, to continue from: its A and its kept entries stay, and calibration is
    skipped."""
    steps: Positive | None = None
    """Optimizer steps of this task; overrides train.steps and train.epochs."""
    epochs: Rate | None = None
    """Passes over this task's rows; overrides train.steps and train.epochs."""
    lr: Rate | None = None
    """Learning rate of this task; overrides train.lr."""


@section
class Calibrate:
    """The dense phase, which finds the mask."""

    steps: Positive | None = None
    """Optimizer steps of the dense phase; null, as is epochs: as long as the sparse phase."""
    epochs: Rate | None = None
    """Passes over the rows in the dense phase; set at most one of steps and epochs."""
    lr: Rate | None = None
    """Learning rate of the dense phase; null: a tenth of train.lr, or train.lr with density 1.0."""


@section
class Train:
    """How each task is trained."""

    engine: Annotated[Choice, Chosen, ENGINES] = field(default_factory=lambda: Choice(name="ddp"))
    """Engine that distributes the training: ddp, fsdp or {name: deepspeed, stage: 3}."""
    steps: Positive | None = None
    """Optimizer steps; set exactly one of steps and epochs."""
    epochs: Rate | None = None
    """Passes over the training rows; set exactly one of steps and epochs."""
    batch_size: Positive = 32
    """Rows of one optimizer step, over all ranks."""
    micro_batch_size: Positive = 8
    """Rows that a rank runs at once; a larger batch is accumulated."""
    max_length: Annotated[int, pydantic.Field(ge=2), NotBool] = 512
    """Tokens of a row; longer prompts lose their beginning, longer responses their end."""
    pack: bool = False
    """Put several short rows into one sequence of up to max_length tokens; rows do not attend to each other."""
    lr: Rate = 5e-4
    """Learning rate."""
    schedule: Literal["constant", "linear", "cosine"] = "constant"
    """Course of the learning rate after warmup."""
    warmup_steps: Count = 0
    """Steps over which the learning rate rises from 0."""
    weight_decay: Annotated[float, pydantic.Field(ge=0, allow_inf_nan=False), NotBool] = 0.0
    """Weight decay of AdamW."""
    betas: tuple[Decay, Decay] = (0.9, 0.999)
    """Betas of AdamW."""
    eps: Rate = 1e-8
    """Epsilon of AdamW."""
    clip: Rate | None = 1.0
    """Largest global norm of the gradient; null: no clipping."""
    activation_checkpointing: bool = False
    """Recompute activations in the backward pass to save memory."""
    compile: bool = False
    """Compile transformer blocks with torch.compile at the first steps."""
    deterministic: bool = False
    """Use only kernels that give the same bits every time, even where others are faster."""
    on_divergence: Literal["stop", "skip", "rollback"] = "stop"
    """What to do at a loss or gradient that is not finite, or a spike: stop with an error, skip the update, or rollback
    to the last checkpoint and continue with the rows after it."""
    spike: Annotated[float, pydantic.Field(gt=1, allow_inf_nan=False), NotBool] | None = None
    """Count a loss above this many times the median of the last 32 (8 at least) as a spike; null: no loss is one."""
    validate_every: Positive | None = None
    """Steps between measurements of the loss on the tasks' validation rows; null: no measurements."""
    early_stop: Positive | None = None
    """End after this many measurements without a lower loss, and keep the best values; null: never."""
    calibrate: Calibrate = field(default_factory=Calibrate)
    """The dense phase, which finds the mask."""
    checkpoint_every: Positive | None = 100
    """Steps between checkpoints; null: no checkpoints."""
    keep: Positive = 2
    """Checkpoints to keep."""
    time_limit: Duration | None = None
    """Time after the start of the process, in seconds or as 11h30m or 1m30s, at which it saves and exits with code 3;
    the same command resumes it."""
    seed: Seed = 0
    """Seed of the order of the rows."""


@section
class Search:
    """Weights found on validation rows, by evaluating merges with weights that are tried. It never sees test rows.

    The rows are the first of a task's `validation` file, or, where it has none, the last of its `train` file, which are
    then left out of its training.
    """

    method: Literal["coordinate", "cma"] = "coordinate"
    """Search along one weight after the other (coordinate), or CMA-ES (cma; needs the extra search)."""
    per: Literal["task", "projection"] = "task"
    """Search one weight for each task, or one for each task and kind of projection (q_proj)."""
    rows: Positive = 64
    """Validation rows of each task."""
    budget: Positive = 32
    """Largest number of evaluations; the first is that of the default weights."""
    bounds: tuple[Number, Number] = (0.0, 1.0)
    """Smallest and largest weight."""
    metric: Literal["loss", "exact_match", "choice", "choice_norm", "choice_bytes", "choice_end"] = "loss"
    """Metric whose mean over the merge's tasks is optimised."""
    seed: Seed = 0
    """Seed of cma."""


Weight = Number | dict[Text, Number]
"""Of one task: a number, or pattern over module paths -> number."""


@section
class Merge:
    """One merged adapter."""

    method: Annotated[Choice, Chosen, MERGES]
    """Merge method."""
    weights: dict[str, Weight] | tuple[Weight, ...] | None = None
    """Weights by task name, or in the order of the tasks; null: equal ones that sum to one, or 1 each for methods whose
    paper has a sum or takes a mean (ties, dare_ties, tsv). A weight is a number or, for layers and modules, a mapping
    such as {default: 0.4, layers.0: 0.0, "*.mlp.*": 0.6}: the last pattern that fits a module's path counts, and
    `default`, or else the default weight, where none does."""
    tasks: tuple[str, ...] | None = None
    """Tasks to merge; null: all of them."""
    search: Search | None = None
    """Find the weights on validation rows; set either weights or search."""


@section
class LmEval:
    """Tasks of EleutherAI's lm-eval, which every model is measured on besides. Needs the extra `lm-eval`."""

    tasks: Annotated[tuple[Text, ...], pydantic.Field(min_length=1)]
    """Names of tasks, groups or tags of lm-eval."""
    include: FilePath | None = None
    """Folder with tasks of your own, in lm-eval's YAML."""
    rows: Positive | None = None
    """Evaluate on the first rows of each task only, this many; null: all."""
    num_fewshot: Count | None = None
    """Examples before each question; null: the task's own number."""


@section
class Evaluate:
    """How base, adapters and merges are measured on every task's test rows."""

    metrics: Annotated[tuple[str, ...], pydantic.Field(min_length=1)] = ("loss", "exact_match", "choice")
    """Metrics to measure. choice is lm-eval's acc, on tasks that have labels; choice_norm and choice_bytes divide by a
    label's length, as acc_norm and acc_bytes do; choice_end counts the end token too."""
    batch_size: Positive = 32
    """Rows evaluated at once."""
    rows: Positive | None = None
    """Evaluate on the first test rows only, this many; null: all."""
    max_new_tokens: Positive = 64
    """Longest generated response, in tokens."""
    lm_eval: LmEval | None = None
    """Benchmarks of EleutherAI's lm-eval that every model is measured on as well; needs the extra lm-eval."""


@section
class Cluster:
    """Where the jobs run, and on how much of it."""

    address: str = "local"
    """local starts Ray on this machine; auto or host:port joins a running cluster."""
    bind: Literal["127.0.0.1", "0.0.0.0"] = "127.0.0.1"
    """Interface on which a local Ray listens: this machine only, or all interfaces."""
    workers: Positive = 1
    """Ranks of each training; a merge's modules are divided among as many processes."""
    min_workers: Positive | None = None
    """Continue a training with as few ranks as this when nodes are lost; null: wait for all of them."""
    cpus_per_worker: Rate = 1.0
    """CPUs that each rank reserves."""
    gpus_per_worker: Count = 0
    """GPUs that each rank reserves; it computes on the first of them, and with 0 on the CPU."""
    placement: Literal["pack", "spread", "strict_pack", "strict_spread"] = "pack"
    """Place a training's ranks on few nodes (pack), many (spread), one (strict_pack) or each on one (strict_spread)."""
    max_concurrent: Positive | None = None
    """Jobs that run side by side; null: as many as there is room for."""
    retries: Count = 1
    """How often a failed job is started again; a training resumes from its last checkpoint."""
    patience: Rate = 600.0
    """Seconds that a job waits for nodes that were lost."""
    packing: Annotated[
        Literal["off", "auto"] | Annotated[int, pydantic.Field(ge=2), NotBool], pydantic.BeforeValidator(_off)
    ] = "off"
    """Train several tasks at once over one copy of the base: this many, all that could start (auto), or none (off)."""


@section
class Run:
    """Several tasks' trainings, the merges of their adapters, and the evaluation of all of them."""

    name: Name
    """Name of the run: letters, digits, - and _."""
    output: FilePath = "runs"
    """Folder for results, which go to output/name: a path that all nodes see, or a URL that fsspec knows."""
    model: Model
    """The frozen base model."""
    tasks: dict[Name, Task]
    """Tasks by name, each with an adapter of its own."""
    adapter: Adapter = field(default_factory=Adapter)
    """Shape and sparsity of every task's adapter."""
    train: Train = field(default_factory=Train)
    """How each task is trained."""
    merges: dict[Name, Merge] = field(default_factory=dict)
    """Merged adapters by name."""
    evaluate: Evaluate = field(default_factory=Evaluate)
    """How base, adapters and merges are measured on every task's test rows."""
    cluster: Cluster = field(default_factory=Cluster)
    """Where the jobs run, and on how much of it."""
    trackers: Annotated[tuple[str, ...], Listed] = ("tensorboard",)
    """Where metrics go besides metrics.jsonl: tensorboard, wandb, mlflow, aim, clearml, comet_ml, dvclive, swanlab or
    trackio."""
    multitask: Annotated[Choice, Chosen, PLANS] = field(default_factory=lambda: Choice(name="independent"))
    """Plan of the trainings: independent, joint (one adapter for all tasks) or sequential (one after the other)."""

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
    return _check(tree, [rule for rule in RULES if not (elsewhere and rule in OF_THIS_MACHINE)], problems)


def text(path: str | Path, overrides: Sequence[str] = ()) -> str:
    """YAML of a configuration with overrides applied, and else as it was written. Raises ConfigError."""
    tree, problems = _read(path, overrides)
    return yaml.dump(_unless(problems, tree), Dumper=_Dumper, sort_keys=False, allow_unicode=True)


def has_engine(path: str | Path, overrides: Sequence[str] = ()) -> bool:
    """Whether a configuration itself says which engine trains, and does not leave it at the default."""
    train = _read(path, overrides)[0].get("train")
    return isinstance(train, dict) and "engine" in train


def _read(path: str | Path, overrides: Sequence[str]) -> tuple[dict[str, Any], list[str]]:
    """The tree in a YAML file with overrides applied, and what is wrong with these and its keys."""
    tree, problems = _parse(_text_of(path), str(path))
    if not isinstance(tree, dict):
        raise ConfigError(f"{path}: holds {type(tree).__name__}, wanted a mapping with name, model and tasks")
    for override in overrides:
        problems += _override(tree, override)
    return tree, problems


def validate(tree: Mapping[str, Any]) -> Run:
    """The run a plain tree describes. Raises ConfigError that lists every mistake."""
    return _check(dict(tree), RULES)


def checked(kind: type[T], tree: Any, where: str) -> T:
    """Returns an object of a section from a plain tree. Raises ConfigError that lists every mistake.

    where: what the tree is of, such as the path of a file.
    """
    made, problems = _built(kind, tree, where)
    return _unless(problems, made)


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


class _InPython(yaml.reader.Reader, yaml.scanner.Scanner, yaml.parser.Parser):
    """Events of a text where PyYAML was built without libyaml, which gives the same ones faster."""

    def __init__(self, stream: str) -> None:
        yaml.reader.Reader.__init__(self, stream)
        yaml.scanner.Scanner.__init__(self)
        yaml.parser.Parser.__init__(self)

    def fetch_flow_collection_start(self, TokenClass: Any) -> None:  # PyYAML's name
        """Ends early where brackets are nested: the scanner takes the square of their number."""
        if self.flow_level >= DEEPEST:
            raise yaml.scanner.ScannerError(None, None, TOO_DEEP, self.get_mark())
        super().fetch_flow_collection_start(TokenClass)


_Events: Any = vars(yaml.cyaml)["CParser"] if yaml.__with_libyaml__ else _InPython


class _Loader(
    yaml.composer.Composer,
    _Events,  # type: ignore[misc]  # one of two classes
    yaml.constructor.BaseConstructor,
    yaml.resolver.BaseResolver,
):
    """YAML 1.2 as JSON has it: text, numbers, true, false, null, lists and mappings; merge keys, and no other tags.

    Times such as 1:30, dates, 1_000, yes, no, on and off are text, which a key that wants a number or a switch reads.
    """

    def __init__(self, stream: str) -> None:
        _Events.__init__(self, stream)
        yaml.composer.Composer.__init__(self)
        yaml.constructor.BaseConstructor.__init__(self)
        yaml.resolver.BaseResolver.__init__(self)
        self.repeated: list[tuple[list[int], str]] = []
        self._depth = self._number = 0

    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node | None:  # PyYAML's name
        """Ends early where a text is nested too deeply or has too many nodes, a key and its value being two."""
        self._depth += 1
        self._number += 1
        if self._depth > DEEPEST + 1:
            raise yaml.composer.ComposerError(None, None, TOO_DEEP, self.peek_event().start_mark)
        if self._number > 2 * MOST:
            raise _TooMany
        node = super().compose_node(parent, index)
        self._depth -= 1
        return node


class _TooMany(Exception):
    pass


class _Dumper(yaml.SafeDumper):
    """Puts text in quotes that _Loader would read as something else, such as 1e5."""


TAG = "tag:yaml.org,2002:"
FLOAT = r"^[-+]?(?:\.[0-9]+|[0-9]+(?:\.[0-9]*)?)(?:[eE][-+]?[0-9]+)?$|^[-+]?\.(?:inf|Inf|INF)$|^\.(?:nan|NaN|NAN)$"
for _kind_of_scalar, _pattern, _first in (
    ("null", r"^(?:~|null|Null|NULL|)$", ["~", "n", "N", ""]),
    ("bool", r"^(?:true|True|TRUE|false|False|FALSE)$", list("tTfF")),
    ("int", r"^[-+]?(?:[0-9]+|0[0-9_]+|0o[0-7]+|0x[0-9a-fA-F]+)$", list("-+0123456789")),
    ("float", FLOAT, list("-+.0123456789")),
    ("merge", r"^<<$", ["<"]),
):
    _Loader.add_implicit_resolver(TAG + _kind_of_scalar, re.compile(_pattern), _first)
    _Dumper.add_implicit_resolver(TAG + _kind_of_scalar, re.compile(_pattern), _first)


def _scalar(loader: _Loader, node: yaml.Node) -> Any:
    written = loader.construct_scalar(typing.cast(yaml.ScalarNode, node))  # raises ConstructorError for other nodes
    kind = node.tag.removeprefix(TAG)
    match kind:
        case "str":
            return written
        case "null" if written in ("", "~") or written.lower() == "null":
            return None
        case "bool" if written.lower() in ("true", "false"):
            return written.lower() == "true"
        case "int" if re.fullmatch(r"[-+]?0[0-9_]*[1-9_][0-9_]*", written):
            problem = (
                f"{written} is base 8 to some readers of YAML; write it without the leading 0, or put text in quotes"
            )
        case "int" if re.fullmatch(r"[-+]?(?:[0-9]+|0o[0-7]+|0x[0-9a-fA-F]+)", written):
            if len(written) <= LONGEST_NUMBER:
                return int(written, 0)
            problem = f"a number of {len(written)} digits; put text in quotes"
        case "float" if re.match(FLOAT, written):
            number = float(written.lower().replace(".inf", "inf").replace(".nan", "nan"))
            if not math.isinf(number) or "inf" in written.lower():
                return number
            problem = f"{written[:LONGEST_NUMBER]} is larger than any float"
        case _:
            problem = f"{written[:LONGEST_NUMBER]!r} is not of the kind that its tag !!{kind} names; remove the tag"
    raise yaml.constructor.ConstructorError(None, None, problem, node.start_mark)


def _list(loader: _Loader, node: yaml.Node) -> list[Any]:
    if not isinstance(node, yaml.SequenceNode):
        raise yaml.constructor.ConstructorError(None, None, "!!seq is the tag of a list; remove it", node.start_mark)
    return [loader.construct_object(item, deep=True) for item in node.value]


def _mapping(loader: _Loader, node: yaml.Node) -> dict[Any, Any]:
    """Merges are of what was built, not of nodes: the same keys again and again take no more room than once."""
    if not isinstance(node, yaml.MappingNode):
        raise yaml.constructor.ConstructorError(None, None, "!!map is the tag of a mapping; remove it", node.start_mark)
    lines: dict[str, list[int]] = {}
    merged: dict[Any, Any] = {}
    own: dict[Any, Any] = {}
    for key_node, item_node in node.value:
        lines.setdefault(str(key_node.value), []).append(key_node.start_mark.line + 1)
        item = loader.construct_object(item_node, deep=True)
        if key_node.tag == TAG + "merge":
            for mapping in item if isinstance(item, list) else [item]:
                if not isinstance(mapping, dict):
                    problem = "<< takes a mapping, or a list of mappings"
                    raise yaml.constructor.ConstructorError(None, None, problem, item_node.start_mark)
                merged = mapping | merged
            continue
        key = loader.construct_object(key_node, deep=True)
        if isinstance(key, (list, dict)):
            problem = "a key is a list or a mapping; write text"
            raise yaml.constructor.ConstructorError(None, None, problem, key_node.start_mark)
        own[key] = item
    loader.repeated += [(places, key) for key, places in lines.items() if len(places) > 1]
    return merged | own


def _refuse_tag(loader: _Loader, node: yaml.Node) -> Any:
    tag = node.tag.replace(TAG, "!!")
    problem = f"the tag {tag} is not one of !!str, !!int, !!float, !!bool, !!null, !!seq and !!map; remove it"
    raise yaml.constructor.ConstructorError(None, None, problem, node.start_mark)


for _kind_of_scalar in ("str", "int", "float", "bool", "null"):
    _Loader.add_constructor(TAG + _kind_of_scalar, _scalar)
_Loader.add_constructor(TAG + "seq", _list)
_Loader.add_constructor(TAG + "map", _mapping)
_Loader.add_constructor(None, _refuse_tag)  # every other tag

LARGEST = 2**20
"""Bytes of a file."""
MOST, DEEPEST, LONGEST_NUMBER = 25_000, 64, 100
"""Values of a configuration, their nesting, and characters of a number."""
TOO_DEEP = f"it is nested more than {DEEPEST} deep; write it flat"


def read(path: str | Path) -> Any:
    """Returns what a YAML file holds. Raises ConfigError."""
    tree, problems = _parse(_text_of(path), str(path))
    return _unless(problems, tree)


def value(text: str, where: str) -> Any:
    """Returns what a text given on the command line means, read as a configuration's values are. Raises ConfigError."""
    tree, problems = _parse(text, where)
    unusable: dict[Place, str] = {}
    tree = _usable(tree, (), unusable)
    return _unless([*problems, *(f"{where}: {problem}" for problem in unusable.values())], tree)


def _unless(problems: Sequence[str], found: T) -> T:
    if problems:
        raise ConfigError("\n".join(problems))
    return found


def _text_of(path: str | Path) -> str:
    """A pipe is read if somebody writes to it; nothing is read without an end."""
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
        with open(descriptor, "rb") as file:
            os.set_blocking(descriptor, True)
            data = file.read(LARGEST + 1)
        if len(data) > LARGEST:
            raise ValueError(f"it has more than {LARGEST:,} bytes")
        return data.decode("utf-16" if data[:2] in (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE) else "utf-8-sig")
    except (OSError, ValueError) as error:
        raise ConfigError(f"{path}: cannot be read ({error}); give the path of a YAML file") from error


def _parse(text: str, source: str) -> tuple[Any, list[str]]:
    """What a YAML text holds, and the keys that it gives more than once."""
    try:
        loader = _Loader(text)
        tree = loader.get_single_data()
    except _TooMany:
        raise ConfigError(_too_many(source)) from None
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        where = "" if mark is None else f"line {mark.line + 1}, column {mark.column + 1}: "
        what = ", ".join(part for part in (error.context, error.problem) if part)
        raise ConfigError(f"{source}: is not valid YAML: {where}{what}") from error
    except (yaml.YAMLError, ValueError, OverflowError) as error:  # control characters; escapes that are not characters
        raise ConfigError(f"{source}: is not valid YAML: {' '.join(str(error).split())}") from error
    return _unshared(tree, source), [
        f"{source}: {key} is given in lines {' and '.join(map(str, lines))}; keep one"
        for lines, key in sorted(loader.repeated)
    ]


def _too_many(source: str) -> str:
    return f"{source}: has more than {MOST:,} values, counting what aliases repeat; write fewer"


Place = tuple[str, ...]
"""Where a value stands: the keys that lead to it."""


def _unshared(tree: Any, source: str) -> Any:
    """A copy in which what YAML's aliases repeat is there as often. Raises ConfigError for a tree that is too large."""
    number = itertools.count(1)

    def copied(value: Any, depth: int) -> Any:
        if next(number) > MOST:
            raise ConfigError(_too_many(source))
        if depth > DEEPEST:
            raise ConfigError(f"{source}: is nested more than {DEEPEST} deep; write it flat")
        if isinstance(value, dict):
            return {key: copied(item, depth + 1) for key, item in value.items()}
        return [copied(item, depth + 1) for item in value] if isinstance(value, (list, tuple)) else value

    return copied(tree, 0)


def _usable(value: Any, place: Place, problems: dict[Place, str]) -> Any:
    """The tree with keys that are text. Puts into `problems` which were not, and what no text and no number may be."""
    if isinstance(value, dict):
        made = {}
        for key, item in value.items():
            below = (*place, key if isinstance(key, str) and not UNUSABLE.search(key) else _found(key))
            if below[-1] is not key:
                wrong = "has a character that text cannot have" if isinstance(key, str) else "is not a text"
                problems[below] = f"the key {wrong}; {'remove it' if isinstance(key, str) else 'put it in quotes'}"
            made[below[-1]] = _usable(item, below, problems)
        return made
    if isinstance(value, list):
        return [_usable(item, (*place, str(index)), problems) for index, item in enumerate(value)]
    if isinstance(value, str) and UNUSABLE.search(value):
        problems[place] = f"{_found(value)} has a character that text cannot have; remove it"
    elif isinstance(value, int) and value.bit_length() > 64:
        problems[place] = "got a number of more than 64 bits; write a smaller one"
    return value


UNUSABLE = re.compile(r"[\0\ud800-\udfff]")
"""No file name has the first, and no file of text the others: halves of characters, as of `"\\ud800"`."""


def _override(tree: dict[str, Any], override: str) -> list[str]:
    """Applies `path.to.key=value` to the tree. Returns what is wrong with it."""
    path, equals, text = override.partition("=")
    *parents, last = path.split(".")
    if not equals or not all((*parents, last)):
        return [f"{_cut(override)}: an override has the form path.to.key=value, such as train.lr=1e-4"]
    place = tree
    for depth, key in enumerate(parents):
        below = place.get(key)
        if below is None:
            below = place[key] = {}
        elif isinstance(below, str) and _is_choice(parents[: depth + 1]):
            below = place[key] = {"name": below}  # `engine: deepspeed` and `train.engine.stage=3` name one choice
        if not isinstance(below, dict):
            where = ".".join(parents[: depth + 1])
            return [
                f"{_cut(override)}: {where} is {_found(below)}, which has nothing below it; override {where} itself"
            ]
        place = below
    try:
        place[last], problems = _parse(text, _cut(override))
    except ConfigError as error:
        return [str(error)]
    return problems


def _is_choice(place: Sequence[str]) -> bool:
    kind: _Kind | None = _kind_of(Run)
    for part in place:
        if kind is not None and kind.sections is not None:
            kind = _kind_of(kind.sections)
        else:
            kind = _kinds(kind.section).get(part) if kind is not None and kind.section is not None else None
    return kind is not None and kind.methods is not None


# --- what is wrong, all at once --------------------------------------------------------------------------------------


def _check(tree: Any, rules: Iterable[Rule], before: Sequence[str] = ()) -> Run:
    """The run, without a mistake. Raises ConfigError that lists `before` and every mistake.

    A misspelt key and a misspelt method are reported together: rules run on what is right, and end where they need a
    value that is not.
    """
    run, problems = _built(Run, tree, "the configuration")
    listed = [*before, *problems]
    for rule in rules:
        listed += _as_far_as_known(rule, run) if problems else rule(run)
    return _unless(list(dict.fromkeys(listed)), run)


def _built(kind: type[T], tree: Any, where: str) -> tuple[T, list[str]]:
    """An object that lacks what is wrong, and what is wrong with the tree alone."""
    problems: dict[Place, str] = {}
    made: T = _made(kind, _usable(_unshared(tree, where), (), problems), (), problems)
    return made, [f"{'.'.join(place) or where}: {problem}" for place, problem in problems.items()]


def _as_far_as_known(rule: Rule, run: Run) -> list[str]:
    """What a rule finds in a run that lacks values. Where one task lacks what a rule reads, others may have it."""
    found: list[str] = []
    if not _ends(rule, run, found) and rule in EACH:
        for name, item in getattr(run, EACH[rule], {}).items():
            _ends(rule, _changed(run, EACH[rule], {name: item}), found)
    return found


def _ends(rule: Rule, run: Run, found: list[str]) -> bool:
    """Puts into `found` what a rule gives, and says whether it came to its end."""
    try:
        for problem in rule(run):
            found.append(problem)
    except AttributeError:  # it reads what is absent, as it was wrong
        return False
    return True


def _changed(run: Run, key: str, value: Any) -> Run:
    """`dataclasses.replace` for a run that may lack values."""
    made = object.__new__(Run)
    for item in fields(run):
        if hasattr(run, item.name):
            object.__setattr__(made, item.name, value if item.name == key else getattr(run, item.name))
    return made


MOST_NAMED = 100
"""Unknown keys of one section that are named, and compared with the known ones."""
ABSENT: Any = object()
"""Made of what is wrong."""


def _made(section: type, value: Any, place: Place, problems: dict[Place, str]) -> Any:
    """An object that lacks the values which are wrong: reading one of them raises AttributeError."""
    made: Any = object.__new__(section)
    if not isinstance(value, dict):
        problems.setdefault(place, f"got {_found(value)}; wanted a mapping, key: value")
        return made
    kinds = _kinds(section)
    unknown = [key for key in value if key not in kinds]
    strange = {key: plugin.closest(key, kinds) for key in unknown[:MOST_NAMED]}
    if others := unknown[MOST_NAMED:]:
        problems.setdefault(place, f"has {len(others):,} more unknown keys; there are {', '.join(kinds)}")
    for item in fields(section):
        where = (*place, item.name)
        if item.name not in value and item.name in strange.values():
            continue  # it is there, misspelt
        if item.name in value:
            content = _value_of(section, item.name, value[item.name], where, problems)
        elif item.default is not MISSING:
            content = item.default
        elif item.default_factory is not MISSING:
            content = item.default_factory()
        else:
            problems[where] = "is missing; give it a value"
            continue
        if content is not ABSENT:
            object.__setattr__(made, item.name, content)
    for key, meant in strange.items():
        near = "" if meant is None else f" Did you mean {meant!r}?"
        problems.setdefault((*place, key), f"unknown key; there are {', '.join(kinds)}.{near}")
    return made


def _value_of(section: type, key: str, value: Any, place: Place, problems: dict[Place, str]) -> Any:
    """What a value is to a key, or ABSENT."""
    kind = _kinds(section)[key]
    if place in problems:
        return ABSENT
    if kind.section is not None and not (value is None and kind.is_optional):
        made = _made(kind.section, value, place, problems)
        return made if isinstance(value, dict) else ABSENT
    if kind.sections is not None and isinstance(value, dict):
        made = {name: _made(kind.sections, item, (*place, name), problems) for name, item in value.items()}
        if not all(isinstance(item, dict) for item in value.values()):
            return ABSENT  # keys of one section, written where sections are named
        value = made
    try:
        content = _adapter(section, key).validate_python(value)
    except pydantic.ValidationError as error:
        for below, errors in _places(error).items():
            problems.setdefault((*place, *below), _problem(errors))
        return ABSENT
    if kind.methods is not None:
        path = ".".join(place)
        try:
            plugin.find(kind.methods.folder, content.name, kind.methods.role, path).bind(content.options, path)
        except ConfigError as error:
            lines = [line.partition(": ") for line in str(error).split("\n")]
            problems.update({tuple(where.split(".")): problem for where, _, problem in lines})
            return ABSENT
    is_usable = kind.sections is not None or not any(other[: len(place)] == place for other in problems)
    return content if is_usable else ABSENT


class _Kind(typing.NamedTuple):
    """What a key takes: a section, sections by their names, a method, or any other value."""

    hint: Any
    section: Any = None
    sections: Any = None
    is_optional: bool = False
    methods: Methods | None = None


@functools.cache
def _kinds(section: type) -> dict[str, _Kind]:
    hints = typing.get_type_hints(section, include_extras=True)
    return {item.name: _kind_of(hints[item.name]) for item in fields(section)}


def _kind_of(hint: Any) -> _Kind:
    plain = typing.get_args(hint)[0] if typing.get_origin(hint) is Annotated else hint
    inner = typing.get_args(plain)
    if typing.get_origin(plain) is dict and _is_section(inner[1]):
        return _Kind(hint, sections=inner[1])
    if _is_section(plain):
        return _Kind(hint, section=plain)
    if typing.get_origin(plain) is types.UnionType and _is_section(inner[0]):
        return _Kind(hint, section=inner[0], is_optional=True)
    return _Kind(
        hint, methods=next((part for part in getattr(hint, "__metadata__", ()) if isinstance(part, Methods)), None)
    )


@functools.cache
def _adapter(section: type, key: str) -> pydantic.TypeAdapter[Any]:
    return pydantic.TypeAdapter(_kinds(section)[key].hint)


def _is_section(kind: Any) -> bool:
    return is_dataclass(kind) and kind is not Choice


def _places(error: pydantic.ValidationError) -> dict[Place, list[Any]]:
    """The errors by place. Where a value fits none of several kinds, those that got furthest into it count."""
    skipped = ("function-", "literal[", "tuple[", "dict[", "[key]")  # the kind of value that was tried
    places: dict[Place, list[Any]] = {}
    for item in error.errors(include_url=False):
        place = tuple(str(part) for part in item["loc"] if not str(part).startswith(skipped))
        places.setdefault(place, []).append(item)
    inner = {place[:depth] for place in places for depth in range(len(place))}
    return {place: items for place, items in places.items() if place not in inner}


def _problem(errors: Sequence[Any]) -> str:
    """What was found, and what was wanted."""
    error = errors[0]
    if error["type"] == "missing":
        return "is missing; give it a value"
    if error["type"] == "string_pattern_mismatch":
        return f"got {_found(error['input'])}; names are at most 64 letters, digits, - and _"
    return f"got {_found(error['input'])}; {' or '.join(_wanted(error) for error in errors)}"


def _found(value: Any) -> str:
    kinds = {dict: "a mapping", list: "a list", type(None): "nothing"}
    if type(value) in kinds:
        return kinds[type(value)]
    try:
        return _cut(repr(value))
    except ValueError:  # more digits than Python makes text of
        return "a large number"


def _cut(text: str) -> str:
    return text if len(text) <= 200 else f"{text[:150]}...{text[-20:]}"


def _wanted(error: Any) -> str:
    match error["type"]:
        case "literal_error":
            names = re.findall(r"'([^']*)'", error["ctx"]["expected"])
            return f"wanted {' or '.join(names)}" + plugin.nearest(str(error["input"]), names).replace(" Did", ". Did")
        case "dataclass_type":
            return "wanted a method's name, or a mapping with its name and options"
        case "dict_type":
            return "wanted a mapping, key: value"
        case "too_short" if error["ctx"]["min_length"] == 1:
            return "wanted at least one"
        case "string_too_short":
            return "wanted text that is not empty"
        case "tuple_type":
            return "wanted a list"
        case "string_type":
            return "wanted text" + ("; put it in quotes" if error["input"] is not None else "")
        case "value_error":
            return str(error["msg"]).removeprefix("Value error, ")
        case _:
            return str(error["msg"]).replace("Input should be", "it should be")


def _metrics(run: Run) -> Iterator[str]:
    for metric in run.evaluate.metrics:
        try:
            plugin.find("evaluation", metric, "score", "evaluate.metrics")
        except ConfigError as error:
            yield str(error)


def _projections(run: Run) -> Iterator[str]:
    if run.adapter.projection != "trained":
        return
    if run.adapter.share_projection:
        yield (
            "adapter.share_projection: makes one A for all tasks, and with adapter.projection trained each adapter "
            "gets its own; set only one"
        )
    if run.adapter.dtype != "float32":
        yield f"adapter.dtype: got {run.adapter.dtype}, and a trained A is float32; remove it"


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
            f"model.attention: got {attention}, which computes in half precision, and model.dtype is float32; "
            "set that to bfloat16, or use sdpa"
        )
    if run.train.pack:
        yield (
            f"model.attention: got {attention}, which lets packed rows see each other in a batch of several "
            "sequences; remove train.pack, or use sdpa"
        )


def _attention_is_there(run: Run) -> Iterator[str]:
    package, name = FLASH.get(str(run.model.attention), (None, None))
    if package is not None and not _is_installed(package):
        yield (
            f"model.attention: {run.model.attention} needs the package {package}, which is not installed; "
            f"pip install {name}, or use sdpa"
        )


COMPILED_AT_STAGE_3 = (
    "train.compile: cannot be combined with stage 3 of deepspeed, whose hooks around each layer leave too little of a "
    "block to compile; remove it, or use fsdp"
)


def _compiled(run: Run) -> Iterator[str]:
    if not run.train.compile:
        return
    engine = run.train.engine
    if engine.name == "deepspeed" and engine.options.get("stage") == 3:
        yield COMPILED_AT_STAGE_3


def _saved(run: Run) -> Iterator[str]:
    if not run.adapter.modules_to_save:
        return
    if run.multitask.name == "joint" and run.multitask.options.get("projection") != "none":
        yield (
            "adapter.modules_to_save: cannot be combined with multitask joint, which projects the gradients of A and B "
            "alone; set multitask.projection to none, or remove it"
        )
    elif run.multitask.name not in ("independent", "joint"):
        yield (
            f"adapter.modules_to_save: cannot be combined with multitask {run.multitask.name}, where each task adds "
            "to what the earlier ones leave as it is; train them independent, or remove it"
        )
    if run.merges:
        yield (
            f"adapter.modules_to_save: is given, and merges.{next(iter(run.merges))} cannot merge what each task has "
            "trained in full; remove one of them"
        )
    if run.model.dtype != "float32":
        yield f"adapter.modules_to_save: needs model.dtype float32, got {run.model.dtype}"


def _lengths(run: Run) -> Iterator[str]:
    if (run.train.steps is None) == (run.train.epochs is None):
        given = "neither is given" if run.train.steps is None else "both are given"
        yield f"train.steps, train.epochs: {given}; give exactly one"
    if run.train.calibrate.steps is not None and run.train.calibrate.epochs is not None:
        yield "train.calibrate.steps, train.calibrate.epochs: both are given; give one, or neither"
    for path, steps in (("train.steps", run.train.steps), ("train.calibrate.steps", run.train.calibrate.steps)):
        if steps is not None and run.train.warmup_steps >= steps:
            yield f"train.warmup_steps: got {run.train.warmup_steps}, {path} is {steps}; give fewer than those"


def _lengths_of_tasks(run: Run) -> Iterator[str]:
    for name, task in run.tasks.items():
        where = f"tasks.{name}"
        own = {key for key in ("steps", "epochs", "lr") if getattr(task, key) is not None}
        if {"steps", "epochs"} <= own:
            yield f"{where}.steps, {where}.epochs: both are given; give one, or neither"
        if task.steps is not None and run.train.warmup_steps >= task.steps:
            found = f"got {run.train.warmup_steps}, {where}.steps is {task.steps}"
            yield f"train.warmup_steps: {found}; give fewer than those"
        if own and run.multitask.name == "joint":
            given = ", ".join(f"{where}.{key}" for key in sorted(own))
            yield f"{given}: cannot be combined with multitask joint, which trains all tasks as one; set those of train"


def trained_as(run: Run, task: str) -> Train:
    """`train`, with a task's own settings in the place of those for all."""
    own = run.tasks[task]
    has_length = own.steps is not None or own.epochs is not None
    steps, epochs = (own.steps, own.epochs) if has_length else (run.train.steps, run.train.epochs)
    return replace(run.train, steps=steps, epochs=epochs, lr=run.train.lr if own.lr is None else own.lr)


def _long_runs(run: Run) -> Iterator[str]:
    train = run.train
    if train.early_stop is not None and train.validate_every is None:
        yield "train.early_stop: is set without train.validate_every, which measures for it; give both"
    if train.on_divergence == "rollback" and train.checkpoint_every is None:
        yield "train.on_divergence: rollback goes back to a checkpoint; give train.checkpoint_every"


def _validation_rows(run: Run) -> Iterator[str]:
    if run.train.validate_every is not None:
        for name, task in run.tasks.items():
            if task.validation is None:
                yield f"tasks.{name}.validation: is missing, and train.validate_every measures on its rows; give a file"


def _tasks(run: Run) -> Iterator[str]:
    if not run.tasks:
        yield "tasks: none is given; give at least one"
    for name, task in run.tasks.items():
        if task.seed is not None and run.adapter.share_projection:
            yield f"tasks.{name}.seed: is given, but adapter.share_projection makes one A for all; set only one"


def _mixtures(run: Run) -> Iterator[str]:
    for name, task in run.tasks.items():
        if sum(task.mixture.values()) >= 1:
            yield (
                f"tasks.{name}.mixture: its shares add up to {sum(task.mixture.values()):g}; give less than 1, as "
                "train has the rest"
            )
        if task.train in task.mixture:
            yield f"tasks.{name}.mixture: {task.train!r} is also tasks.{name}.train, which has the rest; remove it"
        if task.mixture and run.multitask.name == "joint":
            yield (
                f"tasks.{name}.mixture: cannot be combined with multitask joint, which mixes tasks evenly; set only one"
            )
        if task.template.messages is None and task.template.date is not None:
            yield f"tasks.{name}.template.date: is for chat templates, and template.messages is not given; remove it"
        if task.template.messages is not None and task.labels is not None:
            yield f"tasks.{name}.labels: are for template.response, and template.messages is given; set only one"


def _starts(run: Run) -> Iterator[str]:
    for name, task in run.tasks.items():
        if task.start is None:
            continue
        where = f"tasks.{name}.start"
        if not os.path.exists(task.start):
            yield f"{where}: there is no file or folder {task.start!r}; paths are relative to {Path.cwd()}"
        if task.seed is not None:
            yield f"tasks.{name}.seed: cannot be combined with {where}, whose A stays; set only one"
        if run.multitask.name != "independent":
            yield f"{where}: cannot be combined with multitask {run.multitask.name}; use independent, or remove it"
        if run.adapter.share_projection or run.adapter.projection == "trained" or run.adapter.modules_to_save:
            yield (
                f"{where}: its A stays and its kept entries alone are trained; remove adapter.share_projection, "
                "adapter.modules_to_save and adapter.projection: trained"
            )


PACKED = (
    "gemma", "gemma2", "gpt2", "gpt_neox", "llama", "mistral", "mixtral", "phi", "phi3", "qwen2", "qwen3", "qwen3_moe",
)  # fmt: skip
"""Model types whose attention keeps packed rows apart, as tests show; others, such as gpt_oss, do not."""


def _packed_rows(run: Run) -> Iterator[str]:
    if not run.train.pack:
        return
    with contextlib.suppress(OSError, ValueError, AttributeError):  # the job says what is wrong with config.json
        settings = json.loads(read_regular(Path(run.model.path) / "config.json"))
        yield from unpackable(str(settings.get("model_type")))


def unpackable(model_type: str) -> Iterator[str]:
    """What is wrong with packing rows for a model."""
    if model_type not in PACKED:
        yield (f"train.pack: {model_type} is not known to keep packed rows apart, as {', '.join(PACKED)} do; remove it")


def _files(run: Run) -> Iterator[str]:
    for name, task in run.tasks.items():
        for part, path in files(task):
            if problem := tables.problem_of(path):
                yield f"tasks.{name}.{part}: {problem}"
            elif not tables.is_hub(path) and not os.path.isfile(path):
                kind = "regular file" if os.path.exists(path) else "file"
                yield f"tasks.{name}.{part}: there is no {kind} {path!r}; paths are relative to {Path.cwd()}"


def _model(run: Run) -> Iterator[str]:
    is_hub_name = run.model.path.count("/") == 1 and not run.model.path.startswith((".", "/", "~"))
    is_local = not is_hub_name or Path(run.model.path).parent.is_dir()
    if is_local and not os.path.isfile(Path(run.model.path) / "config.json"):
        yield f"model.path: there is no config.json in {run.model.path!r}; give a model's folder or its name on the hub"


def _output(run: Run) -> Iterator[str]:
    place = run.folder
    while not os.path.lexists(place):
        place = place.parent
    if not place.is_dir() or not os.access(place, os.W_OK | os.X_OK):
        found = f"{str(place)!r} is not a folder that can be written to"
        yield f"output: {str(run.folder)!r} cannot be made, as {found}; give another"


def _in_a_job(run: Run) -> Iterator[str]:
    """A job of Ray works in a copy of what was submitted, which is deleted after it."""
    if (
        in_a_job()
        and not storage.is_url(run.output)
        and (not Path(run.output).is_absolute() or run.folder.is_relative_to(Path.cwd()))
    ):
        yield (
            f"output: got {run.output!r}, which would be lost with the folder of this Ray job; give an absolute "
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
    paths |= engine_files(run)
    for place, path in paths.items():
        is_hub_name = place == "model.path" and path.count("/") == 1 and not path.startswith(".")
        is_elsewhere = (place == "output" and storage.is_url(path)) or tables.is_hub(path)
        if not (Path(path).is_absolute() or is_hub_name or is_elsewhere):
            yield f"{place}: got {path!r}, which no other machine finds; give an absolute path that all nodes see"


def engine_files(run: Run) -> dict[str, str]:
    """Files that options of the engine name: place in the configuration -> path."""
    engine = run.train.engine
    given = plugin.find(ENGINES.folder, engine.name, ENGINES.role, "train.engine").constants.get("FILES", ())
    options = {name: engine.options.get(name) for name in given}
    return {f"train.engine.{name}": os.path.expanduser(path) for name, path in options.items() if path is not None}


def checked_engine(run: Run) -> Iterator[str]:
    """What the engine itself says of files that its options name; only then is it imported."""
    if not (paths := engine_files(run)):
        return
    engine = run.train.engine
    lacking = [(place, path) for place, path in paths.items() if not os.path.exists(path)]
    for place, path in lacking:
        yield f"{place}: there is no file {path!r}; paths are relative to {Path.cwd()}"
    check = plugin.find(ENGINES.folder, engine.name, ENGINES.role, "train.engine").companion("check")
    if check is not None and not lacking:
        try:
            yield from check(run)
        except ConfigError as error:
            yield str(error)


def _positions(run: Run) -> Iterator[str]:
    if "exact_match" not in run.evaluate.metrics:
        return
    with contextlib.suppress(OSError, ValueError, AttributeError):  # the job says what is wrong with config.json
        settings = json.loads(read_regular(Path(run.model.path) / "config.json"))
        positions, asked = settings.get("max_position_embeddings"), run.evaluate.max_new_tokens
        if isinstance(positions, int) and asked >= positions:
            yield f"evaluate.max_new_tokens: got {asked}, the model has {positions} positions; give less"


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
                yield f"tasks.{name}.template.{part}: {template!r} is not a template ({error}); write {{{{ for a brace"
                continue
            if strange:
                yield f"tasks.{name}.template.{part}: {{{strange[0]}}} is not a field; use plain names such as {{text}}"
            elif part == "response" and task.labels is not None and len(names) != 1:
                yield (
                    f"tasks.{name}.labels: are values of the one field in template.response, and {template!r} has "
                    f"{len(names)}; leave one field there, or remove labels"
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
            yield f"tasks.{name}.labels: got {list(task.labels)}; give at least two, each of them once"
            continue
        if task.labels is None or len(names) != 1:
            continue
        literal = "".join(text for text, *_ in string.Formatter().parse(task.template.response))
        if blank := [label for label in task.labels if not (literal + label).strip()]:
            yield f"tasks.{name}.labels: {blank[0]!r} makes an empty response; give labels with text"
            continue
        rows = ((part, *row) for part, path in files(task) for row in _rows(path, LOOKED_AT))
        for part, number, row in rows:
            try:
                label = tables.text(row, names[0])
            except ConfigError:  # for the job to say, with all others
                continue
            if label not in task.labels:
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
        if not os.path.isfile(path) and not tables.is_hub(path):
            return 0
        return sum(1 for _ in itertools.islice(tables.read(path), most))
    return 0


def _rows(path: str, count: int) -> Iterator[tuple[int, dict[str, Any]]]:
    """Those of the first rows, numbered, that are some. What is wrong with the others is for the job to say."""
    if tables.is_hub(path) or not os.path.isfile(path):
        return  # the one takes a network, and time; a device may have no end
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
            yield f"{path}.tasks: {', '.join(repeated)} is listed twice; keep one"
        if merge.tasks == ():
            yield f"{path}.tasks: none is given; name at least one, or remove it for all"
        for task in tasks:
            if task not in run.tasks:
                listing = f"there are {', '.join(run.tasks)}.{plugin.nearest(task, run.tasks)}"
                yield f"{path}.tasks: unknown task {task!r}; {listing}"
        if merge.weights is not None and len(merge.weights) != len(tasks):
            yield (
                f"{path}.weights: {len(merge.weights)} given for {len(tasks)} adapters ({', '.join(tasks)}); "
                "give one weight per adapter, or remove it for equal weights"
            )
        elif isinstance(merge.weights, dict) and set(merge.weights) != set(tasks):
            yield f"{path}.weights: are for {', '.join(merge.weights)}; wanted one for each of {', '.join(tasks)}"
    if "base" in run.tasks:
        yield "tasks.base: the name stands for the model without an adapter; give the task another name"


def _cluster(run: Run) -> Iterator[str]:
    least, most = run.cluster.min_workers, run.cluster.workers
    if least is not None and least > most:
        yield f"cluster.min_workers: got {least} for {most} workers; give at most cluster.workers"
    if run.cluster.bind != "127.0.0.1" and run.cluster.address != "local":
        yield (
            f"cluster.bind: is given, but the cluster at {run.cluster.address!r} was started before, where "
            "Ray was given its interfaces; remove it"
        )


def _searches(run: Run) -> Iterator[str]:
    for name, merge in run.merges.items():
        search, path = merge.search, f"merges.{name}"
        if search is None:
            continue
        tasks = {task: run.tasks[task] for task in merge.tasks or run.tasks if task in run.tasks}
        if merge.weights is not None:
            yield f"{path}.weights: are given, and {path}.search finds them; set only one"
        if search.bounds[0] >= search.bounds[1]:
            low, high = search.bounds
            yield f"{path}.search.bounds: got [{low:g}, {high:g}]; the second must be larger than the first"
        for task_name, task in tasks.items():
            found = _num_rows(task.train, search.rows + 1) if task.validation is None else None
            if found is not None and 0 < found <= search.rows:
                yield (
                    f"{path}.search.rows: got {search.rows}, and tasks.{task_name}.train, whose last rows are "
                    f"held out for it, has {found}; give fewer, or tasks.{task_name}.validation"
                )
        if search.metric.startswith("choice") and not any(task.labels for task in tasks.values()):
            yield f"{path}.search.metric: {search.metric} is measured on tasks that have labels, and none has; use loss"
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
        yield "evaluate.lm_eval: lm-eval is not installed; pip install 'lori_dist[lm-eval]', or remove it"
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
            yield f"trackers: unknown {name!r}; {listing}"
        elif not _is_installed(name):
            package = name.replace("_", "-")
            yield f"trackers: {name} is not installed; pip install {package}, or remove it"
        if run.trackers.count(name) > 1:
            yield f"trackers: {name} is listed twice; keep one"


RULES: tuple[Rule, ...] = (
    _metrics,
    _projections,
    _saved,
    _quantized,
    _attention,
    _attention_is_there,
    _compiled,
    _lengths,
    _lengths_of_tasks,
    _long_runs,
    _validation_rows,
    _tasks,
    _mixtures,
    _starts,
    _packed_rows,
    _files,
    _model,
    _output,
    _in_a_job,
    checked_engine,
    _positions,
    _templates,
    _fields,
    _labels,
    _merges,
    _searches,
    _cluster,
    _lm_eval,
    _trackers,
)

OF_THIS_MACHINE = (_files, _model, _output, _in_a_job, checked_engine, _trackers, _attention_is_there)
"""What is so for this machine alone."""

EACH = {
    _lengths_of_tasks: "tasks",
    _validation_rows: "tasks",
    _tasks: "tasks",
    _mixtures: "tasks",
    _starts: "tasks",
    _files: "tasks",
    _templates: "tasks",
    _fields: "tasks",
    _labels: "tasks",
    _merges: "merges",
    _searches: "merges",
}
"""Rules that look at one task, or one merge, after the other."""
