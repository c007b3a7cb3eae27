"""Runs whose results are on storage that is reached by URL."""

import contextlib
import dataclasses
import json
import os
import shutil
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from lori_dist import config, storage
from tests.cluster.trained import assert_undisturbed, attempts, described, driven, process_of
from tests.raylets import Machine, Node, Nodes

pytestmark = pytest.mark.ray


@pytest.mark.slow
def test_a_url_gives_the_bytes_a_path_gives_also_after_a_kill(tmp_path: Path) -> None:
    """A worker is killed once a checkpoint is on storage; a second attempt resumes from one. Another setting keeps the
    finished adapter on storage under another name."""
    plain = described(tmp_path, workers=1, cpus_per_worker=0.5, retries=2)
    with driven(plain, tmp_path) as driver:
        assert driver.ends() == 0, driver.said()
    store = tmp_path / "store" / "demo"
    run = dataclasses.replace(plain, output=store.parent.as_uri())
    checkpoints = store / ".partial-train-copy" / "checkpoints"
    try:
        with driven(run, tmp_path) as driver:
            driver.until(lambda: any(checkpoints.glob("*-*.safetensors")))
            process = driver.until(lambda: process_of(run, 0, 1))
            os.kill(process, signal.SIGKILL)
            assert driver.ends() == 0, driver.said()
        first, second = attempts(run)
        assert first["error"] and not second["error"]
        assert second["resumed_at"]["step"] > 0
        name = "train-copy/adapter.safetensors"
        assert (store / name).read_bytes() == (plain.folder / name).read_bytes()
        assert not (store / ".partial-train-copy").exists()
        with driven(dataclasses.replace(run, train=dataclasses.replace(run.train, lr=4e-3)), tmp_path) as driver:
            assert driver.ends() == 0, driver.said()
        assert "train.lr 0.01 -> 0.004; it is done again, and what is there is kept as train-copy.1" in driver.said()
        assert (store / "train-copy.1" / "adapter.safetensors").read_bytes() == (plain.folder / name).read_bytes()
        assert (store / name).read_bytes() != (plain.folder / name).read_bytes()
    finally:
        with contextlib.suppress(FileNotFoundError):
            shutil.rmtree(run.folder.parent)


@contextlib.contextmanager
def apart(run: config.Run, folder: Path, count: int) -> Iterator[tuple[Nodes, list[Node], config.Run]]:
    """A head, nodes of a CPU each, and the run on them. Each node's place for mirrors is a disk of its own."""
    run = dataclasses.replace(run, output=(folder / "store").as_uri())
    place = storage.mirror_folder(run.output, run.name).parent.parent
    place.mkdir(mode=0o700, exist_ok=True)
    script = f'mount -t tmpfs -o mode=700 tmpfs "{place}" && exec "$@"'
    own = Machine(prefix=("unshare", "-m", "sh", "-c", script, "sh"), options=())
    if subprocess.run([*own.prefix, "true"], capture_output=True, check=False).returncode:
        pytest.skip("cannot give a process disks of its own")
    try:
        with Nodes(folder, [own] * (count + 1)) as nodes:
            workers = nodes.add(count, cpus=1)
            cluster = dataclasses.replace(run.cluster, address=nodes.address)
            yield nodes, workers, dataclasses.replace(run, cluster=cluster)
    finally:
        with contextlib.suppress(FileNotFoundError):
            shutil.rmtree(run.folder.parent)


def sees(node: Node, path: Path) -> bool:
    """Whether there is such a file on the disks of that node."""
    return Path(f"/proc/{node.pids()[0]}/root{path}").exists()


@pytest.mark.slow
def test_nodes_with_no_disk_in_common_work(tmp_path: Path) -> None:
    """A training's two ranks are on two nodes."""
    run = described(tmp_path, workers=2, cpus_per_worker=1, placement="strict_spread")
    with apart(run, tmp_path, 2) as (_, _, run), driven(run, tmp_path) as driver:
        assert driver.ends() == 0, driver.said()
        assert not list(run.folder.glob(".partial-*/checkpoints/*"))
        assert_undisturbed(run, tmp_path, world_size=2)


STOPPING = {"validate_every": 5, "early_stop": 1, "lr": 0.3}
SPIKING = {"on_divergence": "rollback", "spike": 1.001, "lr": 0.03}


@pytest.mark.slow
@pytest.mark.parametrize("change", [STOPPING, SPIKING], ids=["early_stop", "rollback"])
def test_every_node_reads_an_earlier_state_of_an_attempt(change: dict[str, Any], tmp_path: Path) -> None:
    """What rank 0 has saved comes to the other node by the storage, whether it is the best state or the last good
    one."""
    run = described(tmp_path, workers=2, cpus_per_worker=1, placement="strict_spread")
    copy = dataclasses.replace(run.tasks["copy"], validation=run.tasks["copy"].test)
    run = dataclasses.replace(run, tasks={"copy": copy}, train=dataclasses.replace(run.train, **change))
    with apart(run, tmp_path, 2) as (_, _, run), driven(run, tmp_path) as driver:
        assert driver.ends() == 0, driver.said()
        lines = (run.folder / "train-copy" / "metrics.jsonl").read_text().splitlines()
        records = [json.loads(line) for line in lines]
        if "early_stop" in change:
            assert records[-1]["step"] < run.train.steps
        else:
            assert any(str(record.get("update", "")).startswith("rolled back to step") for record in records)
        assert_undisturbed(run, tmp_path, world_size=2)


@pytest.mark.slow
def test_a_node_goes_on_from_what_a_lost_one_has_put_on_storage(tmp_path: Path) -> None:
    """The node that trains is killed; the other has never seen the run, and resumes from a checkpoint it fetches."""
    run = described(tmp_path, workers=1, cpus_per_worker=1, retries=2)
    checkpoints = tmp_path / "store" / "demo" / ".partial-train-copy" / "checkpoints"
    with apart(run, tmp_path, 2) as (_, workers, run), driven(run, tmp_path) as driver:
        driver.until(lambda: any(checkpoints.glob("*-*.safetensors")))
        [lost] = [node for node in workers if sees(node, run.folder / "logs" / "train-copy.rank0.log")]
        lost.kill()
        assert driver.ends() == 0, driver.said()
        first, second = attempts(run)
        assert first["error"] and not second["error"]
        assert second["resumed_at"]["step"] > 0
        assert_undisturbed(run, tmp_path, world_size=1)
