"""A run whose processes are killed at the worst moments, whose disk fills up, and whose cluster goes away."""

import contextlib
import itertools
import os
import signal
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from lori_dist import config
from lori_dist.cluster.failures import DIED
from tests.cluster.trained import (
    Driver,
    assert_undisturbed,
    attempts,
    described,
    driven,
    last_step,
    process_of,
)
from tests.processes import command, descendants
from tests.raylets import Nodes

pytestmark = [pytest.mark.ray, pytest.mark.slow]


def test_kills_at_the_worst_moments_change_nothing(tmp_path: Path) -> None:
    """A rank dies while it calibrates, while it trains, while a checkpoint is written and while the result is."""
    run = described(tmp_path, workers=2, cpus_per_worker=0.5, retries=4)
    partial = run.folder / ".partial-train-copy"
    with driven(run, tmp_path) as driver:
        kill(driver, run, 1, rank=1, when=lambda: at(run, "calibrate", 15))
        kill(driver, run, 2, rank=1, when=lambda: at(run, "train", 15))
        kill_within(driver, run, 3, lambda: any(partial.glob("checkpoints/.train-*.partial")))
        kill_within(driver, run, 4, lambda: any(partial.glob(".adapter.safetensors.*.partial")))
        assert driver.ends() == 0, driver.said()
    found = attempts(run)
    assert [attempt["error"] for attempt in found] == [DIED] * 4 + [None]
    for before, after in itertools.pairwise(found):
        reached, resumed = before["reached"], after["resumed_at"]
        assert reached["phase"] != resumed["phase"] or 0 <= reached["step"] - resumed["step"] <= 10
        assert after["recovery_seconds"] > 0
    assert found[4]["resumed_at"] == {"phase": "train", "step": 50}
    assert not list((run.folder / "train-copy").rglob(".*"))
    assert_undisturbed(run, tmp_path, world_size=2)


def test_a_driver_killed_while_it_publishes_leaves_nothing_half(tmp_path: Path) -> None:
    run = described(tmp_path, workers=1, retries=0)
    partial = run.folder / ".partial-train-copy"
    with driven(run, tmp_path) as driver:
        driver.until(lambda: (partial / "job.json").exists() or any(partial.glob(".job.json*")))
        driver.process.kill()
        driver.process.wait()
    with driven(run, tmp_path) as driver:
        assert driver.ends() == 0, driver.said()
    assert_undisturbed(run, tmp_path, world_size=1)


@pytest.mark.parametrize("name", ["raylet", "gcs_server"])
def test_a_cluster_of_its_own_that_is_killed_ends_the_run_at_once(tmp_path: Path, name: str) -> None:
    """No node can come back to it, so nothing is waited for."""
    run = described(tmp_path, workers=1, patience=3600)
    with driven(run, tmp_path) as driver:
        driver.until(lambda: at(run, "train", 15))
        [process] = [pid for pid in descendants(driver.process.pid) if Path(command(pid).split(" ")[0]).name == name]
        os.kill(process, signal.SIGKILL)
        assert driver.process.wait(timeout=120) == 1
        assert "on this machine has ended: it was killed, or memory ran out" in driver.said()
    with driven(run, tmp_path) as driver:
        assert driver.ends() == 0, driver.said()
    assert attempts(run)[-1]["resumed_at"]["step"] >= 10
    assert_undisturbed(run, tmp_path, world_size=1)


def test_a_full_disk_fails_the_job_and_loses_nothing(tmp_path: Path, small_disk: Path) -> None:
    run = described(tmp_path, workers=1, retries=1)
    run = config.validate({**config.dump(run), "output": str(small_disk)})
    filler = small_disk / "filler"
    with driven(run, tmp_path) as driver:
        driver.until(lambda: any((run.folder / ".partial-train-copy" / "checkpoints").glob("train-*")))
        fill(filler)
        assert driver.ends() == 1, driver.said()
        assert "No space left on device" in driver.said()
    filler.unlink()
    with driven(run, tmp_path) as driver:
        assert driver.ends() == 0, driver.said()
    assert attempts(run)[-1]["resumed_at"]["phase"] == "train"
    assert attempts(run)[-1]["resumed_at"]["step"] >= 10
    assert_undisturbed(run, tmp_path, world_size=1)


def test_a_lost_node_is_waited_for(tmp_path: Path) -> None:
    with Nodes(tmp_path) as nodes:
        lost, _ = nodes.add(2, cpus=1)
        run = described(tmp_path, address=nodes.address, workers=2, placement="strict_spread", patience=120)
        with driven(run, tmp_path) as driver:
            driver.until(lambda: at(run, "train", 15))
            lost.kill()
            driver.until(lambda: len(list((run.folder / ".partial-train-copy").glob("attempt-*"))) == 2)
            nodes.add(1, cpus=1)
            assert driver.ends() == 0, driver.said()
    assert [attempt["workers"] for attempt in attempts(run)] == [2, 2]
    assert_undisturbed(run, tmp_path, world_size=2)


def test_a_node_that_never_comes_back_ends_the_run(tmp_path: Path) -> None:
    with Nodes(tmp_path) as nodes:
        lost, _ = nodes.add(2, cpus=1)
        run = described(tmp_path, address=nodes.address, workers=2, placement="strict_spread", patience=3)
        with driven(run, tmp_path) as driver:
            driver.until(lambda: at(run, "train", 15))
            lost.kill()
            assert driver.ends() == 1
        wanted = "cluster.workers: train-copy takes 2 x (1 CPU), each on its own node, the cluster has room for 1"
        assert wanted in driver.said()
        nodes.add(1, cpus=1)
        with driven(run, tmp_path) as driver:
            assert driver.ends() == 0, driver.said()
    assert_undisturbed(run, tmp_path, world_size=2)


def test_a_run_goes_on_with_another_cluster(tmp_path: Path) -> None:
    (tmp_path / "first").mkdir()
    with Nodes(tmp_path / "first") as nodes:
        nodes.add(1, cpus=2)
        run = described(tmp_path, address=nodes.address, workers=2)
        with driven(run, tmp_path) as driver:
            driver.until(lambda: at(run, "train", 15))
            for node in nodes.nodes:
                node.kill()
            assert driver.ends() != 0
    with Nodes(tmp_path) as nodes:
        nodes.add(1, cpus=2)
        run = described(tmp_path, address=nodes.address, workers=2)
        with driven(run, tmp_path) as driver:
            assert driver.ends() == 0, driver.said()
    assert attempts(run)[-1]["resumed_at"] in ({"phase": "train", "step": step} for step in range(10, 60, 10))
    assert_undisturbed(run, tmp_path, world_size=2)


def at(run: config.Run, phase: str, step: int) -> bool:
    found, done = last_step(run)
    return found == phase and done >= step


def kill(driver: Driver, run: config.Run, attempt: int, *, rank: int, when: Callable[[], bool]) -> None:
    process = driver.until(lambda: process_of(run, rank, attempt))
    driver.until(when)
    os.kill(process, signal.SIGKILL)


def kill_within(driver: Driver, run: config.Run, attempt: int, inside: Callable[[], bool]) -> None:
    """Kills rank 0 while `inside` holds: it is stopped as soon as that is seen, and goes on if it was too late."""
    process = driver.until(lambda: process_of(run, 0, attempt))
    while True:
        driver.until(inside)
        os.kill(process, signal.SIGSTOP)
        if inside():
            os.kill(process, signal.SIGKILL)
            return
        os.kill(process, signal.SIGCONT)


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of a few megabytes."""
    place = tmp_path / "disk"
    place.mkdir()
    words = ["mount", "-t", "tmpfs", "-o", "size=8m", "tmpfs", str(place)]
    if subprocess.run(words, capture_output=True, check=False).returncode:
        pytest.skip("may not mount a file system here")
    yield place
    subprocess.run(["umount", "--lazy", str(place)], check=True)


def fill(filler: Path) -> None:
    with contextlib.suppress(OSError), filler.open("wb", buffering=0) as stream:
        while True:
            stream.write(bytes(4096))
