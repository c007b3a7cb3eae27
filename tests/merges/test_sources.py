"""Merges of our files, of PEFT's LoRA folders and of checkpoints of LoRI's official code, mixed, against dense sums."""

import json
import re
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from lori_dist import formats, plugin
from lori_dist.__main__ import main
from lori_dist.adapter.adapter import Adapter
from lori_dist.errors import AdapterError
from lori_dist.formats import native
from lori_dist.merges import drop, merge_files, reweight
from tests.formats.official import lora, lori_d, lori_s
from tests.formats.test_peft import MODULE, change
from tests.integrations.made import adapted_logits, trained
from tests.models import tiny_llama

pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Adapters of unequal rank, alpha, targets and dtype, and the update of each by PEFT or by us."""
    place = tmp_path_factory.mktemp("sources")
    native.save(trained(tiny_llama(), "ours", seed=1, rank=3, alpha=5.0), place / "ours.safetensors")
    native.save(
        trained(tiny_llama(), "narrow", seed=2, rank=2, targets=("q_proj",), dtype=torch.bfloat16),
        place / "narrow.safetensors",
        dtype=torch.bfloat16,
    )
    lora(place / "plain", seed=3, r=5, lora_alpha=7, target_modules=["q_proj", "down_proj"])
    lora(place / "rslora", seed=4, r=9, lora_alpha=2, use_rslora=True)
    lora(place / "half", seed=5, dtype=torch.bfloat16, rank_pattern={"q_proj": 2}, alpha_pattern={"up_proj": 3})
    lori_d(place / "d", seed=6)
    lori_s(place / "s", seed=7)
    return place


NAMES = ["ours.safetensors", "narrow.safetensors", "plain", "rslora", "half", "d", "s"]
WEIGHTS = [0.5, -0.7, 1.0, 0.3, 2.0, -0.1, 1.5]


def delta(adapter: Adapter, module: str) -> Tensor:
    """In float64, from what is in the blocks."""
    shape = adapter.shapes[module]
    total = torch.zeros(shape, dtype=torch.float64)
    for block in adapter.blocks:
        if module in block.entries:
            b = block.entries[module].dense(shape[0], block.rank_of(module)).double()
            total += block.scale * b @ block.projection(module, shape[1]).double()
    return total


@pytest.mark.parametrize("method", ["concat", "linear", "svd"])
def test_mixed_sources_merge_to_the_dense_sum(place: Path, tmp_path: Path, method: str) -> None:
    out = tmp_path / "merged.safetensors"
    merge_files([place / name for name in NAMES], out, method=method, weights=WEIGHTS)
    merged, parts = native.load(out), [formats.load(place / name) for name in NAMES]
    assert set(merged.shapes) == set().union(*(part.shapes for part in parts))
    for module in merged.shapes:
        shares = [(weight, part) for weight, part in zip(WEIGHTS, parts, strict=True) if module in part.shapes]
        wanted = sum((weight * delta(part, module) for weight, part in shares), torch.zeros(()))
        torch.testing.assert_close(delta(merged, module), wanted, rtol=0, atol=2e-5)
    seeds = [block.seed for block in merged.blocks]
    if method == "concat":
        assert seeds == [1, 2, None, None, None, None, None]
        assert merged.blocks[6].entries[MODULE].index is not None  # LoRI-S stays sparse
        assert [block.name for block in merged.blocks] == ["ours", "narrow", "plain", "rslora", "half", "d", "s"]


@pytest.mark.parametrize("name", plugin.names("merges"))
def test_every_method_takes_them(place: Path, tmp_path: Path, name: str) -> None:
    chosen = ["d", "s"] if name == "peft_linear" else ["ours.safetensors", "rslora", "s"]  # it takes equal ranks only
    merge_files([place / one for one in chosen], tmp_path / "out", method=name)
    assert set(native.load(tmp_path / "out").shapes) == set(formats.load(place / "d").shapes)


@pytest.mark.parametrize("name", ["plain", "rslora", "half", "d", "s"])
def test_one_at_weight_one_comes_back(place: Path, tmp_path: Path, name: str) -> None:
    merge_files([place / name], tmp_path / "out", method="linear", weights=[1.0])
    before, after = formats.load(place / name), native.load(tmp_path / "out")
    assert all(
        torch.allclose(delta(after, module), delta(before, module), rtol=0, atol=1e-5) for module in before.shapes
    )


def test_the_command_takes_files_and_folders(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(place)
    out = str(tmp_path / "merged.safetensors")
    words = ["merge", out, "s", "ours.safetensors", "rslora", "--method", "concat", "--weights", "1,-1,0.5"]
    assert main(words) == 0
    merged = native.load(out)
    assert [block.name for block in merged.blocks] == ["s", "ours", "rslora"]
    assert capsys.readouterr().out.startswith(f"{out}: keeps {merged.kept:,} of {merged.total:,} entries of B")
    assert adapted_logits(tiny_llama(), merged).isfinite().all()


@pytest.mark.parametrize("name", ["s", "half", "plain"])
def test_a_folder_is_shown(place: Path, name: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["show", str(place / name)]) == 0
    adapter, printed = formats.load(place / name), capsys.readouterr().out
    assert f"keeps {adapter.kept:,} of {adapter.total:,} entries" in printed
    assert re.search(rf"^{name} +- +{adapter.blocks[0].rank} ", printed, re.MULTILINE)


def test_a_folder_is_exported(place: Path, tmp_path: Path) -> None:
    assert main(["export", str(place / "s"), str(tmp_path / "out"), "--format", "peft", "--base", "tiny"]) == 0
    before, after = formats.load(place / "s"), formats.load(tmp_path / "out")
    assert all(torch.allclose(delta(after, name), delta(before, name), rtol=0, atol=1e-6) for name in before.shapes)


def test_they_have_a_report_together(place: Path, tmp_path: Path) -> None:
    names = ["ours.safetensors", "rslora", "half", "s"]
    assert main(["report", *(str(place / name) for name in names), "--out", str(tmp_path)]) == 0
    found = json.loads((tmp_path / "report.json").read_text())
    (norm,) = {one["norm"] for one in found["adapters"] if one["name"] == "rslora"}
    rslora = formats.load(place / "rslora")
    wanted = sum(float(delta(rslora, module).square().sum()) for module in rslora.shapes) ** 0.5
    assert norm == pytest.approx(wanted, rel=1e-5)


def test_folders_of_one_name_are_told_apart(tmp_path: Path) -> None:
    lora(tmp_path / "math" / "last", seed=1, target_modules=["q_proj"])
    lora(tmp_path / "code" / "last", seed=2, target_modules=["q_proj", "v_proj"])
    paths = [tmp_path / "math" / "last", tmp_path / "code" / "last"]
    merge_files(paths, tmp_path / "out", method="concat", weights=[1.0, 1.0])
    merged, second = native.load(tmp_path / "out"), formats.load(paths[1])
    assert [block.name for block in merged.blocks] == ["last", "last-2"]
    left = drop(merged, "last")
    assert all(torch.allclose(delta(left, name), delta(second, name), rtol=0, atol=1e-6) for name in second.shapes)
    lora(tmp_path / "three" / "last", r=3)
    with pytest.raises(AdapterError, match=r"the ranks differ \(last 4, last-2 3\)"):
        merge_files([paths[0], tmp_path / "three" / "last"], tmp_path / "no", method="peft_linear")


def test_a_task_of_peft_is_dropped_and_reweighted_as_one_of_ours(place: Path, tmp_path: Path) -> None:
    """Its scale, alpha / rank or alpha / sqrt(rank), is no part of its weight."""
    paths = [place / "rslora", place / "ours.safetensors", place / "half", place / "s"]
    merge_files(paths, tmp_path / "all", method="concat", weights=[0.5, 1.0, -0.25, 2.0])
    merged = native.load(tmp_path / "all")
    assert [block.weight for block in merged.blocks] == [0.5, 1.0, -0.25, 2.0]
    again = reweight(merged, {"rslora": 0.5})
    assert all(torch.equal(delta(again, module), delta(merged, module)) for module in merged.shapes)
    less = drop(reweight(merged, {"rslora": 0.7, "half": 1.5}), "ours", "s")
    parts = [(0.7, formats.load(paths[0])), (1.5, formats.load(paths[2]))]
    for module in less.shapes:
        wanted = sum((weight * delta(part, module) for weight, part in parts if module in part.shapes), torch.zeros(()))
        torch.testing.assert_close(delta(less, module), wanted, rtol=0, atol=1e-6)


# --- what cannot be merged -------------------------------------------------------------------------------------------


def test_another_shape_is_refused_with_its_module(place: Path, tmp_path: Path) -> None:
    lora(tmp_path / "odd")
    path = tmp_path / "odd" / "adapter_model.safetensors"
    tensors = load_file(path)
    tensors[f"base_model.model.{MODULE}.lora_B.weight"] = torch.ones(41, 4)
    save_file(tensors, path)
    with pytest.raises(
        AdapterError, match=rf"^{MODULE}: ours was trained on a weight of shape \(40, 36\), odd on \(41,"
    ):
        merge_files([place / "ours.safetensors", tmp_path / "odd"], tmp_path / "out", method="concat")
    assert not (tmp_path / "out").exists()


def test_another_base_is_refused_by_its_name(tmp_path: Path) -> None:
    for number, name in enumerate(("meta/Llama-3", "/models/Llama-3", "mistral/7B")):
        lora(tmp_path / str(number))
        change(tmp_path / str(number), base_model_name_or_path=name)
    merge_files([tmp_path / "0", tmp_path / "1"], tmp_path / "out", method="concat")
    wanted = (
        r"^merge: 0 was trained on the base model meta/Llama-3, 2 on mistral/7B; merge adapters of one base model, or"
    )
    with pytest.raises(AdapterError, match=wanted):
        merge_files([tmp_path / "0", tmp_path / "2"], tmp_path / "no", method="concat")
    native.save(trained(tiny_llama(), base={"name": "Llama-3", "weights": "ab"}), tmp_path / "ours")
    merge_files([tmp_path / "0", tmp_path / "ours"], tmp_path / "both", method="concat")
    assert native.load(tmp_path / "both").base == {"name": "Llama-3", "weights": "ab"}
    with pytest.raises(
        AdapterError, match=r"^merge: 2 was trained on the base model mistral/7B, task on Llama-3; merge"
    ):
        merge_files([tmp_path / "2", tmp_path / "ours"], tmp_path / "no", method="concat")


def test_values_that_are_not_finite_are_refused_with_their_module(place: Path, tmp_path: Path) -> None:
    lora(tmp_path / "odd", change=lambda name, b: b.fill_(torch.inf) if "layers.1.mlp.up_proj" in name else b)
    with pytest.raises(AdapterError, match=r"odd: model\.layers\.1\.mlp\.up_proj: B has values that are not finite"):
        merge_files([place / "ours.safetensors", tmp_path / "odd"], tmp_path / "out", method="concat")
    assert not (tmp_path / "out").exists()
