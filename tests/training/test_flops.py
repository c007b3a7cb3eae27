"""The work of a step is what torch counts, and a share of a peak is given only where that is known."""

import dataclasses
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoConfig

from lori_dist import Spec, attach, config
from lori_dist.training import flops
from lori_dist.training.trainer import checkpoint_activations
from lori_dist.training.world import World
from tests.models import tiny, tiny_gpt2, tiny_llama

H100 = "NVIDIA H100 80GB HBM3"


def counted(model: Any, num_tokens: int) -> int:
    """What torch counts of products with the base's matrices in one step of training with a frozen base."""
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    model.enable_input_require_grads()
    counter = FlopCounterMode(display=False)
    with counter:
        model(input_ids=torch.arange(3, 3 + num_tokens)[None], use_cache=False).logits.sum().backward()
    products = (torch.ops.aten.mm, torch.ops.aten.addmm)  # the scores are of bmm or of an attention
    return sum(number for operation, number in counter.get_flop_counts()["Global"].items() if operation in products)


def mixture(kind: str) -> Any:
    """Of which every expert is computed for its own tokens alone."""
    model = tiny(kind)
    model.set_experts_implementation("eager")
    return model


@pytest.mark.parametrize("kind", ["mixtral", "qwen3_moe", "gpt_oss", "deepseek_v3"])
@pytest.mark.parametrize("is_adapted", [False, True])
def test_of_a_mixture_it_is_the_work_of_the_experts_that_a_token_meets(kind: str, is_adapted: bool) -> None:
    model = mixture(kind)
    number = counted(model, 12)
    if is_adapted:  # whose own products are not those of the base
        attach(model, Spec(rank=4, alpha=8.0, seed=1))
    wanted = flops.per_token(model)
    assert wanted is not None
    routers = [m for name, m in model.named_modules() if name.endswith((".gate", ".router"))]
    assert len(routers) == (1 if kind == "deepseek_v3" else 2)
    assert number == pytest.approx(12 * wanted, rel=1e-9)


@pytest.mark.parametrize("recomputed", [False, True])
@pytest.mark.parametrize("make", [tiny_llama, tiny_gpt2])
def test_it_is_what_torch_counts(make: Any, recomputed: bool) -> None:
    model = make()
    if recomputed:
        checkpoint_activations(model)
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    wanted = flops.per_token(model, activation_checkpointing=recomputed)
    assert wanted is not None
    # The head is in no block, and of a block's last product the result is not needed again.
    last = [weight for name, weight in model.named_parameters() if re.search(r"(down_proj|mlp.c_proj).weight", name)]
    once = sum(weight.numel() for weight in [model.get_output_embeddings().weight, *last])
    assert counted(model, 12) == 12 * (wanted - 2 * once * recomputed)


@pytest.mark.parametrize("make", [tiny_llama, tiny_gpt2])
def test_attention_is_what_torch_counts(make: Any) -> None:
    model, length = make(), 12
    model.set_attn_implementation("eager")
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    model.enable_input_require_grads()
    counter = FlopCounterMode(display=False)
    with counter:
        model(input_ids=torch.arange(3, 3 + length)[None], use_cache=False).logits.sum().backward()
    products = counter.get_flop_counts()["Global"][torch.ops.aten.bmm]
    layers = flops.attention(model.config)
    assert len(layers) == model.config.num_hidden_layers
    # The eager kernel computes what the mask hides, too.
    assert products == 3 * sum(layer.per_pair * layer.pairs(length, skips=False) for layer in layers)
    needed = flops.of_attention(layers, [length])
    assert needed == products * (length + 1) / (2 * length)


@pytest.mark.parametrize(
    ("settings", "pairs"),
    [
        ({"model_type": "mistral", "sliding_window": 4}, [4 * 5 / 2 + 6 * 4] * 2),
        ({"model_type": "mistral", "sliding_window": None}, [10 * 11 / 2] * 2),
        ({"model_type": "qwen2", "sliding_window": 4, "use_sliding_window": False}, [10 * 11 / 2] * 2),
        (
            {"model_type": "gemma2", "sliding_window": 4, "layer_types": ["sliding_attention", "full_attention"]},
            [4 * 5 / 2 + 6 * 4, 10 * 11 / 2],
        ),
        ({"model_type": "mamba"}, []),
    ],
)
def test_windows_are_those_of_the_configuration(settings: dict[str, Any], pairs: list[float]) -> None:
    given = {"num_hidden_layers": 2, "num_attention_heads": 2, "hidden_size": 16, **settings}
    if given["model_type"] == "mamba":
        del given["num_attention_heads"]
    layers = flops.attention(AutoConfig.for_model(given.pop("model_type"), **given))
    assert [layer.pairs(10) for layer in layers] == pairs


def test_chunks_do_not_see_each_other() -> None:
    layer = flops.Attention(per_pair=1, window=4, is_chunked=True)
    assert layer.pairs(10) == 2 * (4 * 5 / 2) + 2 * 3 / 2


@pytest.mark.parametrize("kind", ["Linear4bit", "QuantizedLinear"])
def test_packed_weights_count_as_the_matrices_they_are(kind: str) -> None:
    model: Any = tiny_llama().requires_grad_(False)
    wanted = per_token(model)
    for path, module in list(model.named_modules()):
        if type(module) is torch.nn.Linear and "lm_head" not in path:
            made: Any = type(kind, (torch.nn.Linear,), {})(module.in_features, module.out_features, bias=False)
            packed = torch.zeros(module.weight.numel() // 2, 1, dtype=torch.uint8)
            made.weight = torch.nn.Parameter(packed, requires_grad=False)
            model.set_submodule(path, made)
    assert per_token(model) == wanted


def per_token(model: Any) -> float:
    found = flops.per_token(model, activation_checkpointing=False)
    assert found is not None
    return found


def test_an_adapter_does_not_count() -> None:
    model, plain = tiny_llama(), tiny_llama()
    plain.requires_grad_(False)
    attach(model, Spec(rank=4, alpha=8.0, seed=1))
    assert per_token(model) == per_token(plain)


def test_a_mixture_of_experts_is_not_guessed() -> None:
    model = tiny_llama()
    model.config.num_local_experts = 8
    assert flops.per_token(model, activation_checkpointing=False) is None


@pytest.mark.parametrize(
    ("name", "dtype", "precision", "peak"),
    [
        (H100, torch.bfloat16, "highest", 989e12),
        (H100, torch.float32, "highest", 67e12),
        (H100, torch.float32, "high", 494e12),
        ("Tesla T4", torch.float16, "highest", 65e12),
        ("Tesla T4", torch.bfloat16, "highest", None),
        ("NVIDIA H100 80GB HBM3 MIG 1g.10gb", torch.bfloat16, "highest", None),
        ("Some Device", torch.bfloat16, "highest", None),
    ],
)
def test_a_peak_is_that_of_the_device_and_dtype(
    name: str, dtype: torch.dtype, precision: str, peak: float | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: name)
    monkeypatch.setattr(torch, "get_float32_matmul_precision", lambda: precision)
    assert flops.peak(torch.device("cuda", 0), dtype) == peak
    assert flops.peak(torch.device("cpu"), dtype) is None


def described(tmp_path: Path) -> config.Run:
    return config.Run(name="demo", output=str(tmp_path), model=config.Model(path="m", dtype="bfloat16"), tasks={})


def test_a_share_is_of_all_devices(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: H100)
    model: Any = tiny_llama().requires_grad_(False)
    world = World(rank=0, size=4, local_rank=0, device=torch.device("cuda", 0))
    share = flops.utilisation(model, described(tmp_path), world)
    assert share(1000, 0.25) == pytest.approx(per_token(model) * 1000 / 0.25 / (4 * 989e12))
    # What is computed again does not count, and rows' own products do.
    run = described(tmp_path)
    again = dataclasses.replace(run, train=dataclasses.replace(run.train, activation_checkpointing=True))
    assert flops.utilisation(model, again, world)(1000, 0.25) == share(1000, 0.25)
    rows = flops.of_attention(flops.attention(model.config), [600, 400])
    assert share(1000, 0.25, [600, 400]) - share(1000, 0.25) == pytest.approx(rows / 0.25 / (4 * 989e12))
    on_cpu = World(rank=0, size=4, local_rank=0, device=torch.device("cpu"))
    assert flops.utilisation(model, described(tmp_path), on_cpu)(1000, 0.25) is None
