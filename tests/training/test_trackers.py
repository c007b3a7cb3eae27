"""What trackers get: TensorBoard for real, of the others what does not need their servers."""

import inspect
import os
import threading
import time
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate.state import PartialState
from accelerate.tracking import LOGGER_TYPE_TO_CLASS
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from lori_dist import config
from lori_dist.errors import JobError
from lori_dist.training.trackers import ARGUMENTS, forget, tracked

Curve = list[tuple[int, float]]


@pytest.fixture
def run(tmp_path: Path) -> config.Run:
    return config.Run(name="demo", output=str(tmp_path), model=config.Model(path="model"), tasks={})


def curves(place: Path) -> dict[str, Curve]:
    """What TensorBoard shows of a folder: name -> (step, value), in the order they were written."""
    accumulator = EventAccumulator(str(place), size_guidance={"scalars": 0})
    accumulator.Reload()
    return {
        tag: [(event.step, event.value) for event in accumulator.Scalars(tag)] for tag in accumulator.Tags()["scalars"]
    }


def step(number: int, **others: Any) -> dict[str, Any]:
    return {"phase": "train", "step": number, "num_steps": 9, "loss": 1 / number, "time": 1.7e9, "mfu": None, **others}


def track(run: config.Run, records: Iterable[dict[str, Any]], job: str = "train-math") -> None:
    with tracked(run, job) as write:
        for record in records:
            write(record)


def test_steps_become_curves_of_their_phase(run: config.Run) -> None:
    track(run, [step(1, phase="calibrate"), step(2, phase="calibrate"), step(1), step(2), step(3)])
    job = run.folder / "tensorboard" / "train-math"
    assert {path.name for path in job.iterdir()} == {"calibrate", "train"}
    assert curves(job / "calibrate") == {"loss": [(1, 1.0), (2, 0.5)]}
    assert curves(job / "train") == {"loss": [(1, 1.0), (2, 0.5), (3, pytest.approx(1 / 3))]}


def test_measurements_become_points_by_metric_and_task(run: config.Run) -> None:
    measured = [{"metric": "loss", "task": task, "value": 0.5, "seconds": 3.0, "time": 1.7e9} for task in "ab"]
    track(run, measured, "evaluate-all")
    track(run, [{"kept": 5, "bytes": 99, "method": "concat", "time": 1.7e9}], "merge-all")
    place = run.folder / "tensorboard"
    assert curves(place / "evaluate-all") == {"loss/a": [(0, 0.5)], "loss/b": [(0, 0.5)]}
    assert curves(place / "merge-all") == {"kept": [(0, 5.0)], "bytes": [(0, 99.0)]}


@pytest.mark.parametrize("resumed_at", [1, 3, 5])
def test_steps_that_are_done_again_are_there_once(run: config.Run, resumed_at: int) -> None:
    track(run, [step(number, loss=0.0) for number in range(1, 6)])
    time.sleep(1.0)  # TensorBoard tells files apart by the second they begin in
    track(run, [step(number, loss=1.0) for number in range(resumed_at, 8)])
    found = curves(run.folder / "tensorboard" / "train-math" / "train")["loss"]
    assert found == [(number, float(number >= resumed_at)) for number in range(1, 8)]


def test_a_job_that_is_done_anew_leaves_nothing_of_the_old_one(run: config.Run) -> None:
    track(run, [step(1, phase="calibrate"), step(1)])
    track(run, [step(1)], "train-code")
    forget(run, "train-math")
    assert [path.name for path in (run.folder / "tensorboard").iterdir()] == ["train-code"]


@pytest.mark.parametrize("records", [[], [step(1)]], ids=["no record", "no tracker"])
def test_what_nobody_wants_is_not_written(run: config.Run, records: list[dict[str, Any]]) -> None:
    track(replace(run, trackers=("tensorboard",) if not records else ()), records)
    assert not run.folder.exists()


def test_nothing_is_left_open(run: config.Run) -> None:
    def held() -> tuple[int, int]:
        return threading.active_count(), len(os.listdir("/proc/self/fd"))

    track(run, [step(1)])  # which imports
    before = held()
    for number in range(10):
        track(run, [step(1, phase="calibrate"), step(1)], f"train-{number}")
    assert held() == before


def test_a_launcher_s_variables_start_nothing(run: config.Run, monkeypatch: pytest.MonkeyPatch) -> None:
    PartialState._reset_state()
    for name, value in {"RANK": "2", "LOCAL_RANK": "2", "WORLD_SIZE": "4"}.items():
        monkeypatch.setenv(name, value)
    num_threads, initialized = torch.get_num_threads(), torch.distributed.is_initialized()
    track(run, [step(1)])
    assert curves(run.folder / "tensorboard" / "train-math" / "train") == {"loss": [(1, 1.0)]}
    assert torch.distributed.is_initialized() == initialized
    assert torch.get_num_threads() == num_threads
    assert os.environ["LOCAL_RANK"] == "2"


def test_a_tracker_that_does_not_work_is_named_without_secrets(
    tmp_path: Path, run: config.Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DEMO_API_KEY", "hush-hush")
    (tmp_path / "hush-hush").touch()
    with pytest.raises(JobError, match=r"^trackers: tensorboard does not work") as caught:
        track(replace(run, output=str(tmp_path / "hush-hush")), [step(1)])
    assert "/***/demo" in str(caught.value)
    assert "hush-hush" not in str(caught.value)
    assert caught.value.__cause__ is None
    assert caught.value.__suppress_context__  # a traceback shows the message alone


def test_what_went_wrong_before_is_not_hidden_by_a_tracker(run: config.Run) -> None:
    with pytest.raises(ZeroDivisionError), tracked(run, "train-math") as write:
        write(step(1))
        raise ZeroDivisionError
    assert curves(run.folder / "tensorboard" / "train-math" / "train") == {"loss": [(1, 1.0)]}


def test_the_trackers_are_those_of_accelerate() -> None:
    assert set(LOGGER_TYPE_TO_CLASS) == set(ARGUMENTS) == set(config.TRACKERS)


@pytest.mark.parametrize("name", config.TRACKERS)
def test_every_tracker_takes_what_it_is_told(name: str, run: config.Run) -> None:
    kind, arguments = LOGGER_TYPE_TO_CLASS[name], ARGUMENTS[name](run, "train-math/train", 3)
    assert kind(**arguments).name == name
    inspect.signature(kind.__init__).bind(None, **arguments)
