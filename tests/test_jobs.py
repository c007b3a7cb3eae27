"""Jobs: seeds, fingerprints and their order."""

import dataclasses
import json
import os
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lori_dist import config
from lori_dist.cluster.run import planned
from lori_dist.errors import ConfigError, JobError
from lori_dist.jobs import (
    Job,
    check_inputs,
    dependents,
    evaluate_job,
    fingerprint,
    merge_job,
    order,
    path_lengths,
    ready,
    same_merges,
    sha256,
    task_seed,
    train_job,
)


@pytest.fixture
def inputs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The current directory, with a model's folder and the rows of two tasks."""
    monkeypatch.chdir(tmp_path)
    make_inputs(tmp_path)
    return tmp_path


def make_inputs(folder: Path) -> None:
    (folder / "model").mkdir()
    (folder / "model" / "config.json").write_text('{"hidden_size": 4}')
    (folder / "model" / "model.safetensors").write_bytes(bytes(range(256)) * 8)
    for task in ("math", "code"):
        for part in ("train", "test"):
            (folder / f"{task}-{part}.jsonl").write_text(70 * (json.dumps({"prompt": task, "response": part}) + "\n"))


def described(**changes: Any) -> config.Run:
    tree: dict[str, Any] = {
        "name": "demo",
        "model": {"path": "model"},
        "tasks": {name: {"train": f"{name}-train.jsonl", "test": f"{name}-test.jsonl"} for name in ("math", "code")},
        "train": {"steps": 4},
        "merges": {"all": {"method": "concat"}},
    }
    return config.validate({**tree, **changes})


# --- seeds -----------------------------------------------------------------------------------------------------------


def test_the_seed_of_a_task_is_frozen(inputs: Path) -> None:
    run = described()
    assert {task: task_seed(run, task) for task in run.tasks} == {"math": 67706387161171, "code": 7456472855087966}


def test_the_seed_of_a_task_follows_from_its_name_and_the_run_s_seed_alone(inputs: Path) -> None:
    run = described()
    alone = described(tasks={"math": config.dump(run)["tasks"]["math"]}, merges={})
    assert task_seed(alone, "math") == task_seed(run, "math")
    assert task_seed(run, "math") != task_seed(run, "code")
    assert task_seed(described(adapter={"seed": 1}), "math") != task_seed(run, "math")


def test_a_shared_projection_has_one_seed_and_a_task_s_own_seed_counts(inputs: Path) -> None:
    shared = described(adapter={"seed": 7, "share_projection": True})
    assert task_seed(shared, "math") == task_seed(shared, "code") == 7
    tasks = config.dump(described())["tasks"]
    tasks["math"]["seed"] = 11
    assert task_seed(described(tasks=tasks), "math") == 11


@given(seed=st.integers(0, 2**53 - 1), task=st.from_regex(r"\A[A-Za-z0-9][A-Za-z0-9_-]{0,63}\Z"))
def test_seeds_are_integers_that_json_keeps(seed: int, task: str) -> None:
    run = config.Run(
        name="demo",
        model=config.Model(path="model"),
        tasks={task: config.Task(train="", test="")},
        adapter=config.Adapter(seed=seed),
    )
    assert 0 <= task_seed(run, task) < 2**53


# --- fingerprints ----------------------------------------------------------------------------------------------------


def test_a_fingerprint_does_not_follow_the_order_of_the_keys() -> None:
    assert fingerprint("train", {"a": 1, "b": {"c": 2, "d": 3}}, []) == fingerprint(
        "train", {"b": {"d": 3, "c": 2}, "a": 1}, []
    )


@given(st.permutations(["one", "two"]))
def test_a_fingerprint_follows_all_its_parts(upstream: list[str]) -> None:
    prints = {
        fingerprint("train", {}, upstream),
        fingerprint("merge", {}, upstream),
        fingerprint("train", {"a": 1}, upstream),
        fingerprint("train", {}, upstream[::-1]),
        fingerprint("train", {}, upstream[:1]),
    }
    assert len(prints) == 5


@pytest.mark.parametrize(
    "change",
    [
        {"train": {"steps": 5}},
        {"train": {"steps": 4, "lr": 1e-3}},
        {"train": {"steps": 4, "batch_size": 8}},
        {"train": {"steps": 4, "seed": 1}},
        {"train": {"steps": 4, "calibrate": {"steps": 2}}},
        {"adapter": {"rank": 8}},
        {"adapter": {"density": 0.5}},
        {"adapter": {"mask": "per_layer"}},
        {"adapter": {"seed": 1}},
        {"adapter": {"targets": ["q_proj"]}},
        {"model": {"path": "model", "dtype": "bfloat16"}},
        {"model": {"path": "model", "attention": "eager"}},
    ],
)
def test_what_changes_the_result_changes_the_fingerprint(inputs: Path, change: dict[str, Any]) -> None:
    assert train_job(described(**change), "math").fingerprint != train_job(described(), "math").fingerprint


def test_inputs_that_change_while_a_job_runs_are_noticed(inputs: Path) -> None:
    run = described()
    trained = train_job(run, "math")
    planned = [trained, train_job(run, "code"), evaluate_job(run, "base", None), merge_job(run, "all", trained_by(run))]
    for job in planned:
        check_inputs(run, job)
    (inputs / "math-train.jsonl").write_text("changed")
    with pytest.raises(JobError, match=r"^tasks\.math\.train: the file has changed since the run began; give the same"):
        check_inputs(run, trained)
    for job in planned[1:]:
        check_inputs(run, job)
    (inputs / "code-test.jsonl").write_text("changed")
    with pytest.raises(JobError, match=r"^tasks\.code\.test: the file has changed"):
        check_inputs(run, planned[2])
    (inputs / "model" / "config.json").write_text("{}")
    with pytest.raises(JobError, match=r"^model\.path: the model has changed"):
        check_inputs(run, planned[1])


def trained_by(run: config.Run) -> dict[str, Job]:
    return {task: train_job(run, task) for task in run.tasks}


def test_a_method_of_one_s_own_counts_with_its_source(inputs: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(inputs)
    (inputs / "own").mkdir()
    source = inputs / "own" / "mask.py"

    def printed(text: str) -> str:
        source.write_text(f"def mask(b, *, density, share: float = 0.5):\n    return {text}\n")
        return train_job(described(adapter={"mask": "own.mask"}), "math").fingerprint

    (inputs / "own" / "__init__.py").touch()
    assert printed("b") == printed("b")
    assert printed("b") != printed("{}")


@pytest.mark.parametrize(
    "change",
    [
        {"train": {"steps": 4, "engine": "fsdp"}},
        {"train": {"steps": 4, "micro_batch_size": 1, "activation_checkpointing": True}},
        {"train": {"steps": 4, "compile": True}},
        {"train": {"steps": 4, "checkpoint_every": 1, "keep": 5}},
        {"adapter": {"projection": "recomputed"}},
        {"cluster": {"workers": 4, "retries": 3}},
        {"output": "elsewhere"},
        {"name": "other"},
        {"merges": {}},
        {"evaluate": {"rows": 3}},
        {"trackers": []},
    ],
)
def test_where_and_how_it_runs_does_not(inputs: Path, change: dict[str, Any]) -> None:
    assert train_job(described(**change), "math").fingerprint == train_job(described(), "math").fingerprint


@pytest.mark.parametrize(
    ("name", "changed"),
    [
        ("math-train.jsonl", {"train-math", "merge-all", "evaluate-math", "evaluate-all"}),
        ("math-test.jsonl", {"evaluate-base", "evaluate-math", "evaluate-code", "evaluate-all"}),
        ("model/model.safetensors", None),
        ("model/config.json", None),
        ("model/README.md", set()),
    ],
)
def test_other_input_changes_the_jobs_that_read_it_and_those_after_them(
    inputs: Path, name: str, changed: set[str] | None
) -> None:
    before = all_fingerprints(described())
    with (inputs / name).open("ab") as file:
        file.write(b"\n")
    after = all_fingerprints(described())
    different = {job for job in before if before[job] != after[job]}
    assert different == (set(before) if changed is None else changed)


def test_a_weight_that_changes_and_leaves_the_size_is_noticed(inputs: Path) -> None:
    before = train_job(described(), "math").fingerprint
    weights = inputs / "model" / "model.safetensors"
    status = weights.stat()
    weights.write_bytes(bytes(reversed(weights.read_bytes())))
    os.utime(weights, ns=(status.st_atime_ns, status.st_mtime_ns + 1))
    assert train_job(described(), "math").fingerprint != before


def test_a_large_weight_file_is_read_in_samples(inputs: Path) -> None:
    weights = inputs / "model" / "model.safetensors"
    with weights.open("wb") as file:
        file.truncate(2**27)
    before = train_job(described(), "math").fingerprint
    with weights.open("r+b") as file:
        file.seek(-1, os.SEEK_END)
        file.write(b"x")
    assert train_job(described(), "math").fingerprint != before


def test_a_model_s_folder_may_move(inputs: Path) -> None:
    before = train_job(described(), "math").fingerprint
    (inputs / "model").rename(inputs / "moved")
    assert train_job(described(model={"path": str(inputs / "moved")}), "math").fingerprint == before


def test_a_file_is_read_once(inputs: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = inputs / "math-train.jsonl"
    first, status = sha256(rows), rows.stat()
    rows.write_bytes(rows.read_bytes()[::-1])
    os.utime(rows, ns=(status.st_atime_ns, status.st_mtime_ns))
    assert sha256(rows) == sha256("math-train.jsonl") == first
    os.utime(rows, ns=(status.st_atime_ns, status.st_mtime_ns + 1))
    assert sha256(rows) != first


def test_weights_are_given_by_name_or_in_order_or_are_equal(inputs: Path) -> None:
    def weights(given: Any) -> list[Any]:
        run = described(merges={"all": {"method": "linear", "weights": given}})
        trained = {task: train_job(run, task) for task in run.tasks}
        found: list[Any] = merge_job(run, "all", trained).settings["weights"]
        return found

    assert weights(None) == [0.5, 0.5]
    assert weights([1, 2]) == weights({"code": 2, "math": 1}) == [1.0, 2.0]
    patterns = {"*.mlp.*": 0.5, "default": 1, "q_proj": -1}
    assert weights({"math": 1, "code": patterns}) == [1.0, [["*.mlp.*", 0.5], ["default", 1.0], ["q_proj", -1.0]]]


def test_the_order_of_patterns_counts(inputs: Path) -> None:
    def fingerprint(patterns: dict[str, float]) -> str:
        run = described(merges={"all": {"method": "linear", "weights": [1, patterns]}})
        return merge_job(run, "all", {task: train_job(run, task) for task in run.tasks}).fingerprint

    assert fingerprint({"mlp": 1, "layers.0": 2}) != fingerprint({"layers.0": 2, "mlp": 1})


def searched(**search: Any) -> config.Run:
    return described(merges={"all": {"method": "linear", "search": search}})


def merge_of(run: config.Run) -> Job:
    return merge_job(run, "all", {task: train_job(run, task) for task in run.tasks})


def test_a_training_is_another_one_only_where_rows_are_held_out_of_it(inputs: Path) -> None:
    def trained(run: config.Run) -> str:
        return train_job(run, "math").fingerprint

    plain = trained(described())
    assert trained(searched(rows=5)) not in (plain, trained(searched(rows=6)))
    assert trained(searched(rows=5)) == trained(searched(rows=5, budget=3, metric="exact_match"))
    assert trained(described(merges={"all": {"method": "linear", "tasks": ["code"], "search": {}}})) == plain
    tasks = {
        name: {"train": f"{name}-train.jsonl", "test": f"{name}-test.jsonl", "validation": "math-test.jsonl"}
        for name in ("math", "code")
    }
    assert trained(described(tasks=tasks, merges={"all": {"method": "linear", "search": {}}})) == plain


UNIT: list[dict[str, Any]] = [
    {"name": "ties"},
    {"name": "dare_ties"},
    {"name": "tsv"},
    {"name": "knots"},
    {"name": "knots", "inner": "dare_ties"},
    {"name": "core_space", "inner": "tsv"},
    {"name": "sce"},
    {"name": "iso"},
    {"name": "della"},
    {"name": "breadcrumbs", "inner": "ties"},
    {"name": "compress", "inner": "ties"},
]
SHARED: list[dict[str, Any]] = [
    {"name": "linear"},
    {"name": "dare"},
    {"name": "pico", "inner": "ties"},
    {"name": "knots", "inner": "dare"},
    {"name": "core_space"},
    {"name": "della", "inner": "task_arithmetic"},
    {"name": "breadcrumbs"},
    {"name": "compress"},
    {"name": "cp"},
    {"name": "do_merging"},
]


@pytest.mark.parametrize(("method", "share"), [*((one, 1.0) for one in UNIT), *((one, 0.5) for one in SHARED)])
def test_weights_by_default_are_those_of_the_method(inputs: Path, method: dict[str, Any], share: float) -> None:
    merges: dict[str, Any] = {"method": method}
    assert merge_of(described(merges={"all": merges})).settings["weights"] == [share] * 2
    given = merge_of(described(merges={"all": {**merges, "weights": [{"q_proj": 0.2}, 0.5]}})).settings["weights"]
    assert given == [[*([["default", 1.0]] if share == 1.0 else []), ["q_proj", 0.2]], 0.5]
    halves = merge_of(described(merges={"all": {**merges, "weights": [0.5, 0.5]}}))
    assert (halves.fingerprint == merge_of(described(merges={"all": merges})).fingerprint) == (share == 0.5)


def test_merges_that_are_the_same_function_say_so(inputs: Path, caplog: pytest.LogCaptureFixture) -> None:
    run = described(
        merges={
            "joined": {"method": "concat"},
            "summed": {"method": {"name": "linear"}, "weights": [0.5, 0.5]},
            "turned": {"method": {"name": "dare", "density": 1}, "tasks": ["code", "math"]},
            "other": {"method": "linear", "weights": [0.5, 0.4]},
            "alone": {"method": "linear", "tasks": ["code"]},
            "ties": {"method": "ties"},
            "again": {"method": {"name": "ties", "density": 0.2}, "weights": {"code": 1, "math": 1}},
            "rarer": {"method": {"name": "ties", "density": 0.3}},
            "searched": {"method": "linear", "search": {}},
        }
    )
    jobs = planned(run)
    assert same_merges(run, jobs) == [["joined", "summed", "turned"], ["ties", "again"]]
    assert "The merges joined, summed and turned are the same function of the same adapters" in caplog.text


def test_a_search_is_part_of_its_merge(inputs: Path) -> None:
    settings = merge_of(searched(rows=5, bounds=[-1, 2])).settings["search"]
    assert json.loads(json.dumps(settings)) == settings
    assert (settings["method"], settings["rows"], settings["bounds"]) == ("coordinate", 5, [-1.0, 2.0])
    assert {name: data["part"] for name, data in settings["tasks"].items()} == {"math": "train", "code": "train"}
    assert "search" not in merge_of(described()).settings


def test_a_search_is_done_again_for_other_rows_but_not_for_other_test_rows(inputs: Path) -> None:
    shutil.copy("code-train.jsonl", "validation.jsonl")
    run = searched()
    tasks = {**run.tasks, "code": dataclasses.replace(run.tasks["code"], validation="validation.jsonl")}
    run = dataclasses.replace(run, tasks=tasks)
    before = merge_of(run)
    assert before.settings["search"]["tasks"]["code"]["part"] == "validation"
    Path("code-test.jsonl").write_text('{"prompt": "new", "response": "new"}\n')
    assert merge_of(run).fingerprint == before.fingerprint
    check_inputs(run, before)
    Path("validation.jsonl").write_text('{"prompt": "new", "response": "new"}\n')
    assert merge_of(run).fingerprint != before.fingerprint
    with pytest.raises(JobError, match=r"^tasks\.code\.validation: the file has changed since the run began"):
        check_inputs(run, before)
    assert merge_of(searched(budget=3)).fingerprint != merge_of(searched(budget=4)).fingerprint


def test_settings_are_plain_json(inputs: Path) -> None:
    for job in all_jobs(
        described(adapter={"targets": ["q_proj"]}, train={"steps": 1, "engine": {"name": "deepspeed"}})
    ):
        assert json.loads(json.dumps(job.settings)) == job.settings


def all_jobs(run: config.Run) -> list[Job]:
    trained = {task: train_job(run, task) for task in run.tasks}
    merged = {name: merge_job(run, name, trained) for name in run.merges}
    return [
        *trained.values(),
        *merged.values(),
        *(evaluate_job(run, *item) for item in [("base", None), *trained.items(), *merged.items()]),
    ]


def all_fingerprints(run: config.Run) -> dict[str, str]:
    return {job.name: job.fingerprint for job in all_jobs(run)}


# --- order -----------------------------------------------------------------------------------------------------------


def job(name: str, *needs: str) -> Job:
    return Job(name=name, kind="train", needs=needs, fingerprint=name)


@st.composite
def plans(draw: st.DrawFn) -> list[Job]:
    """Plans without a circle, in any order."""
    count = draw(st.integers(0, 8))
    names = [f"job-{number}" for number in range(count)]
    needs = [draw(st.sets(st.sampled_from(names[:number]))) if number else set() for number in range(count)]
    return draw(st.permutations([job(name, *sorted(need)) for name, need in zip(names, needs, strict=True)]))


@given(plans())
def test_every_job_comes_after_what_it_needs(plan: list[Job]) -> None:
    ordered = order(plan)
    assert sorted(ordered, key=lambda job: job.name) == sorted(plan, key=lambda job: job.name)
    for place, item in enumerate(ordered):
        assert {before.name for before in ordered[:place]}.issuperset(item.needs)
    assert order(ordered) == ordered


def test_jobs_stay_in_the_order_of_the_plan_where_they_can() -> None:
    plan = [job("c", "b"), job("d"), job("b"), job("a")]
    assert [item.name for item in order(plan)] == ["d", "b", "c", "a"]


@pytest.mark.parametrize(
    ("plan", "message"),
    [
        ([job("a"), job("a")], "multitask: the plan has two jobs called a"),
        ([job("a", "b")], "multitask: a needs b, which the plan does not have"),
        ([job("x"), job("a", "b"), job("b", "a")], "multitask: a, b wait for each other"),
    ],
)
def test_a_plan_that_cannot_be_done_is_refused(plan: list[Job], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        order(plan)


@given(plans(), st.randoms(use_true_random=False))
def test_doing_what_is_ready_does_everything_once(plan: list[Job], random: Any) -> None:
    finished: list[str] = []
    while possible := ready(plan, finished, ()):
        finished.append(random.choice(possible).name)
    assert sorted(finished) == sorted(item.name for item in plan)


def test_what_runs_or_waits_for_others_is_not_ready() -> None:
    plan = [job("a"), job("b", "a"), job("c", "a", "d"), job("d"), job("e")]
    assert [item.name for item in ready(plan, ["a"], ["d"])] == ["b", "e"]


@given(plan=plans())
def test_the_longest_way_to_the_end(plan: list[Job]) -> None:
    ordered = order(plan)
    lengths = path_lengths(ordered)
    for job in ordered:
        after = [lengths[other.name] for other in ordered if job.name in other.needs]
        assert lengths[job.name] == 1 + max(after, default=0)


@given(plans(), st.data())
def test_all_that_hangs_on_a_failed_job_is_found(plan: list[Job], data: st.DataObject) -> None:
    ordered = order(plan)
    failed = data.draw(st.sets(st.sampled_from([item.name for item in ordered]))) if ordered else set()
    found = [item.name for item in dependents(ordered, failed)]
    reached = closure(ordered, failed)
    assert set(found) == reached - failed


def closure(plan: Sequence[Job], start: set[str]) -> set[str]:
    reached = set(start)
    for _ in plan:
        reached |= {item.name for item in plan if reached & set(item.needs)}
    return reached


def test_a_job_cannot_be_changed() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        job("a").name = "b"  # type: ignore[misc]
