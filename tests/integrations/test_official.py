"""Folders in the layout of LoRI's official code."""

from pathlib import Path

import pytest
import torch
import yaml
from peft import PeftModel

from lori_dist import formats
from lori_dist.errors import AdapterError
from lori_dist.integrations.official import export
from lori_dist.merges import merge
from tests.formats import official
from tests.integrations.made import adapted_logits, logits, trained
from tests.models import tiny_llama

pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")


@pytest.mark.parametrize("density", [0.1, 0.003, 1.0])
def test_what_is_written_is_read_again(tmp_path: Path, density: float) -> None:
    adapter = trained(tiny_llama(), density=density)
    export(adapter, tmp_path / "out", base_model_name="tiny")
    again = formats.open_lazy(tmp_path / "out")
    assert again.kept == adapter.kept and again.shapes == adapter.shapes
    torch.testing.assert_close(adapted_logits(tiny_llama(), again), adapted_logits(tiny_llama(), adapter))
    torch.testing.assert_close(
        logits(PeftModel.from_pretrained(tiny_llama(), tmp_path / "out")),
        adapted_logits(tiny_llama(), adapter),
        rtol=0,
        atol=1e-5,
    )


def test_the_mask_is_as_the_official_code_writes_it(tmp_path: Path) -> None:
    model, mask = official.lori_s(tmp_path / "theirs")
    export(formats.open_lazy(tmp_path / "theirs"), tmp_path / "ours", base_model_name="tiny")
    written = torch.load(tmp_path / "ours" / "0.9_mask.pt", weights_only=True)
    assert written.keys() == mask.keys()
    assert all(torch.equal(written[name], mask[name]) for name in mask)
    assert torch.equal(logits(PeftModel.from_pretrained(tiny_llama(), tmp_path / "ours")), logits(model))


def test_a_merge_of_several_blocks_has_no_place(tmp_path: Path) -> None:
    both = merge([trained(tiny_llama(), "one", seed=1), trained(tiny_llama(), "two", seed=2)], method="concat")
    with pytest.raises(AdapterError, match="--format peft"):
        export(both, tmp_path / "out", base_model_name="tiny")
    assert not (tmp_path / "out").exists()


def test_the_card_names_base_and_task(tmp_path: Path) -> None:
    name = 'a/b: "c"'
    export(trained(tiny_llama(), "arithmetic", seed=7), tmp_path / "out", base_model_name=name)
    _, front, body = (tmp_path / "out" / "README.md").read_text().split("---\n", 2)
    assert yaml.safe_load(front)["base_model"] == name and yaml.safe_load(front)["library_name"] == "peft"
    assert "| arithmetic | 4 | 10 | 1 | seed 7 |" in body
