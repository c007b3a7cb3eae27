"""The checks that involve several keys, each a function that yields every mistake of one kind.

What a single key may be is said with it, in run.py. A rule reads the run as if it were right: where a key that it reads
is wrong, the rule ends there, and the key's own mistake is reported alone.
"""

import contextlib
import functools
import itertools
import json
import os
import string
from collections.abc import Callable, Iterator
from dataclasses import fields
from pathlib import Path
from typing import Any

from lori_dist import plugin, storage, tables
from lori_dist.config.kinds import ENGINES, FORMS
from lori_dist.config.run import (
    FLASH,
    Moments,
    Run,
    Search,
    Template,
    Train,
    engine_files,
    files,
    names_of,
    wrong_labels,
    wrong_template,
)
from lori_dist.errors import ConfigError
from lori_dist.files import read_regular

Rule = Callable[[Run], Iterator[str]]
"""Yields every mistake of one kind in a run."""


def as_far_as_known(rule: Rule, run: Run) -> list[str]:
    """The mistakes that a rule finds in a run that lacks values. If one task lacks a value that the rule reads, others
    are checked all the same."""
    found: list[str] = []
    if not _ends(rule, run, found) and rule in EACH:
        for name, item in getattr(run, EACH[rule], {}).items():
            _ends(rule, _changed(run, EACH[rule], {name: item}), found)
    return found


def _ends(rule: Rule, run: Run, found: list[str]) -> bool:
    """Appends a rule's mistakes to `found`. Returns whether the rule came to its end."""
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


LORI = "lori"


def is_per_task(run: Run) -> bool:
    """Whether a run trains one adapter with an update for each task."""
    return of_form(run, "PER_TASK")


def of_form(run: Run, constant: str) -> bool:
    """Whether the form of a run's adapters says of itself that it has a property."""
    form = run.adapter.form
    return plugin.find(FORMS.folder, form.name, FORMS.role, "adapter.form").declares(constant, form.options)


def reads_moments(run: Run) -> bool:
    """Whether the A of a run's adapters follows from second moments of the tasks' inputs."""
    return run.adapter.init == "osrm" or of_form(run, "MOMENTS")


def _moments(run: Run) -> Iterator[str]:
    adapter = run.adapter
    if not reads_moments(run):
        if adapter.moments != Moments():
            yield (
                "adapter.moments: is for adapter.init osrm, or a form that begins from moments, and neither is set; "
                "remove it"
            )
        return
    of_init = adapter.init == "osrm"
    key = "adapter.init: osrm" if of_init else f"adapter.form: {adapter.form.name} that begins from moments"
    if adapter.dtype != "float32":
        yield f"adapter.dtype: got {adapter.dtype}, and an A that is computed from data is float32; remove it"
    if not of_init:
        return
    if len(run.tasks) < 2:
        yield f"{key} keeps A away from what other tasks read, and there is one task; add another, or use random"
    if adapter.form.name != LORI or run.multitask.name == "joint":
        yield f"{key} is for an adapter of each task, and multitask joint trains one for all; use random"
    if adapter.projection != "cached":
        yield f"adapter.projection: got {adapter.projection}, and {key} keeps an A that is stored as it is; use cached"
    if adapter.share_projection:
        yield f"adapter.share_projection: makes one A for all tasks, and {key} one for each; set only one"
    for name, task in run.tasks.items():
        if task.start is not None:
            yield f"tasks.{name}.start: its A stays, and {key} makes another; set only one"


def _forms(run: Run) -> Iterator[str]:
    form = run.adapter.form
    if form.name == LORI:
        return
    if "." in form.name:
        yield (
            f"adapter.form: got {form.name}, a module of your own, which no reader of an adapter file would import; "
            "put the file into lori_dist/forms"
        )
        return
    in_sequence = of_form(run, "IN_SEQUENCE")
    if run.multitask.name not in ("joint", *(["sequential"] if in_sequence else [])):
        how = "together, or one after the other" if in_sequence else "together"
        wanted = "joint or sequential" if in_sequence else "joint"
        yield (
            f"adapter.form: {form.name} trains the tasks {how}, and multitask is {run.multitask.name}; set that to "
            f"{wanted}, or use lori"
        )
    if run.adapter.projection == "recomputed":
        yield f"adapter.projection: recomputed is for the form lori, and adapter.form is {form.name}; use cached"
    if of_form(run, "RANK_FOR_EACH") and run.adapter.rank < len(run.tasks):
        yield (
            f"adapter.rank: got {run.adapter.rank} for {len(run.tasks)} tasks, of which {form.name} gives each a part; "
            "give at least as many"
        )
    method = plugin.find(FORMS.folder, form.name, FORMS.role, "adapter.form")
    for option in method.constants.get("AT_MOST_RANK", ()):
        given = form.options.get(option)
        if isinstance(given, int) and given > run.adapter.rank:
            yield f"adapter.form.{option}: got {given}, and adapter.rank is {run.adapter.rank}; give at most that"
    for option in method.constants.get("AT_LEAST_RANK", ()):
        given = form.options.get(option)
        if isinstance(given, int) and given < run.adapter.rank:
            yield f"adapter.form.{option}: got {given}, and adapter.rank is {run.adapter.rank}; give at least that"
    yield from _of_rows(run, method)
    if is_per_task(run) and run.evaluate.lm_eval is not None:
        yield (
            f"evaluate.lm_eval: cannot be combined with adapter.form {form.name}, which has an update for each task of "
            "the run and none for those of lm-eval; remove it"
        )
    for name, merge in run.merges.items():
        if merge.search is not None:
            yield f"merges.{name}.search: cannot be combined with adapter.form {form.name}; give weights"


def _of_rows(run: Run, method: plugin.Method) -> Iterator[str]:
    """What a form cannot do that looks at whole rows."""
    form = run.adapter.form
    chooses, option = of_form(run, "OF_ROWS"), method.constants.get("COUNTS")
    counts = option is not None and form.options.get(option, method.options[option].default) != 0
    if run.train.sequence_parallel > 1 and (chooses or counts):
        remedy = "remove it" if chooses else f"remove it, or set adapter.form.{option} to 0"
        yield (
            f"train.sequence_parallel: cannot be combined with adapter.form {form.name}, which looks at whole rows; "
            f"{remedy}"
        )
    if chooses and run.evaluate.lm_eval is not None:
        yield (
            f"evaluate.lm_eval: cannot be combined with adapter.form {form.name}, which looks at the prompt of a row, "
            "and lm-eval does not say where that ends; remove it"
        )


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


BALANCES = ("balance", "projection")
"""Options of joint training for how it makes one gradient of the tasks', by the newer and the older name."""


def _sliced(run: Run) -> Iterator[str]:
    if run.train.mlp_slices == 1:
        return
    if run.train.compile:
        yield "train.mlp_slices: cannot be combined with train.compile, which compiles blocks as they are; set only one"
    how, why = run.multitask, "where layers look at whose rows a batch has; remove it"
    if how.name == "joint" and (run.adapter.form.name != LORI or "none" not in map(how.options.get, BALANCES)):
        yield f"train.mlp_slices: cannot be combined with multitask joint and a form or a balance, {why}"
    if how.name == "independent" and run.cluster.packing != "off" and len(run.tasks) > 1:
        yield f"train.mlp_slices: cannot be combined with cluster.packing, {why}, or set cluster.packing to off"


def _saved(run: Run) -> Iterator[str]:
    if not run.adapter.modules_to_save:
        return
    how = run.multitask.options
    if run.multitask.name == "joint" and "none" not in map(how.get, BALANCES):
        yield (
            "adapter.modules_to_save: cannot be combined with multitask joint, which balances the gradients of A and B "
            "alone; set multitask.balance to none, or remove it"
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
    most, train = run.train.micro_batch_tokens, run.train
    if most is not None and most < train.max_length:
        yield (
            f"train.micro_batch_tokens: got {most}, and a row may have train.max_length tokens, {train.max_length}; "
            "give at least as many"
        )
    if most is not None and train.micro_batch_size != Train().micro_batch_size:
        yield "train.micro_batch_size, train.micro_batch_tokens: both are given; set only one"


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
    for name, task in run.tasks.items():
        if task.seed is not None and run.adapter.share_projection:
            yield f"tasks.{name}.seed: is given, but adapter.share_projection makes one A for all; set only one"


def _mixtures(run: Run) -> Iterator[str]:
    for name, task in run.tasks.items():
        if task.train in task.mixture:
            yield f"tasks.{name}.mixture: {task.train!r} is also tasks.{name}.train, which has the rest; remove it"
        if task.mixture and run.multitask.name == "joint":
            yield (
                f"tasks.{name}.mixture: cannot be combined with multitask joint, which mixes tasks itself; set only one"
            )


def _chats(run: Run) -> Iterator[str]:
    for name, task in run.tasks.items():
        where, template, usual = f"tasks.{name}.template", task.template, Template()
        for key in ("date", "tools", "arguments", "train_on"):
            if template.chat is None and getattr(template, key) != getattr(usual, key):
                yield f"{where}.{key}: is for chat templates, and template.messages is not given; remove it"
        given = "layout" if template.layout is not None else "messages" if template.messages is not None else None
        if given is not None and task.labels is not None:
            yield f"tasks.{name}.labels: are for template.response, and template.{given} is given; set only one"
        for key in ("prompt", "response"):
            if given is not None and getattr(template, key) != getattr(usual, key):
                yield f"{where}.{key}: is not used where template.{given} is given; set only one"
        if template.layout == "alpaca" and template.messages is not None:
            yield f"{where}.messages: alpaca rows have no messages; set only one of messages and layout"


def _starts(run: Run) -> Iterator[str]:
    for name, task in run.tasks.items():
        if task.start is None:
            continue
        where = f"tasks.{name}.start"
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


def _divided_rows(run: Run) -> Iterator[str]:
    if run.train.sequence_parallel == 1:
        return
    for key in ("pack", "compile"):
        if getattr(run.train, key):
            yield f"train.sequence_parallel: cannot be combined with train.{key}; remove one of them"


def unpackable(model_type: str) -> Iterator[str]:
    """Yields the reasons why rows cannot be packed for a model."""
    if model_type not in PACKED:
        yield (f"train.pack: {model_type} is not known to keep packed rows apart, as {', '.join(PACKED)} do; remove it")


def _output(run: Run) -> Iterator[str]:
    place = run.folder
    while not os.path.lexists(place):
        place = place.parent
    if not place.is_dir() or not os.access(place, os.W_OK | os.X_OK):
        found = f"{str(place)!r} is not a folder that can be written to"
        yield f"output: {str(run.folder)!r} cannot be made, as {found}; give another"


def _in_a_job(run: Run) -> Iterator[str]:
    """Yields the mistake of an output folder that would be lost: a job of Ray works in a copy of what was submitted,
    which is deleted after it."""
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
    """Yields the mistakes of a run that is to work on machines which share no current directory with this one."""
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


def checked_engine(run: Run) -> Iterator[str]:
    """Yields the mistakes that the engine finds in files that its options name; only then is it imported."""
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
    if not {"exact_match", "refusal"} & set(run.evaluate.metrics):
        return
    with contextlib.suppress(OSError, ValueError, AttributeError):  # the job says what is wrong with config.json
        settings = json.loads(read_regular(Path(run.model.path) / "config.json"))
        positions, asked = settings.get("max_position_embeddings"), run.evaluate.max_new_tokens
        if isinstance(positions, int) and asked >= positions:
            yield f"evaluate.max_new_tokens: got {asked}, the model has {positions} positions; give less"


def _labels_of_templates(run: Run) -> Iterator[str]:
    for name, task in run.tasks.items():
        template = task.template.response
        named = names_of(template)
        if task.labels is None or len(named) == 1 or any(wrong_template(template)):
            continue
        yield (
            f"tasks.{name}.labels: are values of the one field in template.response, and {template!r} has "
            f"{len(named)}; leave one field there, or remove labels"
        )


def _fields_of(template: Template) -> dict[str, list[str]]:
    """Key of the template -> fields that every row must have for it."""
    if template.chat is not None:
        return {"layout" if template.messages is None else "messages": [template.chat]}
    if template.layout == "alpaca":
        return {"layout": ["instruction", "output"]}
    return {key: names_of(getattr(template, key)) for key in ("prompt", "response")}


def _fields(run: Run) -> Iterator[str]:
    """Looks at the first row only: the usual mistake shows there, and a file may have gigabytes."""
    first_row = functools.cache(_first_row)  # tasks may have files in common
    for name, task in run.tasks.items():
        rows = {part: first_row(path) for part, path in files(task)}
        for text, named in _fields_of(task.template).items():
            for wanted in named:
                lacking = [part for part, row in rows.items() if row is not None and wanted not in row]
                if lacking:
                    row = rows[lacking[0]] or {}
                    yield (
                        f"tasks.{name}.template.{text}: takes the field {wanted!r}, which the first row of "
                        f"tasks.{name}.{lacking[0]} lacks; it has {', '.join(row)}.{plugin.nearest(wanted, row)}"
                    )


def _labels(run: Run) -> Iterator[str]:
    for name, task in run.tasks.items():
        names = names_of(task.template.response)
        if task.labels is None or len(names) != 1 or any(wrong_labels(task.labels)):
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


LOOKED_AT = 10_000
"""Number of a file's rows whose labels are compared before anything starts: a fraction of a second."""


def _first_row(path: str) -> dict[str, Any] | None:
    return next((row for _, row in _rows(path, 1)), None)


def _num_rows(path: str, most: int) -> int:
    """Number of rows, counted up to `most`; 0 if there is no such file."""
    with contextlib.suppress(OSError, ConfigError):
        if not os.path.isfile(path) and not tables.is_hub(path):
            return 0
        return sum(1 for _ in itertools.islice(tables.read(path), most))
    return 0


def _rows(path: str, count: int) -> Iterator[tuple[int, dict[str, Any]]]:
    """The readable ones of a file's first rows, numbered. The job reports the mistakes of the others."""
    if tables.is_hub(path) or not os.path.isfile(path):
        return  # the one takes a network, and time; a device may have no end
    with contextlib.suppress(OSError, ConfigError):
        for number, row in itertools.islice(tables.read(path), count):
            if isinstance(row, dict):
                yield number, row


def _merges(run: Run) -> Iterator[str]:
    for name, merge in run.merges.items():
        path = f"merges.{name}"
        if name in run.tasks or name == "base":
            yield f"{path}: is also the name of a task or of the base; give the merge another name"
        tasks = merge.tasks if merge.tasks is not None else tuple(run.tasks)
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
        for task_name, task in tasks.items():
            found = _num_rows(task.train, search.rows + 1) if task.validation is None else None
            if found is not None and 0 < found <= search.rows:
                yield (
                    f"{path}.search.rows: got {search.rows}, and tasks.{task_name}.train, whose last rows are "
                    f"held out for it, has {found}; give fewer, or tasks.{task_name}.validation"
                )
        if search.metric.startswith("choice") and not any(task.labels for task in tasks.values()):
            yield f"{path}.search.metric: {search.metric} is measured on tasks that have labels, and none has; use loss"
        if search.method == "gradient":
            if merge.method.name not in ("concat", "linear"):
                yield (
                    f"{path}.search.method: gradient is for merges that are a weighted sum, concat and linear, and "
                    f"{path}.method is {merge.method.name}; use coordinate or cma"
                )
            if search.metric != "loss":
                yield f"{path}.search.metric: got {search.metric}, which has no gradient; use loss"
        elif search.per == "module":
            yield f"{path}.search.per: module is for search.method gradient, got {search.method}; use projection"
        if search.method != "gradient" and search.lr != Search().lr:
            yield f"{path}.search.lr: is for search.method gradient, got {search.method}; remove it"
        if search.method == "cma" and search.per == "task" and len(tasks) == 1:
            yield f"{path}.search.method: cma needs two weights, there is one; use coordinate"


def _drawn(run: Run) -> Iterator[str]:
    if run.evaluate.top_p < 1 and run.evaluate.temperature == 0:
        yield "evaluate.top_p: is for tokens that are drawn; set evaluate.temperature, or remove it"


RULES: tuple[Rule, ...] = (
    _projections,
    _moments,
    _forms,
    _saved,
    _attention,
    _compiled,
    _sliced,
    _lengths,
    _lengths_of_tasks,
    _long_runs,
    _validation_rows,
    _tasks,
    _mixtures,
    _chats,
    _starts,
    _packed_rows,
    _divided_rows,
    _output,
    _in_a_job,
    checked_engine,
    _positions,
    _labels_of_templates,
    _fields,
    _labels,
    _merges,
    _searches,
    _drawn,
    _cluster,
)

OF_THIS_MACHINE = (_output, _in_a_job, checked_engine)
"""Rules that hold on this machine alone."""

EACH = {
    _lengths_of_tasks: "tasks",
    _validation_rows: "tasks",
    _tasks: "tasks",
    _mixtures: "tasks",
    _chats: "tasks",
    _starts: "tasks",
    _labels_of_templates: "tasks",
    _fields: "tasks",
    _labels: "tasks",
    _merges: "merges",
    _searches: "merges",
}
"""Rules that look at one task, or one merge, after the other."""
