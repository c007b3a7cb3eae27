"""The card of an exported adapter: what, from what, on what data, measured what."""

import hashlib
import json
from pathlib import Path

import pytest
import yaml

from lori_dist.formats import native
from lori_dist.integrations.model_card import UNKNOWN, origin, text, write_of_run
from tests.integrations.made import trained
from tests.models import tiny_llama


@pytest.fixture
def adapter(tmp_path: Path) -> Path:
    """A file in the folder of a finished training, beside an evaluation of it and one of another file."""
    path = tmp_path / "train-math" / "adapter.safetensors"
    path.parent.mkdir()
    native.save(trained(tiny_llama(), "math", seed=7), path)
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    settings = {"data": {"rows": "rows-hash"}, "train": {"steps": 5}, "seed": 7}
    records = {
        "train-math": {"settings": settings, "sha256": {path.name: digest}},
        "evaluate-math": {"inputs": {"train-math": digest}, "result": {"evaluation": {"math": {"loss": 3.25}}}},
        "evaluate-base": {"inputs": {}, "result": {"evaluation": {"math": {"loss": 9.75}}}},
    }
    for name, record in records.items():
        (tmp_path / name).mkdir(exist_ok=True)
        (tmp_path / name / "job.json").write_text(json.dumps(record))
    return path


def test_the_card_says_what_the_run_knows(adapter: Path) -> None:
    card = text(native.load(adapter), "some/base", origin(adapter))
    _, front, body = card.split("---\n", 2)
    assert yaml.safe_load(front)["base_model"] == "some/base"
    assert yaml.safe_load(front)["metrics"] == ["loss"]
    assert "rows-hash" in body and '"steps": 5' in body
    assert "| math | 3.25 |" in body and "9.75" not in body
    assert "seed 7" in body


def test_a_run_leaves_a_card_beside_every_adapter(adapter: Path, caplog: pytest.LogCaptureFixture) -> None:
    gone = adapter.parent.parent / "merge-gone" / adapter.name
    write_of_run({"adapters": {"math": {"path": str(adapter)}}, "merges": {"gone": {"path": str(gone)}}}, "some/base")
    _, front, body = (adapter.parent / "README.md").read_text().split("---\n", 2)
    assert yaml.safe_load(front)["library_name"] == "lori_dist"
    assert "| math | 3.25 |" in body and "rows-hash" in body
    assert f"{gone}: no model card could be written" in caplog.text


def test_the_record_of_another_file_is_not_used(adapter: Path) -> None:
    native.save(trained(tiny_llama(), "math", seed=8), adapter)
    assert origin(adapter) == UNKNOWN
    assert "rows-hash" not in text(native.load(adapter), "some/base", origin(adapter))


@pytest.mark.parametrize("content", ["", "[]", "{"])
def test_a_file_outside_of_a_run_has_no_origin(tmp_path: Path, content: str) -> None:
    (tmp_path / "job.json").write_text(content)
    native.save(trained(tiny_llama()), tmp_path / "a.safetensors")
    assert origin(tmp_path / "a.safetensors") == UNKNOWN
    assert origin(tmp_path) == UNKNOWN
