"""What is wrong with rows is said before anything is trained: of all files of all tasks, with the lines."""

import json
import math
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest

from lori_dist import config, rows
from lori_dist.errors import ConfigError
from lori_dist.training.job_rows import prepare
from tests.tokenizers import tiny_tokenizer

PARTS = ("train", "test", "validation", "mixture")


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
        prepare(run, [], tiny_tokenizer(), PARTS, None)
    places = [line.split(": ")[:2] for line in str(caught.value).split("\n")]
    assert places == [
        ["tasks.one.train", f"{tmp_path}/one.jsonl:2"],
        ["tasks.one.test", f"{tmp_path}/test.csv:3"],
        ["tasks.one.mixture", f"{tmp_path}/more.jsonl:2"],
        ["tasks.two.train", f"{tmp_path}/two.jsonl:2"],
        ["tasks.two.test", f"{tmp_path}/test.csv:3"],
    ]


MISSING = {
    ".jsonl": ['{"prompt": null, "response": "b"}', '{"prompt": NaN, "response": "b"}'],
    ".json": ['[{"prompt": null, "response": "b"}]', '[{"prompt": NaN, "response": "b"}]'],
    ".csv": ["prompt,response\n,b\n", "prompt,response\nNaN,b\n", 'prompt,response\n"null",b\n'],
    ".parquet": [None, math.nan],
}


@pytest.mark.parametrize(("ending", "content"), [(kind, item) for kind, items in MISSING.items() for item in items])
def test_a_missing_value_is_refused_in_every_kind_of_file(tmp_path: Path, ending: str, content: Any) -> None:
    path = tmp_path / f"rows{ending}"
    if ending == ".parquet":
        pyarrow.parquet.write_table(pyarrow.table({"prompt": [1.5, content], "response": ["b", "b"]}), path)
    else:
        path.write_text(content)
    with pytest.raises(ConfigError, match=r"rows\.\w+:[12]: (field 'prompt' is|is not JSON \().*missing|null"):
        rows.read(str(path), config.Template())


@pytest.mark.parametrize(
    ("message", "problem"),
    [
        ({"role": "assistant", "content": 7}, "the content of message 2 of 'chat' is a number; wanted text"),
        ({"role": "assistant", "content": None}, "the content of message 2 of 'chat' is null; wanted text"),
        ({"role": "assistant", "content": True}, "the content of message 2 of 'chat' is true or false; wanted text"),
        (
            {"role": "assistant", "content": ["a"]},
            "part 1 of message 2 of 'chat' is text; wanted a part of type 'text' with its text",
        ),
        ({"role": 1, "content": "a"}, "the role of message 2 of 'chat' is a number; wanted text"),
    ],
)
def test_a_message_is_text(tmp_path: Path, message: dict[str, Any], problem: str) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps({"chat": [{"role": "user", "content": "q"}, message]}))
    with pytest.raises(ConfigError, match=f":1: {problem}$"):
        rows.read(str(path), config.Template(messages="chat"))


def labelled(folder: Path, values: list[Any], labels: list[str], *, num_good: int = 0) -> dict[str, Any]:
    """A run whose train rows have the values as labels, after some that are right."""
    (folder / "config.json").write_text("{}")
    good = json.dumps({"q": "a", "a": labels[0]}) + "\n"
    (folder / "train.jsonl").write_text(
        good * num_good + "".join(json.dumps({"q": "a", "a": v}) + "\n" for v in values)
    )
    (folder / "test.jsonl").write_text(good)
    task = {"train": str(folder / "train.jsonl"), "test": str(folder / "test.jsonl"), "labels": labels}
    task["template"] = {"prompt": "{q}", "response": " {a}"}
    model = {"path": str(folder)}
    return {"name": "r", "output": str(folder), "model": model, "tasks": {"t": task}, "train": {"steps": 1}}


@pytest.mark.parametrize(
    ("values", "labels", "wrong"),
    [
        ([0, 1], ["0", "1"], None),
        ([0, 1], ["0", "2"], "row 2 of tasks.t.train has '1', wanted one of 0, 2"),
        ([1.5, 2.0], ["1.5", "2.0"], None),
        ([1.0], ["1", "2"], "row 1 of tasks.t.train has '1.0', wanted one of 1, 2"),
        ([True, False], ["true", "false"], None),
        ([True, False], ["True", "False"], "row 1 of tasks.t.train has 'true', wanted one of True, False"),
        (["a"], ["a", " "], "' ' makes an empty response; give labels with text"),
    ],
)
def test_labels_are_compared_with_values_as_they_read(
    tmp_path: Path, values: list[Any], labels: list[str], wrong: str | None
) -> None:
    tree = labelled(tmp_path, values, labels)
    if wrong is None:
        prepare(config.validate(tree), [], tiny_tokenizer(), PARTS, None)
    else:
        with pytest.raises(ConfigError, match=f"^tasks.t.labels: {wrong}"):
            config.validate(tree)


def test_every_row_with_an_unknown_label_is_named_before_anything_is_trained(tmp_path: Path) -> None:
    """Also after the rows that are looked at when the configuration is read."""
    run = config.validate(labelled(tmp_path, [2, "no"], ["0", "1"], num_good=config.LOOKED_AT))
    with pytest.raises(ConfigError) as caught:
        prepare(run, [], tiny_tokenizer(), PARTS, None)
    lines = str(caught.value).split("\n")
    assert [line.split(": ")[1] for line in lines] == [f"{tmp_path}/train.jsonl:{10_000 + place}" for place in (1, 2)]
    assert lines[0].endswith(
        "its response is ' 2', which is not one of the labels; wanted one of ' 0', ' 1'. Did you mean ' 1'?"
    )


def test_alpaca_rows_of_a_csv_file_may_have_no_input(tmp_path: Path) -> None:
    path = tmp_path / "rows.csv"
    path.write_text("instruction,input,output\nadd,,b\nadd,NaN,b\nadd,1,b\nadd,1,\n")
    with pytest.raises(ConfigError, match=r"rows\.csv:5: field 'output' is"):
        rows.read(str(path), config.Template(layout="alpaca"))
    path.write_text("instruction,input,output\nadd,,b\nadd,NaN,b\nadd,1,b\n")
    prompts = [prompt for prompt, _ in rows.read(str(path), config.Template(layout="alpaca"))]  # type: ignore[misc]
    assert ["### Input:\n1" in prompt for prompt in prompts] == [False, False, True]
    assert "### Input" not in prompts[0] + prompts[1]


def test_what_parquet_adds_to_calls_and_tools_is_left_out(tmp_path: Path) -> None:
    """It gives every object the keys of all others, with null for those that an object does not have."""
    calls = [{"type": "function", "function": {"name": name, "arguments": {name: 1}}} for name in ("f", "g")]
    chats = [
        [{"role": "user", "content": "q"}, {"role": "assistant", "content": None, "tool_calls": [call]}]
        for call in calls
    ]
    tools = [[{"name": "f"}], [{"name": "g", "strict": True}]]
    pyarrow.parquet.write_table(pyarrow.table({"chat": chats, "tools": tools}), tmp_path / "rows.parquet")
    found = rows.read(str(tmp_path / "rows.parquet"), config.Template(messages="chat", tools="tools"))
    answers = [chat.messages[-1] for chat in found if isinstance(chat, rows.Chat)]
    assert answers == [{"role": "assistant", "content": "", "tool_calls": [call]} for call in calls]
    assert [chat.tools for chat in found if isinstance(chat, rows.Chat)] == tools


def test_tools_that_no_row_has_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps({"chat": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]}))
    with pytest.raises(ConfigError, match=r"no row has the field 'tool', which template.tools names"):
        rows.read(str(path), config.Template(messages="chat", tools="tool"))
