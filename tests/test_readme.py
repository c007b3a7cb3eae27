"""What the README says of the program is so."""

import re
from pathlib import Path
from typing import Any

import pytest
import yaml
from transformers import Trainer, TrainingArguments

from lori_dist import config, load_adapter
from lori_dist.__main__ import main
from tests.models import tiny_llama

README = (Path(__file__).parents[1] / "README.md").read_text()


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```$", README, re.MULTILINE | re.DOTALL)


def test_the_settings_are_all_there_are_with_their_defaults(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Given a value for each `...`, the block is a configuration equal to one that gives nothing else."""
    (text,) = [block for block in blocks("yaml") if "multitask:" in block]
    listed = yaml.safe_load(text)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "rows.jsonl").write_text('{"prompt": "a", "response": "b"}\n')
    task = {"train": "rows.jsonl", "test": "rows.jsonl"}
    least: dict[str, Any] = {
        "name": "x",
        "model": {"path": "."},
        "tasks": {"...": task},
        "train": {"steps": 1},
        "merges": {"...": {"method": "concat"}},
    }
    least["tasks"], least["merges"] = {"t": task}, {"m": {"method": "concat"}}
    wanted = config.dump(config.validate(least))
    listed["tasks"], listed["merges"] = {"t": listed["tasks"]["..."]}, {"m": listed["merges"]["..."]}
    filled = fill(listed, wanted)
    assert set(leaves(filled)) == set(leaves(wanted))
    filled["train"]["steps"] = 1
    assert config.dump(config.validate(filled)) == wanted


def fill(listed: Any, wanted: Any) -> Any:
    if listed == "...":
        return wanted
    return {key: fill(item, wanted.get(key)) for key, item in listed.items()} if isinstance(listed, dict) else listed


def leaves(tree: Any, path: str = "") -> list[str]:
    if not isinstance(tree, dict) or ("name" in tree and len(tree) == 1):  # a method by its name
        return [path]
    return [leaf for key, item in tree.items() for leaf in leaves(item, f"{path}.{key}")]


def test_the_script_of_one_s_own_trains_with_the_trainer_of_transformers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (script,) = blocks("python")
    monkeypatch.chdir(tmp_path)
    rows = [{"input_ids": [1, 2, 3, 4], "labels": [1, 2, 3, 4]}] * 8
    arguments = TrainingArguments(
        output_dir="trainer", max_steps=2, report_to=[], use_cpu=True, save_strategy="no", learning_rate=1e-2
    )

    def train(model: Any) -> None:
        Trainer(model=model, args=arguments, train_dataset=rows).train()

    exec(script, {"model": tiny_llama(), "train": train})
    adapter = load_adapter("adapter.safetensors")
    assert adapter.kept == round(0.1 * adapter.total)
    assert all(entries.values.any() for entries in adapter.blocks[0].entries.values())


@pytest.mark.parametrize(
    "line", re.findall(r"(?:^|lori_dist |\.venv/bin/)(?:lori )?(train|merge|evaluate|export|show|run) ", README)
)
def test_a_verb_it_names_exists(line: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="0"):
        main([line, "--help"])
