"""The page of the evidence is what its script writes from the results beside it."""

import importlib.util
import json
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

FOLDER = Path(__file__).parents[1] / "configs" / "evidence"


@pytest.fixture(scope="module")
def tables() -> ModuleType:
    spec = importlib.util.spec_from_file_location("evidence_tables", FOLDER / "tables.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def summary(name: str, *, share: float, merges: dict[str, dict[str, float]] | None = None) -> dict[str, Any]:
    """What a run of two tasks leaves. share: the accuracy of each task's adapter; merges: merge -> task -> accuracy."""
    values = {"base": {"trec": 0.25, "sst2": 0.5}, "trec": {"trec": share}, "sst2": {"sst2": share}, **(merges or {})}
    evaluation = {
        model: {task: {"choice": value} for task, value in of_model.items()} for model, of_model in values.items()
    }
    made = {"kept": 10, "total": 100, "trained": 10, "bytes": 1000, "step_seconds": 0.5, "path": "/a/path"}
    return {
        "run": name,
        "jobs": {"train-trec": {"state": "finished"}},
        "adapters": {"trec": made, "sst2": made},
        "merges": {merge: {"kept": 5, "total": 100, "path": "/a/path"} for merge in merges or {}},
        "evaluation": evaluation,
        "intervals": {
            model: {task: {"choice": [0.0, 1.0]} for task in of_model} for model, of_model in evaluation.items()
        },
        "test_rows": {"trec": 500, "sst2": 500},
    }


def left(runs: Path, summaries: list[dict[str, Any]]) -> Path:
    for one in summaries:
        (runs / one["run"]).mkdir(parents=True)
        (runs / one["run"] / "summary.json").write_text(json.dumps(one))
    return runs


def test_the_page_is_what_the_script_writes(tables: ModuleType) -> None:
    assert tables.main(["--check"]) == 0


def test_a_table_has_the_mean_its_spread_and_its_interval(tables: ModuleType, tmp_path: Path) -> None:
    grid = [summary(f"single-lora-grid-{number}", share=share) for number, share in enumerate((0.25, 0.75, 0.5))]
    runs = left(tmp_path / "runs", [*grid, summary("single-lora-0", share=0.8), summary("single-lora-1", share=0.9)])
    tables.collect(runs, "lori compare single.yaml", tmp_path / "results")
    found = tables.load(tmp_path / "results")
    assert "/a/path" not in json.dumps(found)
    text = tables.tables_of("single", found)
    assert "| LoRA | 85.0 ± 7.1 [81.6, 87.9] | 85.0 ± 7.1 [81.6, 87.9] | 85.0 ± 7.1 | 20 | 2,000 | 0.50 | 2 |" in text
    assert "| base | 25.0 ± 0.0 [21.4, 29.0] | 50.0 ± 0.0 [45.6, 54.4] | 37.5 ± 0.0 | - | - | - | 2 |" in text
    assert "| lora | `train.lr=1e-3` | 25.0, 75.0, 50.0 |" in text
    assert "Made by `lori compare single.yaml`." in text
    assert "`single-lora-2`, `single-lori-d-grid-0`" in text.rpartition("missing")[2]


def test_what_has_not_been_run_is_said_to_be(tables: ModuleType) -> None:
    text = "before\n<!-- tables: joint -->\nold\n<!-- end of tables -->\nafter"
    assert tables.page(text, {}) == text.replace("old", "Not run yet.")


def test_a_run_that_has_not_ended_is_not_taken(tables: ModuleType, tmp_path: Path) -> None:
    begun = summary("single-lora-0", share=0.5)
    begun["jobs"]["train-sst2"] = {"state": "running"}
    assert tables.collect(left(tmp_path / "runs", [begun]), "lori compare", tmp_path / "results") == []


def test_retention_is_over_subsets_with_the_worst_of_them(tables: ModuleType, tmp_path: Path) -> None:
    merges = {
        "linear-trec-sst2": {"trec": 0.8, "sst2": 0.4},
        "linear-trec": {"trec": 0.72},
        "sum-trec": {"trec": 0.2},
        "all": {"trec": 0.1, "sst2": 0.1},
    }
    runs = left(tmp_path / "runs", [summary("merging-lora-subsets-0", share=0.8, merges=merges)])
    tables.collect(runs, "lori compare", tmp_path / "results")
    text = tables.tables_of("merging", tables.load(tmp_path / "results"))
    assert "| lora-subsets | linear | 2 | 80.0 | 75.0 | 50.0 |" in text
    assert "| lora-subsets | sum | 1 | 25.0 | 25.0 | 25.0 |" in text


def test_a_balance_recovers_a_share_of_the_gap(tables: ModuleType, tmp_path: Path) -> None:
    joint = summary("joint-plain-0", share=0.0)
    joint["evaluation"]["joint"] = {"trec": {"choice": 0.5}, "sst2": {"choice": 0.5}}
    joint["adapters"]["joint"] = joint["adapters"]["trec"]
    ortho = json.loads(json.dumps(joint)) | {"run": "joint-ortho-0"}
    ortho["evaluation"]["joint"] = {"trec": {"choice": 0.6}, "sst2": {"choice": 0.6}}
    pair = {"tasks": ["trec", "sst2"], "cosine": 0.125, "share": 0.25, "layers": {}}
    ortho["adapters"]["joint"] = {**joint["adapters"]["joint"], "conflicts": {"steps": 3, "pairs": [pair]}}
    runs = left(tmp_path / "runs", [summary("joint-single-0", share=0.7), joint, ortho])
    tables.collect(runs, "lori compare", tmp_path / "results")
    text = tables.tables_of("joint", tables.load(tmp_path / "results"))
    assert "The gap between `LoRA, each task by itself` and `LoRA, joint` is 20.0 points." in text
    assert "| LoRA, joint, Ortho-LoRA | +10.0 | 50.0 |" in text
    assert "| `joint-ortho-0` | trec and sst2 | 0.125 | 25.0 |" in text


def test_the_base_stands_beside_chance(tables: ModuleType, tmp_path: Path) -> None:
    (tmp_path / "base.json").write_text(json.dumps({"base": {"trec": {"choice": 0.25}}}))
    rows = [
        {"task": "trec", "metric": "choice", "row": number, "answer": " a" if number else " b"} for number in range(4)
    ]
    (tmp_path / "base.predictions.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    tables.collect(tmp_path, "lori compare", tmp_path / "results")
    text = tables.tables_of("base", tables.load(tmp_path / "results"))
    assert "| trec | 4 | 50.0 | 75.0 | 25.0 [4.6, 69.9] |" in text
    assert text.endswith("Made by `lori evaluate configs/evidence/tasks.yaml`.")
