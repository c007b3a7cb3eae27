"""What an adapter does holds for every kind of model: attach, train, file, PEFT folder, folded folder."""

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, PreTrainedModel

from lori_dist import AdapterError, Spec, attach, detach, extract, fold, trainable, unfold
from lori_dist.formats import native
from lori_dist.integrations.folded import export_folded
from lori_dist.integrations.peft import export
from lori_dist.masks.magnitude import mask
from lori_dist.merges import merge
from tests.integrations.made import adapted_logits, logits
from tests.models import KINDS, MIXTURES, tiny, tiny_classifier
from tests.tokenizers import save

pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
SPEC = Spec(rank=4, alpha=16.0, seed=3)
IDS = torch.arange(1, 25).view(2, 12)


def trained(model: PreTrainedModel, masks: dict[str, torch.Tensor] | None = None) -> None:
    """Some steps on one batch."""
    attach(model, SPEC, masks=masks)
    optimizer = torch.optim.Adam(trainable(model).values(), lr=0.05)
    for _ in range(3):
        model(input_ids=IDS, labels=IDS).loss.backward()
        optimizer.step()
        optimizer.zero_grad()


@pytest.mark.parametrize("kind", [*KINDS, *MIXTURES])
def test_what_is_trained_is_the_same_from_a_file_folded_and_exported(tmp_path: Path, kind: str) -> None:
    model = tiny(kind)
    before, names = logits(model), [name for name, _ in model.named_modules()]
    frozen = {name: parameter.clone() for name, parameter in model.named_parameters()}
    trained(model)
    dense = {path: values.detach().view(-1, SPEC.rank).clone() for path, values in trainable(model).items()}
    assert all(values.abs().max() > 0 for values in dense.values())  # no layer is left out
    detach(model)
    assert torch.equal(logits(model), before)
    assert [name for name, _ in model.named_modules()] == names

    trained(model, mask(dense, density=0.3))
    adapter, after = extract(model, name="task"), logits(model)
    assert (after - before).abs().max() > 0.05
    fold(model)
    torch.testing.assert_close(logits(model), after, rtol=0, atol=1e-4)
    unfold(model)
    detach(model)
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter, frozen[name], rtol=0, atol=1e-5)

    native.save(adapter, tmp_path / "adapter.safetensors")
    again = native.load(tmp_path / "adapter.safetensors")
    assert torch.equal(adapted_logits(tiny(kind), again), after)

    export(dataclasses.replace(again, base={"model_type": kind}), tmp_path / "peft", base_model_name="tiny")
    torch.testing.assert_close(
        logits(PeftModel.from_pretrained(tiny(kind), tmp_path / "peft")), after, rtol=0, atol=1e-4
    )

    base = save(tiny(kind), tmp_path / "base")
    export_folded(str(base), again, tmp_path / "folded")
    folded = AutoModelForCausalLM.from_pretrained(tmp_path / "folded").eval()
    torch.testing.assert_close(logits(folded), after, rtol=0, atol=1e-4)


@pytest.mark.parametrize("kind", ["bert", "roberta"])
def test_an_encoder_s_head_is_trained_whole_and_stored_with_the_adapter(tmp_path: Path, kind: str) -> None:
    model, labels = tiny_classifier(kind), torch.tensor([0, 2])
    before, base = logits(model), {name: tensor.clone() for name, tensor in model.state_dict().items()}
    layers = attach(model, dataclasses.replace(SPEC, modules_to_save=("classifier",)))
    assert not any("classifier" in path for path in layers)
    trained = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    optimizer = torch.optim.Adam(trained.values(), lr=0.05)
    for _ in range(3):
        model(input_ids=IDS, labels=labels).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    adapter, after = extract(model, name="task"), logits(model)
    assert {name.split(".")[0] for name in adapter.saved} == {"classifier"}
    assert any(not torch.equal(values, base[name]) for name, values in adapter.saved.items())
    detach(model)
    assert torch.equal(logits(model), before)
    assert not any(parameter.requires_grad for parameter in model.parameters())

    native.save(adapter, tmp_path / "adapter.safetensors")
    again = native.load(tmp_path / "adapter.safetensors")
    assert torch.equal(adapted_logits(tiny_classifier(kind), again), after)
    export(again, tmp_path / "peft", base_model_name="tiny")
    theirs = PeftModel.from_pretrained(tiny_classifier(kind), tmp_path / "peft")
    torch.testing.assert_close(logits(theirs), after, rtol=0, atol=1e-4)

    attach(model, again, train=True)
    assert [name for name, parameter in model.named_parameters() if parameter.requires_grad] == list(trained)
    assert torch.equal(logits(model), after)


def test_a_head_of_a_language_model_is_folded_into_its_files(tmp_path: Path) -> None:
    model = tiny("llama")
    attach(model, dataclasses.replace(SPEC, modules_to_save=("lm_head",)))
    with torch.no_grad():
        for parameter in [p for p in model.parameters() if p.requires_grad]:
            parameter.add_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1)), alpha=0.3)
    adapter, after = extract(model, name="task"), logits(model)
    export_folded(str(save(tiny("llama"), tmp_path / "base")), adapter, tmp_path / "folded")
    folded = AutoModelForCausalLM.from_pretrained(tmp_path / "folded").eval()
    torch.testing.assert_close(logits(folded), after, rtol=0, atol=1e-4)


def test_what_was_trained_whole_is_not_merged() -> None:
    model = tiny_classifier("bert")
    attach(model, dataclasses.replace(SPEC, modules_to_save=("classifier",)))
    adapter = extract(model, name="task")
    with pytest.raises(AdapterError, match=r"merge: task has classifier\.weight, which was trained in full"):
        merge([adapter, adapter], method="concat")


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ({"modules_to_save": ("clasifier",)}, "'clasifier' is not a module. Did you mean 'classifier'"),
        ({"modules_to_save": ("dropout",)}, "has no parameter"),
        ({"modules_to_save": ("pooler",), "targets": ("pooler.dense",)}, "is also in modules_to_save"),
    ],
)
def test_modules_that_cannot_be_trained_whole_are_refused(spec: dict[str, Any], message: str) -> None:
    with pytest.raises(AdapterError, match=message):
        attach(tiny_classifier("bert"), dataclasses.replace(SPEC, **spec))


def test_one_head_in_half_precision_or_tied_is_refused() -> None:
    spec = dataclasses.replace(SPEC, modules_to_save=("lm_head",))
    with pytest.raises(AdapterError, match=r"lm_head\.weight is torch\.bfloat16; load the model in float32"):
        attach(tiny("llama").to(torch.bfloat16), spec)
    with pytest.raises(AdapterError, match="are one parameter; untie it"):
        attach(tiny("gemma"), spec)
