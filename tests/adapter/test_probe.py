"""What a small copy of a model says of it: layers that never run, and tokens that see later ones."""

import dataclasses
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText

from lori_dist.adapter import matching
from lori_dist.adapter.adapter import Spec
from lori_dist.adapter.attach import attach, extract, trainable
from lori_dist.adapter.matching import match
from lori_dist.adapter.probe import NOTHING, probe
from lori_dist.errors import AdapterError
from tests.models import tiny_gpt2, tiny_llama

SPEC = Spec(rank=2, alpha=4.0, seed=0)
IDS = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
COMMON: dict[str, Any] = {
    "vocab_size": 128,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
    **IDS,
}
PICTURES = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "image_size": 28,
    "patch_size": 14,
}
STATES = {"vocab_size": 128, "hidden_size": 32, "num_hidden_layers": 2, "state_size": 8, **IDS}
KINDS: dict[str, dict[str, Any]] = {
    "bert": COMMON,
    "roberta": COMMON,
    "falcon": {key: COMMON[key] for key in COMMON if key != "intermediate_size"} | {"alibi": False},
    "mamba": {**STATES, "time_step_rank": 4},
    "mamba2": {**STATES, "num_heads": 8, "head_dim": 8, "n_groups": 1, "chunk_size": 16},
    "jamba": {
        **COMMON,
        "num_key_value_heads": 2,
        "mamba_d_state": 8,
        "mamba_dt_rank": 4,
        "attn_layer_period": 2,
        "attn_layer_offset": 1,
        "num_experts": 2,
        "use_mamba_kernels": False,
    },
    "zamba2": {
        **COMMON,
        "num_key_value_heads": 4,
        "num_hidden_layers": 4,
        "layers_block_type": ["mamba", "hybrid", "mamba", "hybrid"],
        "mamba_d_state": 8,
        "n_mamba_heads": 8,
        "mamba_headdim": 8,
        "mamba_ngroups": 1,
        "chunk_size": 16,
        "num_mem_blocks": 1,
        "attention_head_dim": 16,
    },
    "phimoe": {**COMMON, "num_key_value_heads": 2, "num_local_experts": 2, "num_experts_per_tok": 1},
    "gemma3": {
        "text_config": {**COMMON, "num_key_value_heads": 2, "head_dim": 8},
        "vision_config": PICTURES,
        "mm_tokens_per_image": 4,
        "image_token_index": 100,
        "boi_token_index": 101,
        "eoi_token_index": 102,
    },
    "qwen2_5_vl": {
        "text_config": {
            **COMMON,
            "num_key_value_heads": 2,
            "rope_scaling": {"rope_type": "default", "mrope_section": [1, 1, 2]},
        },
        "vision_config": {
            "depth": 1,
            "hidden_size": 32,
            "intermediate_size": 48,
            "num_heads": 4,
            "out_hidden_size": 32,
            "fullatt_block_indexes": [0],
        },
        "image_token_id": 100,
        "video_token_id": 101,
        "vision_start_token_id": 102,
        "vision_end_token_id": 103,
    },
    "mistral3": {
        "text_config": {"model_type": "mistral", **COMMON, "num_key_value_heads": 2, "head_dim": 8},
        "vision_config": {"model_type": "pixtral", **PICTURES, "head_dim": 8},
        "image_token_index": 100,
    },
}


def of_kind(name: str, **more: Any) -> Any:
    settings = AutoConfig.for_model(name, **{**KINDS[name], **more})
    auto: Any = AutoModelForImageTextToText if "vision_config" in KINDS[name] else AutoModelForCausalLM
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return auto.from_config(settings).eval()


@pytest.fixture(autouse=True)
def said_anew() -> Iterator[None]:
    matching._say_once.cache_clear()
    yield


@pytest.mark.parametrize("name", ["bert", "roberta"])
def test_tokens_that_see_later_ones_are_found(name: str) -> None:
    assert probe(of_kind(name)).is_causal is False
    assert probe(of_kind(name, is_decoder=True)).is_causal is True


@pytest.mark.parametrize(
    "make",
    [tiny_llama, tiny_gpt2, *(lambda name=name: of_kind(name) for name in KINDS if name not in ("bert", "roberta"))],
)
def test_causal_models_are_known_as_such(make: Callable[[], Any]) -> None:
    assert probe(make()).is_causal is True


LEFT_OUT = {
    "falcon": (),
    "mamba": ("dt_proj",),
    "mamba2": (),
    "jamba": ("dt_proj",),
    "zamba2": ("gate_up_proj_adapter_list",),
    "phimoe": ("router",),
    "gemma3": ("vision_tower",),
    "qwen2_5_vl": ("visual",),
    "mistral3": ("vision_tower", "multi_modal_projector"),
}


@pytest.mark.parametrize(("name", "parts"), LEFT_OUT.items())
def test_every_layer_of_all_linear_is_trained_and_others_are_named(
    name: str, parts: tuple[str, ...], caplog: pytest.LogCaptureFixture
) -> None:
    model, ids = of_kind(name), torch.arange(5, 37).view(2, 16)
    linear = {path: module for path, module in model.named_modules() if isinstance(module, nn.Linear)}
    called: set[str] = set()
    hooks = [
        module.register_forward_pre_hook(lambda module, inputs, path=path: called.add(path))
        for path, module in linear.items()
    ]
    model(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False)
    for hook in hooks:
        hook.remove()
    layers = attach(model, SPEC)
    left = set(linear) - set(layers) - {"lm_head"}
    assert left == {path for path in linear if path not in called or path.endswith(".router")}
    assert all(any(f".{part}." in f".{path}." for part in parts) for path in left)
    said = [record.message for record in caplog.records if "all-linear leaves out" in record.message]
    assert len(said) == bool(parts)
    assert all(any(part in message for message in said) for part in parts)
    output = model(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False)
    output.logits.log_softmax(-1)[..., 7].sum().backward()
    for path, values in trainable(model).items():
        assert values.grad is not None and values.grad.any(), path


def test_a_layer_that_never_runs_is_refused_by_name() -> None:
    wanted = r"^targets: backbone\.layers\.0\.mixer\.dt_proj is never called when MambaForCausalLM reads tokens"
    with pytest.raises(AdapterError, match=wanted):
        attach(of_kind("mamba"), dataclasses.replace(SPEC, targets=("in_proj", "dt_proj")))
    spec = dataclasses.replace(SPEC, targets=("in_proj", "dt_proj"), exclude=("dt_proj",))
    assert {path.rpartition(".")[2] for path in attach(of_kind("mamba"), spec)} == {"in_proj"}


def test_a_model_on_meta_and_one_of_real_size_are_known_as_a_small_one(caplog: pytest.LogCaptureFixture) -> None:
    """Blocks that the copy does not have are as those that it has."""
    sizes = {"hidden_size": 4096, "num_hidden_layers": 96, "state_size": 16, "time_step_rank": 256}
    with torch.device("meta"):
        large = AutoModelForCausalLM.from_config(AutoConfig.for_model("mamba", vocab_size=50280, **sizes, **IDS))
    state = torch.random.get_rng_state()
    layers = match(large, "all-linear")
    assert torch.equal(state, torch.random.get_rng_state())
    kinds = {"in_proj", "x_proj", "out_proj"}
    assert set(layers) == {f"backbone.layers.{block}.mixer.{kind}" for block in range(96) for kind in kinds}
    assert "leaves out 96 layers" in caplog.text and "backbone.layers.*.mixer.dt_proj" in caplog.text
    assert not any(parameter.device.type != "meta" for parameter in large.parameters())


def test_of_other_modules_nothing_is_known() -> None:
    assert probe(nn.Sequential(nn.Linear(4, 4))) is NOTHING


def test_of_a_model_whose_copy_cannot_be_made_that_is_said(caplog: pytest.LogCaptureFixture) -> None:
    class Odd(type(tiny_llama())):  # type: ignore[misc]
        def __init__(self, config: Any, *, more: int) -> None:
            super().__init__(config)

    model = Odd(tiny_llama().config, more=1)
    assert probe(model) is NOTHING
    assert "Odd: no small copy of it can be run (TypeError" in caplog.text
    assert len(attach(model, SPEC)) == 14


# --- layers of other classes -----------------------------------------------------------------------------------------


class Same(nn.Linear):
    def forward(self, input: Any) -> Any:
        y = input @ self.weight.T
        return y if self.bias is None else y + self.bias


class Scaled(nn.Linear):
    def forward(self, input: Any) -> Any:
        return super().forward(input) * 2


class Router(nn.Linear):
    def forward(self, input: Any) -> Any:
        scores = super().forward(input)
        return scores.softmax(-1), scores


class Plain(nn.Linear):
    pass


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize(("kind", "is_taken"), [(Same, True), (Plain, True), (Scaled, False), (Router, False)])
def test_a_class_of_its_own_is_adapted_where_it_computes_the_product(kind: Any, is_taken: bool, bias: bool) -> None:
    model = nn.ModuleDict({"own": kind(6, 5, bias=bias), "other": nn.Linear(6, 5)})
    assert list(attach(model, SPEC)) == (["own", "other"] if is_taken else ["other"])
    model = nn.ModuleDict({"own": kind(6, 5, bias=bias)})
    if is_taken:
        x = torch.randn(3, 6)
        before = model["own"](x)
        attach(model, SPEC)
        torch.testing.assert_close(model["own"](x), before)
        assert extract(model, name="t").shapes == {"own": (5, 6)}
    else:
        with pytest.raises(AdapterError, match=rf"targets: own is a {kind.__name__}, which does not compute"):
            attach(model, dataclasses.replace(SPEC, targets=("own",)))
        with pytest.raises(AdapterError, match="targets: no linear layer is left"):
            attach(model, SPEC)


def test_what_a_multihead_attention_never_calls_is_left_out() -> None:
    model = nn.ModuleDict({"attention": nn.MultiheadAttention(8, 2), "out": nn.Linear(8, 8)})
    assert list(attach(model, SPEC)) == ["out"]


# --- exclude ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("targets", "exclude", "left"),
    [
        ("all-linear", ("q_proj", "mlp"), {"k_proj", "v_proj", "o_proj"}),
        ("all-linear", ("model.layers.*.self_attn.*",), {"gate_proj", "up_proj", "down_proj"}),
        (("q_proj", "k_proj"), ("k_proj",), {"q_proj"}),
        (("self_attn.q_proj", "v_proj"), ("layers.0", "v_proj"), {"q_proj"}),
    ],
)
def test_what_is_excluded_is_no_target(targets: Any, exclude: tuple[str, ...], left: set[str]) -> None:
    layers = attach(tiny_llama(), dataclasses.replace(SPEC, targets=targets, exclude=exclude))
    assert {path.rpartition(".")[2] for path in layers} == left
    if "layers.0" in exclude:
        assert all(".layers.1." in path for path in layers)


def test_an_exclusion_that_matches_nothing_or_everything_is_refused() -> None:
    with pytest.raises(AdapterError, match=r"^exclude: 'q_prj' matches nothing; .* Did you mean 'q_proj'\?"):
        attach(tiny_llama(), dataclasses.replace(SPEC, exclude=("q_prj",)))
    with pytest.raises(AdapterError, match=r"^targets: no linear layer is left after exclude \(model\)"):
        attach(tiny_llama(), dataclasses.replace(SPEC, exclude=("model",)))


def test_a_large_mixture_of_experts_is_probed_in_seconds() -> None:
    sizes = {"hidden_size": 2048, "num_hidden_layers": 48, "num_attention_heads": 32, "num_key_value_heads": 4}
    experts = {"num_experts": 128, "num_experts_per_tok": 8, "moe_intermediate_size": 768, "head_dim": 128}
    settings = AutoConfig.for_model("qwen3_moe", **sizes, **experts)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(settings)
    num_threads = torch.get_num_threads()
    torch.set_num_threads(4)
    try:
        start = time.process_time()  # of all threads
        found = probe(model)
        assert time.process_time() - start < 8
        assert torch.get_num_threads() == 4
    finally:
        torch.set_num_threads(num_threads)
    assert found.is_causal and not found.idle
    assert "model.layers.47.mlp.experts" in found.layers
