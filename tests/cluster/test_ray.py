"""A run on a real cluster: failures, kills and continuing after them.

One run is told in four parts, as each start of a cluster and of a gang takes seconds: its driver is killed; then a rank
is killed, and one task has a rate at which nothing can be trained; then the rate is mended; then everything is there
already.
"""

import dataclasses
import itertools
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch

from lori_dist import config, jobs
from lori_dist.cluster import work
from lori_dist.cluster.board import Progress
from lori_dist.cluster.connection import TOKEN_FILE, connected
from lori_dist.cluster.failures import CUT_OFF, DIED
from lori_dist.cluster.run import execute
from lori_dist.errors import AdapterError, ConfigError, JobError
from lori_dist.formats import native
from lori_dist.jobs import order
from lori_dist.merges import merge_files
from lori_dist.multitask.independent import plan
from lori_dist.training.train import train
from lori_dist.training.world import from_environment
from tests.distributed import run_distributed
from tests.merges.made import adapter, block
from tests.models import tiny_llama
from tests.processes import command, descendants, listening
from tests.tokenizers import save

pytestmark = pytest.mark.ray

DEADLINE = 240.0
"""Seconds until a process that does not get on has failed the test."""


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model's folder and the rows of two tasks, one of them with a row that cannot be used."""
    folder = tmp_path_factory.mktemp("inputs")
    save(tiny_llama(), folder / "model")
    words = ["abc", "dog", "four", "x y", "hello", "sun", "1 2 3"]
    for task, answer in {"copy": lambda word: word, "reverse": lambda word: word[::-1]}.items():
        rows = [json.dumps({"prompt": f"{task} {word}: ", "response": answer(word)}) + "\n" for word in words]
        (folder / f"{task}-test.jsonl").write_text("".join(rows[:3]))
        (folder / f"{task}-train.jsonl").write_text("".join(rows))
    return folder


@pytest.fixture(scope="module")
def run(inputs: Path) -> config.Run:
    """Of two tasks, one cannot be trained at the rate it has."""
    return config.validate(
        {
            "name": "demo",
            "output": str(inputs / "runs"),
            "model": {"path": str(inputs / "model")},
            "tasks": {
                name: {
                    "train": str(inputs / f"{name}-train.jsonl"),
                    "test": str(inputs / f"{name}-test.jsonl"),
                    "lr": lr,
                }
                for name, lr in (("copy", 1e-2), ("reverse", 1e38))
            },
            "adapter": {"rank": 4, "density": 0.3},
            "train": {"steps": 80, "batch_size": 3, "micro_batch_size": 1, "checkpoint_every": 10},
            "merges": {"both": {"method": "concat"}},
            "evaluate": {"max_new_tokens": 4},
            "cluster": {"workers": 2, "cpus_per_worker": 0.5},
        }
    )


@dataclass
class Story:
    """What was seen of the run's four parts."""

    run: config.Run
    orphans: set[int] = field(default_factory=set)
    checkpoints: list[str] = field(default_factory=list)
    """Of the training whose driver was killed."""
    unfinished: list[str] = field(default_factory=list)
    """Folders after the kill that look like a finished job."""
    sockets: set[str] = field(default_factory=set)
    """Addresses on which the cluster's processes listened, before any gang and while one trained."""
    lock: str = ""
    """The message to a second driver."""
    killed: int = 0
    """The process of the rank that was killed."""
    events: list[Progress] = field(default_factory=list)
    error: str = ""
    broken: dict[str, Any] = field(default_factory=dict)
    """The summary of the run with the rate that is too high."""
    mended: dict[str, Any] = field(default_factory=dict)
    again: dict[str, Any] = field(default_factory=dict)


@pytest.fixture(scope="module", params=[pytest.param("story", marks=pytest.mark.slow)])
def story(run: config.Run, inputs: Path) -> Story:
    story = Story(run=run)
    kill_driver(story, inputs)
    kill_rank(story)
    run = mended(run)
    story.mended = execute(run)
    nowhere = dataclasses.replace(run.cluster, address="127.0.0.1:1")  # a second run does not even look for a cluster
    story.again = execute(dataclasses.replace(run, cluster=nowhere))
    return story


DRIVER = """
import json, sys
from lori_dist import config
from lori_dist.cluster.run import execute
execute(config.validate(json.load(sys.stdin)))
"""


def kill_driver(story: Story, inputs: Path) -> None:
    """Starts the run, and kills its driver as soon as a training has a checkpoint."""
    partial = story.run.folder / ".partial-train-copy" / "checkpoints"
    with (
        (inputs / "driver.log").open("w") as log,
        subprocess.Popen([sys.executable, "-c", DRIVER], stdin=subprocess.PIPE, stdout=log, stderr=log) as process,
    ):
        assert process.stdin is not None
        process.stdin.write(json.dumps(config.dump(story.run)).encode())
        process.stdin.close()
        for _ in patiently():
            assert process.poll() is None, (inputs / "driver.log").read_text()
            if any(partial.glob("*.safetensors")):
                break
        family = descendants(process.pid)
        process.kill()
    story.checkpoints = [path.name for path in partial.glob("*.safetensors")]
    story.unfinished = [path.name for path in story.run.folder.glob("*-*") if not path.name.startswith(".")]
    for _ in patiently():
        story.orphans = {pid for pid in family if command(pid).startswith("ray::")}
        if not story.orphans:
            break


def kill_rank(story: Story) -> None:
    """Runs again, and kills a rank once it trains."""

    def watch(event: Progress) -> None:
        story.events.append(event)
        if not story.sockets:
            story.sockets = listening(descendants(os.getpid()))
            with pytest.raises(JobError) as caught:
                execute(story.run)
            story.lock = str(caught.value)
        if event.num_steps:
            story.sockets |= listening(descendants(os.getpid()))
        if event.job == "train-copy" and not story.killed:
            log = (story.run.folder / "logs" / "train-copy.rank1.log").read_text()
            if started := re.search(r"attempt 2, rank 1, process (\d+)", log):
                story.killed = int(started[1])
                os.kill(story.killed, signal.SIGKILL)

    with pytest.raises(JobError) as caught:
        execute(story.run, progress=watch)
    story.error = str(caught.value)
    story.broken = json.loads((story.run.folder / "summary.json").read_text())


def mended(run: config.Run) -> config.Run:
    reverse = dataclasses.replace(run.tasks["reverse"], lr=1e-2)
    return dataclasses.replace(run, tasks={**run.tasks, "reverse": reverse})


def patiently() -> Iterator[None]:
    """Asks again and again, until the deadline."""
    end = time.monotonic() + DEADLINE
    while time.monotonic() < end:
        yield
        time.sleep(0.05)
    pytest.fail(f"nothing happened for {DEADLINE} s")


# --- what the parts showed -------------------------------------------------------------------------------------------


def test_a_killed_driver_leaves_no_folder_that_looks_finished(story: Story) -> None:
    assert story.checkpoints
    assert story.unfinished == []


def test_a_killed_driver_takes_the_workers_with_it(story: Story) -> None:
    assert story.orphans == set()


def test_a_cluster_of_our_own_listens_on_the_loopback_only(story: Story) -> None:
    assert story.sockets
    assert {address for address in story.sockets if not address.startswith("127.") and address != "::1"} == set()


def test_a_second_driver_is_refused(story: Story) -> None:
    assert re.search(rf"process {os.getpid()} on .* is working on this run", story.lock)


def test_a_gang_that_lost_a_rank_is_started_again(story: Story) -> None:
    assert story.killed
    assert story.broken["jobs"]["train-copy"]["state"] == "finished"
    attempts = story.broken["jobs"]["train-copy"]["attempts"]
    assert [attempt["number"] for attempt in attempts] == [1, 2, 3]
    assert [attempt["error"] for attempt in attempts] == [CUT_OFF, DIED, None]
    assert [attempt["workers"] for attempt in attempts] == [2, 2, 2]
    assert attempts[0]["resumed_at"] == {"phase": "calibrate", "step": 0}
    trained = [attempt for attempt in attempts if attempt["reached"]]  # the second may have been killed before a step
    assert trained[-1] is attempts[-1]
    assert attempts[-1]["recovery_seconds"] > 0
    for before, attempt in itertools.pairwise(trained):
        if before["reached"]["phase"] == attempt["resumed_at"]["phase"]:  # at most a checkpoint's interval is lost
            assert 0 <= before["reached"]["step"] - attempt["resumed_at"]["step"] <= 10


def test_a_mistake_is_told_with_its_place_and_not_tried_again(story: Story) -> None:
    assert re.fullmatch(
        r"train-reverse: reverse: at step .*; lower the learning rate \(here .*\) or .* \(rank [01]\); "
        rf"see {re.escape(str(story.run.folder))}/logs/train-reverse.rank[01].log",
        story.error,
    )
    attempts = re.findall("attempt", (story.run.folder / "logs" / "train-reverse.rank0.log").read_text())
    assert len(attempts) <= 3  # with the killed driver, with the second, and with the rate mended


def test_a_failed_job_leaves_the_others_going(story: Story) -> None:
    assert {name: job["state"] for name, job in story.broken["jobs"].items()} == {
        "train-copy": "finished",
        "train-reverse": "failed",
        "merge-both": "blocked",
        "evaluate-base": "finished",
        "evaluate-copy": "finished",
        "evaluate-reverse": "blocked",
        "evaluate-both": "blocked",
    }
    assert story.broken["jobs"]["merge-both"]["needs"] == ["train-reverse"]
    assert story.broken["jobs"]["evaluate-both"]["needs"] == ["merge-both"]
    assert list(story.broken["adapters"]) == ["copy"]
    assert list(story.broken["evaluation"]) == ["base", "copy"]


def test_progress_tells_the_steps(story: Story) -> None:
    steps = [event for event in story.events if event.job == "train-copy" and event.num_steps]
    assert steps
    assert {event.phase for event in steps} <= {"calibrate", "train"}
    assert all(0 < event.step <= event.num_steps == 80 and event.loss is not None for event in steps)
    assert story.events[-1].num_jobs == 7


def test_only_what_is_missing_is_done_again(story: Story) -> None:
    cached = {name for name, job in story.mended["jobs"].items() if job.get("cached")}
    assert cached == {"train-copy", "evaluate-base", "evaluate-copy"}
    assert {job["state"] for job in story.mended["jobs"].values()} == {"finished"}


def test_the_summary_has_every_adapter_merge_and_evaluation(story: Story) -> None:
    summary = json.loads((story.run.folder / "summary.json").read_text())
    assert summary == story.again
    results = ["adapters", "merges", "evaluation", "intervals"]
    assert list(summary) == ["run", "jobs", "needs", *results, "fingerprints", "report"]
    for task in ("copy", "reverse"):
        made = summary["adapters"][task]
        adapter = native.load(Path(made["path"]))
        assert (adapter.kept, adapter.total) == (made["kept"], made["total"])
        assert Path(made["path"]).stat().st_size == made["bytes"]
    assert native.load(Path(summary["merges"]["both"]["path"])).kept == sum(
        made["kept"] for made in summary["adapters"].values()
    )
    assert list(summary["evaluation"]) == ["base", "copy", "reverse", "both"]
    for tasks in summary["evaluation"].values():
        assert {task: set(values) for task, values in tasks.items()} == {
            "copy": {"loss", "exact_match"},
            "reverse": {"loss", "exact_match"},
        }


def test_training_has_learned_something(story: Story) -> None:
    loss = {model: tasks["copy"]["loss"] for model, tasks in story.mended["evaluation"].items()}
    assert loss["copy"] < loss["base"]


def test_the_same_run_again_does_nothing(story: Story) -> None:
    assert all(job == {**story.again["jobs"][name], "cached": True} for name, job in story.again["jobs"].items())
    for part in ("adapters", "merges", "evaluation"):
        assert story.again[part] == story.mended[part]


def test_after_all_kills_the_adapter_is_that_of_an_undisturbed_training(story: Story, tmp_path: Path) -> None:
    run_distributed(train_undisturbed, story.run, str(tmp_path), world_size=2)
    expected = native.load(tmp_path / "adapter.safetensors")
    path = Path(story.mended["adapters"]["copy"]["path"])
    assert "library_name: lori_dist" in path.with_name("README.md").read_text()
    found = native.load(path)
    assert found.blocks[0].seed == expected.blocks[0].seed == jobs.task_seed(story.run, "copy")
    for module, entries in expected.blocks[0].entries.items():
        other = found.blocks[0].entries[module]
        assert torch.equal(other.index, entries.index) if entries.index is not None else other.index is None
        assert (other.values - entries.values).norm() <= 5e-6 * entries.values.norm()


def train_undisturbed(run: config.Run, folder: str) -> None:
    train(run, "copy", from_environment(), Path(folder), fingerprint="undisturbed")


def test_a_merge_is_the_same_file_on_one_worker_and_on_several(run: config.Run, tmp_path: Path) -> None:
    paths = [tmp_path / f"{name}.safetensors" for name in ("nlu", "math")]
    for number, path in enumerate(paths):
        native.save(adapter(block(path.stem, seed=number, draw=number)), path)
    job = next(job for job in order(plan(run)) if job.kind == "merge")
    options: dict[str, Any] = {"weights": [0.5, -1.0]}
    with connected(run):
        spread = work._spread(run, job)
        assert spread["num_ranges"] == 2
        for method in ("concat", "linear", "ties", "svd"):
            merge_files(paths, tmp_path / f"{method}-one", method=method, **options)
            merge_files(paths, tmp_path / f"{method}-two", method=method, **options, **spread)
            assert (tmp_path / f"{method}-one").read_bytes() == (tmp_path / f"{method}-two").read_bytes()
        [pid] = spread["spread"](_pid, [None])
        assert pid != os.getpid()
        data = bytearray(paths[1].read_bytes())
        data[-1] ^= 1  # the last mask's
        paths[1].write_bytes(data)
        with pytest.raises(
            AdapterError, match=r"^\S*math.safetensors: B of layers.1.up_proj in block 0 does not match its digest"
        ):
            merge_files(paths, tmp_path / "damaged", method="ties", **options, **spread)
    assert {path.suffix for path in tmp_path.iterdir()} == {"", ".safetensors"}
    assert not (tmp_path / "damaged").exists()


def _pid(_: object) -> int:
    return os.getpid()


def test_a_gang_larger_than_the_cluster_is_refused_before_anything_starts(run: config.Run, tmp_path: Path) -> None:
    large = dataclasses.replace(run.cluster, workers=10_000)
    (tmp_path / "demo").mkdir()
    (tmp_path / "demo" / TOKEN_FILE).write_text("of a driver that was killed")
    with pytest.raises(ConfigError, match=r"cluster.workers: train-copy takes 10000 x \(0.5 CPUs\), the cluster has"):
        execute(dataclasses.replace(run, cluster=large, output=str(tmp_path)))
    assert {path.name for path in (tmp_path / "demo").iterdir()} == {".lock", "summary.json"}


@pytest.mark.parametrize(
    ("address", "error", "message"),
    [
        ("127.0.0.1:1", JobError, r"cluster.address: nothing answers at '127.0.0.1:1' \(.*refused\)"),
        ("ray://127.0.0.1:1", ConfigError, "cluster.address: got 'ray://127.0.0.1:1'; wanted `local`"),
        ("head", ConfigError, "cluster.address: got 'head'; wanted `local`, `auto` or host:port"),
    ],
)
def test_a_cluster_that_is_not_there_is_told(
    run: config.Run, tmp_path: Path, address: str, error: type[Exception], message: str
) -> None:
    nowhere = dataclasses.replace(run.cluster, address=address)
    with pytest.raises(error, match=message):
        execute(dataclasses.replace(run, cluster=nowhere, output=str(tmp_path)))
