"""A DeepSpeed configuration file (`ds_config.json`) beside the YAML: read, compared with it, and filled in from it.

A value counts as a contradiction only where the file writes it: what it leaves out, or gives as "auto", is the YAML's.
"""

import functools
import os
from collections.abc import Iterator, Mapping
from typing import Any

from lori_dist import files, plugin
from lori_dist.config import Run, Train
from lori_dist.errors import ConfigError
from lori_dist.training.micro_batches import num_micro_batches

AUTO = "auto"
LARGEST = 2**20
"""Bytes of a file."""
OWN = ("optimizer", "scheduler", "fp16", "bf16", "bfloat16", "activation_checkpointing")
"""Sections whose content must agree with the YAML and is then done from there: DeepSpeed does not get them."""
DECAYS = {"WarmupLR": "constant", "WarmupDecayLR": "linear", "WarmupCosineLR": "cosine"}
"""DeepSpeed's schedulers -> train.schedule."""
PARALLEL = ("pipeline", "tensor_parallel", "expert_parallel", "hybrid_engine", "data_efficiency", "autotuning")
"""Sections that change what is computed or where, in ways that no engine here does."""

ZERO = "zero_optimization"
PLACE = "train.engine.config"


def read(path: str) -> dict[str, Any]:
    """The content of a file. Raises ConfigError, also for a file that is not strict JSON."""
    try:
        expanded = os.path.expanduser(path)
        return _read(expanded, os.stat(expanded).st_mtime_ns)
    except (OSError, ValueError) as error:
        reason = (error.strerror or str(error)) if isinstance(error, OSError) else f"is not valid JSON ({error})"
        raise ConfigError(f"{PLACE}: {path!r} {_verb(reason)}; give a DeepSpeed configuration in JSON") from error


def _verb(reason: str) -> str:
    return reason if reason.startswith(("is ", "has ")) else f"cannot be read ({reason})"


@functools.lru_cache
def _read(path: str, changed: int) -> dict[str, Any]:
    tree = files.parse_json(files.read_regular(path, LARGEST))
    if not isinstance(tree, dict):
        raise ValueError(f"it holds a {type(tree).__name__}, not an object")
    for name in (ZERO, *OWN, "compile", "torch_autocast", *PARALLEL):
        if name in tree and not isinstance(tree[name], dict):
            raise ValueError(f"{name} holds a {type(tree[name]).__name__}, not an object")
    return tree


def settled(options: Mapping[str, Any]) -> dict[str, Any]:
    """Options of the engine, with those that the file says. Raises ConfigError for a file that shards nothing."""
    path = options.get("config")
    if path is None:
        return dict(options)
    zero = read(path).get(ZERO, {})
    found = dict(options)
    for name, value in _of_zero(zero).items():
        if value != AUTO:
            found[name] = value
    if found.get("stage", 2) not in (1, 2, 3) or isinstance(found.get("stage"), bool):
        raise ConfigError(
            f"{PLACE}: {path} has {ZERO}.stage {found['stage']!r}; give 1, 2 or 3 there, or write "
            "`train: {engine: ddp}`, which shards nothing, as stage 0"
        )
    hpz = found.get("hpz", 1)
    if not isinstance(hpz, int) or isinstance(hpz, bool) or hpz < 1:
        raise ConfigError(f"{PLACE}: {path} has {ZERO}.zero_hpz_partition_size {hpz!r}; give a number of ranks from 1")
    return found


def _of_zero(zero: Mapping[str, Any]) -> dict[str, Any]:
    """The engine's own options, where the file writes them."""
    found = {}
    if "stage" in zero:
        found["stage"] = zero["stage"]
    if "zero_hpz_partition_size" in zero:
        found["hpz"] = zero["zero_hpz_partition_size"]
    if isinstance(zero.get("offload_param"), dict):
        device = zero["offload_param"].get("device", "none")
        found["offload"] = device if device == AUTO else device != "none"
    return found


def of_ranks(path: str, train: Train, ranks: int) -> Iterator[str]:
    """Yields contradictions between the file and the YAML that depend on the number of ranks."""
    name = "gradient_accumulation_steps"
    found = read(path).get(name, AUTO)
    wanted = num_micro_batches(train.batch_size, train.groups(ranks), train.rows_at_once)
    if found != AUTO and found != wanted:
        yield (
            f"{PLACE}: {path} has {name} {found!r}, and train.batch_size {train.batch_size} in pieces of "
            f"train.micro_batch_size {train.rows_at_once} on {ranks} ranks is {wanted}; "
            f'write {wanted} or "{AUTO}" there, or change the YAML'
        )


def contradictions(run: Run) -> Iterator[str]:
    """Yields contradictions between the file and the YAML, and settings that no engine here supports, one sentence
    each."""
    engine, train = run.train.engine, run.train
    path = str(engine.options["config"])
    tree = read(path)

    def other(key: str, found: Any, place: str, wanted: Any) -> str:
        shown = "null" if wanted is None else wanted
        return (
            f'{PLACE}: {path} has {key} {found!r}, and {place} is {shown}; write the same value, or "{AUTO}" in the '
            "file"
        )

    for key, place, wanted in (
        ("train_batch_size", "train.batch_size", train.batch_size),
        ("train_micro_batch_size_per_gpu", "train.micro_batch_size", train.rows_at_once),
    ):
        if (found := tree.get(key, AUTO)) not in (AUTO, wanted):
            yield other(key, found, place, wanted)
    if (found := tree.get("gradient_clipping", AUTO)) not in (AUTO, train.clip or 0.0):
        yield other("gradient_clipping", found, "train.clip", train.clip)
    for name, found in _of_zero(tree.get(ZERO, {})).items():
        if name in engine.options and found not in (AUTO, engine.options[name]):
            key = {"stage": "stage", "hpz": "zero_hpz_partition_size", "offload": "offload_param.device"}[name]
            written = tree[ZERO]["offload_param"].get("device", "none") if name == "offload" else found
            yield other(f"{ZERO}.{key}", written, f"train.engine.{name}", engine.options[name])
    settled(engine.options)
    yield from _optimizer(tree.get("optimizer", {}), train, path, other)
    yield from _scheduler(tree.get("scheduler", {}), train, path, other)
    yield from _precision(tree, run.model.dtype, path)
    yield from _impossible(tree, path)


def _optimizer(section: Mapping[str, Any], train: Train, path: str, other: Any) -> Iterator[str]:
    kind = section.get("type", AUTO)
    if str(kind).lower() not in (AUTO, "adamw", "adam"):
        yield other("optimizer.type", kind, "the optimizer of train", "AdamW (train.lr, train.betas, train.eps)")
        return
    values: dict[str, tuple[str, Any]] = {
        "lr": ("train.lr", train.lr),
        "betas": ("train.betas", list(train.betas)),
        "eps": ("train.eps", train.eps),
        "weight_decay": ("train.weight_decay", train.weight_decay),
        "adam_w_mode": ("AdamW, which decays weights apart from the gradient,", True),
        "bias_correction": ("the bias correction of AdamW", True),
        "amsgrad": ("amsgrad of AdamW", False),
    }
    yield from _params("optimizer", section, values, ("torch_adam", "fused"), path, other)


def _scheduler(section: Mapping[str, Any], train: Train, path: str, other: Any) -> Iterator[str]:
    kind = section.get("type", AUTO)
    if kind not in (AUTO, None) and DECAYS.get(kind) != train.schedule:
        near = next(name for name, schedule in DECAYS.items() if schedule == train.schedule)
        yield other("scheduler.type", kind, "train.schedule", f"{train.schedule}, which is DeepSpeed's {near}")
        return
    values: dict[str, tuple[str, Any]] = {
        "warmup_min_lr": ("the learning rate before the first step", 0),
        "warmup_min_ratio": ("the learning rate before the first step", 0),
        "cos_min_ratio": ("the learning rate after the last step", 0),
        "warmup_max_lr": ("train.lr", train.lr),
        "warmup_num_steps": ("train.warmup_steps", train.warmup_steps),
        "total_num_steps": ("train.steps", train.steps),
        "warmup_type": ("the course of train.warmup_steps", "linear"),
        "last_batch_iteration": ("the step before the first", -1),
    }
    yield from _params("scheduler", section, values, (), path, other)


def _params(
    name: str,
    section: Mapping[str, Any],
    values: Mapping[str, tuple[str, Any]],
    ignored: tuple[str, ...],
    path: str,
    other: Any,
) -> Iterator[str]:
    """Yields the unknown keys of a section with a type and params, and contradictions to `values`: key -> its place in
    the YAML and its value there. ignored: keys that change no result."""
    yield from _strange(section, ("type", "params"), name, path)
    params = section.get("params", {})
    if not isinstance(params, dict):
        return
    yield from _strange(params, (*values, *ignored), f"{name}.params", path)
    for key, (place, wanted) in values.items():
        if (found := params.get(key, AUTO)) not in (AUTO, wanted):
            yield other(f"{name}.params.{key}", found, place, wanted)


def _strange(section: Mapping[str, Any], known: tuple[str, ...], where: str, path: str) -> Iterator[str]:
    for key in section:
        if key not in known:
            yield unknown(f"{where}.{key}", known, path)


def unknown(key: str, known: Any, path: str) -> str:
    """The sentence about a key that nobody reads."""
    near = plugin.nearest(key.rpartition(".")[2], known)
    return f"{PLACE}: {path} has the unknown key {key}; remove it.{near}"


def mistake(path: str, place: tuple[str, ...], found: Any, message: str | None, known: list[str]) -> str:
    """The sentence about what DeepSpeed's own reader says."""
    key = ".".join(place)
    if message is None:
        return unknown(key, known, path)
    return f"{PLACE}: DeepSpeed refuses {path}: {f'{key} {found!r}: ' if place else ''}{message}"


def zero(path: str | None) -> dict[str, Any]:
    """The section zero_optimization of a file, without what is "auto"; empty where there is none."""
    return {} if path is None else dict(_without_auto(read(path)).get(ZERO, {}))


def _precision(tree: Mapping[str, Any], dtype: str, path: str) -> Iterator[str]:
    for names, meant in ((("bf16", "bfloat16"), "bfloat16"), (("fp16",), "float16")):
        for name in names:
            section = tree.get(name, {})
            found = section.get("enabled", AUTO)
            if found != AUTO and bool(found) != (dtype == meant):
                remedy = f"write `model: {{dtype: {meant}}}`" if found else "write true"
                yield (
                    f'{PLACE}: {path} has {name}.enabled {found}, and model.dtype is {dtype}; {remedy}, or "{AUTO}" '
                    "in the file"
                )
            elif dtype == meant:
                for key, kept in (
                    ("loss_scale", 1),
                    ("auto_cast", False),
                    ("fp16_master_weights_and_grads", False),
                    ("bf16_master_weights_and_grads", False),
                    ("bf16_optimizer_states", False),
                    ("immediate_grad_update", False),
                    ("check_grad_overflow", True),
                ):
                    if (value := section.get(key, AUTO)) not in (AUTO, kept):
                        yield (
                            f"{PLACE}: {path} has {name}.{key} {value!r}, and trained values, their gradients and "
                            "moments stay float32 and unscaled whatever model.dtype is; remove it"
                        )


def _impossible(tree: Mapping[str, Any], path: str) -> Iterator[str]:
    zero = tree.get(ZERO, {})
    for key, value, kept, remedy in (
        ("gradient_allreduce_op", tree.get("gradient_allreduce_op"), ("mean",), "the loss is one of the global batch"),
        (
            "managed_gradient_accumulation",
            tree.get("managed_gradient_accumulation"),
            (True,),
            "train.micro_batch_size says what is accumulated",
        ),
        (
            "torch_autocast.enabled",
            tree.get("torch_autocast", {}).get("enabled"),
            (False,),
            "model.dtype is the precision of the base",
        ),
        ("compile.deepcompile", tree.get("compile", {}).get("deepcompile"), (False,), "train.compile compiles"),
        ("dataloader_drop_last", tree.get("dataloader_drop_last"), (False,), "train.epochs takes all rows"),
        (
            "sequence_parallel_size",
            tree.get("sequence_parallel_size"),
            (1,),
            "train.sequence_parallel divides rows among ranks",
        ),
        (
            f"{ZERO}.round_robin_gradients",
            zero.get("round_robin_gradients"),
            (False,),
            "DeepSpeed then does not say which rank holds which values, and no checkpoint could be written",
        ),
        (f"{ZERO}.zenflow", zero.get("zenflow"), (), "moments of an adapter, which are few, are not offloaded"),
    ):
        if value is not None and value != AUTO and value not in kept:
            yield f"{PLACE}: {path} has {key} {value!r}, which is not done here: {remedy}; remove it"
    if strange := [
        key for key, value in tree.get("activation_checkpointing", {}).items() if value not in (AUTO, False, None)
    ]:
        yield (
            f"{PLACE}: {path} has activation_checkpointing.{strange[0]}, and activations are checkpointed by "
            "train.activation_checkpointing; remove the section there, and write "
            "`train: {activation_checkpointing: true}` if that is meant"
        )
    for name in PARALLEL:
        section = tree.get(name, {})
        is_on = section.get("enabled", False) not in (AUTO, False) or section.get("autotp_size", 0) not in (AUTO, 0)
        if is_on or (name == "pipeline" and section):
            yield f"{PLACE}: {path} asks for {name}, which is not done here; remove the section"


def filled(path: str, defaults: Mapping[str, Any]) -> dict[str, Any]:
    """The configuration for DeepSpeed: `defaults`, the engine's own, overridden by the file, with every "auto" filled
    in."""
    tree = _without_auto(read(path))
    for name in OWN:
        tree.pop(name, None)
    zero = {**defaults[ZERO], **tree.get(ZERO, {})}
    # Stage 3 has its own for frozen layers, which saves more and leaves torch's as it is.
    zero["memory_efficient_linear"] = False
    fixed = {name: value for name, value in defaults.items() if name in FIXED}
    tree.pop("train_batch_size", None)
    return {**defaults, **tree, **fixed, ZERO: zero}


FIXED = ("train_micro_batch_size_per_gpu", "gradient_accumulation_steps", "gradient_clipping")
"""Keys that the engine sets itself, once they are known to agree."""


def _without_auto(value: Any) -> Any:
    """DeepSpeed's own models drop "auto" in some places and take it for a value in others."""
    if not isinstance(value, dict):
        return value
    return {key: _without_auto(item) for key, item in value.items() if item != AUTO or key == "keep_in_fp32_modules"}
