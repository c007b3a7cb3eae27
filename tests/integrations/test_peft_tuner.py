"""LoRI through PEFT's own calls."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from peft import PeftConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from torch import nn
from transformers import PreTrainedModel

from lori_dist.adapter.attach import trainable
from lori_dist.errors import AdapterError
from lori_dist.integrations.peft_tuner import LoriConfig, LoriLinear, dense, sparsify, to_adapter
from lori_dist.masks.magnitude import mask
from tests.integrations.made import adapted_logits, logits
from tests.models import tiny_gpt2, tiny_llama

pytestmark = pytest.mark.filterwarnings(
    "ignore:`is_gradient_checkpointing` is deprecated:FutureWarning",  # peft 0.21 asks transformers 5.23 for it
    "ignore:Could not find a config file:UserWarning",  # a tiny model has no name on the hub
)


def peft_model(model: PreTrainedModel | None = None, *, density: float = 1.0, **settings: object) -> PeftModel:
    """With values of B that change the logits visibly."""
    wrapped = get_peft_model(model or tiny_llama(), LoriConfig(**{"r": 4, "lori_alpha": 10.0, **settings}))
    return fill(wrapped, "default", density)


def fill(wrapped: PeftModel, name: str, density: float = 1.0) -> PeftModel:
    generator = torch.Generator().manual_seed(len(name))
    if density < 1:
        b = {path: torch.randn(b.shape, generator=generator) for path, b in dense(wrapped, name).items()}
        sparsify(wrapped, mask(b, density=density), name)
    with torch.no_grad():
        for layer in layers(wrapped):
            if layer.lori_delta[name].values is not None:
                layer.lori_delta[name].values.normal_(generator=generator)
    return wrapped.eval()


def layers(model: nn.Module) -> list[LoriLinear]:
    return [module for module in model.modules() if isinstance(module, LoriLinear)]


def trained_names(model: nn.Module) -> set[str]:
    return {name for name, parameter in model.named_parameters() if parameter.requires_grad}


@pytest.mark.parametrize("make", [tiny_llama, tiny_gpt2])
@pytest.mark.parametrize("density", [0.1, 1.0])
def test_it_is_the_adapter_that_attach_gives(make: object, density: float) -> None:
    wrapped = peft_model(make(), density=density)  # type: ignore[operator]
    torch.testing.assert_close(logits(wrapped), adapted_logits(make(), to_adapter(wrapped)), rtol=0, atol=1e-5)  # type: ignore[operator]
    assert (logits(wrapped) - logits(make())).abs().max() > 1e-2  # type: ignore[operator]


@pytest.mark.parametrize("density", [0.1, 1.0])
def test_a_folder_has_no_a_and_gives_the_same_logits(tmp_path: Path, density: float) -> None:
    wrapped = peft_model(density=density, seed=3)
    wrapped.save_pretrained(tmp_path)
    held = load_file(tmp_path / "adapter_model.safetensors")
    kept = sum(tensor.numel() for name, tensor in held.items() if name.endswith("values"))
    assert kept == to_adapter(wrapped).kept and all(name.endswith(("values", "index")) for name in held)
    again = PeftModel.from_pretrained(tiny_llama(), tmp_path)
    assert torch.equal(logits(again), logits(wrapped)) and not trained_names(again)
    lazily = PeftModel.from_pretrained(tiny_llama(), tmp_path, low_cpu_mem_usage=True)
    assert torch.equal(logits(lazily), logits(wrapped))


def test_loading_to_train_trains_the_kept_entries_alone(tmp_path: Path) -> None:
    wrapped = peft_model(density=0.1)
    wrapped.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(tiny_llama(), tmp_path, is_trainable=True)
    assert trained_names(again) == trained_names(wrapped)
    assert all(name.endswith("lori_delta.default.values") for name in trained_names(again))
    assert again.get_nb_trainable_parameters()[0] == to_adapter(wrapped).kept


def test_the_freeze_survives_what_peft_and_torch_do() -> None:
    wrapped = peft_model(density=0.2)
    wrapped.add_adapter("other", LoriConfig(r=4, seed=9))
    before = {layer.path: layer.lori_delta["default"].a().clone() for layer in layers(wrapped)}
    names = trained_names(wrapped)
    wrapped.set_adapter("other")
    assert all(".other." in name for name in trained_names(wrapped))
    wrapped.set_adapter("default")
    with wrapped.disable_adapter():
        assert not trained_names(wrapped)
    assert trained_names(wrapped) == names
    wrapped.to(torch.bfloat16)
    optimizer = torch.optim.SGD([parameter for parameter in wrapped.parameters() if parameter.requires_grad], lr=1.0)
    wrapped(input_ids=torch.arange(8)[None], labels=torch.arange(8)[None]).loss.backward()
    optimizer.step()
    assert trained_names(wrapped) == names
    for layer in layers(wrapped):
        assert torch.equal(layer.lori_delta["default"].a(), before[layer.path])
        assert layer.lori_delta["default"].values is None or layer.lori_delta["default"].values.dtype == torch.float32


def test_several_adapters(tmp_path: Path) -> None:
    wrapped = peft_model(density=0.3, seed=1)
    wrapped.add_adapter("other", LoriConfig(r=3, seed=2))
    first = logits(wrapped)
    fill(wrapped, "other", 0.5).set_adapter("other")
    second = logits(wrapped)
    wrapped.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(tiny_llama(), tmp_path)
    again.load_adapter(tmp_path / "other", "other")
    assert torch.equal(logits(again), first)
    again.set_adapter("other")
    assert torch.equal(logits(again), second) and not torch.equal(first, second)
    with again.disable_adapter():
        assert torch.equal(logits(again), logits(tiny_llama()))
    with pytest.warns(UserWarning, match="Setting active adapter to default"):
        again.delete_adapter("other")
    assert torch.equal(logits(again), first)


@pytest.mark.parametrize("make", [tiny_llama, tiny_gpt2])
def test_merged_into_the_base(make: object) -> None:
    wrapped = peft_model(make(), density=0.3)  # type: ignore[operator]
    wanted = logits(wrapped)
    wrapped.merge_adapter()
    torch.testing.assert_close(logits(wrapped), wanted, rtol=0, atol=1e-5)
    with wrapped.disable_adapter():
        torch.testing.assert_close(logits(wrapped), logits(make()), rtol=0, atol=1e-5)  # type: ignore[operator]
    model = wrapped.merge_and_unload(safe_merge=True)
    torch.testing.assert_close(logits(model), wanted, rtol=0, atol=1e-5)
    assert not layers(model) and not trainable(model)


def test_a_process_without_the_package_is_told_what_to_install(tmp_path: Path) -> None:
    peft_model().save_pretrained(tmp_path)
    code = f"import peft; peft.PeftConfig.from_pretrained({str(tmp_path)!r})"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert result.returncode != 0
    assert "pip install lori_dist[peft]" in result.stderr.splitlines()[-1]
    assert isinstance(PeftConfig.from_pretrained(tmp_path), LoriConfig)  # here, where it was imported


def test_another_a_is_refused(tmp_path: Path) -> None:
    peft_model(seed=1).save_pretrained(tmp_path)
    file = tmp_path / "adapter_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "seed": 2}))
    with pytest.raises(AdapterError, match="checksum"):
        PeftModel.from_pretrained(tiny_llama(), tmp_path)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"r": 0}, "rank: 0"),
        ({"projection_dtype": "float33"}, "projection_dtype"),
        ({"generator": "other"}, "generator"),
        ({"layers_pattern": "layers"}, "layers_pattern"),
    ],
)
def test_what_cannot_be_is_refused(settings: dict[str, object], message: str) -> None:
    with pytest.raises(AdapterError, match=message):
        LoriConfig(**settings)


def test_masks_that_do_not_fit_change_nothing() -> None:
    wrapped = peft_model(target_modules=["q_proj"])
    before = logits(wrapped)
    masks = {path: torch.ones(b.shape, dtype=torch.bool) for path, b in dense(wrapped).items()}
    path = min(masks)
    for wrong in ({}, {**masks, path: masks[path].float()}, {**masks, path: masks[path][:, :1]}):
        with pytest.raises(AdapterError, match=path.replace(".", r"\.")):
            sparsify(wrapped, wrong)
    assert torch.equal(logits(wrapped), before)
