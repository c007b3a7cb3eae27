"""What a run under the same name does with results of other settings: it says what differs, and keeps them."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch.distributed as dist

from lori_dist import config, folder
from lori_dist.cluster.board import Board
from lori_dist.cluster.launcher import train_task
from lori_dist.cluster.run import planned
from lori_dist.training.world import from_environment
from tests.cluster.trained import described


@pytest.fixture
def run(tmp_path: Path) -> config.Run:
    run = described(tmp_path)
    train = dataclasses.replace(run.train, steps=1, checkpoint_every=None)
    adapter = dataclasses.replace(run.adapter, density=1.0)
    run = dataclasses.replace(
        run, train=train, adapter=adapter, merges={"m": config.Merge(method=config.Choice(name="concat"))}
    )
    trained(run)
    return run


def trained(run: config.Run) -> Path:
    try:
        return train_task(run, "copy", from_environment(), progress=lambda record: None)
    finally:
        dist.destroy_process_group()


def board(run: config.Run) -> Board:
    return Board(run=run, jobs=planned(run), progress=lambda event: None)


def other(run: config.Run, **settings: Any) -> config.Run:
    return dataclasses.replace(run, train=dataclasses.replace(run.train, **settings))


def test_a_changed_setting_is_said_and_the_finished_adapter_is_kept(
    run: config.Run, caplog: pytest.LogCaptureFixture
) -> None:
    assert board(run).superseded() == []
    before = (run.folder / "train-copy" / "adapter.safetensors").read_bytes()
    changed = other(run, lr=4e-3)
    said = (
        "train-copy: settings changed since it finished: train.lr 0.01 -> 0.004; it is done again, and what is there "
        "is kept as train-copy.1"
    )
    assert board(changed).superseded() == [said]
    path = trained(changed)
    assert said in caplog.text
    assert path.read_bytes() != before
    assert (run.folder / "train-copy.1" / "adapter.safetensors").read_bytes() == before
    assert folder.finished(run.folder, planned(changed)[0]) is not None
    assert {place.name for place in (run.folder / "tensorboard").iterdir()} == {"train-copy", "train-copy.1"}
    assert trained(changed) == path  # it is there
    assert not (run.folder / "train-copy.2").exists()


def test_changed_rows_and_a_changed_model_are_named_as_such(run: config.Run) -> None:
    rows, settings = Path(run.tasks["copy"].train), Path(run.model.path) / "config.json"
    rows.write_text(rows.read_text() + '{"prompt": "more: ", "response": "more"}\n')
    settings.write_text(settings.read_text() + "\n")
    [said] = board(run).superseded()
    assert "model.path: config.json has changed" in said
    assert "tasks.copy.train: the file has changed" in said


def test_settings_that_change_no_result_are_no_change(run: config.Run) -> None:
    assert board(other(run, checkpoint_every=1, micro_batch_size=3)).superseded() == []


def test_summary_and_report_of_other_results_are_kept_once(run: config.Run) -> None:
    board(run).write()
    for name in ("report.html", "report.json", "report-cosine.png"):
        (run.folder / name).write_text("earlier")
    assert board(run).keep_report() == []
    changed = board(other(run, lr=4e-3))
    kept = ["summary.1.json", "report.1.html", "report.1.json", "report-cosine.1.png"]
    assert changed.keep_report() == kept
    assert [(run.folder / name).exists() for name in kept] == [True] * 4
    changed.write()
    assert changed.keep_report() == []  # as when it is cut off and resumed
    (run.folder / "summary.json").write_text('{"jobs": {"train-copy": {"state"')
    assert changed.keep_report() == []


def test_a_job_that_is_in_the_plan_no_more_keeps_its_report(run: config.Run) -> None:
    board(run).write()
    renamed = dataclasses.replace(run, tasks={"other": run.tasks["copy"]})
    assert board(renamed).keep_report() == ["summary.1.json"]
    assert json.loads((run.folder / "summary.1.json").read_text())["adapters"]["copy"]["kept"] > 0
