"""The configuration: what is read, and how every mistake in it is reported."""

import copy
import functools
import importlib.util
import itertools
import json
import os
import random
import re
import subprocess
import sys
import time
from collections.abc import Iterable, Iterator
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any

import pydantic
import pytest
import yaml

from lori_dist import config
from lori_dist.errors import ConfigError

MINIMAL = """
name: demo
model: {path: ./model}
tasks:
  nlu: {train: rows.jsonl, test: rows.jsonl, labels: ["yes", "no"]}
  code: {train: rows.jsonl, test: rows.jsonl}
train: {steps: 10}
merges:
  all: {method: concat}
"""


@pytest.fixture(autouse=True)
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A current directory with a model's folder and a file of rows."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text('{"max_position_embeddings": 128}')
    (tmp_path / "rows.jsonl").write_text(70 * '{"prompt": "a", "response": "yes"}\n')
    return tmp_path


def tree(**changes: Any) -> dict[str, Any]:
    return {**yaml.safe_load(MINIMAL), **changes}


def load(text: str, *overrides: str) -> config.Run:
    Path("run.yaml").write_text(text)
    return config.load("run.yaml", overrides)


def problems(what: dict[str, Any] | str, *overrides: str) -> list[str]:
    with pytest.raises(ConfigError) as caught:
        load(what if isinstance(what, str) else yaml.safe_dump(what), *overrides)
    return str(caught.value).split("\n")


# --- what is read ----------------------------------------------------------------------------------------------------


def test_a_minimal_run_has_the_defaults_of_the_paper(place: Path) -> None:
    run = load(MINIMAL)
    assert run.adapter.mask == config.Choice(name="magnitude")
    assert run.adapter.density == 0.1
    assert (run.train.betas, run.train.eps, run.train.weight_decay, run.train.clip) == ((0.9, 0.999), 1e-8, 0.0, 1.0)
    assert run.tasks["nlu"].labels == ("yes", "no")
    assert run.folder == place / "runs" / "demo"


def test_a_dumped_run_reads_back() -> None:
    run = load(MINIMAL, "train.engine={name: deepspeed, stage: 3}", "adapter.targets=[q_proj, v_proj]")
    assert config.validate(config.dump(run)) == run
    assert load(yaml.safe_dump(config.dump(run))) == run


def test_validate_leaves_its_argument_as_it_is() -> None:
    wrong = tree(adapter={"rnk": 1, "density": 2}, model="x")
    before = copy.deepcopy(wrong)
    with pytest.raises(ConfigError):
        config.validate(wrong)
    assert wrong == before


@pytest.mark.parametrize("spelling", ["5e-5", "5.0e-5", "5E-5", "0.00005", "'5e-5'", "+5e-05", "5.e-5", ".5e-4"])
def test_numbers_with_exponents_are_numbers(spelling: str) -> None:
    assert load(MINIMAL + f"adapter: {{alpha: {spelling}}}").adapter.alpha == 5e-5
    assert load(MINIMAL, f"train.lr={spelling}").train.lr == 5e-5


@pytest.mark.parametrize("spelling", ["1e6", "1000000", "1_000_000", "1.0e+6", "'1e6'"])
def test_whole_numbers_may_be_written_as_floats(spelling: str) -> None:
    assert load(MINIMAL, f"train.calibrate.epochs={spelling}").train.calibrate.epochs == 1e6
    if "'" not in spelling:
        assert load(MINIMAL, f"train.steps={spelling}").train.steps == 1_000_000


@pytest.mark.parametrize("spelling", ["no", "on", "yes", "off", "true", "False"])
@pytest.mark.parametrize("path", ["train.lr", "train.steps", "adapter.seed", "adapter.density", "cluster.retries"])
def test_yes_and_no_are_no_numbers(path: str, spelling: str) -> None:
    (found,) = problems(MINIMAL, f"{path}={spelling}")
    read = {"true": True, "False": False}.get(spelling, spelling)
    assert found.startswith(f"{path}: got {read!r}; ")
    assert "number" in found or "integer" in found


def test_yes_and_no_are_text_where_text_is_wanted() -> None:
    assert load(MINIMAL, "tasks.nlu.labels=[yes, no]").tasks["nlu"].labels == ("yes", "no")
    assert load(MINIMAL, "cluster.packing=off").cluster.packing == "off"


@pytest.mark.parametrize(
    ("written", "number"),
    [
        ("0x10", 16),
        ("0o20", 16),
        ("1_6", 16),
        ("1.6e1", 16),
        ("'16'", 16),
        ("!!int 16", 16),
        ("!!str 16", 16),
        ("+16", 16),
    ],
)
def test_a_number_is_the_one_that_was_meant(written: str, number: int) -> None:
    assert load(MINIMAL, f"train.steps={written}").train.steps == number


HALF = "(has a character that text cannot have|found invalid Unicode character escape code)"
"""What is said of half of a surrogate pair: by ourselves, or by libyaml."""


@pytest.mark.parametrize(
    ("override", "message"),
    [
        (
            "train.time_limit=1:30",
            "train.time_limit: got '1:30'; wanted a duration such as 11h30m, 1m30s, or 3600",
        ),
        ("train.time_limit=1:30:00", "train.time_limit: got '1:30:00'; wanted a duration such as 11h30m, 1m30s"),
        ("train.steps=1:30", "train.steps: got '1:30'; it should be a valid integer"),
        ("train.steps=010", "line 1, column 1: 010 is base 8 to some readers of YAML; write it without the leading 0"),
        (
            "train.steps=0_10",
            "line 1, column 1: 0_10 is base 8 to some readers of YAML; write it without the leading 0",
        ),
        (
            "tasks.nlu.labels=[007, 7]",
            "line 1, column 2: 007 is base 8 to some readers of YAML; .* or put text in quotes",
        ),
        ("train.steps=0b11", "train.steps: got '0b11'; it should be a valid integer"),
        ("train.lr=1e400", "line 1, column 1: 1e400 is larger than any float"),
        ("train.steps=" + 5000 * "9", "line 1, column 1: a number of 5000 digits; put text in quotes"),
        ("train.steps=0x" + 50 * "f", "train.steps: got a number of more than 64 bits; write a smaller one"),
        ("name=!!binary aGk=", "the tag !!binary is not one of !!str, !!int, !!float, !!bool, !!null, !!seq and !!map"),
        ("name=!!timestamp 2024-01-01", "the tag !!timestamp is not one of"),
        ("name=!mine x", "the tag !mine is not one of"),
        ("train.steps=!!int x", "'x' is not of the kind that its tag !!int names; remove the tag"),
        ('name="\\0"', r"name: '\\x00' has a character that text cannot have; remove it"),
        ('tasks.nlu.template.prompt="\\ud800"', f"^tasks.nlu.template.prompt.* {HALF}"),
        ('tasks={"\\ud800": {}}', f"^tasks.* {HALF}"),
        ("name=" + 70 * "[", "line 1, column 6[56]: it is nested more than 64 deep; write it flat"),
        ("name=" + 70 * "- ", "is nested more than 64 deep"),
        ("name=&a [*a]", "found unconstructable recursive node"),
    ],
)
def test_what_could_be_read_as_something_else_is_refused(override: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        load(MINIMAL, override)


def test_text_stays_text_when_a_configuration_is_written_and_read_again(place: Path) -> None:
    labels = ["1e5", "0o17", "010", "1:30", "yes", "null", "1_000", "2024-01-01", "<<", ".5e3", "é"]
    (place / "rows.jsonl").write_text('{"prompt": "a", "response": "1e5"}\n')
    (place / "run.yaml").write_text(MINIMAL)
    written = config.text(
        "run.yaml", ["tasks.nlu.labels=" + json.dumps(labels), "train.lr=1e-05", "cluster.packing=off"]
    )
    run = load(written, "merges={}")
    assert run.tasks["nlu"].labels == tuple(labels)
    assert run.train.lr == 1e-5


def test_names_that_look_like_dates_and_switches_are_names() -> None:
    text = MINIMAL.replace("nlu:", "2024-01-01:").replace("code:", "no:")
    assert set(load(text).tasks) == {"2024-01-01", "no"}


def test_an_override_of_what_an_alias_repeats_changes_one_of_both() -> None:
    text = """
name: demo
model: {path: ./model}
tasks:
  nlu: &rows {train: rows.jsonl, test: rows.jsonl}
  code: *rows
train: {epochs: 1}
"""
    run = load(text, "tasks.nlu.lr=0.5")
    assert (run.tasks["nlu"].lr, run.tasks["code"].lr) == (0.5, None)


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16"])
def test_a_file_may_begin_with_a_byte_order_mark(place: Path, encoding: str) -> None:
    (place / "run.yaml").write_text(MINIMAL, encoding=encoding)
    assert config.load("run.yaml").name == "demo"


@pytest.mark.parametrize("kind", ["pipe", "device", "large"])
def test_a_file_without_an_end_is_refused(place: Path, kind: str) -> None:
    path = place / "run.yaml" if kind != "device" else Path("/dev/zero")
    if kind == "pipe":
        os.mkfifo(path)
    if kind == "large":
        path.write_text(MINIMAL + 2**20 * "#")
    with pytest.raises(ConfigError, match="holds NoneType" if kind == "pipe" else "it has more than 1,048,576 bytes"):
        config.load(path)


@pytest.mark.parametrize(
    "text",
    [
        "x:\n" + 200_000 * "- 1\n",
        "x:\n" + "".join(f"  k{n}: {{a: {n}, b: 2}}\n" for n in range(35_000)),
        "x: [" + ",".join(24_000 * ["0.1234567"]) + "]",
        "".join(f"k{n}: 1\n" for n in range(24_000)),
        "merges:\n" + "".join(f"  m{n}: {{method: concat}}\n" for n in range(8_000)),
        "x: |\n" + 80_000 * "  some words\n",
        1_000_000 * "[",
        500_000 * "- ",
    ],
    ids=["items", "mappings", "numbers", "keys", "merges", "text", "brackets", "dashes"],
)
def test_files_of_almost_a_mebibyte_are_read_or_refused_in_two_seconds(text: str, place: Path) -> None:
    (place / "run.yaml").write_text(text)
    start = time.process_time()
    with pytest.raises(ConfigError):
        config.load("run.yaml")
    assert time.process_time() - start < 2


def test_thousands_of_tasks_are_read_in_two_seconds(place: Path) -> None:
    tasks = "".join(f"  t{n}: {{train: rows.jsonl, test: rows.jsonl}}\n" for n in range(8_000))
    (place / "run.yaml").write_text(f"name: demo\nmodel: {{path: ./model}}\ntrain: {{steps: 10}}\ntasks:\n{tasks}")
    start = time.process_time()
    assert len(config.load("run.yaml").tasks) == 8_000
    assert time.process_time() - start < 2


def test_aliases_that_repeat_aliases_take_no_room() -> None:
    names = "abcdefghijkl"
    laughs = "".join(f"{b}: &{b} [{','.join([f'*{a}'] * 9)}]\n" for a, b in itertools.pairwise(names))
    merges = "".join(f"{b}: &{b} {{<<: [{','.join([f'*{a}'] * 9)}]}}\n" for a, b in itertools.pairwise(names))
    assert problems(f"{MINIMAL}a: &a [x]\n{laughs}") == [
        "run.yaml: has more than 25,000 values, counting what aliases repeat; write fewer"
    ]
    assert len(problems(f"{MINIMAL}a: &a {{x: 1}}\n{merges}")) == len(names)
    assert len(problems(MINIMAL, f"name=[&a [x], {laughs.replace(': ', ' ').replace(chr(10), ', ')}]")) == 1


@pytest.mark.parametrize("spelling", ["on", "yes", "true", "True"])
def test_switches_take_yes_and_no(spelling: str) -> None:
    assert load(MINIMAL, f"adapter.share_projection={spelling}").adapter.share_projection is True


@pytest.mark.parametrize("written", ["all-linear", "q_proj", "[q_proj, v_proj]"])
def test_targets_are_one_or_several_names(written: str) -> None:
    wanted = {"q_proj": ("q_proj",), "[q_proj, v_proj]": ("q_proj", "v_proj")}.get(written, written)
    assert load(MINIMAL, f"adapter.targets={written}").adapter.targets == wanted


def test_a_method_is_written_with_or_without_options() -> None:
    assert load(MINIMAL, "adapter.mask=random").adapter.mask == config.Choice(name="random")
    assert load(MINIMAL, "adapter.mask={name: random, seed: 3}").adapter.mask.options == {"seed": 3}


# --- overrides -------------------------------------------------------------------------------------------------------


def test_overrides_reach_every_depth_and_come_in_order() -> None:
    run = load(
        MINIMAL, "train.lr=1e-3", "train.lr=1e-4", "tasks.nlu.template.prompt='{response}:'", "merges.two.method=linear"
    )
    assert run.train.lr == 1e-4
    assert run.tasks["nlu"].template.prompt == "{response}:"
    assert run.merges["two"].method.name == "linear"


def test_an_override_adds_an_option_to_a_method_named_alone() -> None:
    text = MINIMAL + "adapter: {mask: random}"
    assert load(text, "adapter.mask.seed=7").adapter.mask == config.Choice(name="random", options={"seed": 7})
    assert load(MINIMAL, "adapter.mask=random", "adapter.mask.seed=7").adapter.mask.options == {"seed": 7}


def test_an_override_fills_an_empty_section() -> None:
    assert load(MINIMAL + "evaluate:\n", "evaluate.rows=5").evaluate.rows == 5


def test_an_override_with_null_takes_a_value_out() -> None:
    assert load(MINIMAL, "train.clip=null").train.clip is None
    assert load(MINIMAL, "train.clip=").train.clip is None


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("train.lr", "train.lr: an override has the form path.to.key=value, such as train.lr=1e-4"),
        ("=3", "=3: an override has the form path.to.key=value, such as train.lr=1e-4"),
        ("train..lr=3", "train..lr=3: an override has the form path.to.key=value, such as train.lr=1e-4"),
        ("train.lr.x=3", "train.lr.x=3: train.lr is 0.1, which has nothing below it; override train.lr itself"),
        ("name.x=3", "name.x=3: name is 'demo', which has nothing below it; override name itself"),
        ("adapter.mask={name: random, name: x}", "name is given in lines 1 and 1"),
        ("train.betas=[1", "train.betas=[1: is not valid YAML"),
        ("trian.lr=3", "trian: unknown key; .* Did you mean 'train'?"),
        ("train.rate=3", "train.rate: unknown key; there are engine, steps, epochs, .*"),
    ],
)
def test_a_wrong_override_is_named(override: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message.replace("?", "\\?").replace("[", "\\[")):
        load(MINIMAL, "train.lr=0.1", override)


# --- files that are no configuration ---------------------------------------------------------------------------------


def test_repeated_keys_are_all_reported_with_their_lines() -> None:
    text = MINIMAL + "adapter:\n  rank: 4\n  alpha: 1\n  rank: 8\nname: again\n"
    assert problems(text) == [
        "run.yaml: name is given in lines 2 and 14; keep one",
        "run.yaml: rank is given in lines 11 and 13; keep one",
    ]


def test_anchors_and_merge_keys_are_no_repetitions() -> None:
    text = """
name: demo
model: {path: ./model}
tasks:
  nlu: &rows {train: rows.jsonl, test: rows.jsonl}
  code: {<<: *rows, test: rows.jsonl}
train: {epochs: 1}
"""
    assert load(text).tasks["code"].test == "rows.jsonl"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "holds NoneType, wanted a mapping"),
        ("- a\n- b", "holds list, wanted a mapping"),
        ("just words", "holds str, wanted a mapping"),
        ("name: [", "is not valid YAML"),
        ("name: !!python/object:os.system x", "is not valid YAML"),
        ("? [a, b]\n: c", "is not valid YAML"),
        ("a: &a [*a]\nb: \t x", "is not valid YAML"),
        ("name: a\x07b", "is not valid YAML"),
    ],
)
def test_what_is_no_configuration_is_refused(text: str, message: str) -> None:
    with pytest.raises(ConfigError, match=f"run.yaml: {message}"):
        load(text)


def test_a_file_that_cannot_be_read_is_named(place: Path) -> None:
    with pytest.raises(ConfigError, match=r"none\.yaml: cannot be read .*; give the path of a YAML file"):
        config.load("none.yaml")
    with pytest.raises(ConfigError, match="cannot be read"):
        config.load(place)
    (place / "binary.yaml").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ConfigError, match="cannot be read"):
        config.load(place / "binary.yaml")


# --- mistakes --------------------------------------------------------------------------------------------------------


def sections(value: Any, path: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], Any]]:
    """Every section of a run, with its path. A method's options are no section: the method says what it takes."""
    if is_dataclass(value) and not isinstance(value, config.Choice):
        yield path, value
        for item in fields(value):
            yield from sections(getattr(value, item.name), (*path, item.name))
    if isinstance(value, dict):
        for key, item in value.items():
            yield from sections(item, (*path, key))


def test_an_unknown_key_is_found_in_every_section() -> None:
    searched, measured = {"method": "concat", "search": {}}, {"lm_eval": {"tasks": ["x"]}}
    run = config.validate(tree(merges={"all": searched}, evaluate=measured))
    planted = config.dump(run)
    wanted = []
    for path, section in sections(run):
        holder = planted
        for key in path:
            holder = holder[key]
        known = [item.name for item in fields(section)]
        misspelt = f"{known[0]}x"
        holder[misspelt] = 1
        where = ".".join((*path, misspelt))
        wanted.append(f"{where}: unknown key; there are {', '.join(known)}. Did you mean {known[0]!r}?")
    assert sorted(problems(planted)) == sorted(wanted)


def test_rows_are_held_out_for_the_largest_search_of_a_task_without_validation() -> None:
    run = config.validate(
        tree(
            merges={
                "one": {"method": "concat", "tasks": ["code"], "search": {"rows": 5}},
                "two": {"method": "linear", "search": {"rows": 3}},
                "three": {"method": "linear"},
            }
        )
    )
    assert {task: config.held_out(run, task) for task in run.tasks} == {"nlu": 3, "code": 5}
    with_rows = load(MINIMAL, "merges.all.search={rows: 900}", *(f"tasks.{t}.validation=rows.jsonl" for t in run.tasks))
    assert {config.held_out(with_rows, task) for task in run.tasks} == {0}


def test_cma_must_be_installed_and_needs_two_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    found = problems(MINIMAL, "merges.all={method: concat, tasks: [code], search: {method: cma}}", "trackers=[]")
    assert found == [
        "merges.all.search.method: cma needs the package of this name, which is not installed; "
        "pip install 'lori_dist[search]', or use coordinate",
        "merges.all.search.method: cma needs two weights, there is one; use coordinate",
    ]


def test_flash_attention_must_be_installed_and_fit_the_run(monkeypatch: pytest.MonkeyPatch, place: Path) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    (place / "model" / "config.json").write_text('{"model_type": "llama"}')
    asked = ["model.attention=flash_attention_2", "train.pack=true", "trackers=[]"]
    assert [problem.partition("; ")[0] for problem in problems(MINIMAL, *asked)] == [
        "model.attention: flash_attention_2 needs the package flash_attn, which is not installed",
        "model.attention: got flash_attention_2, which computes in half precision, and model.dtype is float32",
        "model.attention: got flash_attention_2, which lets packed rows see each other in a batch of several sequences",
    ]
    Path("run.yaml").write_text(MINIMAL)
    alone = ["model={path: model, attention: flash_attention_3, dtype: bfloat16}"]
    assert config.load("run.yaml", alone, elsewhere=True).model.attention == "flash_attention_3"


def test_blocks_are_compiled_but_at_stage_3() -> None:
    joint = ["multitask=joint", "merges={}", "tasks.nlu.labels=null", "train.compile=true"]
    assert load(MINIMAL, *joint).train.compile
    assert load(MINIMAL, "train.compile=true", "cluster.packing=auto").train.compile
    [sharded] = problems(MINIMAL, "train.compile=true", "train.engine={name: deepspeed, stage: 3}")
    assert sharded.startswith("train.compile: cannot be combined with stage 3 of deepspeed, whose hooks")


def test_slices_of_mlps_are_for_layers_that_do_not_look_at_tasks() -> None:
    sliced, joint = "train.mlp_slices=4", ["merges={}", "tasks.nlu.labels=null"]
    assert load(MINIMAL, sliced).train.mlp_slices == 4
    assert load(MINIMAL, sliced, "multitask={name: joint, balance: none}", *joint).train.mlp_slices == 4
    for others, message in (
        (["train.compile=true"], "train.mlp_slices: cannot be combined with train.compile"),
        (["cluster.packing=auto"], "train.mlp_slices: cannot be combined with cluster.packing"),
        (["multitask=joint", *joint], "train.mlp_slices: cannot be combined with multitask joint and a form or a"),
    ):
        [found] = problems(MINIMAL, sliced, *others)
        assert found.startswith(message)


def test_a_tracker_must_be_installed(monkeypatch: pytest.MonkeyPatch, place: Path) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(importlib.util, "find_spec", lambda name: None)
        assert problems(MINIMAL, "trackers=[comet_ml, wandb]") == [
            "trackers: comet_ml is not installed; pip install comet-ml, or remove it",
            "trackers: wandb is not installed; pip install wandb, or remove it",
        ]
    (place / "aim").mkdir()  # as W&B makes one called wandb
    monkeypatch.syspath_prepend(place)
    assert problems(MINIMAL, "trackers=[aim]") == ["trackers: aim is not installed; pip install aim, or remove it"]


def test_trackers_are_a_list_or_one_name() -> None:
    assert load(MINIMAL).trackers == load(MINIMAL, "trackers=tensorboard").trackers == ("tensorboard",)
    assert load(MINIMAL, "trackers=[]").trackers == ()


def test_validation_rows_are_looked_at_as_others_are(place: Path) -> None:
    (place / "few.jsonl").write_text('{"prompt": "a", "response": "maybe"}\n')
    assert problems(MINIMAL, "tasks.nlu.validation=few.jsonl") == [
        "tasks.nlu.labels: row 1 of tasks.nlu.validation has 'maybe', wanted one of yes, no. Did you mean 'yes'?"
    ]
    (place / "few.jsonl").write_text('{"question": "a", "response": "yes"}\n')
    (found,) = problems(MINIMAL, "tasks.nlu.validation=few.jsonl")
    assert found.startswith("tasks.nlu.template.prompt: takes the field 'prompt', which the first row of tasks.nlu.val")


def test_an_unknown_option_is_found_in_every_method() -> None:
    wrong = tree(adapter={"mask": {"name": "random", "sed": 1}}, merges={"all": {"method": {"name": "linear", "x": 1}}})
    found = problems(wrong, "train.engine={name: deepspeed, stge: 3}", "multitask={name: independent, zzz: 1}")
    wanted = [
        r"adapter\.mask\.sed: random has no such option; it takes seed\. Did you mean 'seed'\?",
        r"train\.engine\.stge: deepspeed has no such option; it takes .*stage.*\. Did you mean 'stage'\?",
        r"merges\.all\.method\.x: linear has no such option; it takes none\.",
        r"multitask\.zzz: independent has no such option; it takes .*\.",
    ]
    assert [bool(re.fullmatch(*pair)) for pair in zip(wanted, found, strict=True)] == [True] * 4


def test_every_mistake_is_reported_at_once() -> None:
    text = """
name: my run
model: {pth: ./model, dtype: bf16}
tasks:
  nlu: {train: rows.jsonl, test: none.jsonl, template: {prompt: "{a b}"}, labels: [a]}
  code: {train: rows.jsonl}
adapter: {rnk: 8, density: 1.5, mask: magnitud, targets: 5}
train: {engine: {stage: 3}, lr: fast, steps: 3, epochs: 3, schedule: cosin, betas: [0.9, 1]}
merges:
  nlu: {method: concatt, weights: [1]}
  all: {method: concat, weights: {nlu: 1, cod: 2}}
evaluate: {metrics: [loss, exactmatch]}
cluster: []
clustr: {}
"""
    found = problems(text)
    assert [line.partition(": ")[0] for line in found] == [
        "name",
        "model.dtype",
        "model.pth",
        "tasks.code.test",
        "adapter.targets",
        "adapter.density",
        "adapter.mask",
        "adapter.rnk",
        "train.engine.name",
        "train.lr",
        "train.schedule",
        "train.betas.1",
        "merges.nlu.method",
        "cluster",
        "clustr",
        "tasks.nlu.test",
        "tasks.nlu.template.prompt",
        "tasks.nlu.labels",
        "evaluate.metrics",
        "train.steps, train.epochs",
        "merges.nlu",
        "merges.nlu.weights",
        "merges.all.weights",
    ]
    nearest = ["'path'", "'bfloat16'", "'rank'", "'cosine'", "'cluster'", "'magnitude'", "'concat'", "'exact_match'"]
    assert all(any(f"Did you mean {name}?" in line for line in found) for name in nearest)


def test_a_mistake_is_found_without_torch(place: Path) -> None:
    (place / "run.yaml").write_text(MINIMAL + "adapter: {mask: magnitud}")
    program = """
import sys
from lori_dist import config
try:
    config.load("run.yaml")
except config.ConfigError as error:
    print(error)
print(sorted({"torch", "transformers", "numpy", "ray", "deepspeed"} & set(sys.modules)))
"""
    environment = {"PYTHONPATH": str(Path(config.__file__).parents[2])}
    done = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[0].startswith("adapter.mask: unknown 'magnitud' in masks")
    assert done.stdout.splitlines()[1] == "[]"


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("name=", "name: got nothing; wanted text"),
        ("name=../x", "name: got '../x'; names are at most 64 letters, digits, - and _"),
        ("tasks.a/b={train: rows.jsonl, test: rows.jsonl}", "tasks.a/b: got 'a/b'; names are .*"),
        ("model=./model", "model: got './model'; wanted a mapping, key: value"),
        ("model=", "model: got nothing; wanted a mapping, key: value"),
        ("model.path=model/tiny", "model.path: there is no config.json in 'model/tiny'; give a model's folder or .*"),
        ("model.path=elsewhere", "model.path: there is no config.json in 'elsewhere'; give a model's folder or .*"),
        ("tasks={}", "tasks: none is given; give at least one"),
        ("tasks=[a]", "tasks: got a list; wanted a mapping, key: value"),
        ("tasks.nlu.test=x.jsonl", "tasks.nlu.test: there is no file 'x.jsonl'; paths are relative to .*"),
        ("tasks.nlu.labels=[a]", "tasks.nlu.labels: got ['a']; give at least two, each of them once"),
        ("tasks.nlu.labels=[a, b, a]", "tasks.nlu.labels: got ['a', 'b', 'a']; give at least two, .*"),
        ("tasks.code.template.tools=tools", "tasks.code.template.tools: is for chat templates, and .*"),
        ("tasks.code.template.train_on=all", "tasks.code.template.train_on: is for chat templates, and .*"),
        ("tasks.code.template.arguments={a: 1}", "tasks.code.template.arguments: is for chat templates, and .*"),
        (
            "tasks.code.template={messages: prompt, arguments: {tools: 1}}",
            "tasks.code.template.arguments: 'tools' is not an argument of a chat template's own; remove it",
        ),
        ("tasks.code.template={messages: prompt, response: a}", "tasks.code.template.response: is not used where .*"),
        ("tasks.code.template.layout=sharegpt", "tasks.code.template.layout: takes the field 'conversations', .*"),
        ("tasks.nlu.template.prompt='{'", "tasks.nlu.template.prompt: '{' is not a template .*; write {{ for a brace"),
        ("tasks.nlu.labels=['no', yess]", "tasks.nlu.labels: row 1 of tasks.nlu.train has 'yes', wanted .* 'yess'?"),
        ("tasks.nlu.template.prompt='{prompt!r}'", "tasks.nlu.template.prompt: {prompt!r} is not a field; .*"),
        ("tasks.nlu.template.prompt='{prompt:>9}'", "tasks.nlu.template.prompt: {prompt:>9} is not a field; .*"),
        ("adapter.targets=[]", "adapter.targets: .*"),
        ("adapter.targets=['']", "adapter.targets.0: got ''; .*"),
        ("train.max_length=1", "train.max_length: got 1; it should be greater than or equal to 2"),
        ("train.warmup_steps=10", "train.warmup_steps: got 10, train.steps is 10; give fewer than those"),
        ("train.micro_batch_tokens=4", "train.micro_batch_tokens: got 4, and a row may have .* give at least as many"),
        ("evaluate.metrics=[]", "evaluate.metrics: .*"),
        ("evaluate.max_new_tokens=128", "evaluate.max_new_tokens: got 128, the model has 128 positions; .*"),
        ("output=rows.jsonl/x", "output: .* cannot be made, as .*rows.jsonl' is not a folder .*"),
        ("train={stesp: 10}", "train.stesp: unknown key; there are engine, steps, .* Did you mean 'steps'?"),
        ("merges.all.weights={nlu: 1, code: x}", "merges.all.weights.code: got 'x'; it should be a valid .*"),
        ("tasks.nlu.template.prompt='{}'", "tasks.nlu.template.prompt: {} is not a field; use plain names .*"),
        (
            "tasks.code.template.prompt='{promt}?'",
            "tasks.code.template.prompt: takes the field 'promt', which the first row of tasks.code.train lacks; "
            "it has prompt, response. Did you mean 'prompt'.*",
        ),
        ("tasks.nlu.template.response=yes or no", "tasks.nlu.labels: are values of the one field in .* has 0; .*"),
        ("tasks.base={train: rows.jsonl, test: rows.jsonl}", "tasks.base: the name stands for the model without .*"),
        ("adapter=5", "adapter: got 5; wanted a mapping, key: value"),
        ("adapter.rank=0", "adapter.rank: got 0; it should be greater than 0"),
        ("adapter.rank=1.5", "adapter.rank: got 1.5; it should be a valid integer, .*"),
        ("adapter.alpha=.inf", "adapter.alpha: got inf; it should be a finite number"),
        ("adapter.density=.nan", "adapter.density: got nan; it should be .*"),
        ("adapter.density=0", "adapter.density: got 0; it should be greater than 0"),
        ("adapter.seed=-1", "adapter.seed: got -1; it should be greater than or equal to 0"),
        ("adapter.targets=5", "adapter.targets: got 5; wanted all-linear or wanted a list"),
        ("adapter.targets=[5]", "adapter.targets.0: got 5; wanted text; put it in quotes"),
        (
            "adapter.projection=resident",
            "adapter.projection: got 'resident'; wanted cached or recomputed or trained",
        ),
        (
            "adapter={projection: trained, share_projection: true}",
            "adapter.share_projection: makes one A for all tasks, and with adapter.projection trained each .*",
        ),
        ("tasks.code.mixture={./rows.jsonl: 1.0}", "tasks.code.mixture: its shares add up to 1; give less than 1, .*"),
        ("tasks.code.mixture={rows.jsonl: 0.5}", "tasks.code.mixture: 'rows.jsonl' is also tasks.code.train, .*"),
        ("tasks.code.mixture={none.csv: 0.5}", "tasks.code.mixture: there is no file 'none.csv'; .*"),
        ("tasks.code.train=hub:none", "tasks.code.train: got 'hub:none'; wanted hub:NAME:SPLIT, .*"),
        ("tasks.nlu.template.date=2026-01-31", "tasks.nlu.template.date: is for chat templates, .*; remove it"),
        ("tasks.nlu.template.date=soon", "tasks.nlu.template.date: got 'soon'; wanted a date such as 2026-01-31"),
        ("tasks.nlu.template.messages=prompt", "tasks.nlu.labels: are for template.response, and template.messages .*"),
        ("model.attention=flash", "model.attention: got 'flash'; wanted eager or sdpa or flex_attention or .*"),
        ("train.pack=true", "train.pack: .* is not known to keep packed rows apart, as gemma, .*"),
        ("adapter.modules_to_save=[x]", "adapter.modules_to_save: is given, and merges.* cannot merge what each .*"),
        ("adapter={projection: trained, dtype: bfloat16}", "adapter.dtype: got bfloat16, and a trained A is .*"),
        ("adapter.dtype=fp16", "adapter.dtype: got 'fp16'; wanted float32 or bfloat16 or float16.*"),
        ("adapter.mask=5", "adapter.mask: got 5; wanted a method's name, or a mapping with its name and options"),
        ("adapter.mask={seed: 5}", "adapter.mask.name: got nothing; wanted text"),
        ("adapter.mask=_select", "adapter.mask: unknown '_select' in masks; there are magnitude, .*"),
        ("adapter.mask={name: random, seed: x}", "adapter.mask.seed: got 'x'; it should be a valid integer, .*"),
        ("adapter.mask={name: random, seed: yes}", "adapter.mask.seed: got 'yes'; it should be a valid .*"),
        ("adapter.mask={name: random, seed: true}", "adapter.mask.seed: got True; wanted a number"),
        ("adapter.mask=no.such.module", "adapter.mask: no Python module 'no.such.module' can be found; check .*"),
        ("train.steps=", "train.steps, train.epochs: neither is given; give exactly one"),
        ("train.epochs=3", "train.steps, train.epochs: both are given; give exactly one"),
        ("train.calibrate={steps: 3, epochs: 3}", "train.calibrate.steps, train.calibrate.epochs: both are given; .*"),
        ("train.betas=[0.9]", "train.betas.1: is missing; give it a value"),
        ("train.betas=[0.9, 1.0]", "train.betas.1: got 1.0; it should be less than 1"),
        ("train.lr=0", "train.lr: got 0; it should be greater than 0"),
        ("merges.all.method=", "merges.all.method: got nothing; wanted a method's name, or a mapping .*"),
        ("merges.all={}", "merges.all.method: is missing; give it a value"),
        ("merges.nlu.method=concat", "merges.nlu: is also the name of a task or of the base; .*"),
        ("merges.all.tasks=[nlu, cod]", "merges.all.tasks: unknown task 'cod'; there are nlu, code. Did you .*"),
        ("merges.all.tasks=[]", "merges.all.tasks: none is given; name at least one, or remove it for all"),
        ("merges.all.tasks=[nlu, nlu]", "merges.all.tasks: nlu is listed twice; keep one"),
        ("merges.all.weights=[1]", "merges.all.weights: 1 given for 2 adapters (nlu, code); give one weight per .*"),
        (
            "merges.all.weights={nlu: 1, cod: 1}",
            "merges.all.weights: are for nlu, cod; wanted one for each of nlu, code",
        ),
        ("merges.all.weights=[1, x]", "merges.all.weights.1: got 'x'; it should be a valid number, .*"),
        ("merges.all.weights=[1, .inf]", "merges.all.weights.1: got inf; it should be a finite number.*"),
        ("merges.all.weights=[1, {q_proj: x}]", "merges.all.weights.1.q_proj: got 'x'; it should be a valid .*"),
        (
            "merges.all.weights={nlu: {default: .inf}, code: 1}",
            "merges.all.weights.nlu.default: got inf; it should be a finite number",
        ),
        (
            "merges.all.weights={nlu: 1, code: {0: 1}}",
            "merges.all.weights.code.0: the key is not a text; put it in quotes",
        ),
        ("merges.all.weights=5", "merges.all.weights: got 5; wanted a mapping, key: value or wanted a list"),
        ("trackers=[tensorbord]", "trackers: unknown 'tensorbord'; there are aim, .* 'tensorboard'?"),
        ("trackers=[tensorboard, tensorboard]", "trackers: tensorboard is listed twice; keep one"),
        ("trackers=[1]", "trackers.0: got 1; wanted text; put it in quotes"),
        ("merges.all.search=cma", "merges.all.search: got 'cma'; wanted a mapping, key: value"),
        ("merges.all.search={method: cam}", "merges.all.search.method: got 'cam'; wanted coordinate or cma.*"),
        (
            "merges.all.search={budgt: 5}",
            "merges.all.search.budgt: unknown key; there are method, .*. Did you mean 'budget'?",
        ),
        (
            "merges.all.search={bounds: [1, 0]}",
            "merges.all.search.bounds: got [1, 0]; the second must be larger than the first",
        ),
        (
            "merges.all.search={bounds: [0, .inf]}",
            "merges.all.search.bounds.1: got inf; it should be a finite .*",
        ),
        ("merges.all.search={budget: 0}", "merges.all.search.budget: got 0; it should be greater than 0"),
        ("merges.all.search={metric: los}", "merges.all.search.metric: got 'los'; wanted loss or .*"),
        (
            "merges.all={method: concat, tasks: [code], search: {rows: 70}}",
            "merges.all.search.rows: got 70, and tasks.code.train, whose last rows are held out for it, has 70; "
            "give fewer, or tasks.code.validation",
        ),
        (
            "merges.all={method: concat, weights: [1, 2], search: {}}",
            "merges.all.weights: are given, and merges.all.search finds them; set only one",
        ),
        (
            "merges.all={method: concat, tasks: [code], search: {metric: choice}}",
            "merges.all.search.metric: choice is measured on tasks that have labels, and none has; use loss",
        ),
        ("tasks.nlu.validation=none.jsonl", "tasks.nlu.validation: there is no file 'none.jsonl'; paths are .*"),
        ("evaluate.metrics=loss", "evaluate.metrics: got 'loss'; wanted a list"),
        ("evaluate.metrics=[los]", "evaluate.metrics: unknown 'los' in evaluation; .* 'loss'?"),
        ("cluster.workers=2.5", "cluster.workers: got 2.5; it should be a valid integer, .*"),
        ("multitask=independant", "multitask: unknown 'independant' in multitask; .* 'independent'?"),
    ],
)
def test_one_mistake_is_one_line_with_its_path(override: str, message: str) -> None:
    found = problems(MINIMAL, override)
    assert len(found) == 1
    assert re.fullmatch(re.escape(message).replace(re.escape(".*"), ".*"), found[0]), found


def test_a_seed_of_a_task_contradicts_a_shared_projection() -> None:
    found = problems(MINIMAL, "adapter.share_projection=true", "tasks.nlu.seed=3")
    assert found == ["tasks.nlu.seed: is given, but adapter.share_projection makes one A for all; set only one"]


def test_a_task_has_one_length_and_none_in_joint_training() -> None:
    found = problems(MINIMAL, "tasks.nlu.steps=2", "tasks.nlu.epochs=1")
    assert found == ["tasks.nlu.steps, tasks.nlu.epochs: both are given; give one, or neither"]
    found = problems(MINIMAL, "tasks.nlu.lr=1e-3", "multitask=joint", "merges={}")
    assert found == [
        "tasks.nlu.lr: cannot be combined with multitask joint, which trains all tasks as one; set those of train"
    ]
    found = problems(MINIMAL, "tasks.nlu.steps=2", "train.warmup_steps=2")
    assert found == ["train.warmup_steps: got 2, tasks.nlu.steps is 2; give fewer than those"]


def test_keys_that_are_no_text_are_reported() -> None:
    text = MINIMAL + "true: 1\n3: {}\n"
    assert problems(text, "tasks.nlu={1: 2}")[:3] == [
        "tasks.nlu.1: the key is not a text; put it in quotes",
        "True: the key is not a text; put it in quotes",
        "3: the key is not a text; put it in quotes",
    ]


def test_a_task_of_a_wrong_name_brings_no_wrong_reports_about_merges() -> None:
    text = MINIMAL.replace("code:", "c/d:").replace("{method: concat}", "{method: concat, weights: [1, 2]}")
    assert problems(text) == ["tasks.c/d: got 'c/d'; names are at most 64 letters, digits, - and _"]


def test_a_model_on_the_hub_is_not_looked_for_in_the_folder() -> None:
    assert load(MINIMAL, "model.path=owner/name").model.path == "owner/name"


# --- every wrong value at every key ----------------------------------------------------------------------------------

WHOLE: dict[str, Any] = {
    **yaml.safe_load(MINIMAL),
    "merges": {
        "all": {"method": "concat", "search": {"rows": 2}},
        "two": {
            "method": {"name": "ties", "density": 0.5},
            "weights": {"nlu": 1, "code": {"default": 0.1, "q_proj": 1}},
        },
    },
    "evaluate": {"metrics": ["loss"], "lm_eval": {"tasks": ["x"]}},
}
"""Without a mistake, and with every section there is."""

UNUSABLE = ["a\0b", "\ud800", 2**70, {1: 2}, {"x": {None: 1}}, ["\udfff"]]
"""What pydantic takes in some places, and no place may have."""
VALUES = [
    *(None, True, False, 0, -1, 2, 1.5, 1e300, float("inf"), float("nan"), 10**30),
    *(
        "",
        "x",
        "yes",
        "off",
        "1:30",
        "010",
        "1e5",
        "magnitude",
        "ddp",
        "deepspeed",
        "joint",
        "concat",
        "../x",
        "rows.jsonl",
    ),
    *([], [1], [2, 2], [1, 2, 3], ["a", "b"], ["a", 1], [None], [[]], [{}], ["tensorboard", "tensorboard"]),
    *({}, {"name": "x"}, {"name": 1}, {"name": "random", "seed": []}, {"x": {"y": [1]}}, {"a/b": {}}, {"nlu": 1}),
    *UNUSABLE,
]

Change = tuple[tuple[str, ...], Any]


def places(value: Any, path: tuple[str, ...] = ()) -> Iterator[tuple[str, ...]]:
    """The paths of all keys of a tree, of those within a method's options and a task's weights too."""
    if path:
        yield path
    for key, item in value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ():
        yield from places(item, (*path, str(key)))


def changed(tree: Any, changes: Iterable[Change]) -> Any:
    """The tree with other values in places; what is not changed is shared."""
    for (key, *below), value in changes:
        made = dict(tree) if isinstance(tree, dict) else dict(enumerate(tree))
        place = key if isinstance(tree, dict) else int(key)
        made[place] = changed(made[place], [(tuple(below), value)]) if below else value
        tree = made if isinstance(tree, dict) else list(made.values())
    return tree


def mistakes(wrong: dict[str, Any]) -> list[str]:
    start = time.process_time()
    try:
        config.validate(wrong)
    except ConfigError as error:
        return str(error).split("\n")
    finally:
        assert time.process_time() - start < 2
    return []


def is_about(line: str, path: tuple[str, ...]) -> bool:
    """Whether a mistake is in a place, below it, or in what holds it, or names it as what it contradicts."""
    found = [tuple(name.split(".")) for name in line.partition(": ")[0].split(", ")]
    return any(place[: len(path)] == path[: len(place)] for place in found) or f"{'.'.join(path)} " in line


def is_named(change: Change) -> bool:
    """Whether names of tasks stand there, which merges know although the tasks are wrong."""
    path, value = change
    return path == ("tasks",) and isinstance(value, dict) and all(isinstance(item, dict) for item in value.values())


def mended(change: Change, whole: dict[str, Any]) -> Change:
    path, value = change
    return (
        (path, {name: whole["tasks"]["code"] for name in value if isinstance(name, str)})
        if is_named(change)
        else change
    )


def test_only_true_mistakes_are_listed_for_every_wrong_value_at_every_key_and_for_pairs(place: Path) -> None:
    """What pydantic refuses by itself is reported; what else is, is a mistake also without the wrong values."""
    (place / "rows.jsonl").write_text(4 * '{"prompt": "a", "response": "yes"}\n')
    whole = config.dump(config.validate(WHOLE))
    sections_of = {path for path, _ in sections(config.validate(WHOLE))}
    assert sections_of - {()} <= set(places(whole))
    kinds = {
        value for value in vars(config).values() if isinstance(value, type) and hasattr(value, "__pydantic_config__")
    }
    assert {type(section) for _, section in sections(config.validate(WHOLE))} == kinds - {config.Choice}
    schema = pydantic.TypeAdapter(config.Run)

    @functools.cache
    def is_wrong(path: tuple[str, ...], number: int) -> bool:
        if any(VALUES[number] is value for value in UNUSABLE):
            return True
        try:
            schema.validate_python(changed(whole, [(path, VALUES[number])]))
        except pydantic.ValidationError:
            return True
        return False

    single = [[case] for case in itertools.product(places(whole), range(len(VALUES)))]
    draw = random.Random(0)
    pairs = (draw.sample(single, 2) for _ in itertools.count())
    apart = ([*a, *b] for a, b in pairs if a[0][0][: len(b[0][0])] != b[0][0][: len(a[0][0])])
    cases = [*single, *itertools.islice(apart, 10_000 - len(single))]
    assert len(cases) == 10_000
    for case in cases:
        changes = [(path, VALUES[number]) for path, number in case]
        found = mistakes(changed(whole, changes))
        wrong = [path for path, number in case if is_wrong(path, number)]
        assert all(any(is_about(line, path) for line in found) for path in wrong), (changes, found)
        others = [line for line in found if not any(is_about(line, path) for path in wrong)]
        if wrong and others:
            kept = [mended(change, whole) for change in changes if change[0] not in wrong or is_named(change)]
            assert set(others) <= set(mistakes(changed(whole, kept))), (changes, found)


def test_a_misspelt_key_is_one_mistake_wherever_it_stands() -> None:
    """Not also that the right key is missing, or what a rule makes of its default."""
    run = config.validate({**WHOLE, "train": {"steps": 10, "compile": True}, "multitask": {"name": "independent"}})
    whole = config.dump(run)
    for path, section in sections(run):
        for item in fields(section):
            wrong = copy.deepcopy(whole)
            holder = functools.reduce(lambda tree, key: tree[key], path, wrong)
            misspelt = f"{item.name}x"
            holder[misspelt] = holder.pop(item.name)
            (found,) = mistakes(wrong)
            assert found.startswith(f"{'.'.join((*path, misspelt))}: unknown key; ")
            assert found.endswith(f"Did you mean {item.name!r}?")
    joint = {"train": {"steps": 10, "compile": True}, "multitask": {"name": "joint", "projecton": "none"}, "merges": {}}
    (found,) = mistakes({**yaml.safe_load(MINIMAL), **joint})
    assert found.startswith("multitask.projecton: joint has no such option; ")


def test_any_override_ends_in_a_run_or_an_error_that_names_it(place: Path) -> None:
    (place / "rows.jsonl").write_text(4 * '{"prompt": "a", "response": "yes"}\n')
    (place / "run.yaml").write_text(yaml.safe_dump(WHOLE))
    whole = config.dump(config.validate(WHOLE))
    texts = [
        *("", "null", "yes", "x", "3", "-1", "1e400", ".nan", "010", "0o17", "0x1f", "1_000", "1:30", "2024-01-01"),
        *("[]", "[1, 2]", "{}", "{a: {b: [c]}}", "{1: 2}", "[x", "!!binary aa", "!!python/name:os.system", "!!set {a}"),
        *("&a [*a]", "*a", '"\\ud800"', '"\\0"', '"\\UFFFFFFFF"', "\0", "\udcff", "{x: 1, x: 2}", "{<<: 3}", "a: b: c"),
    ]
    long = [
        *("[" * 10_000, "- " * 5_000, "{a: " * 100 + "1" + "}" * 100, "a" * 100_000, "9" * 5000, "0x" + "f" * 5000),
        "[" + ",".join(f"&a{n} [{','.join([f'*a{n - 1}'] * 9) if n else 'x'}]" for n in range(12)) + "]",
        "[" + ",".join(f"&a{n} {{<<: [{','.join([f'*a{n - 1}'] * 9) if n else '{x: 1}'}]}}" for n in range(12)) + "]",
    ]
    paths = [".".join(path) for path in places(whole)]
    draw = random.Random(0)
    chosen = itertools.islice(itertools.chain(long, long, itertools.cycle(texts)), 1500)
    overrides = [f"{draw.choice(paths)}{draw.choice(('', '', '', '.x', '.x.y'))}={text}" for text in chosen]
    assert len(overrides) == 1500
    for override in overrides:
        start = time.process_time()
        try:
            config.load("run.yaml", [override])
        except ConfigError as error:
            assert all(": " in line for line in str(error).split("\n"))
            assert len(str(error)) < 10 * len(override) + 10_000
        assert time.process_time() - start < 2, override[:100]


def test_keys_that_are_not_set_are_in_no_fingerprint_if_they_came_later() -> None:
    assert config.fingerprinted(config.Template()) == {"prompt": "{prompt}", "response": "{response}"}
