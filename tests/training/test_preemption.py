"""Trainings told to end by a signal or for their time: they save, and go on bit for bit as if never stopped."""

import json
import os
import signal
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from lori_dist import config
from lori_dist.cluster.launcher import train_task
from lori_dist.config import Calibrate, Run
from lori_dist.errors import ConfigError, Preempted
from lori_dist.formats import native
from lori_dist.jobs import train_job
from lori_dist.training.metrics import Record
from lori_dist.training.preemption import Notice, StopRequest, of_process
from lori_dist.training.task import make_job
from lori_dist.training.train import train_together
from lori_dist.training.world import from_environment
from tests.distributed import run_distributed

STEPS = {"calibrate": 5, "train": 6}


@pytest.fixture
def run(model_folder: Path, tmp_path: Path) -> Run:
    """Without checkpoints but those of a training that is told to end."""
    tasks = {}
    for name, answer in {"short": "yes", "long": "no yes no"}.items():
        path = tmp_path / f"{name}.jsonl"
        rows = [{"prompt": f"{number}: ", "response": answer} for number in range(7)]
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        tasks[name] = {"train": str(path), "test": str(path)}
    tasks["short"] |= {"steps": 2}
    return config.validate(
        {
            "name": "t",
            "output": str(tmp_path / "runs"),
            "model": {"path": str(model_folder)},
            "tasks": tasks,
            "adapter": {"rank": 4, "density": 0.3},
            "train": {
                "steps": STEPS["train"],
                "calibrate": {"steps": STEPS["calibrate"]},
                "batch_size": 4,
                "micro_batch_size": 1,
                "lr": 1e-2,
                "schedule": "cosine",
                "checkpoint_every": None,
            },
        }
    )


def changed(run: Run, tmp_path: Path, name: str, **settings: Any) -> Run:
    return replace(run, output=str(tmp_path / name), train=replace(run.train, **settings))


def fit(run: Run, terminated: tuple[str, int] | None = None) -> str:
    """The adapter's file, or what it said when it ended before. terminated: phase and step at which rank 1 gets a
    SIGTERM."""
    world, numbers = from_environment(), Path(run.output) / "rank1"
    numbers.parent.mkdir(parents=True, exist_ok=True)
    if world.rank == 1:
        numbers.write_text(str(os.getpid()))

    def watch(record: Record) -> None:
        if (record["phase"], record["step"]) == terminated:
            os.kill(int(numbers.read_text()), signal.SIGTERM)

    try:
        return str(train_task(run, "long", world, progress=watch))
    except Preempted as error:
        return str(error)


def values(run: Run, task: str = "long") -> Tensor:
    [block] = native.load(run.folder / f"train-{task}" / "adapter.safetensors").blocks
    return torch.cat([entries.values for entries in block.entries.values()])


def steps(run: Run, task: str = "long", place: str = "train-") -> list[tuple[str, int]]:
    lines = (run.folder / f"{place}{task}" / "metrics.jsonl").read_text().splitlines()
    return [(record["phase"], record["step"]) for record in map(json.loads, lines)]


EVERY = [(phase, step) for phase, count in STEPS.items() for step in range(1, count + 1)]


def test_a_signal_to_one_rank_saves_on_all_and_nothing_is_done_twice(run: Run, tmp_path: Path) -> None:
    whole, run = changed(run, tmp_path, "whole"), changed(run, tmp_path, "stopped")
    run_distributed(fit, whole, world_size=2)
    for phase in STEPS:
        first, second = run_distributed(fit, run, (phase, 2), world_size=2)
        done = steps(run, place=".partial-train-")[-1]
        assert done in ((phase, 2), (phase, 3))  # the signal is on its way while the step is counted
        where = f"long after step {done[1]} of {STEPS[phase]} of phase {phase}"
        assert (
            first == second == f"{where}: saved and ended, as SIGTERM was received; the same command resumes from there"
        )
    run_distributed(fit, run, world_size=2)
    assert steps(run) == EVERY
    assert torch.equal(values(run), values(whole))


def test_at_its_time_limit_a_training_has_done_a_step_and_goes_on_from_it(run: Run, tmp_path: Path) -> None:
    run = changed(run, tmp_path, "runs", steps=2, calibrate=Calibrate(steps=1))
    whole, short = changed(run, tmp_path, "whole"), changed(run, tmp_path, "stopped", time_limit=0.001)
    run_distributed(fit, whole, world_size=1)
    for said in ("long after step 1 of 1 of phase calibrate: ", "long after step 1 of 2 of phase train: "):
        [found] = run_distributed(fit, short, world_size=1)
        assert found.startswith(f"{said}saved and ended, as train.time_limit has passed; the same command")
    [path] = run_distributed(fit, short, world_size=1)  # after the last step it is done, however late
    assert Path(path) == short.folder / "train-long" / "adapter.safetensors"
    assert steps(short) == [("calibrate", 1), ("train", 1), ("train", 2)]
    assert torch.equal(values(short), values(whole))


def pack(run: Run, stop_request: StopRequest) -> list[str] | str:
    def make(task: str) -> Any:
        job = train_job(run, task)
        return lambda: make_job(
            run,
            job,
            from_environment(),
            run.folder / job.name,
            fingerprint=job.fingerprint,
            stop_request=stop_request,
        )

    try:
        return list(train_together({task: make(task) for task in run.tasks}, from_environment()))
    except Preempted as error:
        return str(error)


def pack_for_three_steps(run: Run) -> list[str] | str:
    count = iter(range(3, 0, -1))
    rank = from_environment().rank
    return pack(run, lambda: Notice.TIME_LIMIT if next(count) == 1 and rank == 1 else Notice.NONE)


def pack_to_the_end(run: Run) -> list[str] | str:
    return pack(run, lambda: Notice.NONE)


def test_packed_trainings_save_all_of_their_tasks(run: Run, tmp_path: Path) -> None:
    whole, run = changed(run, tmp_path, "whole"), changed(run, tmp_path, "stopped")
    run_distributed(pack_to_the_end, whole, world_size=2)
    for phase, num_short in (("calibrate", 3), ("train", 1), ("train", 2)):
        said = run_distributed(pack_for_three_steps, run, world_size=2)
        assert said[0] == said[1]
        assert f"short after step {num_short} of " in said[0]
        assert f" of phase {phase}: saved and ended, as train.time_limit has passed; the same" in said[0]
    run_distributed(pack_to_the_end, run, world_size=2)
    for task, count in {"short": 2, "long": 6}.items():
        assert steps(run, task) == [*EVERY[:5], *(("train", step) for step in range(1, count + 1))]
        assert torch.equal(values(run, task), values(whole, task))


def test_a_signal_is_for_the_training_alone() -> None:
    before = signal.getsignal(signal.SIGTERM)
    with of_process(None) as stop_request:
        assert stop_request() is Notice.NONE
        os.kill(os.getpid(), signal.SIGTERM)
        assert stop_request() is Notice.SIGNAL
    assert signal.getsignal(signal.SIGTERM) == before


def test_the_limit_is_no_part_of_what_a_job_is(run: Run) -> None:
    limited = replace(run, train=replace(run.train, time_limit=60.0))
    assert train_job(limited, "long").fingerprint == train_job(run, "long").fingerprint


@pytest.mark.parametrize(
    ("given", "seconds"),
    [("11h30m", 41400), ("1d2h3m4s", 93784), ("90m", 5400), ("45s", 45), ("3600", 3600), (3600, 3600), (0.5, 0.5)],
)
def test_limits_are_durations_or_seconds(run: Run, given: Any, seconds: float) -> None:
    tree = config.dump(run)
    tree["train"]["time_limit"] = given
    found = config.validate(tree)
    assert found.train.time_limit == seconds
    assert config.validate(config.dump(found)) == found


@pytest.mark.parametrize("given", ["", "soon", "1h 30m", "30m1h", "1.5h", "-1h", 0, "0m", -5, True, float("inf")])
def test_other_limits_are_refused(run: Run, given: Any) -> None:
    tree = config.dump(run)
    tree["train"]["time_limit"] = given
    with pytest.raises(ConfigError, match=r"^train\.time_limit: "):
        config.validate(tree)
