"""A small run for tests that disturb it, driven by the command a user gives, and what it makes undisturbed."""

import json
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from lori_dist import config
from lori_dist.adapter import file
from lori_dist.cluster.work import Assignment, evaluate_rank
from lori_dist.training.train import train
from lori_dist.training.world import from_environment
from tests.distributed import run_distributed
from tests.models import tiny_llama
from tests.tokenizers import save


def evaluated(assignment: Assignment) -> dict[str, Any]:
    """The result of a job's evaluation in this process, a world of one rank, which ends with it."""
    try:
        result: dict[str, Any] = evaluate_rank([assignment])[assignment.job.name]["result"]
        return result
    finally:
        dist.destroy_process_group()


DEADLINE = 300.0
"""Seconds until something that does not come has failed the test."""
ROUNDING = 5e-6
"""Relative, between a training and the same one that was cut off and went on."""
OTHER_WORLD = 2e-5
"""Between trainings on different numbers of ranks, which add up in another order: over all values, as rounding differs
between processors, and a single small module can be at 2e-5."""


def described(folder: Path, **cluster: Any) -> config.Run:
    """One task, two phases of 60 steps, a checkpoint every 10. folder: gets inputs and results."""
    folder.mkdir(exist_ok=True)
    save(tiny_llama(), folder / "model")
    words = ["abc", "dog", "four", "x y", "hello", "sun", "1 2 3"]
    for part in ("train", "test"):
        rows = [json.dumps({"prompt": f"copy {word}: ", "response": word}) + "\n" for word in words]
        (folder / f"{part}.jsonl").write_text("".join(rows))
    return config.validate(
        {
            "name": "demo",
            "output": str(folder / "runs"),
            "model": {"path": str(folder / "model")},
            "tasks": {"copy": {"train": str(folder / "train.jsonl"), "test": str(folder / "test.jsonl")}},
            "adapter": {"rank": 4, "density": 0.3},
            "train": {"steps": 60, "batch_size": 6, "micro_batch_size": 1, "lr": 1e-2, "checkpoint_every": 10},
            "evaluate": {"max_new_tokens": 4, "rows": 2},
            "cluster": cluster,
        }
    )


class Driver:
    """`lori run` in a process of its own."""

    def __init__(self, run: config.Run, folder: Path, prefix: Sequence[str] = ()) -> None:
        self._log = folder / "driver.log"
        (folder / "run.yaml").write_text(json.dumps(config.dump(run)))
        words = [*prefix, sys.executable, "-m", "lori_dist", "run", str(folder / "run.yaml")]
        with self._log.open("wb") as stream:
            self.process = subprocess.Popen(words, stdout=stream, stderr=stream)

    def until(self, happened: Any) -> Any:
        """What `happened()` gives, as soon as that is something; the run must not end before."""
        end = time.monotonic() + DEADLINE
        while not (found := happened()):
            assert self.process.poll() is None, self.said()
            assert time.monotonic() < end, self.said()
            time.sleep(0.0005)
        return found

    def ends(self) -> int:
        """Its exit code."""
        return self.process.wait(timeout=DEADLINE)

    def said(self) -> str:
        return self._log.read_text(errors="replace")


@contextmanager
def driven(run: config.Run, folder: Path, prefix: Sequence[str] = ()) -> Iterator[Driver]:
    """prefix: before its command, to run it somewhere else."""
    driver = Driver(run, folder, prefix)
    try:
        yield driver
    finally:
        driver.process.kill()
        driver.process.wait()


def process_of(run: config.Run, rank: int, attempt: int) -> int | None:
    """The process of a rank, once that attempt at the training has begun."""
    log = run.folder / "logs" / f"train-copy.rank{rank}.log"
    text = log.read_text(errors="replace") if log.exists() else ""
    _, _, after = text.partition(f"attempt {attempt}, rank {rank}, process ")
    return int(after.split()[0]) if "\n" in after else None


def last_step(run: config.Run) -> tuple[str, int]:
    """Phase and step of the last line of its metrics."""
    metrics = run.folder / ".partial-train-copy" / "metrics.jsonl"
    lines = metrics.read_text().splitlines(keepends=True) if metrics.exists() else []
    whole = [line for line in lines if line.endswith("\n")]
    record = json.loads(whole[-1]) if whole else {"phase": "", "step": 0}
    return record["phase"], record["step"]


def attempts(run: config.Run) -> list[dict[str, Any]]:
    summary = json.loads((run.folder / "summary.json").read_text())
    return list(summary["jobs"]["train-copy"]["attempts"])


def assert_undisturbed(run: config.Run, folder: Path, *, world_size: int, tolerance: float = ROUNDING) -> None:
    """That the run's adapter is the one that a training in one go makes."""
    run_distributed(_train, run, str(folder), world_size=world_size)
    assert_close(run.folder / "train-copy" / "adapter.safetensors", folder / "adapter.safetensors", tolerance)


def assert_close(path: Path, wanted: Path, tolerance: float = ROUNDING) -> None:
    """That two adapters keep the same entries, with values that differ by so much at most, relative: those of each
    module, or with `OTHER_WORLD` all of them together."""
    found, expected = file.load(path).blocks[0].entries, file.load(wanted).blocks[0].entries
    assert found.keys() == expected.keys()
    for module, entries in expected.items():
        assert entries.index is not None and found[module].index is not None
        assert torch.equal(found[module].index, entries.index)
    groups = [[*expected]] if tolerance == OTHER_WORLD else [[module] for module in expected]
    for modules in groups:
        ours, theirs = (torch.cat([made[module].values for module in modules]) for made in (found, expected))
        assert (ours - theirs).norm() <= tolerance * theirs.norm()


def _train(run: config.Run, folder: str) -> None:
    train(run, "copy", from_environment(), Path(folder), fingerprint="undisturbed")
