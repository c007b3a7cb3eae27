"""LoRA folders that PEFT has saved, read with the updates that PEFT itself computes."""

import json
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from transformers import PreTrainedModel

from lori_dist import formats
from lori_dist.adapter.adapter import Adapter
from lori_dist.errors import AdapterError
from lori_dist.formats import native
from lori_dist.integrations.peft import export
from tests.formats.official import lora
from tests.integrations.made import adapted_logits, logits, trained
from tests.models import tiny_gpt2, tiny_llama

# peft 0.21 asks transformers 5.23 for a property under the name it is about to lose.
pytestmark = [
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"),
    pytest.mark.filterwarnings("ignore:fan_in_fan_out is set to:UserWarning"),
]

PREFIX = "base_model.model.model.layers.0."
MODULE = "model.layers.0.self_attn.q_proj"


def compare(model: PeftModel, adapter: Adapter) -> None:
    modules = dict(model.get_base_model().named_modules())
    adapted = {name for name, module in modules.items() if hasattr(module, "lora_A")}
    assert set(adapter.shapes) == adapted
    for name in adapted:
        wanted = modules[name].get_delta_weight("default").float()
        wanted = wanted.t() if modules[name].fan_in_fan_out else wanted
        torch.testing.assert_close(adapter.delta(name), wanted, rtol=1e-5, atol=1e-5)


SETTINGS: dict[str, dict[str, Any]] = {
    "plain": {},
    "one": {"r": 1, "lora_alpha": 3},
    "fractional": {"r": 3, "lora_alpha": 3.3},
    "rslora": {"r": 7, "lora_alpha": 5, "use_rslora": True},
    "targets": {"target_modules": ["q_proj", "down_proj"]},
    "pattern": {"target_modules": r".*layers\.1\..*_proj"},
    "ranks": {"rank_pattern": {"q_proj": 2, r"layers\.1\.mlp\.up_proj": 6}},
    "alphas": {"alpha_pattern": {"q_proj": 32, "model.layers.0.mlp.down_proj": 1, "^model.layers.1.*k_proj": 5}},
    "both": {"rank_pattern": {"v_proj": 9}, "alpha_pattern": {"v_proj": 4}, "use_rslora": True},
    "transformed": {"layers_to_transform": [1]},
    "zero": {"alpha_pattern": {"q_proj": 0}},
    "gaussian": {"init_lora_weights": "gaussian"},
}


@pytest.mark.parametrize("settings", SETTINGS.values(), ids=list(SETTINGS))
def test_the_updates_are_those_of_peft(tmp_path: Path, settings: dict[str, Any]) -> None:
    model = lora(tmp_path / "lora", **settings)
    adapter = formats.load(tmp_path / "lora")
    compare(model, adapter)
    (block,) = adapter.blocks
    assert (block.name, block.seed, adapter.base) == ("lora", None, {})
    native.save(adapter, tmp_path / "ours")
    compare(model, native.load(tmp_path / "ours"))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_narrow_tensors_are_kept_as_they_are(tmp_path: Path, dtype: torch.dtype) -> None:
    model = lora(tmp_path / "lora", dtype=dtype)
    adapter = formats.load(tmp_path / "lora")
    assert adapter.blocks[0].dtype == adapter.blocks[0].entries[MODULE].values.dtype == dtype
    layer = model.get_base_model().get_submodule(MODULE)
    b, a = (getattr(layer, name)["default"].weight.float() for name in ("lora_B", "lora_A"))
    torch.testing.assert_close(adapter.delta(MODULE), 2.0 * b @ a)


@pytest.mark.parametrize("make", [tiny_llama, tiny_gpt2])
def test_the_logits_are_those_of_peft(tmp_path: Path, make: Callable[[], PreTrainedModel]) -> None:
    is_gpt2 = make is tiny_gpt2
    settings = {"target_modules": ["c_attn", "c_proj"], "fan_in_fan_out": True} if is_gpt2 else {}
    model = lora(tmp_path / "lora", make=make, **settings)
    adapter = formats.load(tmp_path / "lora")
    compare(model, adapter)
    torch.testing.assert_close(adapted_logits(make(), adapter), logits(model.eval()), rtol=0, atol=1e-5)
    export(adapter, tmp_path / "again", base_model_name="tiny")
    assert json.loads((tmp_path / "again" / "adapter_config.json").read_text())["fan_in_fan_out"] is is_gpt2


def test_our_own_export_comes_back(tmp_path: Path) -> None:
    adapter = trained(tiny_llama(), base={"name": "tiny"})
    export(adapter, tmp_path / "lora", base_model_name="org/tiny")
    found = formats.load(tmp_path / "lora")
    assert found.base == {"name": "org/tiny"}
    assert found.kept == adapter.kept  # zeros of B are no entries
    assert all(torch.equal(found.delta(module), adapter.delta(module)) for module in found.shapes)


def test_names_without_the_prefix_or_with_the_adapters_are_read(tmp_path: Path) -> None:
    lora(tmp_path / "lora")
    before = formats.load(tmp_path / "lora")
    path = tmp_path / "lora" / "adapter_model.safetensors"
    tensors = load_file(path)
    for change in (("base_model.model.", ""), (".weight", ".default.weight")):
        save_file({name.replace(*change): tensor for name, tensor in tensors.items()}, path)
        assert all(
            torch.equal(formats.load(tmp_path / "lora").delta(name), before.delta(name)) for name in before.shapes
        )


def test_a_local_base_is_known_by_the_name_of_its_folder(tmp_path: Path) -> None:
    lora(tmp_path / "lora")
    for name, wanted in (("/models/llama", "llama"), ("meta/llama", "meta/llama"), ("./here/llama", "llama")):
        change(tmp_path / "lora", base_model_name_or_path=name)
        assert formats.load(tmp_path / "lora").base == {"name": wanted}


def change(folder: Path, **fields: object) -> None:
    path = folder / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **fields}))


FIELDS: list[tuple[dict[str, Any], str]] = [
    ({"peft_type": "LOHA"}, r"peft_type is 'LOHA'; only LORA"),
    ({"peft_type": None}, r"peft_type is None; only LORA"),
    ({"use_dora": True}, r"use_dora is True: DoRA also scales"),
    ({"bias": "all"}, r"bias is 'all': biases of the base"),
    ({"lora_bias": True}, r"lora_bias is True: biases were trained"),
    ({"modules_to_save": ["lm_head"]}, r"modules_to_save is \['lm_head'\]: whole layers"),
    ({"layer_replication": [[0, 2]]}, r"layer_replication is of type list: layers of the base"),
    ({"target_parameters": ["experts"]}, r"target_parameters has experts: parameters outside"),
    ({"trainable_token_indices": [1]}, r"trainable_token_indices is of type list: rows"),
    ({"alora_invocation_tokens": [1]}, r"alora_invocation_tokens is of type list: the update"),
    ({"init_lora_weights": "pissa_niter_4"}, r"init_lora_weights is 'pissa_niter_4', which changes the base's"),
    ({"r": 5}, rf"^.*lora: {MODULE.replace('0', '.')}\S*: A has 4 rows, adapter_config\.json says 5|A has 4 rows"),
    ({"r": "4"}, r"r is '4'; it must be an integer from 1"),
    ({"lora_alpha": None}, r"lora_alpha is None; it must be a finite number"),
    ({"lora_alpha": True}, r"lora_alpha is True; it must be a finite number"),
    ({"alpha_pattern": {"(": 1}}, r"alpha_pattern has \(, not a regular expression"),
    ({"rank_pattern": [1]}, r"rank_pattern is of type list; it must be an object"),
]


@pytest.mark.parametrize(("fields", "wanted"), FIELDS, ids=[next(iter(fields)) for fields, _ in FIELDS])
def test_what_is_no_plain_lora_is_refused_with_the_field(tmp_path: Path, fields: dict[str, Any], wanted: str) -> None:
    lora(tmp_path / "lora")
    change(tmp_path / "lora", **fields)
    with pytest.raises(AdapterError, match=wanted) as caught:
        formats.load(tmp_path / "lora")
    assert str(caught.value).startswith(f"{tmp_path / 'lora'}: ")


TENSORS: list[tuple[dict[str, torch.Tensor | None], str]] = [
    ({PREFIX + "self_attn.q_proj.lora_magnitude_vector": torch.ones(3)}, r"q_proj\S*: is a magnitude of DoRA"),
    ({"base_model.model.model.embed_tokens.lora_embedding_A": torch.ones(3)}, r"embed_tokens\S*: is LoRA on an embed"),
    ({PREFIX + "self_attn.q_proj.lora_B.bias": torch.ones(3)}, r"q_proj\.lora_B\.bias: is a bias of LoRA itself"),
    ({"base_model.model.lm_head.weight": torch.ones(3, 3)}, r"lora: lm_head\.weight: is a weight or bias of the base"),
    ({PREFIX + "self_attn.q_proj.lora_B.weight": None}, rf"{MODULE}: has A but no B; the file is damaged"),
    ({PREFIX + "self_attn.q_proj.lora_A.weight": None}, rf"{MODULE}: has B but no A; the file is damaged"),
    ({PREFIX + "self_attn.q_proj.lora_A.weight": torch.ones(4, 36, 1, 1)}, rf"{MODULE}: A has .* as of a convolution"),
    ({PREFIX + "self_attn.q_proj.lora_A.weight": torch.ones(3, 36)}, rf"{MODULE}: A is \(3, 36\) and B is \(40, 4\)"),
    ({PREFIX + "self_attn.q_proj.lora_A.weight": torch.ones(4, 36).int()}, rf"{MODULE}: A is torch.int32; wanted one"),
    ({PREFIX + "self_attn.q_proj.lora_B.weight": torch.full((40, 4), torch.nan)}, rf"{MODULE}: B has values that are"),
    ({PREFIX + "self_attn.q_proj.lora_A.default.weight": torch.ones(4, 36)}, rf"{MODULE}: the file has two A of it"),
]


@pytest.mark.parametrize(("tensors", "wanted"), TENSORS)
def test_what_is_no_plain_lora_is_refused_with_the_module(
    tmp_path: Path, tensors: dict[str, torch.Tensor | None], wanted: str
) -> None:
    lora(tmp_path / "lora")
    path = tmp_path / "lora" / "adapter_model.safetensors"
    changed = {**load_file(path), **tensors}
    save_file({name: tensor for name, tensor in changed.items() if tensor is not None}, path)
    with pytest.raises(AdapterError, match=wanted):
        formats.load(tmp_path / "lora")


@pytest.mark.parametrize(
    "settings",
    [{"use_dora": True}, {"bias": "lora_only"}, {"modules_to_save": ["lm_head"]}, {"target_modules": ["embed_tokens"]}],
    ids=["dora", "bias", "modules_to_save", "embedding"],
)
def test_what_peft_saves_of_other_kinds_is_refused(tmp_path: Path, settings: dict[str, Any]) -> None:
    lora(tmp_path / "lora", **settings)
    with pytest.raises(AdapterError, match=r"DoRA|biases|whole layers|embedding"):
        formats.load(tmp_path / "lora")


def test_a_pickle_is_never_opened(tmp_path: Path) -> None:
    lora(tmp_path / "lora")
    (tmp_path / "lora" / "adapter_model.safetensors").rename(tmp_path / "lora" / "adapter_model.bin")
    with pytest.raises(
        AdapterError, match=r"lora: has its tensors in adapter_model\.bin, a pickle, which is never opened"
    ):
        formats.load(tmp_path / "lora")


def test_damage_is_refused(tmp_path: Path) -> None:
    lora(tmp_path / "lora")
    tensors, config = tmp_path / "lora" / "adapter_model.safetensors", tmp_path / "lora" / "adapter_config.json"
    whole = tensors.read_bytes()
    tensors.write_bytes(whole[:-7])
    with pytest.raises(AdapterError, match=r"adapter_model\.safetensors is not a whole safetensors file"):
        formats.load(tmp_path / "lora")
    save_file({}, tensors)
    with pytest.raises(AdapterError, match="holds no tensor"):
        formats.load(tmp_path / "lora")
    tensors.unlink()
    with pytest.raises(AdapterError, match=r"has no adapter_model\.safetensors; give a folder that PEFT has saved"):
        formats.load(tmp_path / "lora")
    for text, wanted in (("{", "is not valid JSON"), ("[]", "it must be an object")):
        config.write_text(text)
        with pytest.raises(AdapterError, match=wanted):
            formats.load(tmp_path / "lora")


def test_an_opened_folder_goes_to_other_processes_without_its_tensors(tmp_path: Path) -> None:
    lora(tmp_path / "lora", r=64)
    sent = pickle.dumps(formats.open_lazy(tmp_path / "lora"))
    assert len(sent) < (tmp_path / "lora" / "adapter_model.safetensors").stat().st_size / 4
    there, here = pickle.loads(sent), formats.load(tmp_path / "lora")
    assert all(torch.equal(there.delta(name), here.delta(name)) for name in here.shapes)


def test_tensors_that_change_after_they_were_opened_are_refused(tmp_path: Path) -> None:
    lora(tmp_path / "lora")
    opened, path = formats.open_lazy(tmp_path / "lora"), tmp_path / "lora" / "adapter_model.safetensors"
    save_file({name: tensor + 1 for name, tensor in load_file(path).items()}, path)
    with pytest.raises(
        AdapterError, match=rf"adapter_model\.safetensors: B of {MODULE} changed while it was being read"
    ):
        _ = opened.blocks[0].entries[MODULE].values
    with pytest.raises(AdapterError, match=rf"adapter_model\.safetensors: A of {MODULE} does not match its checksum"):
        opened.blocks[0].projection(MODULE, opened.shapes[MODULE][1])


def test_other_folders_say_what_to_give(tmp_path: Path) -> None:
    with pytest.raises(
        AdapterError, match=r"this is a folder without adapter_config\.json; give an adapter file, a LoRA"
    ):
        formats.load(tmp_path)
    native.save(trained(tiny_llama()), tmp_path / "adapter.safetensors")
    with pytest.raises(AdapterError, match=r"give the adapter file itself, \S+adapter\.safetensors"):
        formats.load(tmp_path)
    lora(tmp_path / "lora")
    for path in ("adapter_model.safetensors", "adapter_config.json"):
        with pytest.raises(AdapterError, match=r"this is a file of a LoRA folder of PEFT; give the folder, \S+lora$"):
            formats.load(tmp_path / "lora" / path)
    with pytest.raises(AdapterError, match=r"none: it cannot be read"):
        formats.load(tmp_path / "none")
