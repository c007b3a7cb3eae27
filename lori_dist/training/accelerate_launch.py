"""What `accelerate launch` has been configured for, which it says in variables of the environment.

`lori train` has engines of its own, so what is asked for there is followed where it is one of them, and refused where
it is not: it is never left out without a word.
"""

import dataclasses
import logging
from collections.abc import Iterator, Mapping
from typing import Any

from lori_dist.config import Choice, Run
from lori_dist.errors import ConfigError

PRECISIONS = {"bf16": "bfloat16", "fp16": "float16"}
NEEDLESS = "none"
"""What accelerate writes for an offload that is not wanted."""

log = logging.getLogger(__name__)


def followed(run: Run, environment: Mapping[str, str], *, has_engine: bool) -> Run:
    """The run with the engine that `accelerate launch` asks for, or as it was where that asks for none.

    has_engine: whether the configuration names an engine itself, which must then be the same. Raises ConfigError that
    lists everything accelerate asks for and the run does not have, with both values and what to write.
    """
    problems = [*_others(run, environment)]
    wanted = _engine(environment, problems)
    if wanted is not None and _named(wanted) != _named(run.train.engine):
        if has_engine:
            problems.append(
                f"train.engine: accelerate's configuration asks for {_shown(wanted)}, the YAML for "
                f"{_shown(run.train.engine)}; write `train: {{engine: {_shown(wanted)}}}`, or set "
                "`distributed_type` to MULTI_GPU in accelerate's configuration"
            )
        else:
            log.info("accelerate's configuration asks for train.engine %s", _shown(wanted))
            run = dataclasses.replace(run, train=dataclasses.replace(run.train, engine=wanted))
    if problems:
        raise ConfigError("\n".join(problems))
    return run


def _engine(environment: Mapping[str, str], problems: list[str]) -> Choice | None:
    """The engine asked for, None where none is. Adds to problems what no engine of ours does."""
    if _is_on(environment, "ACCELERATE_USE_DEEPSPEED"):
        return _deepspeed(environment, problems)
    if _is_on(environment, "ACCELERATE_USE_FSDP"):
        return _fsdp(environment, problems)
    return None


def _fsdp(environment: Mapping[str, str], problems: list[str]) -> Choice:
    offload = _is_on(environment, "FSDP_OFFLOAD_PARAMS")
    wanted = Choice(name="fsdp", options={"offload": True} if offload else {})
    remedy = f"write `train: {{engine: {_shown(wanted)}}}` and set `distributed_type` to MULTI_GPU there"
    if environment.get("FSDP_VERSION", "1") != "2":
        problems.append(
            "FSDP_VERSION: accelerate's configuration asks for FSDP "
            f"{environment.get('FSDP_VERSION', '1')}, and train.engine fsdp is fully_shard, which is FSDP 2; set "
            f"`fsdp_version: 2` there, or {remedy}"
        )
    for name, kept, meaning in (
        ("FSDP_RESHARD_AFTER_FORWARD", ("true", "full_shard", "1"), "shards blocks again after their forward pass"),
        ("FSDP_AUTO_WRAP_POLICY", ("TRANSFORMER_BASED_WRAP",), "shards transformer blocks"),
        ("FSDP_FORWARD_PREFETCH", ("false",), "prefetches nothing of its own in the forward pass"),
        ("FSDP_ACTIVATION_CHECKPOINTING_OFFLOAD", ("false",), "keeps checkpointed activations where they are"),
        ("FSDP_IGNORED_MODULES", (), "shards all modules"),
    ):
        if name in environment and environment[name] not in kept and environment[name].lower() not in kept:
            problems.append(
                f"{name}: accelerate's configuration has {environment[name]!r}, and train.engine fsdp always "
                f"{meaning}; remove it there, or {remedy}"
            )
    return wanted


def _deepspeed(environment: Mapping[str, str], problems: list[str]) -> Choice | None:
    if (file := environment.get("ACCELERATE_DEEPSPEED_CONFIG_FILE", "none").strip()).lower() not in ("", "none"):
        problems.append(
            f"ACCELERATE_DEEPSPEED_CONFIG_FILE: accelerate's configuration gives {file!r}, which is not read; write "
            "its stage as `train: {engine: {name: deepspeed, stage: N}}`, and set `distributed_type` to MULTI_GPU there"
        )
        return None
    stage = environment.get("ACCELERATE_DEEPSPEED_ZERO_STAGE", "2")
    options: dict[str, Any] = {"stage": int(stage)} if stage in ("1", "2", "3") else {}
    device = environment.get("ACCELERATE_DEEPSPEED_OFFLOAD_PARAM_DEVICE", NEEDLESS)
    if device == "cpu" and stage == "3":
        options["offload"] = True
    elif device != NEEDLESS:
        problems.append(
            f"ACCELERATE_DEEPSPEED_OFFLOAD_PARAM_DEVICE: accelerate's configuration has {device!r} at stage {stage}, "
            "and train.engine.offload is to the CPU at stage 3; set `offload_param_device` to none or cpu there"
        )
    optimizer = environment.get("ACCELERATE_DEEPSPEED_OFFLOAD_OPTIMIZER_DEVICE", NEEDLESS)
    if optimizer != NEEDLESS:
        problems.append(
            f"ACCELERATE_DEEPSPEED_OFFLOAD_OPTIMIZER_DEVICE: accelerate's configuration has {optimizer!r}, and moments "
            "of an adapter, which are few, stay on the device; set `offload_optimizer_device: none` there"
        )
    if not options:
        if stage != "0":
            problems.append(f"ACCELERATE_DEEPSPEED_ZERO_STAGE: is {stage!r}; give 0, 1, 2 or 3")
            return None
        return Choice(name="ddp")
    return Choice(name="deepspeed", options=options)


def _others(run: Run, environment: Mapping[str, str]) -> Iterator[str]:
    """What besides the engine is asked for, and is not in the run."""
    for name, what in (
        ("ACCELERATE_USE_MEGATRON_LM", "Megatron-LM"),
        ("ACCELERATE_USE_PARALLELISM_CONFIG", "a parallelism_config (tensor, context or sequence parallel)"),
    ):
        if _is_on(environment, name):
            yield (
                f"{name}: accelerate's configuration asks for {what}, which no engine here does; remove it there, and "
                "write `train: {engine: fsdp}` for a base that does not fit on one device"
            )
    precision = environment.get("ACCELERATE_MIXED_PRECISION", "no").lower()
    if precision not in ("no", "none", "") and PRECISIONS.get(precision) != run.model.dtype:
        known = PRECISIONS.get(precision)
        remedy = f"write `model: {{dtype: {known}}}`, or set" if known else "set"
        yield (
            f"model.dtype: accelerate's configuration asks for mixed_precision {precision}, the YAML for "
            f"{run.model.dtype}; {remedy} `mixed_precision: 'no'` there (the adapter's values stay float32)"
        )
    backend = environment.get("ACCELERATE_DYNAMO_BACKEND", "NO").lower()
    if backend not in ("no", "none", "") and not (backend == "inductor" and run.train.compile):
        yield (
            f"train.compile: accelerate's configuration asks for dynamo_backend {backend}, the YAML has "
            f"{str(run.train.compile).lower()}; write `train: {{compile: true}}` for inductor, or remove it there"
        )
    is_on = _is_on(environment, "FSDP_ACTIVATION_CHECKPOINTING") and _is_on(environment, "ACCELERATE_USE_FSDP")
    if is_on and not run.train.activation_checkpointing:
        yield (
            "train.activation_checkpointing: accelerate's configuration asks for it, the YAML has false; write "
            "`train: {activation_checkpointing: true}`, or remove it there"
        )
    clip = environment.get("ACCELERATE_GRADIENT_CLIPPING", "none").lower()
    if clip not in ("none", "auto") and _number(clip) != run.train.clip:
        yield (
            f"train.clip: accelerate's configuration asks for gradient_clipping {clip}, the YAML has {run.train.clip}; "
            f"write `train: {{clip: {clip}}}`, or remove it there"
        )
    steps = environment.get("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "1").lower()
    if steps not in ("1", "auto", "none"):
        yield (
            f"train.batch_size: accelerate's configuration asks for gradient_accumulation_steps {steps}, and here they "
            f"follow from train.batch_size {run.train.batch_size} over all ranks and train.micro_batch_size "
            f"{run.train.micro_batch_size}; set `gradient_accumulation_steps: 1` there, and train.batch_size to what "
            "is meant"
        )


def _is_on(environment: Mapping[str, str], name: str) -> bool:
    return environment.get(name, "false").lower() in ("true", "1", "yes")


def _number(text: str) -> float | None:
    try:
        return float(text)
    except ValueError:
        return None


def _named(engine: Choice) -> tuple[str, dict[str, Any]]:
    """An engine and the options of it that accelerate's configuration has, too."""
    defaults: dict[str, dict[str, Any]] = {"deepspeed": {"stage": 2, "offload": False}, "fsdp": {"offload": False}}
    known = defaults.get(engine.name, {})
    return engine.name, {name: engine.options.get(name, default) for name, default in known.items()}


def _shown(engine: Choice) -> str:
    options = "".join(f", {name}: {str(value).lower()}" for name, value in engine.options.items())
    return f"{{name: {engine.name}{options}}}" if options else engine.name
