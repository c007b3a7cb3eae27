"""The configuration of `accelerate launch`, which it passes on in environment variables.

`lori train` has engines of its own, so what is asked for there is followed where it is one of them, and refused where
it is not: it is never left out without a word.
"""

import dataclasses
import logging
from collections.abc import Iterator, Mapping
from typing import Any

import torch

from lori_dist.config import Choice, Run, checked_engine
from lori_dist.errors import ConfigError
from lori_dist.training.micro_batches import num_micro_batches

PRECISIONS = {"bf16": "bfloat16", "fp16": "float16"}
NEEDLESS = "none"
"""Value that accelerate writes for an offload that is not wanted."""

log = logging.getLogger(__name__)


HARMLESS: Mapping[str, str] = {
    "ACCELERATE_DEBUG_MODE": "checks of accelerate's own collectives, which are not called here",
    "ACCELERATE_CONFIG_DS_FIELDS": "the names of the fields that accelerate's configuration gives",
    "ACCELERATE_DEEPSPEED_ZERO3_INIT": "a base that stage 3 shards is always made in shards",
    "ACCELERATE_DEEPSPEED_ZERO3_SAVE_16BIT_MODEL": "only adapters are saved, never the base",
    "ACCELERATE_LOG_LEVEL": "accelerate's own log",
    "ACCELERATE_DISABLE_RICH": "accelerate's own log",
    "FSDP_MIN_NUM_PARAMS": "for SIZE_BASED_WRAP alone, which is refused",
    "FSDP_STATE_DICT_TYPE": "checkpoints hold what is trained and fit all engines and world sizes",
    "FSDP_USE_ORIG_PARAMS": "for FSDP 1 alone: fully_shard has no flat parameters",
    "FSDP_CPU_RAM_EFFICIENT_LOADING": "each rank reads its own shards, and none the whole base",
    "FSDP_SYNC_MODULE_STATES": "each rank reads its own shards of the same files",
}
"""Variables of accelerate's that change nothing here, and why."""
READ = (
    "ACCELERATE_USE_CPU", "ACCELERATE_USE_FSDP", "ACCELERATE_USE_DEEPSPEED", "ACCELERATE_USE_MEGATRON_LM",
    "ACCELERATE_USE_SAGEMAKER", "ACCELERATE_SAGEMAKER_DISTRIBUTED_TYPE", "ACCELERATE_USE_PARALLELISM_CONFIG",
    "ACCELERATE_MIXED_PRECISION", "ACCELERATE_CPU_AFFINITY", "ACCELERATE_DYNAMO_BACKEND", "ACCELERATE_DYNAMO_MODE",
    "ACCELERATE_DYNAMO_USE_FULLGRAPH", "ACCELERATE_DYNAMO_USE_DYNAMIC", "ACCELERATE_DYNAMO_USE_REGIONAL_COMPILATION",
    "ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "ACCELERATE_GRADIENT_CLIPPING", "ACCELERATE_DEEPSPEED_ZERO_STAGE",
    "ACCELERATE_DEEPSPEED_OFFLOAD_OPTIMIZER_DEVICE", "ACCELERATE_DEEPSPEED_OFFLOAD_PARAM_DEVICE",
    "ACCELERATE_DEEPSPEED_CONFIG_FILE", "ACCELERATE_DEEPSPEED_MOE_LAYER_CLS_NAMES", "FSDP_VERSION",
    "FSDP_SHARDING_STRATEGY", "FSDP_RESHARD_AFTER_FORWARD", "FSDP_OFFLOAD_PARAMS", "FSDP_AUTO_WRAP_POLICY",
    "FSDP_TRANSFORMER_CLS_TO_WRAP", "FSDP_BACKWARD_PREFETCH", "FSDP_FORWARD_PREFETCH", "FSDP_ACTIVATION_CHECKPOINTING",
    "FSDP_ACTIVATION_CHECKPOINTING_OFFLOAD", "FSDP_IGNORED_MODULES", "PARALLELISM_CONFIG_DP_REPLICATE_SIZE",
    "PARALLELISM_CONFIG_DP_SHARD_SIZE", "PARALLELISM_CONFIG_TP_SIZE", "PARALLELISM_CONFIG_CP_SIZE",
    "PARALLELISM_CONFIG_CP_BACKEND", "PARALLELISM_CONFIG_CP_COMM_STRATEGY", "PARALLELISM_CONFIG_SP_SIZE",
    "PARALLELISM_CONFIG_SP_BACKEND", "PARALLELISM_CONFIG_SP_SEQ_LENGTH", "PARALLELISM_CONFIG_SP_SEQ_LENGTH_IS_VARIABLE",
    "PARALLELISM_CONFIG_SP_ATTN_IMPLEMENTATION",
)  # fmt: skip
"""Variables that are followed or refused below. ACCELERATE_FP8_... come with the mixed precision fp8, and
MEGATRON_LM_... with Megatron-LM, both of which are refused."""


def followed(run: Run, environment: Mapping[str, str], *, has_engine: bool) -> Run:
    """The run with the engine that `accelerate launch` asks for, or as it was where that asks for none.

    has_engine: whether the configuration names an engine itself, which must then be the same. Raises ConfigError that
    lists everything accelerate asks for and the run does not have, with both values and what to write.
    """
    problems = [*_others(run, environment), *_unknown(environment)]
    wanted = _engine(environment, problems)
    if wanted is not None and not _agrees(wanted, run.train.engine):
        if has_engine:
            problems.append(
                f"train.engine: accelerate's configuration asks for {_shown(wanted)}, the YAML for "
                f"{_shown(run.train.engine)}; write `train: {{engine: {_shown(wanted)}}}`, or set "
                "`distributed_type` to MULTI_GPU in accelerate's configuration"
            )
        else:
            log.info("accelerate's configuration asks for train.engine %s", _shown(wanted))
            run = dataclasses.replace(run, train=dataclasses.replace(run.train, engine=wanted))
            problems += checked_engine(run)
    if problems:
        raise ConfigError("\n".join(problems))
    return run


def _unknown(environment: Mapping[str, str]) -> Iterator[str]:
    prefixes = ["PARALLELISM_CONFIG_"] if _is_on(environment, "ACCELERATE_USE_PARALLELISM_CONFIG") else []
    prefixes += ["FSDP_"] if _is_on(environment, "ACCELERATE_USE_FSDP") else []
    prefixes += ["ACCELERATE_DEEPSPEED_"] if _is_on(environment, "ACCELERATE_USE_DEEPSPEED") else []
    for name, value in environment.items():
        if name.startswith(tuple(prefixes)) and name not in READ and name not in HARMLESS:
            yield f"{name}: accelerate's configuration has {value!r}, which no engine here knows; remove it there"


def _engine(environment: Mapping[str, str], problems: list[str]) -> Choice | None:
    """The engine asked for, None where none is. Adds to problems what no engine of ours does."""
    if _is_on(environment, "ACCELERATE_USE_DEEPSPEED"):
        return _deepspeed(environment, problems)
    if _is_on(environment, "ACCELERATE_USE_FSDP"):
        return _fsdp(environment, problems)
    return None


def _fsdp(environment: Mapping[str, str], problems: list[str]) -> Choice:
    options: dict[str, Any] = {}
    if _is_on(environment, "FSDP_OFFLOAD_PARAMS"):
        options["offload"] = True
    strategy = environment.get("FSDP_SHARDING_STRATEGY", "1").upper()
    reshard = environment.get("FSDP_RESHARD_AFTER_FORWARD", "true").upper()
    if reshard in ("FALSE", "SHARD_GRAD_OP", "0", "2") or strategy in ("SHARD_GRAD_OP", "2"):
        options["reshard_after_forward"] = False
    if classes := environment.get("FSDP_TRANSFORMER_CLS_TO_WRAP", "").strip():
        options["wrap"] = [name.strip() for name in classes.split(",") if name.strip()]
    if _is_on(environment, "FSDP_FORWARD_PREFETCH"):
        options["forward_prefetch"] = 1
    if _is_on(environment, "ACCELERATE_USE_PARALLELISM_CONFIG"):
        replicas = environment.get("PARALLELISM_CONFIG_DP_REPLICATE_SIZE", "1")
        if replicas.isdecimal() and int(replicas) > 1:
            options["replicas"] = int(replicas)
    wanted = Choice(name="fsdp", options=options)
    remedy = f"write `train: {{engine: {_shown(wanted)}}}` and set `distributed_type` to MULTI_GPU there"
    if environment.get("FSDP_VERSION", "1") != "2":
        problems.append(
            "FSDP_VERSION: accelerate's configuration asks for FSDP "
            f"{environment.get('FSDP_VERSION', '1')}, and train.engine fsdp is fully_shard, which is FSDP 2; set "
            f"`fsdp_version: 2` there, or {remedy}"
        )
    for name, kept, meaning in (
        (
            "FSDP_SHARDING_STRATEGY",
            ("full_shard", "1", "shard_grad_op", "2", "none"),
            "shards the base, over the ranks of each replica (train.engine.replicas) or all",
        ),
        (
            "FSDP_RESHARD_AFTER_FORWARD",
            ("true", "false", "full_shard", "shard_grad_op", "0", "1", "2", "none"),
            "takes true or false from accelerate",
        ),
        ("FSDP_AUTO_WRAP_POLICY", ("transformer_based_wrap",), "shards transformer blocks, or the classes in its wrap"),
        ("FSDP_BACKWARD_PREFETCH", ("backward_pre", "none"), "gathers at least one block ahead in the backward pass"),
        ("FSDP_ACTIVATION_CHECKPOINTING_OFFLOAD", ("false",), "keeps checkpointed activations where they are"),
        ("FSDP_IGNORED_MODULES", ("none",), "shards all modules"),
    ):
        if name in environment and environment[name].lower() not in kept:
            problems.append(
                f"{name}: accelerate's configuration has {environment[name]!r}, and train.engine fsdp always "
                f"{meaning}; remove it there, or {remedy}"
            )
    is_full = environment.get("FSDP_RESHARD_AFTER_FORWARD", "").upper() in ("TRUE", "FULL_SHARD", "1")
    if is_full and strategy in ("SHARD_GRAD_OP", "2"):
        problems.append(
            f"FSDP_SHARDING_STRATEGY: accelerate's configuration has {strategy}, which frees nothing after the forward "
            f"pass, and FSDP_RESHARD_AFTER_FORWARD {reshard.lower()}; remove one of them there"
        )
    return wanted


def _deepspeed(environment: Mapping[str, str], problems: list[str]) -> Choice | None:
    stage = environment.get("ACCELERATE_DEEPSPEED_ZERO_STAGE")
    optimizer = environment.get("ACCELERATE_DEEPSPEED_OFFLOAD_OPTIMIZER_DEVICE", NEEDLESS)
    if optimizer != NEEDLESS:
        problems.append(
            f"ACCELERATE_DEEPSPEED_OFFLOAD_OPTIMIZER_DEVICE: accelerate's configuration has {optimizer!r}, and moments "
            "of an adapter, which are few, stay on the device; set `offload_optimizer_device: none` there, or give "
            "`offload_optimizer` in a DeepSpeed configuration file, as `deepspeed_config_file`"
        )
    classes = environment.get("ACCELERATE_DEEPSPEED_MOE_LAYER_CLS_NAMES", NEEDLESS)
    if classes.lower() not in ("", NEEDLESS):
        problems.append(
            f"ACCELERATE_DEEPSPEED_MOE_LAYER_CLS_NAMES: accelerate's configuration has {classes!r}, and experts that "
            "are adapted are gathered together by themselves; set `deepspeed_moe_layer_cls_names` to null there, or "
            "give `leaf_module` in a DeepSpeed configuration file, as `deepspeed_config_file`"
        )
    device = environment.get("ACCELERATE_DEEPSPEED_OFFLOAD_PARAM_DEVICE", NEEDLESS)
    if (file := environment.get("ACCELERATE_DEEPSPEED_CONFIG_FILE", NEEDLESS).strip()).lower() not in ("", NEEDLESS):
        given = {"stage": int(stage)} if stage in ("1", "2", "3") else {}
        return Choice(name="deepspeed", options={**given, "config": file})
    stage = stage or "2"
    options: dict[str, Any] = {"stage": int(stage)} if stage in ("1", "2", "3") else {}
    if device == "cpu" and stage == "3":
        options["offload"] = True
    elif device != NEEDLESS:
        problems.append(
            f"ACCELERATE_DEEPSPEED_OFFLOAD_PARAM_DEVICE: accelerate's configuration has {device!r} at stage {stage}, "
            "and train.engine.offload is to the CPU at stage 3; set `offload_param_device` to none or cpu there, or "
            "give `offload_param` in a DeepSpeed configuration file, as `deepspeed_config_file`"
        )
    if not options:
        if stage != "0":
            problems.append(f"ACCELERATE_DEEPSPEED_ZERO_STAGE: is {stage!r}; give 0, 1, 2 or 3")
            return None
        return Choice(name="ddp")
    return Choice(name="deepspeed", options=options)


def _others(run: Run, environment: Mapping[str, str]) -> Iterator[str]:
    """Yields requests besides the engine that the run does not contain."""
    is_parallel = _is_on(environment, "ACCELERATE_USE_PARALLELISM_CONFIG")
    sizes = {name: environment.get(f"PARALLELISM_CONFIG_{name}", "1") for name in ("TP_SIZE", "CP_SIZE", "SP_SIZE")}
    asked = ", ".join(f"PARALLELISM_CONFIG_{name} {size}" for name, size in sizes.items() if size != "1")
    replicated = is_parallel and environment.get("PARALLELISM_CONFIG_DP_REPLICATE_SIZE", "1") != "1"
    for name, is_asked, what in (
        ("ACCELERATE_USE_MEGATRON_LM", _is_on(environment, "ACCELERATE_USE_MEGATRON_LM"), "Megatron-LM"),
        ("ACCELERATE_USE_SAGEMAKER", _is_on(environment, "ACCELERATE_USE_SAGEMAKER"), "SageMaker"),
        (
            "ACCELERATE_USE_PARALLELISM_CONFIG",
            is_parallel and bool(asked),
            f"a parallelism_config (tensor, context or sequence parallel: {asked})",
        ),
        (
            "PARALLELISM_CONFIG_DP_REPLICATE_SIZE",
            replicated and not _is_on(environment, "ACCELERATE_USE_FSDP"),
            "replicas without FSDP",
        ),
    ):
        if is_asked:
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
    if _is_on(environment, "ACCELERATE_USE_CPU") and torch.cuda.is_available():
        yield (
            "ACCELERATE_USE_CPU: accelerate's configuration asks for CPUs, and this rank would compute on a CUDA "
            "device; set CUDA_VISIBLE_DEVICES to an empty text, or `use_cpu: false` there"
        )
    if _is_on(environment, "ACCELERATE_CPU_AFFINITY"):
        yield (
            "ACCELERATE_CPU_AFFINITY: accelerate's configuration asks for ranks that are bound to CPUs, which is not "
            "done here; set `enable_cpu_affinity: false` there, and start ranks with numactl where it is needed"
        )
    backend = environment.get("ACCELERATE_DYNAMO_BACKEND", "NO").lower()
    if backend not in ("no", "none", "") and not (backend == "inductor" and run.train.compile):
        yield (
            f"train.compile: accelerate's configuration asks for dynamo_backend {backend}, the YAML has "
            f"{str(run.train.compile).lower()}; write `train: {{compile: true}}` for inductor, or remove it there"
        )
    elif backend == "inductor":
        for name, kept in (("MODE", "default"), ("USE_FULLGRAPH", "false"), ("USE_DYNAMIC", "false")):
            found = environment.get(f"ACCELERATE_DYNAMO_{name}", kept)
            if found.lower() not in (kept, "none"):
                yield (
                    f"ACCELERATE_DYNAMO_{name}: accelerate's configuration has {found!r}, and train.compile compiles "
                    f"blocks with {kept}; remove it there"
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
    ranks = environment.get("WORLD_SIZE", "")
    size = int(ranks) if ranks.isdecimal() and int(ranks) else 1
    if steps not in (
        "1",
        "auto",
        "none",
        str(num_micro_batches(run.train.batch_size, run.train.groups(size), run.train.rows_at_once)),
    ):
        yield (
            f"train.batch_size: accelerate's configuration asks for gradient_accumulation_steps {steps}, and here they "
            f"follow from train.batch_size {run.train.batch_size} over all ranks and train.micro_batch_size "
            f"{run.train.rows_at_once}; set `gradient_accumulation_steps: 1` there, and train.batch_size to what "
            "is meant"
        )


def _is_on(environment: Mapping[str, str], name: str) -> bool:
    return environment.get(name, "false").lower() in ("true", "1", "yes")


def _number(text: str) -> float | None:
    try:
        return float(text)
    except ValueError:
        return None


def _agrees(wanted: Choice, given: Choice) -> bool:
    """Whether an engine is the one that accelerate asks for, whatever other options it has."""
    if wanted.name != given.name:
        return False
    usual: dict[str, dict[str, Any]] = {
        "deepspeed": {} if "config" in wanted.options else {"stage": 2, "offload": False, "config": None}
    }
    usual["fsdp"] = {"offload": False, "reshard_after_forward": True}
    defaults: dict[str, Any] = usual.get(wanted.name, {})
    unasked = {"wrap": None, "forward_prefetch": 0, "replicas": 1, "stage": 2, "config": None}
    names = {*defaults, *wanted.options}
    if given.options.get("base") == "replicated":
        return False
    return all(
        _plain(name, wanted.options.get(name, defaults.get(name)))
        == _plain(name, given.options.get(name, defaults.get(name, unasked.get(name))))
        for name in names
    )


def _plain(name: str, value: Any) -> Any:
    """A number of ranks among which blocks are resharded is resharding; class names have no order."""
    if name == "reshard_after_forward":
        return value is None or bool(value)
    return sorted(value) if isinstance(value, list) else value


def _shown(engine: Choice) -> str:
    def shown(value: Any) -> str:
        if isinstance(value, list):
            return f"[{', '.join(value)}]"
        return value if isinstance(value, str) else str(value).lower()

    options = "".join(f", {name}: {shown(value)}" for name, value in engine.options.items())
    return f"{{name: {engine.name}{options}}}" if options else engine.name
