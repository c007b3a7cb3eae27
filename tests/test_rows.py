"""What is wrong with rows is said before anything is trained: of all files of all tasks, with the lines."""

import json
from pathlib import Path

import pytest

from lori_dist import config, rows
from lori_dist.errors import ConfigError


def test_every_bad_row_of_every_file_of_a_run_is_named_at_once(tmp_path: Path) -> None:
    good = json.dumps({"prompt": "a", "response": "b"}) + "\n"
    for name in ("one", "two", "more"):
        (tmp_path / f"{name}.jsonl").write_text(good + "bad\n")
    (tmp_path / "test.csv").write_text("prompt,response\na,b\na\n")
    (tmp_path / "config.json").write_text("{}")
    tasks = {
        name: {"train": str(tmp_path / f"{name}.jsonl"), "test": str(tmp_path / "test.csv")} for name in ("one", "two")
    }
    tasks["one"]["mixture"] = {str(tmp_path / "more.jsonl"): 0.25}  # type: ignore[assignment]
    run = config.validate(
        {"name": "r", "output": str(tmp_path), "model": {"path": str(tmp_path)}, "tasks": tasks, "train": {"steps": 1}}
    )
    with pytest.raises(ConfigError) as caught:
        rows.check(run)
    places = [line.split(": ")[:2] for line in str(caught.value).split("\n")]
    assert places == [
        ["tasks.one.train", f"{tmp_path}/one.jsonl:2"],
        ["tasks.one.test", f"{tmp_path}/test.csv:3"],
        ["tasks.one.mixture", f"{tmp_path}/more.jsonl:2"],
        ["tasks.two.train", f"{tmp_path}/two.jsonl:2"],
        ["tasks.two.test", f"{tmp_path}/test.csv:3"],
    ]
