"""The quickstart: its rows are those of their script, and what it is there to show is so."""

import json
import subprocess
import sys
from itertools import chain
from pathlib import Path

import pytest
from safetensors.torch import load_file

from lori_dist import config

ROOT = Path(__file__).parents[1]
PLACE = ROOT / "configs" / "quickstart"
LARGEST_MODEL = 8 * 10**6
"""Bytes."""


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch) -> config.Run:
    monkeypatch.chdir(ROOT)
    return config.load("configs/quickstart.yaml")


def prompts(path: str) -> list[str]:
    rows = [json.loads(line) for line in Path(path).read_text().splitlines()]
    return [row.get("prompt") or row["text"] for row in rows]


def test_the_rows_are_those_of_their_script(tmp_path: Path) -> None:
    subprocess.run([sys.executable, PLACE / "make_data.py", "--out", tmp_path], check=True, capture_output=True)
    made = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    assert made == {path.name: path.read_bytes() for path in (PLACE / "data").iterdir()}


def test_the_model_s_script_writes_a_model_with_the_tokenizer_that_ships(tmp_path: Path) -> None:
    words = [sys.executable, PLACE / "make_model.py", "--out", tmp_path, "--steps", "1", "--threads", "1"]
    subprocess.run(words, check=True, capture_output=True)
    for name in ("tokenizer.json", "tokenizer_config.json", "config.json"):
        assert (tmp_path / name).read_text() == (PLACE / "model" / name).read_text()
    (made, shipped) = (load_file(folder / "model.safetensors") for folder in (tmp_path, PLACE / "model"))
    assert {name: tensor.shape for name, tensor in made.items()} == {name: t.shape for name, t in shipped.items()}


def test_no_test_row_is_trained_on(run: config.Run) -> None:
    for task in run.tasks.values():
        train, test = prompts(task.train), prompts(task.test)
        assert len(set(test)) == len(test) >= 100
        assert not set(train) & set(test)


def test_the_tasks_are_told_apart_by_their_prompts(run: config.Run) -> None:
    texts = [set(prompts(task.train)) for task in run.tasks.values()]
    assert len(set(chain(*texts))) == sum(map(len, texts))
    assert len({task.template.prompt for task in run.tasks.values()}) == len(run.tasks)


def test_the_model_is_small_enough_to_ship() -> None:
    assert sum(path.stat().st_size for path in (PLACE / "model").iterdir()) < LARGEST_MODEL


@pytest.mark.slow
@pytest.mark.ray
def test_it_shows_what_it_is_there_to_show(run: config.Run, tmp_path: Path) -> None:
    lori = [sys.executable, "-m", "lori_dist", "run", "configs/quickstart.yaml", f"output={tmp_path}"]
    printed = subprocess.run(lori, check=True, capture_output=True, text=True, cwd=ROOT).stdout
    summary = json.loads((tmp_path / "quickstart" / "summary.json").read_text())
    accuracy = {
        model: {task: metrics["exact_match"] for task, metrics in tasks.items()}
        for model, tasks in summary["evaluation"].items()
    }
    assert all(value <= 0.2 for value in accuracy["base"].values())
    assert all(accuracy[task][task] >= 0.9 for task in run.tasks)
    mean = sum(accuracy[task][task] for task in run.tasks) / len(run.tasks)
    best = max(sum(accuracy[merge].values()) / len(run.tasks) for merge in run.merges)
    assert best >= 0.6 * mean
    paths = [item["path"] for made in ("adapters", "merges") for item in summary[made].values()]
    assert all(path in printed and Path(path).is_file() for path in paths)
