"""`lori run --dry-run`: all of a run but its steps, and no trace of it."""

import dataclasses
import json
from pathlib import Path

import pytest

from lori_dist import config, folder
from lori_dist.__main__ import main
from lori_dist.cluster.launcher import train_task
from lori_dist.errors import Preempted
from lori_dist.training.world import from_environment
from tests.cluster.trained import described
from tests.distributed import run_distributed

pytestmark = pytest.mark.ray


def files(root: Path) -> dict[str, tuple[int, int]]:
    """What is there: bytes, and when it was written."""
    return {str(path): (path.stat().st_size, path.stat().st_mtime_ns) for path in [root, *root.rglob("*")]}


def begin(run: config.Run) -> None:
    """Leaves a training that has done one step."""
    with pytest.raises(Preempted):
        train_task(run, "copy", from_environment(), progress=lambda record: None)


@pytest.fixture
def run(tmp_path: Path) -> config.Run:
    run = described(tmp_path, workers=2, cpus_per_worker=0.5)
    tasks = {**run.tasks, "again": dataclasses.replace(run.tasks["copy"], seed=1)}
    return dataclasses.replace(run, tasks=tasks, merges={"both": config.Merge(method=config.Choice(name="concat"))})


def shown(run: config.Run, file: Path, *words: str) -> int:
    file.write_text(json.dumps(config.dump(run)))
    return main(["run", str(file), "--dry-run", *words])


@pytest.mark.slow
def test_it_says_what_there_is_to_do_and_leaves_the_folder_as_it_was(
    run: config.Run, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    limited = dataclasses.replace(run, train=dataclasses.replace(run.train, time_limit=0.001))
    run_distributed(begin, limited, world_size=2)
    before = files(run.folder.parent)
    assert shown(run, tmp_path / "run.yaml") == 0
    assert files(run.folder.parent) == before
    titles, *lines = capsys.readouterr().out.splitlines()
    assert titles.split("  ")[0] == "job"
    found = {line.split()[0]: " ".join(line.split()[1:]) for line in lines[: lines.index("")]}
    assert found["train-copy"].startswith("begun 7 calibrate 60, train 60; 1 done ")
    assert found["train-again"].startswith("to do 7 calibrate 60, train 60 ")
    assert found["train-again"].endswith(", then 0.3 of them")
    assert found["merge-both"] == "to do train-copy, train-again"
    assert found["evaluate-base"] == "to do"
    built = "Every training job was built by 2 ranks (cluster.address: local), and no step was run."
    assert lines[-2] == f"{built} {run.folder} is unchanged."
    assert lines[-1].startswith("The evaluation ran on the longest rows of each task, one batch a rank")


@pytest.mark.slow
def test_what_a_training_would_meet_it_meets(
    run: config.Run, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert shown(run, tmp_path / "run.yaml", "adapter.targets=[q_proj, nowhere]") == 1
    said = capsys.readouterr().err
    assert "train-copy: " in said
    assert "nowhere" in said
    assert not run.folder.parent.exists()


@pytest.mark.slow
def test_what_an_evaluation_would_meet_it_meets(
    run: config.Run, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert shown(run, tmp_path / "run.yaml", "evaluate.max_new_tokens=128") == 1  # the model has 128 positions
    said = capsys.readouterr().err
    assert "evaluation: evaluate.max_new_tokens: got 128, the model has 128 positions" in said
    assert "train-copy" not in said


def test_what_is_wrong_before_needs_no_cluster(
    run: config.Run, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "train.jsonl").write_text('{"prompt": "a", "response": "b"}\n{"prompt": "a"}\n')
    assert shown(run, tmp_path / "run.yaml") == 2
    assert "train.jsonl:2: has no field 'response'; there are prompt\n" in capsys.readouterr().err
    assert not run.folder.parent.exists()
    (tmp_path / "train.jsonl").write_text('{"prompt": "a", "response": "b"}\n')
    with folder.lock(run.folder):
        assert shown(run, tmp_path / "run.yaml") == 1
    assert "is working on this run; wait for it" in capsys.readouterr().err
    assert shown(run, tmp_path / "run.yaml", f"output=file://{tmp_path}/there") == 2
    assert "is a URL, and a dry run looks into folders only; give a path" in capsys.readouterr().err
