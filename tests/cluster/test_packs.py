"""Several tasks' trainings in one gang."""

import json
import os
import shutil
import signal
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from lori_dist import config
from lori_dist.cluster import schedule
from lori_dist.errors import ConfigError
from lori_dist.jobs import Job
from tests.cluster.trained import assert_close, described, driven, last_step, process_of

GROWN = 1e-4
"""Of one module, relative: what 60 steps of Adam make of sums that are added up in another order."""


def job(name: str, kind: Any = "train", **settings: Any) -> Job:
    needs = settings.pop("needs", ())
    return Job(name=name, kind=kind, needs=needs, settings=settings, fingerprint=name)


READY = [
    job("train-a"),
    job("evaluate-base", "evaluate"),
    job("train-b"),
    job("train-c", start="digest"),
    job("train-joint", joint={}),
    job("evaluate-x", "evaluate", needs=("train-x",)),
]


@pytest.mark.parametrize(
    ("packing", "wanted"),
    [
        ("off", [["train-a"], ["evaluate-base", "evaluate-x"], ["train-b"], ["train-c"], ["train-joint"]]),
        ("auto", [["train-a", "train-b", "train-c"], ["evaluate-base", "evaluate-x"], ["train-joint"]]),
        (2, [["train-a", "train-b"], ["evaluate-base", "evaluate-x"], ["train-c"], ["train-joint"]]),
    ],
)
def test_what_is_packed(packing: Any, wanted: list[list[str]]) -> None:
    assert [[one.name for one in pack] for pack in schedule.packs(READY, packing)] == wanted


@pytest.mark.parametrize(("text", "wanted"), [("off", "off"), ("'off'", "off"), ("auto", "auto"), ("3", 3)])
def test_it_is_written_as_yaml_has_it(tmp_path: Path, text: str, wanted: Any) -> None:
    run = described(tmp_path)
    (tmp_path / "run.yaml").write_text(json.dumps(config.dump(run)))
    assert config.load(tmp_path / "run.yaml", [f"cluster.packing={text}"]).cluster.packing == wanted


def test_what_goes_on_from_another_is_not() -> None:
    ready = [job("train-a"), job("train-b", needs=("train-x",)), job("train-c", sequel={"before": []})]
    assert [len(pack) for pack in schedule.packs(ready, "auto")] == [1, 1, 1]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"cluster": {"packing": 1}}, "cluster.packing: got 1; .*greater than or equal to 2"),
        ({"cluster": {"packing": "on"}}, "cluster.packing: got 'on'; wanted off or auto"),
    ],
)
def test_what_cannot_be_is_refused(tmp_path: Path, change: dict[str, Any], message: str) -> None:
    tree = config.dump(described(tmp_path))
    tree["cluster"]["packing"] = "auto"
    for key, value in change.items():
        tree[key] = {**tree[key], **value} if isinstance(value, dict) else value
    with pytest.raises(ConfigError, match=message):
        config.validate(tree)


@pytest.fixture
def run(tmp_path: Path) -> config.Run:
    """Two tasks in one gang."""
    run = described(tmp_path, workers=2, cpus_per_worker=0.5, packing="auto")
    copy = run.tasks["copy"]
    turned = replace(copy, template=replace(copy.template, prompt="{response}", response="{prompt}"))
    return replace(run, tasks={"copy": copy, "turn": turned})


def summary(run: config.Run) -> dict[str, Any]:
    return dict(json.loads((run.folder / "summary.json").read_text()))


@pytest.mark.ray
@pytest.mark.slow
def test_a_killed_pack_goes_on_and_a_broken_task_ends_alone(run: config.Run, tmp_path: Path) -> None:
    separate = replace(run, name="alone", cluster=replace(run.cluster, packing="off"))
    with driven(separate, tmp_path) as driver:
        assert driver.ends() == 0, driver.said()
    run = replace(run, tasks={**run.tasks, "broken": replace(run.tasks["copy"], lr=1e38)})
    with driven(run, tmp_path) as driver:
        driver.until(lambda: last_step(run)[1] >= 15)
        os.kill(driver.until(lambda: process_of(run, 1, 1)), signal.SIGKILL)
        assert driver.ends() == 1
        assert "train-broken: broken: at step " in driver.said()
    jobs = summary(run)["jobs"]
    assert {name: jobs[f"train-{name}"]["state"] for name in run.tasks} == {
        "copy": "finished",
        "turn": "finished",
        "broken": "failed",
    }
    assert jobs["train-copy"]["packed_with"] == ["train-turn", "train-broken"]
    assert [bool(attempt["error"]) for attempt in jobs["train-turn"]["attempts"]] == [True, False]
    assert jobs["train-turn"]["attempts"][1]["resumed_at"]["step"] > 0
    assert jobs["evaluate-copy"]["state"] == "finished"
    for model, of_tasks in json.loads((separate.folder / "summary.json").read_text())["evaluation"].items():
        for task, metrics in of_tasks.items():
            assert summary(run)["evaluation"][model][task]["loss"] == pytest.approx(metrics["loss"], rel=1e-3)
    for task in ("copy", "turn"):
        found, wanted = (one.folder / f"train-{task}" / "adapter.safetensors" for one in (run, separate))
        assert_close(found, wanted, GROWN)
    with driven(replace(run, cluster=replace(run.cluster, packing="off")), tmp_path) as driver:
        assert driver.ends() == 1
    again = summary(run)["jobs"]
    assert all(again[f"train-{task}"].get("cached") for task in ("copy", "turn"))


@pytest.mark.ray
@pytest.mark.slow
def test_a_pack_whose_output_is_a_url_gives_what_one_in_a_folder_does(run: config.Run, tmp_path: Path) -> None:
    """With states that are read again within the attempt: the best ones."""
    tasks = {name: replace(task, validation=task.test) for name, task in run.tasks.items()}
    train = replace(run.train, validate_every=5, early_stop=2)
    run = replace(run, tasks=tasks, train=train)
    there = replace(run, output=(tmp_path / "store").as_uri())
    try:
        for one in (run, there):
            with driven(one, tmp_path) as driver:
                assert driver.ends() == 0, driver.said()
        assert summary(there)["jobs"]["train-copy"]["packed_with"] == ["train-turn"]
        for task in tasks:
            name = f"train-{task}/adapter.safetensors"
            assert_close(tmp_path / "store" / run.name / name, run.folder / name)
        assert summary(there)["evaluation"] == summary(run)["evaluation"]
    finally:
        shutil.rmtree(there.folder.parent, ignore_errors=True)
