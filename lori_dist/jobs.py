"""The jobs of a run: what each needs, and the fingerprints that say whether a finished result is still valid."""

import contextlib
import functools
import hashlib
import io
import json
import os
import re
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal, cast

from lori_dist import config, plugin, rows, tables
from lori_dist.errors import ConfigError, JobError
from lori_dist.files import open_regular, parse_json, read_regular

Kind = Literal["moments", "cluster", "train", "merge", "evaluate"]

FORMAT = 1
"""A part of every fingerprint: with another number, every job is done again."""

NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]{0,199}", re.ASCII)
"""Pattern of job names: nothing in them can leave the run's folder."""

JOINT = "joint"
"""The name that stands for a task's in the adapter that all tasks share."""

MOMENTS = "moments.safetensors"
"""File in the folder of a job of moments."""
CLUSTERS = "clusters.safetensors"
"""File in the folder of the job that divides rows into clusters."""

WEIGHTS = (".safetensors", ".bin")
TEXTS = (".json", ".txt", ".model", ".jinja")
WHOLE = 64 * 2**20
"""Bytes up to which a weight file is hashed in full; a larger one is hashed by samples."""
SAMPLE, NUM_SAMPLES = 2**16, 16


@dataclass(frozen=True, kw_only=True, slots=True)
class Job:
    """One piece of a run, whose results are one folder."""

    name: str
    """`moments-TASK`, `cluster-rows`, `train-TASK`, `train-joint`, `train-cluster-NUMBER`, `merge-NAME` or
    `evaluate-MODEL`."""
    kind: Kind
    needs: tuple[str, ...] = ()
    """Names of the jobs whose results it reads."""
    settings: Mapping[str, Any] = field(default_factory=dict)
    """All that determines the result up to rounding, as plain JSON, apart from the results of `needs`."""
    fingerprint: str
    """Digest of the settings and of the fingerprints of the jobs that it needs."""

    @property
    def is_gang(self) -> bool:
        """Whether ranks do it, as it runs the model."""
        return self.kind != "merge" or "search" in self.settings

    def __post_init__(self) -> None:
        """Raises ConfigError for a name that cannot be a folder's name."""
        if not NAME.fullmatch(self.name) or self.name == "logs":
            raise ConfigError(
                f"multitask: the plan has a job called {self.name!r}; names of jobs are at most 200 letters, digits, "
                "- and _, and not `logs`"
            )


def task_seed(run: config.Run, task: str) -> int:
    """The seed of a task's A: its own, or one that follows from adapter.seed and, unless A is shared, the task's name.

    Below 2**53. The same on every machine, whatever other tasks there are.
    """
    if task in run.tasks and (own := run.tasks[task].seed) is not None:
        return own
    if run.adapter.share_projection:
        return run.adapter.seed
    digest = hashlib.sha256(f"{run.adapter.seed}/{task}".encode()).digest()
    return int.from_bytes(digest[:8], "little") >> 11


# --- the jobs there are ----------------------------------------------------------------------------------------------


def plan(run: config.Run) -> list[Job]:
    """The jobs of a run as `multitask` plans them, each after those that it needs, with the measurements of moments
    that its trainings begin from. Raises ConfigError."""
    method = plugin.find("multitask", run.multitask.name, "plan", "multitask")
    planned = list(method.load()(run, **method.bind(run.multitask.options, "multitask")))
    lacking = {need for job in planned for need in job.needs} - {job.name for job in planned}
    measured = [moments_job(run, task) for task in run.tasks] if config.reads_moments(run) else []
    return order([*(job for job in measured if job.name in lacking), *planned])


def moments_of(run: config.Run, task: str) -> tuple[str, ...]:
    """The tasks whose moments the training of a task begins from, or that of all together (JOINT); none where A follows
    from a seed."""
    return tuple(other for other in run.tasks if other != task) if config.reads_moments(run) else ()


def moments_job(run: config.Run, task: str) -> Job:
    """The measurement of the second moments of what the base's layers read of a task's training rows."""
    own, held_out = run.tasks[task], config.held_out(run, task)
    chosen, settings = config.fingerprinted(run.adapter), run.adapter.moments
    width = 4 * run.adapter.rank if settings.width is None else settings.width
    return _job(
        "moments",
        task,
        [],
        task=task,
        model=_model(run.model),
        data={
            "rows": sha256(own.train),
            "template": _template(run, own),
            **({"held_out": held_out} if held_out else {}),
        },
        adapter={key: chosen[key] for key in ("targets", "exclude", "modules_to_save") if key in chosen},
        moments={"rows": settings.rows, "full_up_to": settings.full_up_to, "width": width},
        max_length=run.train.max_length,
    )


def _measured(run: config.Run, task: str) -> list[Job]:
    return [moments_job(run, other) for other in moments_of(run, task)]


def train_job(run: config.Run, task: str, after: Sequence[Job] = (), sequel: Mapping[str, Any] | None = None) -> Job:
    """The training of one task's adapter. after: jobs that it needs. sequel: the adapter that it adds to, as
    `training.train.train` takes it."""
    own, held_out = run.tasks[task], config.held_out(run, task)
    return _job(
        "train",
        task,
        [*after, *_measured(run, task)],
        task=task,
        seed=task_seed(run, task),
        model=_model(run.model),
        data={
            "rows": sha256(own.train),
            "template": _template(run, own),
            **({"mixture": _mixture(own.mixture)} if own.mixture else {}),
            **({"held_out": held_out} if held_out else {}),  # a run without a search has the fingerprints it had
            **({} if run.train.validate_every is None else {"validation": sha256(str(own.validation))}),
        },
        **({} if sequel is None else {"sequel": dict(sequel)}),
        **({} if own.start is None else {"start": contents(Path(own.start))}),
        **_protocol(replace(run, train=config.trained_as(run, task))),
    )


def joint_job(run: config.Run, joint: Mapping[str, Any]) -> Job:
    """The training of one adapter on all tasks together. joint: its settings, as `training.joint.Joint` takes them."""
    return _job(
        "train",
        JOINT,
        _measured(run, JOINT),
        task=JOINT,
        seed=task_seed(run, JOINT),
        model=_model(run.model),
        tasks=_all_rows(run),
        joint=dict(joint),
        **({"seeds": {name: task_seed(run, name) for name in run.tasks}} if config.of_form(run, "OWN_A") else {}),
        **_protocol(run),
    )


def cluster_job(run: config.Run, number: int, seed: int) -> Job:
    """The division of all tasks' training rows into so many clusters, by what the base makes of them."""
    return _job(
        "cluster",
        "rows",
        [],
        model=_model(run.model),
        tasks={
            name: {"rows": sha256(task.train), "template": _template(run, task)} for name, task in run.tasks.items()
        },
        cluster={"clusters": number, "seed": seed},
        max_length=run.train.max_length,
    )


def cluster_train_job(run: config.Run, divided: Job | None, place: int, clusters: int) -> Job:
    """The training of one cluster's adapter, `cluster-1` for place 0 of so many. divided: the job that
    `cluster_job` gives, or None where only the settings are asked for."""
    name = f"cluster-{place + 1}"
    return _job(
        "train",
        name,
        [] if divided is None else [divided],
        task=name,
        seed=task_seed(run, name),
        model=_model(run.model),
        tasks=_all_rows(run),
        cluster={"place": place, "clusters": clusters},
        **_protocol(run),
    )


def _all_rows(run: config.Run) -> dict[str, Any]:
    return {
        name: {
            "rows": sha256(task.train),
            "template": _template(run, task),
            **({} if run.train.validate_every is None else {"validation": sha256(str(task.validation))}),
        }
        for name, task in run.tasks.items()
    }


def tasks_of(training: Job) -> list[str]:
    """The tasks whose rows a training, or what measures rows, reads."""
    settings = training.settings
    return list(settings["tasks"]) if "tasks" in settings else [settings["task"]]


def _protocol(run: config.Run) -> dict[str, Any]:
    """The settings of a training, apart from its rows."""
    is_trained = {"projection": "trained"} if run.adapter.projection == "trained" else {}
    return {
        "adapter": {**config.fingerprinted(run.adapter), **is_trained},
        "train": config.fingerprinted(run.train),
        **_engine(run),
        **_kinds(run),
        **_code("adapter.mask", run.adapter.mask.name),
    }


def _engine(run: config.Run) -> dict[str, Any]:
    """The options of the engine that change the result by more than rounding (RESULT in its file), if they are given;
    for files that options name (FILES), their content."""
    engine = run.train.engine
    method = plugin.find("engines", engine.name, "build", "train.engine")
    files = config.engine_files(run)
    given = {
        name: _content(path) if (path := files.get(f"train.engine.{name}")) is not None else value
        for name, value in engine.options.items()
        if name in method.constants.get("RESULT", ()) and value != method.options[name].default
    }
    return {"engine": given} if given else {}


def _content(path: str) -> Any:
    """The values of a JSON file, whatever its white space; the digest of another file."""
    try:
        return parse_json(read_regular(path))
    except ValueError:
        return sha256(path)


def _kinds(run: config.Run) -> dict[str, str]:
    """A setting for `per_projection`, which once took the number of an expert for a module kind: masks from that time
    are not taken for today's."""
    if run.adapter.mask.name != "per_projection":
        return {}
    try:
        has_experts = b"expert" in read_regular(Path(run.model.path) / "config.json")
    except OSError:  # a name on the hub: nothing is known
        has_experts = True
    return {"kinds": "experts' matrices by name"} if has_experts else {}


def _mixture(shares: Mapping[str, float]) -> list[list[Any]]:
    return [[sha256(path), share] for path, share in shares.items()]


def _template(run: config.Run, task: config.Task) -> dict[str, Any]:
    """The settings of a template. Runs without messages, or whose chat template writes no date, keep the fingerprints
    that they had."""
    given = config.fingerprinted(task.template)
    is_dated = task.template.chat is not None and "date" not in given and _writes_date(run.model.path)
    return {**given, **({"date": rows.DATE} if is_dated else {})}


def _labels(task: config.Task) -> list[str] | None:
    return None if task.labels is None else list(task.labels)


def _writes_date(path: str) -> bool:
    """Whether the chat template in a model's folder asks for today's date. True for a name on the hub, for which this
    is not known."""
    folder = Path(path)
    files = [file for file in folder.glob("*") if file.name.startswith(("chat_template", "tokenizer_config"))]
    return not folder.is_dir() or any(b"strftime_now" in file.read_bytes() for file in files if file.is_file())


def merge_job(run: config.Run, name: str, trained: Mapping[str, Job]) -> Job:
    """The job of one merge. trained: task -> the job that makes its adapter."""
    merge = run.merges[name]
    tasks = merge.tasks if merge.tasks is not None else tuple(run.tasks)
    share = plugin.default_weight(*_bound(name, merge), len(tasks))
    if merge.weights is None:
        given: list[config.Weight] = [share] * len(tasks)
    elif isinstance(merge.weights, dict):
        given = [merge.weights[task] for task in tasks]
    else:
        given = list(merge.weights)
    if share != 1 / len(tasks):  # written out, so that results of when it was the share of one are not taken
        given = [{"default": share, **weight} if isinstance(weight, dict) else weight for weight in given]
    # As pairs, for their order counts and that of an object's keys does not show in a fingerprint.
    weights = [list(map(list, weight.items())) if isinstance(weight, dict) else weight for weight in given]
    method = {"name": merge.method.name, **merge.method.options}
    return _job(
        "merge",
        name,
        list({trained[task].name: trained[task] for task in tasks}.values()),
        merge=name,
        method=method,
        tasks=list(tasks),
        **({"split": True} if config.is_per_task(run) else {}),  # the adapters are those of one file's tasks
        weights=weights,
        **({} if merge.search is None else {"search": _search(run, merge.search, tasks)}),
        **_code(f"merges.{name}.method", merge.method.name),
    )


def _bound(name: str, merge: config.Merge) -> tuple[plugin.Method, dict[str, Any]]:
    path = f"merges.{name}.method"
    method = plugin.find("merges", merge.method.name, "merge", path)
    return method, method.bind(merge.method.options, path)


def same_merges(run: config.Run, jobs: Iterable[Job]) -> list[list[str]]:
    """Merges that are the same function of the same tasks, whatever the form of their results, in groups of names.

    They have the same weights, and are one method with the same options, or all are the exact weighted sum.
    """
    groups: dict[str, list[str]] = {}
    for job in jobs:
        if job.kind == "merge" and "search" not in job.settings:
            name = job.settings["merge"]
            method, options = _bound(name, run.merges[name])
            defaults = {key: option.default for key, option in method.options.items()}
            is_sum = method.declares("EXACT", options)
            function: Any = "sum" if is_sum else [method.name, {**defaults, **options}]
            weights = sorted(zip(job.settings["tasks"], job.settings["weights"], strict=True), key=lambda pair: pair[0])
            key = json.dumps([function, weights, sorted(job.needs)], sort_keys=True, default=str)
            groups.setdefault(key, []).append(name)
    return [names for names in groups.values() if len(names) > 1]


def same_merges_said(groups: Iterable[Sequence[str]]) -> Iterator[str]:
    """A sentence for each group of merges that are the same function."""
    for names in groups:
        yield (
            f"The merges {', '.join(names[:-1])} and {names[-1]} are the same function of the same adapters with the "
            "same weights: they differ in the form of the result only, and their scores by rounding."
        )


def _search(run: config.Run, search: config.Search, tasks: Sequence[str]) -> dict[str, Any]:
    def data(name: str) -> dict[str, Any]:
        task = run.tasks[name]
        part, path = ("train", task.train) if task.validation is None else ("validation", task.validation)
        return {"part": part, "rows": sha256(path), "template": _template(run, task), "labels": _labels(task)}

    return {
        **config.fingerprinted(search),
        "tasks": {name: data(name) for name in tasks},
        "model": _model(run.model),
        "max_length": run.train.max_length,
        "max_new_tokens": run.evaluate.max_new_tokens,
        **_choice(search.metric),
    }


def evaluate_job(run: config.Run, model: str, adapter: Job | None) -> Job:
    """The evaluation of a model on the tasks that evaluate.tasks says. adapter: the job that makes the adapter; None is
    the base alone, which is measured on all."""
    own = _own_tasks(run, adapter) if run.evaluate.tasks == "own" else tuple(run.tasks)
    return _job(
        "evaluate",
        model,
        [adapter] if adapter else [],
        subject=model,
        adapter=adapter.name if adapter else None,
        model=_model(run.model),
        tasks={
            name: {"rows": sha256(task.test), "template": _template(run, task), "labels": _labels(task)}
            for name, task in run.tasks.items()
            if name in own
        },
        evaluate=config.fingerprinted(run.evaluate),
        **({} if run.evaluate.lm_eval is None else {"lm_eval": _lm_eval(run.evaluate.lm_eval)}),
        max_length=run.train.max_length,
        **_choice(*run.evaluate.metrics),
        **_code("evaluate.metrics", *run.evaluate.metrics),
    )


def _own_tasks(run: config.Run, adapter: Job | None) -> tuple[str, ...]:
    """The tasks that an adapter was trained on or merged of; all for the base and for joint training."""
    if adapter is None or "joint" in adapter.settings:
        return tuple(run.tasks)
    return tuple(adapter.settings["tasks"] if adapter.kind == "merge" else (adapter.settings["task"],))


def _choice(*metrics: str) -> dict[str, Any]:
    """A setting for `choice`, which once counted the end token, as `choice_end` does: figures from that time are not
    taken for today's."""
    return {"choice": "without end"} if "choice" in metrics else {}


def _lm_eval(settings: config.LmEval) -> dict[str, Any]:
    """The lm-eval tasks that are measured, with the user's own tasks by their content; the rows that these name are not
    included."""
    files = {} if settings.include is None else contents(Path(settings.include))
    return {**config.fingerprinted(settings), "files": files}


def contents(path: Path) -> dict[str, str]:
    """Path -> digest, for a file or for all files in a folder."""
    files = sorted(path.rglob("*")) if path.is_dir() else [path]
    return {str(file.relative_to(path)): sha256(file) for file in files if file.exists() and not file.is_dir()}


def _code(path: str, *methods: str) -> dict[str, Any]:
    """The digests of the user's own methods, which change without a new version of this program."""
    own = [name for name in methods if "." in name]
    return {"code": {name: sha256(plugin.source_of(name, path)) for name in own}} if own else {}


def _job(kind: Kind, suffix: str, needs: Sequence[Job], **settings: Any) -> Job:
    return Job(
        name=f"{kind}-{suffix}",
        kind=kind,
        needs=tuple(job.name for job in needs),
        settings=settings,
        fingerprint=fingerprint(kind, settings, [job.fingerprint for job in needs]),
    )


def check_inputs(run: config.Run, job: Job) -> None:
    """Raises JobError if rows or the model have changed since the job was planned: its result would belong to
    neither."""
    read = job.settings
    if job.kind == "merge":
        if "search" not in job.settings:
            return
        read = job.settings["search"]
    planned = {read["task"]: read["data"]} if "data" in read else read["tasks"]
    for task, data in planned.items():
        part = data.get("part", "test" if job.kind == "evaluate" else "train")
        if sha256(getattr(run.tasks[task], part)) != data["rows"]:
            where = f"tasks.{task}.{part}"
            raise JobError(f"{where}: the file has changed since the run began; give the same command again")
        if "mixture" in data and data["mixture"] != _mixture(run.tasks[task].mixture):
            raise JobError(f"tasks.{task}.mixture: a file has changed since the run began; give the same command again")
    if "start" in read and read["start"] != contents(Path(str(run.tasks[read["task"]].start))):
        raise JobError(f"tasks.{read['task']}.start: has changed since the run began; give the same command again")
    if _model(run.model)["content"] != read["model"]["content"]:
        raise JobError("model.path: the model has changed since the run began; give the same command again")


# --- fingerprints ----------------------------------------------------------------------------------------------------


def fingerprint(kind: str, settings: Mapping[str, Any], upstream: Sequence[str]) -> str:
    """64 hexadecimal digits that follow from the arguments alone, whatever the order of the keys."""
    tree = {"format": FORMAT, "kind": kind, "settings": settings, "upstream": list(upstream)}
    text = json.dumps(tree, sort_keys=True, separators=(",", ":"), allow_nan=False)
    return hashlib.sha256(text.encode()).hexdigest()


def sha256(path: str | Path) -> str:
    """Digest of a file's content, which is read once as long as the file stays as it is; for a data set on the hub, of
    its name."""
    if tables.is_hub(str(path)):
        return hashlib.sha256(str(path).encode()).hexdigest()
    return _digest(str(Path(path).absolute()), _state(path), None)


def _model(model: config.Model) -> dict[str, Any]:
    tokens = {"tokens": "joined"} if _joins(model.path) else {}
    content = model_content(model.path, code=model.trust_remote_code)
    return {"content": content, **config.fingerprinted(model), **tokens}


def _joins(path: str) -> bool:
    """Whether prompt and response are tokenised as one text. Byte-level tokenizers do not need it: their results from
    before this was done are still right, and keep their fingerprints."""
    try:
        return not _is_byte_level(path, _state(Path(path) / "tokenizer.json"))
    except (OSError, ValueError, LookupError, TypeError, AttributeError, RecursionError):
        return True  # a name on the hub, or no such file: nothing is known


@functools.cache
def _is_byte_level(path: str, state: tuple[int, int]) -> bool:
    tokenizer = json.loads(read_regular(Path(path) / "tokenizer.json"))
    settings = {}
    with contextlib.suppress(FileNotFoundError):
        settings = json.loads(read_regular(Path(path) / "tokenizer_config.json"))
    # transformers makes these parts of a Llama's tokenizer itself, whatever the file has.
    is_own = str(settings.get("tokenizer_class", "")).startswith(("Llama", "CodeLlama"))
    is_prefixed = bool(settings.get("add_prefix_space"))
    return not (is_own or is_prefixed) and rows.is_byte_level(tokenizer["normalizer"], tokenizer["pre_tokenizer"])


def model_content(path: str, *, code: bool = False) -> dict[str, str]:
    """File name -> digest, for a model's folder, wherever it is. For a name on the hub, the name.

    code: whether its Python files count, as they do where they are run. Weight files over 64 MiB are read in samples: a
    change of all tensors, as training makes it, is noticed.
    """
    folder = Path(path)
    if not folder.is_dir():
        return {"name": path}
    content = {}
    for file in sorted(folder.iterdir()):
        if file.suffix in TEXTS or (code and file.suffix == ".py"):
            content[file.name] = sha256(file)
        elif file.suffix in WEIGHTS:
            state = _state(file)
            content[file.name] = _digest(str(file.absolute()), state, None if state[0] <= WHOLE else NUM_SAMPLES)
    return content


def _state(path: str | Path) -> tuple[int, int]:
    status = os.stat(path)
    return status.st_size, status.st_mtime_ns


@functools.cache
def _digest(path: str, state: tuple[int, int], num_samples: int | None) -> str:
    with open_regular(path) as file:
        if num_samples is None:
            return hashlib.file_digest(cast(io.BufferedReader, file), "sha256").hexdigest()
        digest = hashlib.sha256(str(state[0]).encode())
        for index in range(num_samples):
            file.seek((state[0] - SAMPLE) * index // (num_samples - 1))
            digest.update(file.read(SAMPLE))
        return digest.hexdigest()


# --- what differs ----------------------------------------------------------------------------------------------------

_SHOWN = 60
"""Characters of a value in a message."""
_ABSENT = object()
_DIGEST = re.compile(r"[0-9a-f]{64}")


def differences(kind: str, there: Mapping[str, Any], here: Mapping[str, Any]) -> list[str]:
    """Each setting of a job that is another one, by its place in the configuration: `train.lr 0.005 -> 0.004`.

    there, here: the settings of two jobs of one kind, as plain JSON. Files that differ (rows, the model, an adapter to
    start from, code) are only said to have changed.
    """
    before, after = _leaves(there), _leaves(here)
    names = [name for name in {**before, **after} if before.get(name, _ABSENT) != after.get(name, _ABSENT)]
    parts = {**there.get("search", {}).get("tasks", {}), **here.get("search", {}).get("tasks", {})}
    found: dict[str, list[str]] = {}
    for name in names:
        old, new = before.get(name, _ABSENT), after.get(name, _ABSENT)
        place, what = _place(kind, name, {**there, **here}, parts)
        if what is None:
            is_file = any(isinstance(value, str) and _DIGEST.fullmatch(value) for value in (old, new))
            what = "has changed" if is_file else f"{_value(old)} -> {_value(new)}"
        elif what:
            what += " is new" if old is _ABSENT else " is gone" if new is _ABSENT else " has changed"
        else:
            what = "has changed"
        found.setdefault(place, []).append(what)
    return [
        f"{place}{' ' if ' -> ' in whats[0] else ': '}{', '.join(dict.fromkeys(whats))}"
        for place, whats in found.items()
    ]


def _place(
    kind: str, name: tuple[str, ...], settings: Mapping[str, Any], parts: Mapping[str, Any]
) -> tuple[str, str | None]:
    """The place of a job's setting in the configuration, and, for a file among several, its name: empty if the place
    names one file, None if it is not a file."""
    path = ".".join(name)
    task = settings.get("task", settings.get("subject", ""))
    match name:
        case ("model", "content", "name"):
            return "model.path", None
        case ("model", "content", file):
            return "model.path", file
        case ("search", "model", *rest):
            return _place(kind, ("model", *rest), settings, parts)
        case ("data", "rows"):
            return f"tasks.{task}.train", "the file"
        case ("data", "validation"):
            return f"tasks.{task}.validation", "the file"
        case ("data", "held_out"):
            return f"tasks.{task}.train, rows held out for a search", None
        case ("data", "mixture", *_):
            return f"tasks.{task}.mixture", ""
        case ("data", *rest):
            return f"tasks.{task}.{'.'.join(rest)}", None
        case ("start", *_):
            return f"tasks.{task}.start", ""
        case ("engine", *rest):
            return ".".join(["train.engine", *rest]), None
        case ("tasks", other, "rows"):
            return f"tasks.{other}.{'test' if kind == 'evaluate' else 'train'}", "the file"
        case ("search", "tasks", other, "rows"):
            return f"tasks.{other}.{parts.get(other, {}).get('part', 'validation')}", "the file"
        case ("search", "tasks", *rest):
            return f"tasks.{'.'.join(rest)}", None
        case ("code", *rest):
            return ".".join(rest), "the code"
        case ("seed",) | ("seeds", _):
            return "the seed of A (adapter.seed, or tasks.NAME.seed)", None
        case ("moments", *rest):
            return ".".join(["adapter.moments", *rest]), None
        case ("max_length",):
            return "train.max_length", None
        case ("joint" | "sequel" | "cluster", *rest):
            return ".".join(["multitask", *rest]), None
        case ("lm_eval", "files", *rest):
            return "evaluate.lm_eval.include", ".".join(rest)
        case ("lm_eval", *rest):
            return ".".join(["evaluate.lm_eval", *rest]), None
        case ("method" | "weights" | "tasks" | "search", *_) if kind == "merge":
            return f"merges.{settings.get('merge')}.{path}", None
    return path, None


def _leaves(tree: Any, path: tuple[str, ...] = ()) -> dict[tuple[str, ...], Any]:
    if not isinstance(tree, Mapping) or not tree:
        return {path: tree}
    return {name: leaf for key, item in tree.items() for name, leaf in _leaves(item, (*path, str(key))).items()}


def _value(value: Any) -> str:
    if value is _ABSENT:
        return "not set"
    text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
    return text if len(text) <= _SHOWN else f"{text[: _SHOWN - 3]}..."


# --- order -----------------------------------------------------------------------------------------------------------


def order(jobs: Iterable[Job]) -> list[Job]:
    """The jobs with each after what it needs, and otherwise as they came.

    Raises ConfigError for a name used twice, a need that no job meets, and jobs that wait for each other.
    """
    waiting = {}
    for job in jobs:
        if job.name in waiting:
            raise ConfigError(f"multitask: the plan has two jobs called {job.name}; give each its own name")
        waiting[job.name] = job
    for job in waiting.values():
        for need in job.needs:
            if need not in waiting:
                raise ConfigError(
                    f"multitask: {job.name} needs {need}, which the plan does not have; add it to the plan"
                )
    ordered: list[Job] = []
    done: set[str] = set()
    while waiting:
        found = next((job for job in waiting.values() if done.issuperset(job.needs)), None)
        if found is None:
            raise ConfigError(f"multitask: {', '.join(waiting)} wait for each other; a plan must have no circle")
        ordered.append(waiting.pop(found.name))
        done.add(found.name)
    return ordered


def ready(jobs: Iterable[Job], finished: Collection[str], running: Collection[str]) -> list[Job]:
    """The jobs that could start now: not started yet, and everything they need is finished."""
    started = {*finished, *running}
    return [job for job in jobs if job.name not in started and set(finished).issuperset(job.needs)]


def path_lengths(jobs: Sequence[Job]) -> dict[str, int]:
    """Job -> number of jobs on the longest way from it to the end of the run, itself included.

    jobs: in the order that `order` gives.
    """
    lengths = {job.name: 1 for job in jobs}
    for job in reversed(jobs):
        for need in job.needs:
            lengths[need] = max(lengths[need], lengths[job.name] + 1)
    return lengths


def dependents(jobs: Iterable[Job], failed: Collection[str]) -> Iterator[Job]:
    """The jobs that need a failed one, directly or through others. jobs: in the order that `order` gives."""
    out = set(failed)
    for job in jobs:
        if job.name not in failed and not out.isdisjoint(job.needs):
            out.add(job.name)
            yield job
