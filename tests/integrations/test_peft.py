"""A LoRA folder that PEFT loads with the outputs of our adapter."""

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors import safe_open
from transformers import PreTrainedModel

from lori_dist.adapter.adapter import Adapter
from lori_dist.errors import AdapterError
from lori_dist.integrations.peft import export
from lori_dist.merges import merge
from tests.integrations.made import adapted_logits, logits, trained
from tests.models import tiny_gpt2, tiny_llama

# peft 0.21 asks transformers 5.23 for a property under the name it is about to lose.
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")

MODELS: dict[str, tuple[Callable[[], PreTrainedModel], list[str | tuple[str, ...]]]] = {
    "llama": (tiny_llama, ["all-linear", ("q_proj", "down_proj"), ("model.layers.1.mlp.*", "lm_head")]),
    "gpt2": (tiny_gpt2, ["all-linear", ("c_attn",), ("transformer.h.0.mlp.c_proj", "attn.c_proj")]),
}


def compare(make: Callable[[], PreTrainedModel], adapter: Adapter, folder: Path) -> None:
    export(adapter, folder, base_model_name="tiny")
    ours = adapted_logits(make(), adapter)
    theirs = logits(PeftModel.from_pretrained(make(), folder))
    torch.testing.assert_close(theirs, ours, rtol=0, atol=1e-5)
    assert (ours - logits(make())).abs().max() > 1e-2  # or equal logits would say nothing


@pytest.mark.parametrize("density", [0.1, 1.0])
@pytest.mark.parametrize(("name", "targets"), [(name, targets) for name in MODELS for targets in MODELS[name][1]])
def test_one_adapter_gives_the_same_logits(
    tmp_path: Path, name: str, targets: str | tuple[str, ...], density: float
) -> None:
    make = MODELS[name][0]
    compare(make, trained(make(), density=density, targets=targets, base={"model_type": name}), tmp_path / "out")


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("shared", [False, True])
def test_merges_give_the_same_logits(tmp_path: Path, name: str, shared: bool) -> None:
    make, targets = MODELS[name]
    base = {"model_type": name}
    one = trained(make(), "one", seed=1, rank=4, targets=targets[0], base=base)
    other = trained(make(), "two", seed=1 if shared else 2, rank=4 if shared else 3, targets=targets[1], base=base)
    compare(make, merge([one, other], method="concat", weights=[0.7, -0.4]), tmp_path / "concat")
    compare(make, merge([one, other], method="linear", weights=[0.7, -0.4]), tmp_path / "linear")
    compare(make, merge([one, other], method="svd", weights=[0.7, -0.4]), tmp_path / "svd")
    compare(make, merge([one, other], method="ties", weights=[0.7, -0.4]), tmp_path / "ties")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_narrow_a_is_written_as_it_is(tmp_path: Path, dtype: torch.dtype) -> None:
    adapter = trained(tiny_llama(), dtype=dtype)
    compare(tiny_llama, adapter, tmp_path / "out")
    with safe_open(tmp_path / "out" / "adapter_model.safetensors", "pt") as file:
        a = file.get_tensor("base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight")
    assert torch.equal(a, adapter.blocks[0].projection("model.layers.0.self_attn.q_proj", 36))
    assert a.dtype == dtype


def test_modules_that_keep_nothing_are_left_out(tmp_path: Path) -> None:
    adapter = trained(tiny_llama(), density=0.002)
    kept = set(adapter.blocks[0].entries)
    assert kept < set(adapter.shapes)
    compare(tiny_llama, adapter, tmp_path / "out")
    assert set(config(tmp_path / "out")["target_modules"]) == kept


def config(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "adapter_config.json").read_text())


def test_one_block_keeps_its_alpha_and_its_bits(tmp_path: Path) -> None:
    adapter = trained(tiny_llama(), density=1.0, rank=4, alpha=10.0)
    export(adapter, tmp_path / "out", base_model_name="some/model")
    written = config(tmp_path / "out")
    assert (written["r"], written["lora_alpha"], written["base_model_name_or_path"]) == (4, 10, "some/model")
    with safe_open(tmp_path / "out" / "adapter_model.safetensors", "pt") as file:
        b = file.get_tensor("base_model.model.model.layers.0.mlp.up_proj.lora_B.weight")
    assert torch.equal(b, adapter.blocks[0].entries["model.layers.0.mlp.up_proj"].dense(52, 4))


def test_the_weight_of_a_single_block_counts(tmp_path: Path) -> None:
    compare(tiny_llama, merge([trained(tiny_llama())], method="concat", weights=[-0.5]), tmp_path / "out")


def test_a_fractional_alpha_is_kept(tmp_path: Path) -> None:
    adapter = trained(tiny_llama(), alpha=3.3)
    compare(tiny_llama, adapter, tmp_path / "out")
    assert config(tmp_path / "out")["lora_alpha"] == 3.3


def test_several_blocks_become_one_of_all_ranks(tmp_path: Path) -> None:
    parts = [trained(tiny_llama(), f"task{seed}", seed=seed, rank=seed + 2) for seed in range(3)]
    export(merge(parts, method="concat", weights=[1, 1, 1]), tmp_path / "out", base_model_name="tiny")
    written = config(tmp_path / "out")
    assert (written["r"], written["lora_alpha"]) == (9, 9)


def test_a_base_of_unknown_type_loads_with_pefts_own_warning(tmp_path: Path) -> None:
    adapter = trained(tiny_gpt2())
    export(adapter, tmp_path / "out", base_model_name="tiny")
    with pytest.warns(UserWarning, match="fan_in_fan_out is set to False but the target module is `Conv1D`"):
        theirs = logits(PeftModel.from_pretrained(tiny_gpt2(), tmp_path / "out"))
    torch.testing.assert_close(theirs, adapted_logits(tiny_gpt2(), adapter), rtol=0, atol=1e-5)


def test_a_folder_in_use_is_refused_and_left_alone(tmp_path: Path) -> None:
    adapter = trained(tiny_llama())
    (tmp_path / "out").mkdir()
    export(adapter, tmp_path / "out", base_model_name="tiny")  # an empty one is not in use
    before = config(tmp_path / "out")
    with pytest.raises(AdapterError, match="out: is not empty; give a new folder, or remove what is there"):
        export(trained(tiny_llama(), rank=2), tmp_path / "out", base_model_name="tiny")
    assert config(tmp_path / "out") == before
    (tmp_path / "file").touch()
    with pytest.raises(AdapterError, match="file: is a file; give a new folder"):
        export(adapter, tmp_path / "file", base_model_name="tiny")


def test_an_export_that_fails_leaves_nothing(tmp_path: Path) -> None:
    adapter = trained(tiny_llama())
    with pytest.raises(TypeError):
        export(adapter, tmp_path / "deep" / "out", base_model_name=object())  # type: ignore[arg-type]
    assert list((tmp_path / "deep").iterdir()) == []


def test_an_adapter_without_entries_is_refused(tmp_path: Path) -> None:
    adapter = trained(tiny_llama())
    (block,) = adapter.blocks
    empty = dataclasses.replace(adapter, blocks=(dataclasses.replace(block, entries={}),))
    with pytest.raises(AdapterError, match="export: the adapter keeps no entry of any module"):
        export(empty, tmp_path / "out", base_model_name="tiny")
    assert not (tmp_path / "out").exists()


def test_the_folder_is_what_the_loader_of_vllm_asks_for(tmp_path: Path) -> None:
    adapter = trained(tiny_llama(), targets=("q_proj", "down_proj"))
    export(adapter, tmp_path / "out", base_model_name="tiny")
    settings = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    assert type(settings["r"]) is type(settings["lora_alpha"]) is int  # its required fields, with target_modules
    assert settings["bias"] == "none" and not settings.get("modules_to_save") and not settings["use_dora"]
    assert {module.rpartition(".")[2] for module in settings["target_modules"]} == {"q_proj", "down_proj"}
    with safe_open(tmp_path / "out" / "adapter_model.safetensors", "pt") as held:
        for name in held.keys():  # noqa: SIM118  # which is no mapping
            prefix, kind = name.removesuffix(".weight").rsplit(".", 1)
            module = prefix.removeprefix("base_model.model.")
            assert prefix != module and module in settings["target_modules"] and kind in ("lora_A", "lora_B")
            out_features, in_features = adapter.shapes[module]
            wanted = (settings["r"], in_features) if kind == "lora_A" else (out_features, settings["r"])
            assert tuple(held.get_slice(name).get_shape()) == wanted
