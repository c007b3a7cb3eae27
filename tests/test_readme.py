"""What the README says of the program is so."""

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from transformers import Trainer, TrainingArguments

from lori_dist import config, load_adapter, plugin
from lori_dist.__main__ import main
from lori_dist.adapter import source
from lori_dist.masks.magnitude import mask
from lori_dist.merges import merge
from tests.merges.made import adapter, block
from tests.models import tiny_llama

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```$", README, re.MULTILINE | re.DOTALL)


def test_the_settings_are_all_there_are_with_their_defaults(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Given a value for each `...`, the block is a configuration equal to one that gives nothing else."""
    (text,) = [block for block in blocks("yaml") if "cluster:" in block]
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
    (script,) = [text for text in blocks("python") if "train(model)" in text]
    monkeypatch.chdir(tmp_path)
    rows = [{"input_ids": [1, 2, 3, 4], "labels": [1, 2, 3, 4]}] * 8
    arguments = TrainingArguments(
        output_dir="trainer", max_steps=2, report_to=[], use_cpu=True, save_strategy="no", learning_rate=1e-2
    )

    def train(model: Any) -> None:
        Trainer(model=model, args=arguments, train_dataset=rows).train()

    exec(script, {"model": tiny_llama(), "train": train})
    trained = load_adapter("adapter.safetensors")
    assert trained.kept == round(0.1 * trained.total)
    assert all(entries.values.any() for entries in trained.blocks[0].entries.values())


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")  # peft asks for it
def test_the_lines_for_peft_train_both_phases(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    wrap, phases = (text for text in blocks("python") if "peft_tuner" in text)
    monkeypatch.chdir(tmp_path)
    rows = [{"input_ids": [1, 2, 3, 4], "labels": [1, 2, 3, 4]}] * 8

    def trainer_of(model: Any, steps: int) -> Trainer:
        arguments = TrainingArguments(
            output_dir="trainer", max_steps=steps, report_to=[], use_cpu=True, save_strategy="no", learning_rate=1e-2
        )
        return Trainer(model=model, args=arguments, train_dataset=rows)

    wrapped = []
    for _ in range(2):
        names: dict[str, Any] = {"model": tiny_llama()}
        exec(wrap, names)
        wrapped.append(names["model"])
    trainer = trainer_of(wrapped[0], 2)
    trainer.train()
    exec(phases, {"trainer": trainer, "new_model": wrapped[1], "mask": mask})
    trainer_of(wrapped[1], 2).train()
    wrapped[1].save_pretrained("sparse")
    trained = source.load(Path("sparse"))
    assert trained.kept == round(0.1 * trained.total)
    assert any(entries.values.any() for entries in trained.blocks[0].entries.values())


@pytest.mark.ray
def test_the_way_from_rows_to_a_served_model_can_be_gone(tmp_path: Path) -> None:
    section = README.partition("## From rows to a served model")[2].partition("\n## ")[0]
    assert section.count("\n") <= 60
    script = re.findall(r"^```bash\n(.*?)^```$", section, re.MULTILINE | re.DOTALL)[0]
    (tmp_path / "configs").symlink_to(ROOT / "configs")
    script = script.replace(".venv/bin/", f"{Path(sys.executable).parent}/")
    result = subprocess.run(["bash", "-euc", script], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    matrix = json.loads((tmp_path / "runs" / "demo" / "summary.json").read_text())["evaluation"]
    assert all(matrix[task][task]["exact_match"] > 0.9 for task in ("next", "previous"))
    assert all(score["loss"] < matrix["base"][task]["loss"] for task, score in matrix["both"].items())
    assert re.search(r"'generated_text': 'after 7 comes \d", result.stdout)
    assert (tmp_path / "demo" / "both" / "adapter_model.safetensors").exists()


def test_the_merge_of_one_s_own_merges(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (method,) = [text for text in blocks("python") if "def merge(" in text]
    (tmp_path / "mypackage").mkdir()
    (tmp_path / "mypackage" / "faded.py").write_text(method)
    monkeypatch.syspath_prepend(tmp_path)
    options = {"name": "mypackage.faded", "factor": 0.5}
    assert yaml.safe_load(method.partition("`")[2].partition("`")[0]) == {"merges": {"all": {"method": options}}}
    tasks = [adapter(block("one")), adapter(block("two", seed=1))]
    merged = merge(tasks, method=options.pop("name"), options=options, weights=[1.0, -2.0])  # type: ignore[arg-type]
    assert [part.weight for part in merged.blocks] == [0.5, -1.0]


def test_every_merge_is_in_the_table() -> None:
    table = README.partition("\n## Merges\n")[2].partition("\n## ")[0]
    for name in plugin.names("merges"):
        assert re.search(rf"^\|[^|]*`{name}`[^|]*\|", table, re.MULTILINE), name


def test_every_plan_is_in_the_table() -> None:
    table = README.partition("\n## Tasks together\n")[2].partition("\n## ")[0]
    for name in plugin.names("multitask"):
        assert re.search(rf"^\|[^|]*`{name}`[^|]*\|", table, re.MULTILINE), name


def test_the_options_of_joint_training_are_all_there_are_with_their_defaults() -> None:
    (text,) = [block for block in blocks("yaml") if block.startswith("multitask:\n")]
    listed = yaml.safe_load(text)["multitask"]
    options = plugin.find("multitask", listed.pop("name"), "plan", "multitask").options
    assert listed == {name: option.default for name, option in options.items()} | {"weights": {"math": 2.0}}


@pytest.mark.parametrize(
    "line", re.findall(r"(?:^|lori_dist |\.venv/bin/)(?:lori )?(train|merge|evaluate|export|show|run) ", README)
)
def test_a_verb_it_names_exists(line: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="0"):
        main([line, "--help"])
