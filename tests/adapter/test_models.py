"""What an adapter does holds for every kind of model: attach, train, file, PEFT folder, folded folder."""

import dataclasses
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, PreTrainedModel

from lori_dist import Spec, attach, detach, extract, fold, trainable, unfold
from lori_dist.adapter import file
from lori_dist.integrations.folded import export_folded
from lori_dist.integrations.peft import export
from lori_dist.masks.magnitude import mask
from tests.integrations.made import adapted_logits, logits
from tests.models import KINDS, MIXTURES, tiny
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

    file.save(adapter, tmp_path / "adapter.safetensors")
    again = file.load(tmp_path / "adapter.safetensors")
    assert torch.equal(adapted_logits(tiny(kind), again), after)

    export(dataclasses.replace(again, base={"model_type": kind}), tmp_path / "peft", base_model_name="tiny")
    torch.testing.assert_close(
        logits(PeftModel.from_pretrained(tiny(kind), tmp_path / "peft")), after, rtol=0, atol=1e-4
    )

    base = save(tiny(kind), tmp_path / "base")
    export_folded(str(base), again, tmp_path / "folded")
    folded = AutoModelForCausalLM.from_pretrained(tmp_path / "folded").eval()
    torch.testing.assert_close(logits(folded), after, rtol=0, atol=1e-4)
