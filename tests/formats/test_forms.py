"""The file of a form in which tasks have updates of their own."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from safetensors import safe_open
from safetensors.torch import save_file

from lori_dist.adapter.task_adapter import extract_formed
from lori_dist.errors import AdapterError
from lori_dist.formats import forms, native
from tests.forms.made import CASES, fill


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("forms") / "adapter.safetensors"
    forms.save(extract_formed(fill(CASES["mtl_lora, diagonal"].model())), path)
    return path


def changed(written: Path, out: Path, change: Callable[[dict[str, Any], dict[str, Any]], None]) -> Path:
    """The file with another header and other tensors, and a digest of that header."""
    with safe_open(written, framework="pt") as file:
        text = file.metadata()["lori"]
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    header = json.loads(text)
    del header["digest"]
    change(header, tensors)
    save_file(tensors, out, {"lori": native.serialize(header)})
    return out


Q = "model.layers.0.self_attn.k_proj"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda h, t: h["form"].update(name="os.path"),
            "header: form is 'os.path', this program has dac, fly, hydra, lilora, lori, mixlora",
        ),
        (lambda h, t: h["form"].update(options={"heads": 0}), "form.heads: got 0"),
        (lambda h, t: h["form"].update(options={"heads": 5}), "b: shape is"),
        (lambda h, t: h.update(tasks=["one", "one", "two"]), "name at least one, each of them once"),
        (lambda h, t: h.update(tasks=["one", "two"], seeds=[1, 2]), "w: shape is"),
        (lambda h, t: h.update(seed=-1), "header: seeds is -1"),
        (lambda h, t: h.update(depends_on_input=True), "header: depends_on_input is True; it must be false"),
        (lambda h, t: h.update(extra=1), "extra is not known in version 4; update lori_dist"),
        (lambda h, t: h.pop("rank"), "rank is missing"),
        (lambda h, t: h["modules"][Q].update(projections=[]), "projections is .*; it must be an array of 1"),
        (
            lambda h, t: h["modules"][Q]["tensors"].update(c=h["modules"][Q]["tensors"]["b"]),
            "c is not a tensor of this",
        ),
        (lambda h, t: h["modules"][Q]["tensors"]["b"].update(kept=1), "1 values|has .* values, its header says 1"),
        (lambda h, t: t.pop(f"f.{Q}.b"), f"tensor f.{Q}.b is missing"),
        (lambda h, t: t.pop(f"f.{Q}.b.mask"), f"tensor f.{Q}.b.mask is missing"),
        (lambda h, t: t.update(more=t[f"f.{Q}.b"].clone()), "tensor more is not in the header"),
        (lambda h, t: t.update({f"f.{Q}.b": t[f"f.{Q}.b"].half()}), "is torch.float16; it must be torch.float32"),
        (lambda h, t: t[f"f.{Q}.b"].mul_(2), "does not match its digest"),
    ],
)
def test_hostile_files_are_refused(written: Path, tmp_path: Path, change: Any, message: str) -> None:
    path = changed(written, tmp_path / "adapter.safetensors", change)
    with pytest.raises(AdapterError, match=message) as found:
        forms.load(path)
    assert str(found.value).startswith(f"{path}: ")


def test_a_file_of_one_update_for_all_rows_is_not_one(tmp_path: Path) -> None:
    from tests.merges.made import adapter, block

    native.save(adapter(block("one")), tmp_path / "adapter.safetensors")
    with pytest.raises(AdapterError, match="has one update for all rows, not one for each task"):
        forms.load(tmp_path / "adapter.safetensors")
