"""The configurations that ship with the project: each can be run once its paths are given."""

import json
from pathlib import Path

import jsonschema
import pytest

from lori_dist import config
from lori_dist.cluster import comparison
from lori_dist.config import schema

ROOT = Path(__file__).parents[1]
ROWS = {
    "own_data": {
        "gsm8k": {"prompt": "1 + 1?", "response": "2"},
        "sst2": {"text": "good", "label_name": "positive"},
        "trec": {"text": "Who?", "label_name": "human"},
    }
}
"""Configuration -> task -> a row as its template takes it, for those whose paths are overrides."""


COMPARISONS = {ROOT / "configs" / name for name in ("comparison.yaml", "methods.yaml")}
EVIDENCE = ROOT / "configs" / "evidence"
RUNS = ("candidates", "tasks", "trec", "refusals")


@pytest.fixture
def evidence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A project whose evidence/ has a model and rows, as far as a configuration is checked by them."""
    (tmp_path / "configs").symlink_to(ROOT / "configs")
    (tmp_path / "evidence" / "model").mkdir(parents=True)
    (tmp_path / "evidence" / "model" / "config.json").write_text("{}")
    for name in RUNS:
        for task, described in config.read(EVIDENCE / f"{name}.yaml")["tasks"].items():
            (tmp_path / "evidence" / "data" / task).mkdir(parents=True, exist_ok=True)
            label = described.get("labels", ["a response"])[0]
            for part in ("train", "val", "test"):
                row = {"prompt": part, "text": part, "text_pair": part, "response": label}
                lines = json.dumps({**row, "label_name": label, "answer": label})
                (tmp_path / "evidence" / "data" / task / f"{part}.jsonl").write_text(lines)
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize("name", RUNS)
def test_a_run_of_the_evidence_is_valid(evidence: Path, name: str) -> None:
    run = config.load(f"configs/evidence/{name}.yaml")
    assert run.name == name
    assert not Path(run.model.path).is_absolute()


@pytest.mark.parametrize(
    "path",
    sorted({*EVIDENCE.glob("*.yaml")} - {EVIDENCE / f"{name}.yaml" for name in RUNS}),
    ids=lambda path: path.stem,
)
def test_a_comparison_of_the_evidence_is_valid(evidence: Path, path: Path) -> None:
    """All runs can be planned."""
    described = comparison.load(path)
    assert described.name == path.stem
    states = dict(comparison.states(described))
    assert set(states) == set(comparison.planned(described))


@pytest.mark.parametrize("path", sorted(COMPARISONS), ids=lambda path: path.stem)
def test_what_it_compares_is_valid(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    described = comparison.load(path)
    assert described.name == path.stem
    assert len(comparison.runs(described)) == len(described.variants) * 3


@pytest.mark.parametrize("path", sorted({*(ROOT / "configs").glob("*.yaml")} - COMPARISONS), ids=lambda path: path.stem)
def test_it_is_valid(path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    overrides = []
    if path.stem in ROWS:
        (tmp_path / "config.json").write_text("{}")
        overrides.append(f"model.path={tmp_path}")
        for task, row in ROWS[path.stem].items():
            (tmp_path / f"{task}.jsonl").write_text(json.dumps(row) + "\n")
            overrides += [f"tasks.{task}.{part}={tmp_path / task}.jsonl" for part in ("train", "test")]
    run = config.load(path, overrides)
    assert run.name == path.stem
    assert set(ROWS.get(path.stem, run.tasks)) == set(run.tasks)
    validator = jsonschema.Draft202012Validator(json.loads(schema.FILE.read_text(encoding="utf-8")))
    assert [error.message for error in validator.iter_errors(config.read(path))] == []
    named = path.read_text(encoding="utf-8").partition("\n")[0].removeprefix("# yaml-language-server: $schema=")
    assert (path.parent / named).samefile(schema.FILE)
