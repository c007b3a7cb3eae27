"""Every LoRA folder that is exported is the adapter to PEFT, on kinds of models whose targets PEFT moves or refuses."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import AutoPeftModelForCausalLM, PeftModel
from transformers import AutoConfig, AutoModelForCausalLM

from lori_dist.__main__ import main
from lori_dist.adapter.adapter import Adapter
from lori_dist.config import Model
from lori_dist.errors import AdapterError
from lori_dist.formats.native import save
from lori_dist.integrations import official, peft
from lori_dist.integrations._readback import compare, compare_as_read
from lori_dist.training.model import identity
from tests.integrations.made import adapted_logits, logits, trained
from tests.models import tiny_llama
from tests.tokenizers import save as save_base

pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")

SIZES = {
    **{
        "vocab_size": 64,
        "hidden_size": 32,
        "intermediate_size": 44,
        "moe_intermediate_size": 20,
        "initializer_range": 0.2,
    },
    **{"num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 4, "max_position_embeddings": 64},
    **{"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0},
}
ROUTED = {"num_experts_per_tok": 2, "n_group": 1, "topk_group": 1}
DEEPSEEK = {
    **{"n_routed_experts": 4, "first_k_dense_replace": 1, "n_shared_experts": 1, **ROUTED},
    **{"kv_lora_rank": 8, "q_lora_rank": 16, "qk_rope_head_dim": 4, "v_head_dim": 8, "qk_nope_head_dim": 8},
}
MIXTURES: dict[str, dict[str, Any]] = {
    "deepseek_v2": {**DEEPSEEK, "head_dim": 4},
    "deepseek_v3": DEEPSEEK,
    "glm4_moe": {"n_routed_experts": 4, "first_k_dense_replace": 1, "n_shared_experts": 1, "head_dim": 8, **ROUTED},
    "qwen2_moe": {"num_experts": 4, "shared_expert_intermediate_size": 20, "mlp_only_layers": [0], **ROUTED},
    "qwen3_moe": {"num_experts": 4, "mlp_only_layers": [0], "head_dim": 8, **ROUTED},
    "mixtral": {"num_local_experts": 4, **ROUTED},
    "gpt_oss": {"num_local_experts": 4, "head_dim": 8, **ROUTED},
    "phimoe": {"num_local_experts": 4, "num_experts_per_tok": 2},
    "lfm2_moe": {"num_experts": 4, "num_experts_per_tok": 2, "layer_types": ["conv", "full_attention"]},
    "jamba": {
        **{"num_experts": 4, "num_experts_per_tok": 2, "expert_layer_period": 2, "expert_layer_offset": 1},
        **{"attn_layer_period": 2, "attn_layer_offset": 1, "mamba_d_state": 8, "mamba_dt_rank": 4},
    },
    "longcat_flash": {
        **{**DEEPSEEK, "head_dim": 4, "num_layers": 2, "num_hidden_layers": 4, "ffn_hidden_size": 44, "moe_topk": 2},
        **{"expert_ffn_hidden_size": 20, "zero_expert_num": 2},
    },
}
"""Dense first layers and shared experts, where a kind has them."""
MAMBAS: dict[str, dict[str, Any]] = {
    "mamba": {"state_size": 8, "time_step_rank": 4},
    "mamba2": {"state_size": 8, "num_heads": 8, "head_dim": 8, "n_groups": 1, "chunk_size": 16},
    "bamba": {
        **{"intermediate_size": 44, "attn_layer_indices": [1], "mamba_n_heads": 8, "mamba_d_head": 8},
        **{"mamba_d_state": 8, "mamba_n_groups": 1, "mamba_chunk_size": 16},
    },
    "zamba2": {
        **{"intermediate_size": 44, "layers_block_type": ["mamba", "hybrid"], "attention_head_dim": 16},
        **{"mamba_d_state": 8, "mamba_headdim": 8, "n_mamba_heads": 8, "mamba_ngroups": 1, "num_mem_blocks": 1},
    },
}


def made(kind: str, *, mamba: bool = False) -> Any:
    sizes = {key: value for key, value in SIZES.items() if not (mamba and key == "intermediate_size")}
    settings = AutoConfig.for_model(kind, **{**sizes, **(MAMBAS if mamba else MIXTURES)[kind]})
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return AutoModelForCausalLM.from_config(settings).eval()


def base_of(model: Any, at_hand: bool, tmp_path: Path) -> str:
    if not at_hand:
        return "nobody/has-it"
    model.config.save_pretrained(tmp_path / "base")
    return str(tmp_path / "base")


@pytest.mark.parametrize("kind", MIXTURES)
def test_mixtures_give_the_same_logits_in_peft(tmp_path: Path, kind: str) -> None:
    targets: list[str | tuple[str, ...]] = ["all-linear"]
    if kind in ("deepseek_v2", "deepseek_v3", "glm4_moe", "qwen2_moe", "qwen3_moe"):
        targets += [("model.layers.0.mlp.*",), ("q_a_proj" if "deepseek" in kind else "q_proj", "up_proj")]
    for number, chosen in enumerate(targets):
        model = made(kind)
        adapter = trained(model, targets=chosen, base={"model_type": kind})
        ours = adapted_logits(model, adapter)
        assert (ours - logits(model)).abs().max() > 1e-1
        for at_hand in (True, False):
            out = tmp_path / f"{number}-{at_hand}"
            peft.export(adapter, out, base_model_name=base_of(model, at_hand, tmp_path))
            theirs = logits(PeftModel.from_pretrained(made(kind), out))
            torch.testing.assert_close(theirs, ours, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("at_hand", [True, False])
@pytest.mark.parametrize("kind", MAMBAS)
def test_what_kernels_pass_by_is_refused_and_the_rest_exported(tmp_path: Path, kind: str, at_hand: bool) -> None:
    model = made(kind, mamba=True)
    base = base_of(model, at_hand, tmp_path)
    adapter = trained(model, targets=("out_proj",), base={"model_type": kind})
    with pytest.raises(AdapterError, match=r"PEFT (refuses|cannot adapt) \S+\.0\.\w+\.out_proj .*--format folded"):
        peft.export(adapter, tmp_path / "out", base_model_name=base)
    assert not (tmp_path / "out").exists()
    adapter = trained(model, targets=("in_proj",), base={"model_type": kind})
    peft.export(adapter, tmp_path / "out", base_model_name=base)
    theirs = logits(PeftModel.from_pretrained(made(kind, mamba=True), tmp_path / "out"))
    torch.testing.assert_close(theirs, adapted_logits(model, adapter), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kind", MAMBAS)
def test_what_peft_refuses_is_exported_folded_and_transformers_loads_it(tmp_path: Path, kind: str) -> None:
    base = save_base(made(kind, mamba=True), tmp_path / "base")
    model = AutoModelForCausalLM.from_pretrained(base).eval()
    adapter = trained(model, base=identity(Model(path=str(base))))
    wanted = adapted_logits(model, adapter)
    assert any(path.endswith("out_proj") for path in adapter.shapes)
    assert (wanted - logits(model)).abs().max() > 1e-1
    save(adapter, tmp_path / "a.safetensors")
    words = ["export", str(tmp_path / "a.safetensors"), str(tmp_path / "out"), "--format", "folded"]
    assert main([*words, "--base", str(base)]) == 0
    found, report = AutoModelForCausalLM.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert type(found) is type(model) and not any(report.values())
    torch.testing.assert_close(logits(found.eval()), wanted, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("key", "value", "found"),
    [
        ("target_modules", ["q_proj"], "model.layers.0.self_attn.k_proj is not adapted"),
        ("lora_alpha", 11, "model.layers.0.self_attn.q_proj is adapted otherwise"),
        ("r", 3, "PEFT cannot load the adapter"),
    ],
)
def test_a_folder_that_peft_takes_for_another_adapter_is_told_from_it(
    tmp_path: Path, key: str, value: Any, found: str
) -> None:
    adapter = trained(tiny_llama())
    peft.export(adapter, tmp_path / "out", base_model_name="tiny")
    file = tmp_path / "out" / "adapter_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), key: value}))
    with pytest.raises(AdapterError, match=f"{found}.*--format folded"):
        compare(tmp_path / "out", adapter, None)


def test_a_base_of_other_shapes_is_refused(tmp_path: Path) -> None:
    adapter, model = trained(tiny_llama()), tiny_llama()
    model.config.intermediate_size = 60
    model.config.save_pretrained(tmp_path / "base")
    with pytest.raises(AdapterError, match=r"mlp\.gate_proj: .* \(52, 36\), this model's is \(60, 36\)"):
        peft.export(adapter, tmp_path / "out", base_model_name=str(tmp_path / "base"))


def exported(tmp_path: Path, capsys: pytest.CaptureFixture[str], adapter: Adapter, *more: str) -> tuple[str, str]:
    """The base that adapter_config.json names, and what the command says."""
    save(adapter, tmp_path / "a.safetensors")
    capsys.readouterr()
    out = tmp_path / "out"
    assert main(["export", str(tmp_path / "a.safetensors"), str(out), "--format", "peft", *more]) == 0
    return json.loads((out / "adapter_config.json").read_text())["base_model_name_or_path"], capsys.readouterr().err


def test_a_local_base_is_found_again_from_anywhere(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    tiny_llama().save_pretrained(tmp_path / "models" / "base")
    monkeypatch.chdir(tmp_path / "models")
    adapter = trained(tiny_llama(), base={"name": "base", "model_type": "llama"})
    named, said = exported(tmp_path, capsys, adapter, "--base", "base")
    assert (named, said) == (str(tmp_path / "models" / "base"), "")
    monkeypatch.chdir(tmp_path)
    theirs = logits(AutoPeftModelForCausalLM.from_pretrained(tmp_path / "out"))
    torch.testing.assert_close(theirs, adapted_logits(tiny_llama(), adapter), rtol=0, atol=1e-5)


def test_a_base_that_cannot_be_found_is_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    named, said = exported(tmp_path, capsys, trained(tiny_llama(), base={"name": "last-part"}))
    assert named == "last-part"
    assert "names its base model 'last-part'" in said and "--base PATH" in said


def test_a_name_on_the_hub_stays_as_it_is(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert exported(tmp_path, capsys, trained(tiny_llama(), base={"name": "org/model"})) == ("org/model", "")


def test_a_folder_of_the_official_layout_is_compared_with_its_mask(tmp_path: Path) -> None:
    adapter = trained(tiny_llama(), density=0.5)
    official.export(adapter, tmp_path / "out", base_model_name="tiny")
    compare_as_read(tmp_path / "out", adapter)
    with pytest.raises(AdapterError, match=r"q_proj is adapted otherwise when lori reads the folder"):
        compare_as_read(tmp_path / "out", trained(tiny_llama(), density=0.5, seed=1))


def test_fused_experts_have_no_place_in_the_official_layout(tmp_path: Path) -> None:
    adapter = trained(made("mixtral"), base={"model_type": "mixtral"})
    with pytest.raises(AdapterError, match=r"experts\.gate_up_proj\.0 is one of fused experts"):
        official.export(adapter, tmp_path / "out", base_model_name="tiny")
