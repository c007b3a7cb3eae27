"""What accelerate's own configuration asks for is followed or refused, never left out."""

import dataclasses
import inspect
import json
import re
from pathlib import Path
from typing import Any

import pytest
from accelerate.utils import launch

from lori_dist.config import Choice, Model, Run, Task, Train
from lori_dist.errors import ConfigError
from lori_dist.training.accelerate_launch import HARMLESS, READ, followed

PLAIN = {"ACCELERATE_MIXED_PRECISION": "no", "ACCELERATE_DYNAMO_BACKEND": "NO", "ACCELERATE_USE_CPU": "False"}
FSDP = {
    **PLAIN,
    "ACCELERATE_USE_FSDP": "true",
    "FSDP_VERSION": "2",
    "FSDP_RESHARD_AFTER_FORWARD": "true",
    "FSDP_OFFLOAD_PARAMS": "false",
    "FSDP_AUTO_WRAP_POLICY": "TRANSFORMER_BASED_WRAP",
    "FSDP_STATE_DICT_TYPE": "SHARDED_STATE_DICT",
    "FSDP_FORWARD_PREFETCH": "false",
    "FSDP_ACTIVATION_CHECKPOINTING": "false",
    "FSDP_ACTIVATION_CHECKPOINTING_OFFLOAD": "false",
}
DEEPSPEED = {
    **PLAIN,
    "ACCELERATE_USE_DEEPSPEED": "true",
    "ACCELERATE_DEEPSPEED_ZERO_STAGE": "3",
    "ACCELERATE_GRADIENT_ACCUMULATION_STEPS": "1",
    "ACCELERATE_GRADIENT_CLIPPING": "1.0",
    "ACCELERATE_DEEPSPEED_OFFLOAD_OPTIMIZER_DEVICE": "none",
    "ACCELERATE_DEEPSPEED_OFFLOAD_PARAM_DEVICE": "none",
    "ACCELERATE_DEEPSPEED_CONFIG_FILE": "none",
}


def run(engine: Choice | None = None, dtype: Any = "float32", **train: Any) -> Run:
    chosen = {} if engine is None else {"engine": engine}
    return Run(
        name="demo",
        model=Model(path="model", dtype=dtype),
        tasks={"math": Task(train="a", test="b")},
        train=Train(steps=1, **chosen, **train),
    )


@pytest.mark.parametrize(
    ("environment", "engine"),
    [
        ({}, Choice(name="ddp")),
        (PLAIN, Choice(name="ddp")),
        (FSDP, Choice(name="fsdp")),
        ({**FSDP, "FSDP_OFFLOAD_PARAMS": "true"}, Choice(name="fsdp", options={"offload": True})),
        (
            {**FSDP, "FSDP_RESHARD_AFTER_FORWARD": "false"},
            Choice(name="fsdp", options={"reshard_after_forward": False}),
        ),
        (
            {**FSDP, "FSDP_TRANSFORMER_CLS_TO_WRAP": "LlamaMLP, LlamaAttention", "FSDP_FORWARD_PREFETCH": "true"},
            Choice(name="fsdp", options={"wrap": ["LlamaMLP", "LlamaAttention"], "forward_prefetch": 1}),
        ),
        (
            {
                **FSDP,
                "ACCELERATE_USE_PARALLELISM_CONFIG": "true",
                "PARALLELISM_CONFIG_DP_REPLICATE_SIZE": "2",
                "PARALLELISM_CONFIG_DP_SHARD_SIZE": "2",
                "PARALLELISM_CONFIG_CP_BACKEND": "torch",
            },
            Choice(name="fsdp", options={"replicas": 2}),
        ),
        (DEEPSPEED, Choice(name="deepspeed", options={"stage": 3})),
        ({**DEEPSPEED, "ACCELERATE_DEEPSPEED_ZERO_STAGE": "1"}, Choice(name="deepspeed", options={"stage": 1})),
        ({**DEEPSPEED, "ACCELERATE_DEEPSPEED_ZERO_STAGE": "0"}, Choice(name="ddp")),
        (
            {**DEEPSPEED, "ACCELERATE_DEEPSPEED_OFFLOAD_PARAM_DEVICE": "cpu"},
            Choice(name="deepspeed", options={"stage": 3, "offload": True}),
        ),
    ],
)
def test_an_engine_is_followed(environment: dict[str, str], engine: Choice) -> None:
    assert followed(run(), environment, has_engine=False).train.engine == engine
    given = run(engine)
    assert followed(given, environment, has_engine=True) == given


def test_more_options_of_the_same_engine_stay() -> None:
    given = run(Choice(name="fsdp", options={"replicas": 2}))
    assert followed(given, FSDP, has_engine=True) == given


@pytest.mark.parametrize(
    ("environment", "engine", "message"),
    [
        (
            FSDP,
            Choice(name="fsdp", options={"reshard_after_forward": False}),
            "asks for fsdp, the YAML for {name: fsdp, resh",
        ),
        (FSDP, Choice(name="ddp"), "train.engine: .* asks for fsdp, the YAML for ddp; write `train: {engine: fsdp}`"),
        (DEEPSPEED, Choice(name="fsdp"), "asks for {name: deepspeed, stage: 3}, the YAML for fsdp"),
        (DEEPSPEED, Choice(name="deepspeed"), "asks for {name: deepspeed, stage: 3}, the YAML for deepspeed"),
        (
            {**FSDP, "FSDP_OFFLOAD_PARAMS": "true"},
            Choice(name="fsdp"),
            "{name: fsdp, offload: true}, the YAML for fsdp",
        ),
    ],
)
def test_another_engine_is_refused(environment: dict[str, str], engine: Choice, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        followed(run(engine), environment, has_engine=True)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"ACCELERATE_MIXED_PRECISION": "bf16"},
            r"mixed_precision bf16, the YAML for float32; write `model: {dtype: bf",
        ),
        (
            {"ACCELERATE_MIXED_PRECISION": "fp8"},
            r"mixed_precision fp8, the YAML for float32; set `mixed_precision: 'no'`",
        ),
        ({"ACCELERATE_DYNAMO_BACKEND": "INDUCTOR"}, "train.compile: .* dynamo_backend inductor, the YAML has false"),
        ({"ACCELERATE_USE_MEGATRON_LM": "true"}, "Megatron-LM"),
        ({**FSDP, "FSDP_VERSION": "1"}, "asks for FSDP 1, .* set `fsdp_version: 2` there"),
        ({**FSDP, "FSDP_RESHARD_AFTER_FORWARD": "half"}, "FSDP_RESHARD_AFTER_FORWARD: .* 'half'"),
        ({**FSDP, "FSDP_SHARDING_STRATEGY": "HYBRID_SHARD"}, "FSDP_SHARDING_STRATEGY: .* 'HYBRID_SHARD'.*replicas"),
        (
            {**FSDP, "FSDP_SHARDING_STRATEGY": "SHARD_GRAD_OP"},
            "STRATEGY: .* FSDP_RESHARD_AFTER_FORWARD true",
        ),
        ({**FSDP, "FSDP_BACKWARD_PREFETCH": "NO_PREFETCH"}, "FSDP_BACKWARD_PREFETCH: .* 'NO_PREFETCH'"),
        ({**FSDP, "FSDP_NEW_SETTING": "7"}, "FSDP_NEW_SETTING: .* '7', which no engine here knows"),
        ({"ACCELERATE_CPU_AFFINITY": "1"}, "ACCELERATE_CPU_AFFINITY: .*enable_cpu_affinity: false"),
        (
            {
                **FSDP,
                "ACCELERATE_USE_PARALLELISM_CONFIG": "true",
                "PARALLELISM_CONFIG_TP_SIZE": "2",
                "PARALLELISM_CONFIG_CP_SIZE": "1",
            },
            "tensor, context or sequence parallel: PARALLELISM_CONFIG_TP_SIZE 2",
        ),
        ({**FSDP, "FSDP_AUTO_WRAP_POLICY": "SIZE_BASED_WRAP"}, "FSDP_AUTO_WRAP_POLICY: .* 'SIZE_BASED_WRAP'"),
        ({**FSDP, "FSDP_IGNORED_MODULES": "lm_head"}, "FSDP_IGNORED_MODULES: .* 'lm_head'"),
        ({**FSDP, "FSDP_ACTIVATION_CHECKPOINTING": "true"}, "train.activation_checkpointing: .* the YAML has false"),
        ({**DEEPSPEED, "ACCELERATE_GRADIENT_CLIPPING": "0.3"}, "gradient_clipping 0.3, the YAML has 1.0"),
        ({**DEEPSPEED, "ACCELERATE_GRADIENT_ACCUMULATION_STEPS": "3"}, "gradient_accumulation_steps 3"),
        ({**DEEPSPEED, "ACCELERATE_DEEPSPEED_CONFIG_FILE": "nowhere.json"}, "config: there is no file 'nowhere.json'"),
        (
            {**DEEPSPEED, "ACCELERATE_DEEPSPEED_MOE_LAYER_CLS_NAMES": "MixtralSparseMoeBlock"},
            "MOE_LAYER_CLS_NAMES: .*leaf",
        ),
        ({**DEEPSPEED, "ACCELERATE_DEEPSPEED_ZERO_STAGE": "7"}, "is '7'; give 0, 1, 2 or 3"),
        ({**DEEPSPEED, "ACCELERATE_DEEPSPEED_OFFLOAD_PARAM_DEVICE": "nvme"}, "'nvme' at stage 3"),
        ({**DEEPSPEED, "ACCELERATE_DEEPSPEED_OFFLOAD_OPTIMIZER_DEVICE": "cpu"}, "OFFLOAD_OPTIMIZER_DEVICE: .* 'cpu'"),
    ],
)
def test_what_is_not_in_the_run_is_refused(changes: dict[str, str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        followed(run(), changes, has_engine=False)


def test_what_is_in_the_run_is_no_contradiction() -> None:
    environment = {
        **FSDP,
        "ACCELERATE_MIXED_PRECISION": "bf16",
        "ACCELERATE_DYNAMO_BACKEND": "INDUCTOR",
        "FSDP_ACTIVATION_CHECKPOINTING": "true",
    }
    made = run(Choice(name="fsdp"), "bfloat16", compile=True, activation_checkpointing=True)
    assert followed(made, environment, has_engine=True) == made


def test_all_mistakes_are_named_at_once() -> None:
    environment = {**FSDP, "FSDP_VERSION": "1", "ACCELERATE_MIXED_PRECISION": "fp16"}
    with pytest.raises(ConfigError) as found:
        followed(dataclasses.replace(run()), environment, has_engine=False)
    assert len(str(found.value).splitlines()) == 2


def test_a_deepspeed_configuration_file_is_followed_and_checked(tmp_path: Path) -> None:
    path = tmp_path / "ds.json"
    settings: dict[str, Any] = {"zero_optimization": {"stage": 3}, "train_batch_size": "auto", "gradient_clipping": 1.0}
    path.write_text(json.dumps(settings))
    environment = {"ACCELERATE_USE_DEEPSPEED": "true", "ACCELERATE_DEEPSPEED_CONFIG_FILE": str(path)}
    wanted = Choice(name="deepspeed", options={"config": str(path)})
    assert followed(run(), environment, has_engine=False).train.engine == wanted
    path.write_text(json.dumps({**settings, "gradient_clipping": 0.25, "zero_optimisation": {}}))
    with pytest.raises(ConfigError) as found:
        followed(run(), environment, has_engine=False)
    assert "has gradient_clipping 0.25, and train.clip is 1.0" in str(found.value)
    assert "the unknown key zero_optimisation" in str(found.value)


def test_all_that_accelerate_s_launcher_sets_is_decided() -> None:
    source = inspect.getsource(launch)
    names = set(re.findall(r"""current_env\["((?:ACCELERATE|FSDP)_[A-Z0-9_]+)"\]""", source))
    names |= {f"PARALLELISM_CONFIG_{name}" for name in _suffixes(launch.prepare_extend_env_parallelism_config)}
    assert len(names) > 40
    assert names - {*READ, *HARMLESS} == set()


def _suffixes(function: Any) -> list[str]:
    return re.findall(r"prefix \+ .([A-Z0-9_]+).\]", inspect.getsource(function))
