"""The base model with the adapter in its weights."""

import dataclasses
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from lori_dist import config
from lori_dist.adapter.adapter import Adapter
from lori_dist.errors import AdapterError, ConfigError
from lori_dist.integrations.folded import export_folded
from lori_dist.merges import merge
from lori_dist.training.model import identity
from tests.integrations.made import adapted_logits, logits, trained
from tests.models import tiny_gpt2, tiny_llama
from tests.tokenizers import save


def folded(adapter: Adapter, base: Path, folder: Path) -> PreTrainedModel:
    export_folded(str(base), adapter, folder)
    return AutoModelForCausalLM.from_pretrained(folder, dtype="auto").eval()


@pytest.mark.parametrize("make", [tiny_llama, tiny_gpt2])
@pytest.mark.parametrize("density", [0.1, 1.0])
def test_the_logits_are_those_of_base_and_adapter(
    tmp_path: Path, make: Callable[[], PreTrainedModel], density: float
) -> None:
    base = save(make(), tmp_path / "base")
    adapter = trained(make(), density=density, base=identity(config.Model(path=str(base))))
    model = folded(adapter, base, tmp_path / "out")
    torch.testing.assert_close(logits(model), adapted_logits(make(), adapter), rtol=0, atol=1e-5)
    assert (logits(model) - logits(make())).abs().max() > 1e-2


@pytest.mark.parametrize("method", ["concat", "svd", "ties"])
def test_merges_are_folded(tmp_path: Path, method: str) -> None:
    base = save(tiny_llama(), tmp_path / "base")
    parts = [trained(tiny_llama(), f"task{seed}", seed=seed) for seed in range(2)]
    adapter = merge(parts, method=method, weights=[0.5, -0.5])
    model = folded(adapter, base, tmp_path / "out")
    torch.testing.assert_close(logits(model), adapted_logits(tiny_llama(), adapter), rtol=0, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_the_dtype_of_the_base_is_kept(tmp_path: Path, dtype: torch.dtype) -> None:
    base = save(tiny_llama().to(dtype), tmp_path / "base")
    adapter = trained(tiny_llama(), alpha=1.0)
    model = folded(adapter, base, tmp_path / "out")
    assert {parameter.dtype for parameter in model.parameters()} == {dtype}
    exact = adapted_logits(tiny_llama().to(dtype).float(), adapter)
    change = (exact - logits(tiny_llama())).abs().max()
    assert (logits(model) - exact).abs().max() < 0.1 * change


def test_the_tokenizer_and_the_configuration_come_along(tmp_path: Path) -> None:
    base = save(tiny_llama(), tmp_path / "base")
    model = folded(trained(tiny_llama()), base, tmp_path / "out")
    text = "add 3, 4"
    before, after = (AutoTokenizer.from_pretrained(folder)(text)["input_ids"] for folder in (base, tmp_path / "out"))
    assert before == after
    assert model.config.hidden_size == 36
    assert sorted(path.name for path in tmp_path.iterdir()) == ["base", "out"]


def test_another_base_is_refused(tmp_path: Path) -> None:
    base = save(tiny_llama(), tmp_path / "base")
    adapter = dataclasses.replace(trained(tiny_llama()), base={"weights": "0123"})
    with pytest.raises(AdapterError, match=r"base: has the weights .*, the adapter was trained on 0123; give the base"):
        export_folded(str(base), adapter, tmp_path / "out")
    other = save(tiny_gpt2(), tmp_path / "other")
    with pytest.raises(
        AdapterError, match=r"^model\.layers\.0\S*: .* which the model does not have; .* are called c_attn"
    ):
        export_folded(str(other), trained(tiny_llama()), tmp_path / "out")
    with pytest.raises(ConfigError, match=r"model\.path: .*none' cannot be loaded"):
        export_folded(str(tmp_path / "none"), trained(tiny_llama()), tmp_path / "out")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["base", "other"]


def test_a_tied_weight_is_refused(tmp_path: Path) -> None:
    base = save(tiny_llama(tied=True), tmp_path / "base")
    adapter = trained(tiny_llama(tied=True), targets=("lm_head", "q_proj"))
    with pytest.raises(AdapterError, match=r"lm_head: its weight is tied to model\.embed_tokens\.weight"):
        export_folded(str(base), adapter, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_folder_in_use_is_refused_before_the_model_is_loaded(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "precious").touch()
    with pytest.raises(AdapterError, match="out: is not empty"):
        export_folded("no model", trained(tiny_llama()), tmp_path / "out")
