"""The sections of a run's configuration. A key has its kind, range, default, checks and description in one place: here.

What involves several keys is in rules.py. How a key stands in fingerprints is said by its mark, Fingerprint.
"""

import importlib.util
import os
import string
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import field, replace
from pathlib import Path
from typing import Annotated, Any, Literal

import pydantic

from lori_dist import plugin, storage, tables
from lori_dist.config.kinds import (
    ENGINES,
    FORMS,
    MASKS,
    MERGES,
    PLACERS,
    PLANS,
    Check,
    Choice,
    Chosen,
    Count,
    Date,
    Decay,
    Dtype,
    Duration,
    FilePath,
    Fingerprint,
    Fraction,
    Listed,
    Name,
    NotBool,
    Number,
    Positive,
    Rate,
    Seed,
    Text,
    read_off,
    section,
)
from lori_dist.errors import ConfigError
from lori_dist.files import folder_problem

# --- what the checks of single keys find -----------------------------------------------------------------------------


def is_installed(package: str) -> bool:
    """Whether a package can be imported. A folder of that name in the current one is not a package."""
    return getattr(importlib.util.find_spec(package), "origin", None) is not None


def _model_folder(path: str) -> Iterator[str]:
    if problem := folder_problem(path):
        yield problem


def _quantized(quantize: str) -> Iterator[str]:
    if quantize == "nf4" and not is_installed("bitsandbytes"):
        yield (
            "nf4 needs the package bitsandbytes, which is not installed; pip install 'lori_dist[quantize]', or use int8"
        )


FLASH = {
    "flash_attention_2": ("flash_attn", "flash-attn"),
    "flash_attention_3": ("flash_attn_interface", "flash-attn-3"),
}
"""Attention -> the package that has it, and the name under which pip installs that."""


def _attention_is_there(attention: str) -> Iterator[str]:
    package, name = FLASH.get(attention, (None, None))
    if package is not None and not is_installed(package):
        yield f"{attention} needs the package {package}, which is not installed; pip install {name}, or use sdpa"


def wrong_template(template: str) -> Iterator[str]:
    """Yields the mistake of a template: a wrong brace, or a field that is not a plain name."""
    try:
        parsed = [item for item in string.Formatter().parse(template) if item[1] is not None]
    except ValueError as error:
        yield f"{template!r} is not a template ({error}); write {{{{ for a brace"
        return
    for _, name, form, conversion in parsed:
        if name is None or not name.isidentifier() or form or conversion:
            written = f"{name}{'!' if conversion else ''}{conversion or ''}{':' if form else ''}{form or ''}"
            yield f"{{{written}}} is not a field; use plain names such as {{text}}"
            return


def names_of(template: str) -> list[str]:
    """The fields that a template names; empty if it is not a template."""
    try:
        return [name for _, name, _, _ in string.Formatter().parse(template) if name and name.isidentifier()]
    except ValueError:
        return []


CONVERSATIONS = "conversations"
"""Field of ShareGPT rows."""
RESERVED = (
    "add_generation_prompt", "chat_template", "continue_final_message", "conversation", "date_string", "documents",
    "max_length", "messages", "padding", "return_assistant_tokens_mask", "return_dict", "return_tensors", "tokenize",
    "tokenizer_kwargs", "tools", "truncation",
)  # fmt: skip
"""Variables of chat templates, or arguments of transformers, that have another source."""


def _reserved_arguments(arguments: Mapping[str, Any]) -> Iterator[str]:
    for name in arguments:
        if name in RESERVED or not name.isidentifier():
            yield f"{name!r} is not an argument of a chat template's own; remove it"


def _rows_are_there(path: str) -> Iterator[str]:
    if problem := tables.problem_of(path):
        yield problem
    elif not tables.is_hub(path) and not os.path.isfile(path):
        kind = "regular file" if os.path.exists(path) else "file"
        yield f"there is no {kind} {path!r}; paths are relative to {Path.cwd()}"


def _all_rows_are_there(paths: Mapping[str, float]) -> Iterator[str]:
    for path in paths:
        yield from _rows_are_there(path)


def _shares(mixture: Mapping[str, float]) -> Iterator[str]:
    if sum(mixture.values()) >= 1:
        yield f"its shares add up to {sum(mixture.values()):g}; give less than 1, as train has the rest"


def _adapter_is_there(path: str) -> Iterator[str]:
    if not os.path.exists(path):
        yield f"there is no file or folder {path!r}; paths are relative to {Path.cwd()}"


def wrong_labels(labels: Sequence[str]) -> Iterator[str]:
    """Yields the mistakes of a task's labels by themselves."""
    if len(labels) < 2 or len(set(labels)) < len(labels):
        yield f"got {list(labels)}; give at least two, each of them once"


def _bounds(bounds: tuple[float, float]) -> Iterator[str]:
    low, high = bounds
    if low >= high:
        yield f"got [{low:g}, {high:g}]; the second must be larger than the first"


def _search_is_there(method: str) -> Iterator[str]:
    if method == "cma" and not is_installed("cma"):
        yield (
            "cma needs the package of this name, which is not installed; "
            "pip install 'lori_dist[search]', or use coordinate"
        )


def _each_once(tasks: Sequence[str]) -> Iterator[str]:
    repeated = sorted({task for task in tasks if tasks.count(task) > 1})
    if repeated:
        yield f"{', '.join(repeated)} is listed twice; keep one"
    if not tasks:
        yield "none is given; name at least one, or remove it for all"


def _folder_is_there(path: str) -> Iterator[str]:
    if not os.path.isdir(path):
        yield f"there is no folder {path!r}; paths are relative to {Path.cwd()}"


def _metrics(metrics: Sequence[str]) -> Iterator[str]:
    for metric in metrics:
        try:
            plugin.find("evaluation", metric, "score", "evaluate.metrics")
        except ConfigError as error:
            yield str(error).removeprefix("evaluate.metrics: ")


def _lm_eval_is_there(settings: Any) -> Iterator[str]:
    if not is_installed("lm_eval"):
        yield "lm-eval is not installed; pip install 'lori_dist[lm-eval]', or remove it"


def _some(tasks: Mapping[str, Any]) -> Iterator[str]:
    if not tasks:
        yield "none is given; give at least one"


TRACKERS = ("aim", "clearml", "comet_ml", "dvclive", "mlflow", "swanlab", "tensorboard", "trackio", "wandb")
"""The trackers of accelerate. Each is in the package of its name."""


def _trackers(names: Sequence[str]) -> Iterator[str]:
    for name in sorted(set(names)):
        if name not in TRACKERS:
            listing = f"there are {', '.join(TRACKERS)}.{plugin.nearest(name, TRACKERS)}"
            yield f"unknown {name!r}; {listing}"
        elif not is_installed(name):
            package = name.replace("_", "-")
            yield f"{name} is not installed; pip install {package}, or remove it"
        if names.count(name) > 1:
            yield f"{name} is listed twice; keep one"


# --- the sections ----------------------------------------------------------------------------------------------------


@section
class Model:
    """The frozen base model."""

    path: Annotated[FilePath, Check(_model_folder, is_of_this_machine=True), Fingerprint.DERIVED]
    """Folder of a transformers model with its tokenizer, or its name on the hub."""
    dtype: Dtype = "float32"
    """Data type of the base model's weights; trained values are always float32."""
    quantize: Annotated[Literal["nf4", "int8"] | None, Check(_quantized), Fingerprint.IF_SET] = None
    """Keep the base's linear layers in 4 bits (nf4, as QLoRA; needs bitsandbytes) or in 8 (int8)."""
    attention: Annotated[
        Literal["eager", "sdpa", "flex_attention", "flash_attention_2", "flash_attention_3"] | None,
        Check(_attention_is_there, is_of_this_machine=True),
        Fingerprint.IF_SET,
    ] = None
    """Attention implementation by its name in transformers, for training and evaluation; null: transformers chooses."""
    trust_remote_code: Annotated[bool, Fingerprint.IF_SET] = False
    """Run Python code in the model's folder or repository (`auto_map` in its config.json or tokenizer_config.json), in
    every process of the run; set it only for code that you have read."""


@section
class Moments:
    """Second moments, mean of x x^T, of what the base's layers read of tasks' training rows, from which A may begin."""

    rows: Positive = 256
    """Training rows of each task that are read, evenly spaced over its `train` file."""
    full_up_to: Count = 1024
    """Inputs of a layer up to which a moment is kept in full; of a layer with more, a sketch by random numbers is."""
    width: Positive | None = None
    """Columns of a sketch; null: 4 * adapter.rank."""


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
    exclude: Annotated[tuple[Text, ...], Listed, Fingerprint.IF_SET] = ()
    """Names, paths or patterns of layers, or of modules with layers in them, that are left out of the targets."""
    density: Fraction = 0.1
    """Share of B's entries that are kept and trained; 1.0 stops after the dense phase (LoRI-D)."""
    mask: Annotated[Choice, Chosen, MASKS] = field(default_factory=lambda: Choice(name="magnitude"))
    """Method that chooses the kept entries after the dense phase."""
    seed: Annotated[Seed, Fingerprint.DERIVED] = 0
    """Seed of the random A: each task's A follows from this number and the task's name."""
    share_projection: Annotated[bool, Fingerprint.DERIVED] = False
    """Give all tasks the same A: linear merges then keep the rank, and only B differs between tasks."""
    dtype: Dtype = "float32"
    """Data type of A."""
    projection: Annotated[Literal["cached", "recomputed", "trained"], Fingerprint.DERIVED] = "cached"
    """Storage of A: cached in memory, recomputed in each product (slower, no memory), or trained, as in LoRA."""
    init: Annotated[Literal["random", "osrm"], Fingerprint.IF_SET] = "random"
    """Choice of A: random, from its seed, or osrm: where the other tasks' inputs have least energy, which is measured
    first; such an A is stored in the adapter."""
    moments: Annotated[Moments, Fingerprint.DERIVED] = field(default_factory=Moments)
    """Moments that are measured for init osrm, and for forms that begin from them."""
    form: Annotated[Choice, Chosen, FORMS, Fingerprint.IF_SET] = field(default_factory=lambda: Choice(name="lori"))
    """Update of a layer: lori, or, in joint training, one of which each task has its own (task_lora, mtl_lora,
    lilora), or a block (thanora), or one that depends on the input (hydra, smora, fly)."""
    modules_to_save: Annotated[tuple[Text, ...], Listed, Fingerprint.IF_SET] = ()
    """Names of modules that are trained in full and stored with the adapter; such runs have no merges."""


@section
class Template:
    """Text of a row: `{field}` stands for a field of the row."""

    prompt: Annotated[str, Check(wrong_template)] = "{prompt}"
    """Text of the prompt; {field} stands for a field of the row."""
    response: Annotated[str, Check(wrong_template)] = "{response}"
    """Text of the response, which is what is learned."""
    layout: Annotated[Literal["alpaca", "sharegpt"] | None, Fingerprint.IF_SET] = None
    """Rows of a known kind, used instead of both: alpaca (instruction, input, output) or sharegpt (conversations, whose
    messages have from and value), which are chats."""
    messages: Annotated[Text | None, Fingerprint.IF_SET] = None
    """Field with a list of chat messages (role, content), used instead of both: the last one is the response."""
    tools: Annotated[Text | None, Fingerprint.IF_SET] = None
    """Field with the JSON schemas of the tools that a chat may call, as a list or as JSON text."""
    arguments: Annotated[dict[str, Any], Check(_reserved_arguments), Fingerprint.IF_SET] = field(default_factory=dict)
    """Variables of the chat template besides the messages, such as {enable_thinking: false}."""
    train_on: Annotated[Literal["last", "all"], Fingerprint.IF_SET] = "last"
    """Answers of a chat that are learned; evaluation always asks for the last."""
    date: Annotated[Date | None, Fingerprint.IF_SET] = None
    """Date that a chat template writes as today's, as 2026-01-31; null: 2024-07-26, so that the text of a run is the
    same on every day."""

    @property
    def chat(self) -> str | None:
        """The field that holds a chat's messages, or None where rows are not chats."""
        return CONVERSATIONS if self.messages is None and self.layout == "sharegpt" else self.messages


@section
class Task:
    """One task: its rows and how they read. Rows are in JSON lines, JSON, CSV, TSV or Parquet, or `hub:NAME:SPLIT`."""

    train: Annotated[FilePath, Check(_rows_are_there, is_of_this_machine=True), Fingerprint.DERIVED]
    """Training rows: a JSON lines, JSON, CSV, TSV or Parquet file, or hub:NAME:SPLIT, which is streamed."""
    test: Annotated[FilePath, Check(_rows_are_there, is_of_this_machine=True), Fingerprint.DERIVED]
    """Rows to evaluate on, in the same formats."""
    validation: Annotated[FilePath | None, Check(_rows_are_there, is_of_this_machine=True), Fingerprint.DERIVED] = None
    """Rows for train.validate_every and for searches of merge weights, which never see test rows."""
    mixture: Annotated[
        dict[FilePath, Fraction],
        Check(_shares),
        Check(_all_rows_are_there, is_of_this_machine=True),
        Fingerprint.DERIVED,
    ] = field(default_factory=dict)
    """More files to train on, each with its share of the rows; `train` has the rest."""
    template: Template = field(default_factory=Template)
    """Prompt and response that a row becomes."""
    labels: Annotated[tuple[str, ...] | None, Check(wrong_labels)] = None
    """All values of the one field in template.response, for classification."""
    seed: Annotated[Seed | None, Fingerprint.DERIVED] = None
    """Seed of this task's A; null: it follows from adapter.seed and the task's name."""
    start: Annotated[Text | None, Check(_adapter_is_there), Fingerprint.DERIVED] = None
    """Adapter of one task, a file or folder, to continue from: its A and its kept entries stay, and calibration is
    skipped."""
    steps: Annotated[Positive | None, Fingerprint.DERIVED] = None
    """Optimizer steps of this task; overrides train.steps and train.epochs."""
    epochs: Annotated[Rate | None, Fingerprint.DERIVED] = None
    """Passes over this task's rows; overrides train.steps and train.epochs."""
    lr: Annotated[Rate | None, Fingerprint.DERIVED] = None
    """Learning rate of this task; overrides train.lr."""

    @property
    def test_template(self) -> Template:
        """The template of test rows: in a chat, the last answer is asked for."""
        return replace(self.template, train_on="last")


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
    """Training of each task."""

    engine: Annotated[Choice, Chosen, ENGINES, Fingerprint.DERIVED] = field(default_factory=lambda: Choice(name="ddp"))
    """Engine that distributes the training: ddp, fsdp or {name: deepspeed, stage: 3}."""
    steps: Positive | None = None
    """Optimizer steps; set exactly one of steps and epochs."""
    epochs: Rate | None = None
    """Passes over the training rows; set exactly one of steps and epochs."""
    batch_size: Positive = 32
    """Rows of one optimizer step, over all ranks."""
    micro_batch_size: Annotated[Positive, Fingerprint.NEVER] = 8
    """Rows of the longest length that a rank runs at once, or more that are shorter; a larger batch is accumulated."""
    micro_batch_tokens: Annotated[Positive | None, Fingerprint.NEVER] = None
    """Tokens that a rank runs at once, with padding, instead of micro_batch_size; null: as many as those rows have."""
    max_length: Annotated[int, pydantic.Field(ge=2), NotBool] = 512
    """Tokens of a row; longer prompts lose their beginning, longer responses their end."""
    pack: Annotated[bool, Fingerprint.NEVER] = False
    """Put several short rows into one sequence of up to max_length tokens; rows do not attend to each other."""
    sequence_parallel: Annotated[Positive, Fingerprint.NEVER] = 1
    """Ranks that divide the tokens of each row among them, for rows that are too long for one rank."""
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
    activation_checkpointing: Annotated[bool, Fingerprint.NEVER] = False
    """Recompute activations in the backward pass to save memory."""
    mlp_slices: Annotated[Positive, Fingerprint.NEVER] = 1
    """Compute each block's MLP with this many slices of a row, one after another, for long rows; 1: with all tokens."""
    compile: Annotated[bool, Fingerprint.NEVER] = False
    """Compile transformer blocks with torch.compile at the first steps."""
    deterministic: Annotated[bool, Fingerprint.NEVER] = False
    """Use only kernels that give the same bits every time, even where others are faster."""
    on_divergence: Annotated[Literal["stop", "skip", "rollback"], Fingerprint.IF_SET] = "stop"
    """Reaction to a loss or gradient that is not finite, or to a spike: stop with an error, skip the update, or
    rollback to the last checkpoint and continue with the rows after it."""
    spike: Annotated[
        Annotated[float, pydantic.Field(gt=1, allow_inf_nan=False), NotBool] | None, Fingerprint.IF_SET
    ] = None
    """Count a loss above this many times the median of the last 32 (8 at least) as a spike; null: no loss is one."""
    validate_every: Annotated[Positive | None, Fingerprint.IF_SET] = None
    """Steps between measurements of the loss on the tasks' validation rows; null: no measurements."""
    early_stop: Annotated[Positive | None, Fingerprint.IF_SET] = None
    """End after this many measurements without a lower loss, and keep the best values; null: never."""
    calibrate: Calibrate = field(default_factory=Calibrate)
    """The dense phase, which finds the mask."""
    checkpoint_every: Annotated[Positive | None, Fingerprint.NEVER] = 100
    """Steps between checkpoints; null: no checkpoints."""
    keep: Annotated[Positive, Fingerprint.NEVER] = 2
    """Checkpoints to keep."""
    time_limit: Annotated[Duration | None, Fingerprint.NEVER] = None
    """Time after the start of the process, in seconds or as 11h30m or 1m30s, at which it saves and exits with code 3;
    the same command resumes it."""
    seed: Seed = 0
    """Seed of the order of the rows."""

    def groups(self, ranks: int) -> int:
        """Number of groups of ranks that divide rows among them: 1 at least, as their number is checked elsewhere."""
        return max(1, ranks // self.sequence_parallel)

    @property
    def rows_at_once(self) -> int:
        """Rows of max_length tokens that a rank runs at once."""
        if self.micro_batch_tokens is None:
            return self.micro_batch_size
        return max(1, self.micro_batch_tokens // self.max_length)


@section
class Search:
    """Weights found on validation rows, by evaluating merges with weights that are tried. It never sees test rows.

    The rows are the first of a task's `validation` file, or, where it has none, the last of its `train` file, which are
    then left out of its training.
    """

    method: Annotated[Literal["coordinate", "cma", "gradient"], Check(_search_is_there)] = "coordinate"
    """Search along one weight after the other (coordinate), by CMA-ES (cma; needs the extra search), or along the
    gradient of the loss (gradient; LoRA Soups' CAT, of concat and linear)."""
    per: Literal["task", "projection", "module"] = "task"
    """Search one weight for each task, one for each task and kind of projection (q_proj), or, along the gradient, one
    for each task and module."""
    rows: Positive = 64
    """Validation rows of each task."""
    budget: Positive = 32
    """Largest number of evaluations; the first is that of the default weights."""
    bounds: Annotated[tuple[Number, Number], Check(_bounds)] = (0.0, 1.0)
    """Smallest and largest weight."""
    lr: Annotated[Rate, Fingerprint.IF_SET] = 0.05
    """Learning rate of Adam along the gradient."""
    metric: Literal["loss", "exact_match", "choice", "choice_norm", "choice_bytes", "choice_end"] = "loss"
    """Metric whose mean over the merge's tasks is optimised."""
    seed: Seed = 0
    """Seed of cma."""


Weight = Number | dict[Text, Number]
"""Weight of one task: a number, or pattern over module paths -> number."""


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
    tasks: Annotated[tuple[str, ...] | None, Check(_each_once)] = None
    """Tasks to merge; null: all of them."""
    search: Search | None = None
    """Find the weights on validation rows; set either weights or search."""


@section
class LmEval:
    """Tasks of EleutherAI's lm-eval, which every model is measured on besides. Needs the extra `lm-eval`."""

    tasks: Annotated[tuple[Text, ...], pydantic.Field(min_length=1)]
    """Names of tasks, groups or tags of lm-eval."""
    include: Annotated[FilePath | None, Check(_folder_is_there), Fingerprint.DERIVED] = None
    """Folder with tasks of your own, in lm-eval's YAML."""
    rows: Positive | None = None
    """Evaluate on the first rows of each task only, this many; null: all."""
    num_fewshot: Count | None = None
    """Examples before each question; null: the task's own number."""


@section
class Evaluate:
    """Measurements of base, adapters and merges on every task's test rows."""

    engine: Annotated[Choice | None, Chosen, PLACERS, Fingerprint.NEVER] = None
    """Engine that holds the base, sharded or on every rank, while the ranks divide the rows: ddp, fsdp or {name:
    deepspeed, stage: 3}; null: as in training."""
    metrics: Annotated[tuple[str, ...], pydantic.Field(min_length=1), Check(_metrics)] = (
        "loss",
        "exact_match",
        "choice",
    )
    """Metrics to measure. choice is lm-eval's acc, on tasks that have labels; choice_norm and choice_bytes divide by a
    label's length, as acc_norm and acc_bytes do; choice_end counts the end token too."""
    batch_size: Annotated[Positive, Fingerprint.NEVER] = 32
    """Rows that a rank evaluates at once, on all models of a pass together."""
    tasks: Annotated[Literal["all", "own"], Fingerprint.DERIVED] = "all"
    """Tasks on whose test rows an adapter or a merge is measured: all, or its own, that is those it was trained on or
    merged of. The base is measured on all."""
    rows: Positive | None = None
    """Evaluate on the first test rows only, this many; null: all."""
    max_new_tokens: Positive = 64
    """Longest generated response, in tokens."""
    temperature: Annotated[float, pydantic.Field(ge=0, allow_inf_nan=False), NotBool, Fingerprint.IF_SET] = 0.0
    """Temperature at which the tokens of responses are drawn; 0: the likeliest token, always."""
    top_p: Annotated[Fraction, Fingerprint.IF_SET] = 1.0
    """Draw from the likeliest tokens alone, those that have this much of the probability together."""
    seed: Annotated[Seed, Fingerprint.IF_SET] = 0
    """Seed of the tokens that are drawn, which depend on the prompt and the model besides, and on nothing else."""
    lm_eval: Annotated[LmEval | None, Check(_lm_eval_is_there), Fingerprint.DERIVED] = None
    """Benchmarks of EleutherAI's lm-eval that every model is measured on as well; needs the extra lm-eval."""


@section
class Cluster:
    """Cluster that the jobs run on, and the room that they take there."""

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
    """Number of times a failed job is started again; a training resumes from its last checkpoint."""
    patience: Rate = 600.0
    """Seconds that a job waits for nodes that were lost."""
    packing: Annotated[
        Literal["off", "auto"] | Annotated[int, pydantic.Field(ge=2), NotBool], pydantic.BeforeValidator(read_off)
    ] = "off"
    """Train tasks at once over one copy of the base: this many, all that can if it pays (auto), or none (off)."""


@section
class Run:
    """Several tasks' trainings, the merges of their adapters, and the evaluation of all of them."""

    name: Annotated[Name, Fingerprint.NEVER]
    """Name of the run: letters, digits, - and _."""
    output: Annotated[FilePath, Fingerprint.NEVER] = "runs"
    """Folder for results, which go to output/name: a path that all nodes see, or a URL that fsspec knows."""
    model: Model
    """The frozen base model."""
    tasks: Annotated[dict[Name, Task], Check(_some)]
    """Tasks by name, each with an adapter of its own."""
    adapter: Adapter = field(default_factory=Adapter)
    """Shape and sparsity of every task's adapter."""
    train: Train = field(default_factory=Train)
    """Training of each task."""
    merges: dict[Name, Merge] = field(default_factory=dict)
    """Merged adapters by name."""
    evaluate: Evaluate = field(default_factory=Evaluate)
    """Measurements of base, adapters and merges on every task's test rows."""
    cluster: Annotated[Cluster, Fingerprint.NEVER] = field(default_factory=Cluster)
    """Cluster that the jobs run on, and the room that they take there."""
    trackers: Annotated[tuple[str, ...], Listed, Check(_trackers, is_of_this_machine=True), Fingerprint.NEVER] = (
        "tensorboard",
    )
    """Programs that get metrics besides metrics.jsonl: tensorboard, wandb, mlflow, aim, clearml, comet_ml, dvclive,
    swanlab or trackio."""
    multitask: Annotated[Choice, Chosen, PLANS, Fingerprint.DERIVED] = field(
        default_factory=lambda: Choice(name="independent")
    )
    """Plan of the trainings: independent, joint (one adapter for all tasks), sequential (one after the other) or
    clustered (one adapter for each cluster of rows)."""

    @property
    def folder(self) -> Path:
        """The run's folder, or this machine's mirror of it if `output` is a URL."""
        if storage.is_url(self.output):
            return storage.mirror_folder(self.output, self.name)
        return Path(self.output).absolute() / self.name


# --- what follows from a run -----------------------------------------------------------------------------------------


def held_out(run: Run, task: str) -> int:
    """Number of the last rows of a task's `train` file that its training leaves out, since searches for weights measure
    on them. 0 if the task has `validation`."""
    if run.tasks[task].validation is not None:
        return 0
    searches = [merge.search for merge in run.merges.values() if task in (merge.tasks or run.tasks)]
    return max((search.rows for search in searches if search is not None), default=0)


def trained_as(run: Run, task: str) -> Train:
    """`train` with a task's own settings instead of those for all tasks."""
    own = run.tasks[task]
    has_length = own.steps is not None or own.epochs is not None
    steps, epochs = (own.steps, own.epochs) if has_length else (run.train.steps, run.train.epochs)
    return replace(run.train, steps=steps, epochs=epochs, lr=run.train.lr if own.lr is None else own.lr)


PARTS = ("train", "test", "validation")


def files(task: Task) -> Iterator[tuple[str, str]]:
    """Yields each file of a task: its place in the task's section, and its path."""
    for part in PARTS:
        if getattr(task, part) is not None:
            yield part, getattr(task, part)
    yield from (("mixture", path) for path in task.mixture)


def engine_files(run: Run) -> dict[str, str]:
    """Files that options of the engine name: place in the configuration -> path."""
    engine = run.train.engine
    given = plugin.find(ENGINES.folder, engine.name, ENGINES.role, "train.engine").constants.get("FILES", ())
    options = {name: engine.options.get(name) for name in given}
    return {f"train.engine.{name}": os.path.expanduser(path) for name, path in options.items() if path is not None}
