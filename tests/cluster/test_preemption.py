"""A run that is told to end has its trainings save first."""

import dataclasses
import json
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pytest

from lori_dist import config
from lori_dist.cluster.failures import DIED, STOPPED
from lori_dist.cluster.status import status
from lori_dist.config import Calibrate
from tests.cluster.trained import assert_undisturbed, attempts, described, driven, last_step
from tests.processes import command, descendants
from tests.raylets import ENVIRONMENT, RAY, Nodes

pytestmark = pytest.mark.ray


@pytest.mark.slow
def test_a_run_that_is_ended_does_no_step_twice(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without checkpoints but that of a training that is asked to save. In a TMPDIR that is too long for sockets."""
    place = tmp_path / ("scratch_of_a_job_on_some_cluster/" * 3)
    place.mkdir(parents=True)
    monkeypatch.setenv("TMPDIR", str(place))
    run = changed(described(tmp_path, workers=2, cpus_per_worker=0.5), calibrate=10, train=200)
    with driven(run, tmp_path) as driver:
        driver.until(lambda: last_step(run)[0] == "train" and last_step(run)[1] >= 5)
        driver.process.send_signal(signal.SIGTERM)
        assert driver.ends() == 3, driver.said()
        assert f"{run.folder}: ended by SIGTERM; the same command continues from here\n" in driver.said()
    assert list(place.iterdir()) == []
    stopped = status(run.folder)["jobs"][0]
    assert (stopped["state"], stopped["phase"], stopped["error"]) == ("interrupted", "train", STOPPED)
    assert stopped["step"] == stopped["saved_step"] >= 5
    with driven(run, tmp_path) as driver:
        assert driver.ends() == 0, driver.said()
    lines = (run.folder / "train-copy" / "metrics.jsonl").read_text().splitlines()
    found = [(record["phase"], record["step"]) for record in map(json.loads, lines)]
    steps = [(phase, step) for phase, count in (("calibrate", 10), ("train", 200)) for step in range(1, count + 1)]
    assert found == steps
    assert status(run.folder)["jobs"][0]["error"] is None
    log = "".join(path.read_text() for path in (run.folder / "logs").iterdir())
    assert "Traceback" not in log
    assert log.count(f"train-copy: resuming from step {stopped['step']} of 200 of phase train") == 1
    assert list(place.iterdir()) == []
    first, second = attempts(run)
    assert second["resumed_at"] == first["reached"]
    assert_undisturbed(run, tmp_path, world_size=2)


@pytest.mark.parametrize("begun", ["gcs_server", "raylet"])
def test_sigterm_while_ray_starts_ends_with_a_line_and_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, begun: str
) -> None:
    place = Path(tempfile.mkdtemp(prefix="t-", dir="/tmp"))
    monkeypatch.setenv("TMPDIR", str(place))
    run = described(tmp_path)
    with driven(run, tmp_path) as driver:
        family = driver.until(lambda: has_begun(driver.process.pid, begun))
        driver.process.send_signal(signal.SIGTERM)
        assert driver.ends() == 3, driver.said()
    assert driver.said() == f"{run.folder}: ended by SIGTERM; the same command continues from here\n"
    assert [command(pid) for pid in family if command(pid)] == []
    place.rmdir()  # nothing is in it


def has_begun(driver: int, name: str) -> set[int]:
    """The processes of a driver, once one of Ray's is among them."""
    time.sleep(0.05)
    family = descendants(driver)
    return family if any(name in command(pid).partition(" ")[0] for pid in family) else set()


def changed(run: config.Run, *, calibrate: int, train: int) -> config.Run:
    """Of so many steps, and without checkpoints."""
    phase = Calibrate(steps=calibrate)
    return dataclasses.replace(
        run, train=dataclasses.replace(run.train, steps=train, calibrate=phase, checkpoint_every=None)
    )


NODES = """
import sys
import ray
ray.init(address=sys.argv[1], log_to_driver=False)
print(*(node["NodeID"] for node in ray.nodes() if node["Resources"].get("CPU")))
"""


@pytest.mark.slow
def test_a_training_whose_node_is_to_go_saves_and_goes_on(tmp_path: Path) -> None:
    """The node is lost after the notice, and another one is there."""
    with Nodes(tmp_path) as nodes:
        [leaving] = nodes.add(1, cpus=1)
        run = changed(described(tmp_path, address=nodes.address, patience=120), calibrate=20, train=1000)
        saved = run.folder / ".partial-train-copy" / "checkpoints"
        asked = subprocess.run(
            [sys.executable, "-c", NODES, nodes.address], capture_output=True, text=True, check=True, env=ENVIRONMENT
        )
        with driven(run, tmp_path) as driver:
            driver.until(lambda: last_step(run)[0] == "train" and last_step(run)[1] >= 5)
            drain = f"drain-node --address {nodes.address} --node-id {asked.stdout.split()[-1]} "
            drain += "--reason DRAIN_NODE_REASON_PREEMPTION --reason-message gone --deadline-remaining-seconds 600"
            subprocess.run([RAY, *drain.split()], check=True, capture_output=True, env=ENVIRONMENT)
            [path] = driver.until(lambda: list(saved.glob("train-*")))
            step = int(path.stem.rpartition("-")[2])
            driver.until(lambda: last_step(run)[1] >= step + 5)
            leaving.kill()
            nodes.add(1, cpus=1)
            assert driver.ends() == 0, driver.said()
    assert [attempt["error"] for attempt in attempts(run)] == [DIED, None]
    assert attempts(run)[1]["resumed_at"] == {"phase": "train", "step": step}
    assert_undisturbed(run, tmp_path, world_size=1)
