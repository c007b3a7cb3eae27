"""The JSON schema and the YAML of all settings: both say what the checks of configurations say."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml

from lori_dist import config
from lori_dist.__main__ import main
from lori_dist.config import schema
from lori_dist.errors import ConfigError

SCHEMA = schema.json_schema()
RIGHT = {
    "name": "x",
    "model": {"path": "model"},
    "tasks": {"one": {"train": "rows.jsonl", "test": "rows.jsonl"}},
    "train": {"steps": 20},
}


@pytest.fixture(autouse=True)
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text("{}")
    (tmp_path / "rows.jsonl").write_text('{"prompt": "a", "response": "b"}\n')


def test_the_file_that_ships_is_the_schema() -> None:
    """Where it is not: lori schema > lori_dist/config.schema.json"""
    assert schema.FILE.read_text(encoding="utf-8") == schema.text()
    jsonschema.Draft202012Validator.check_schema(SCHEMA)


def test_every_key_is_described_in_one_paragraph() -> None:
    described = {
        f"{name}.{key}": value.get("description", "")
        for name, section in {"Run": SCHEMA, **SCHEMA["$defs"]}.items()
        for key, value in section["properties"].items()
    }
    assert len(described) > 90
    assert [key for key, text in described.items() if not text[:1].isalnum() or not text.endswith(".")] == []
    assert [key for key, text in described.items() if "\n" in text or len(text) > 400] == []


def test_a_verb_prints_both(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["schema"]) == 0
    assert capsys.readouterr().out == schema.text()
    assert main(["schema", "--yaml"]) == 0
    assert capsys.readouterr().out == schema.as_yaml()


def test_the_yaml_has_all_settings_with_their_defaults_and_choices() -> None:
    listed = yaml.safe_load(schema.as_yaml())
    (task,), (merge,) = listed["tasks"].values(), listed["merges"].values()
    assert (listed["name"], listed["model"]["path"], task["train"], merge["method"]) == ("...",) * 4
    listed["merges"] = {"m": {**merge, "method": "concat"}}
    listed["tasks"] = {"t": {**task, **RIGHT["tasks"]["one"]}}
    listed |= {"name": "x", "model": {**listed["model"], "path": "model"}, "train": {**listed["train"], "steps": 1}}
    least = {
        **RIGHT,
        "tasks": {"t": RIGHT["tasks"]["one"]},
        "train": {"steps": 1},
        "merges": {"m": {"method": "concat"}},
    }
    wanted = config.dump(config.validate(least))
    assert config.dump(config.validate(listed)) == wanted
    assert set(leaves(listed)) == {path for path in leaves(wanted) if path == ".name" or not path.endswith(".name")}
    assert max(map(len, schema.as_yaml().split("\n"))) <= 130
    comments = " ".join(line.partition("#")[2].strip() for line in schema.as_yaml().split("\n"))
    for word in ("bfloat16", "cosine", "flash_attention_3", "strict_spread", "0.0.0.0", "cma", "num_fewshot"):
        assert word in comments


def leaves(tree: Any, path: str = "") -> Iterator[str]:
    yield path
    for key, item in tree.items() if isinstance(tree, dict) else ():
        yield from leaves(item, f"{path}.{key}")


@pytest.mark.parametrize(
    ("settings", "is_right"),
    [
        ({}, True),
        ({"adapter.mask": "random"}, True),
        ({"adapter.mask": {"name": "random", "seed": 3}}, True),
        ({"adapter.mask": {"name": "random", "sed": 3}}, False),
        ({"adapter.mask": "randm"}, False),
        ({"train.engine": {"name": "deepspeed", "stage": 3}}, True),
        ({"train.engine": {"name": "deepspeed", "stage": 4}}, False),
        ({"train.time_limit": "11h30m"}, True),
        ({"train.time_limit": 60}, True),
        ({"train.time_limit": []}, False),
        ({"train.betas": [0.9]}, False),
        ({"train.lr": 0}, False),
        ({"train.rate": 1}, False),
        ({"adapter.targets": "q_proj"}, True),
        ({"adapter.targets": ["q_proj", "v_proj"]}, True),
        ({"trackers": "tensorboard"}, True),
        ({"cluster.packing": 3}, True),
        ({"cluster.packing": 1}, False),
        ({"tasks": {"a/b": RIGHT["tasks"]["one"]}}, False),
        ({"merges": {"m": {"method": "concat", "weights": {"one": {"default": 0.5}}}}}, True),
        ({"merges": {"m": {"weights": [1]}}}, False),
        ({"merges": {"m": {"method": "concat", "search": {"bounds": [0, "x"]}}}}, False),
    ],
)
def test_the_schema_takes_what_the_checks_take(settings: dict[str, Any], is_right: bool) -> None:
    tree: dict[str, Any] = {**RIGHT, "adapter": {}, "cluster": {}, "train": {"steps": 20}}
    for path, value in settings.items():
        *parents, last = path.split(".")
        holder = tree[parents[0]] if parents else tree
        holder[last] = value
    assert jsonschema.Draft202012Validator(SCHEMA).is_valid(tree) == is_right
    try:
        config.validate(tree)
    except ConfigError:
        assert not is_right
    else:
        assert is_right
