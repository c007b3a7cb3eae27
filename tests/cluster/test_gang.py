"""Gangs that wait for another training, and what their processes are told."""

import dataclasses
import os
import re
import signal
import threading
import time
from pathlib import Path

import pytest

from lori_dist import config, folder
from lori_dist.cluster.connection import connected
from lori_dist.cluster.failures import DIED, Broken
from lori_dist.cluster.gang import Gangs, Place, interface, ranked, variables
from lori_dist.cluster.work import Assignment, train_rank
from lori_dist.config import Choice, Cluster
from lori_dist.errors import Stopped
from lori_dist.jobs import Job, train_job
from tests.cluster.trained import described

ENGINES = [
    Choice(name="ddp"),
    Choice(name="deepspeed", options={"stage": 3, "hpz": 2}),
    Choice(name="fsdp"),
    Choice(name="deepspeed", options={"stage": 1}),
]


def place(node: str, *gpus: str) -> Place:
    return Place(node=node, address=f"10.0.0.{node}", port=1000 + int(node), gpus=gpus)


def test_ranks_go_node_by_node_and_by_gpu() -> None:
    places = [place("2", "1"), place("1", "10"), place("2", "0"), place("1", "9")]
    assert ranked(places) == [2, 0, 3, 1]


def test_rank_0_is_where_the_others_meet_and_each_finds_its_gpu_at_its_local_rank() -> None:
    found = variables([place("2", "0", "1"), place("2", "2", "3"), place("1", "4", "7")])
    assert [rank["CUDA_VISIBLE_DEVICES"] for rank in found] == ["0,2,1,3", "0,2,1,3", "4,7"]
    assert [(rank["RANK"], rank["LOCAL_RANK"], rank["GROUP_RANK"]) for rank in found] == [
        ("0", "0", "0"),
        ("1", "1", "0"),
        ("2", "0", "1"),
    ]
    assert {(rank["MASTER_ADDR"], rank["MASTER_PORT"], rank["WORLD_SIZE"]) for rank in found} == {
        ("10.0.0.2", "1002", "3")
    }


def test_a_rank_that_was_given_no_gpu_sees_none() -> None:
    assert [rank["CUDA_VISIBLE_DEVICES"] for rank in variables([place("1"), place("2")])] == ["", ""]


def test_the_interface_of_an_address() -> None:
    assert interface("127.0.0.1") == "lo"
    assert interface("192.0.2.77") is None
    assert interface("::1") is None


@pytest.mark.ray
@pytest.mark.slow
def test_a_gang_trains_again_as_a_new_one_does(tmp_path: Path) -> None:
    run = described(tmp_path / "inputs", workers=2, cpus_per_worker=0.5)
    run = dataclasses.replace(run, train=dataclasses.replace(run.train, steps=6, checkpoint_every=None))
    job = train_job(run, "copy")
    with connected(run) as nodes:
        gangs = Gangs(environment={}, nodes=nodes)

        def trained(engine: Choice, name: str) -> tuple[bytes, set[str]]:
            """The adapter, and the processes that made it."""
            train = dataclasses.replace(run.train, engine=engine)
            chosen = dataclasses.replace(run, output=str(tmp_path / name), train=train)
            attempt = folder.attempt(folder.open(chosen.folder, job))
            gang = gangs.take(job, chosen.cluster)
            gang.run(train_rank, Assignment(tree=config.dump(chosen), job=job, attempt=attempt), gangs.stopping)
            gangs.give_back(gang)
            logs = [log.read_text() for log in (chosen.folder / "logs").glob("*")]
            processes = {re.findall(r"process (\d+)", log)[0] for log in logs}
            return (attempt.partial / "adapter.safetensors").read_bytes(), processes

        new = []
        for number, engine in enumerate(ENGINES):
            new.append(trained(engine, f"new{number}"))
            gangs.keep(0)
        assert len(set.union(*(processes for _, processes in new))) == 2 * len(ENGINES)
        again = [trained(engine, f"again{number}") for number, engine in enumerate(ENGINES * 2)]
        assert len(set.union(*(processes for _, processes in again))) == 2
        for (expected, _), (found, _) in zip(new * 2, again, strict=True):
            assert found == expected


@pytest.mark.slow
@pytest.mark.ray
def test_a_gang_that_ends_while_it_waits_is_replaced(tmp_path: Path) -> None:
    run = described(tmp_path, cpus_per_worker=0.5)
    job = Job(name="train-copy", kind="train", fingerprint="")
    with connected(run) as nodes:
        gangs = Gangs(environment={}, nodes=nodes)
        gang = gangs.take(job, run.cluster)
        first = gang.run(_pid, None, gangs.stopping)
        gangs.give_back(gang)
        os.kill(first, signal.SIGKILL)
        second = gangs.take(job, run.cluster)
        assert second.run(_pid, None, gangs.stopping) != first
        with pytest.raises(Broken) as caught:
            second.run(_dies, None, gangs.stopping)
        assert caught.value.failure.message == DIED
        second.close()
        third = Gangs(environment={}, nodes=nodes, stopping=gangs.stopping).take(job, run.cluster)
        threading.Timer(1.0, gangs.stopping.set).start()
        start = time.monotonic()
        with pytest.raises(Broken, match="stopped"):
            third.run(time.sleep, 60, gangs.stopping)
        assert time.monotonic() - start < 10
        third.close()
        with pytest.raises(Stopped, match="the run ends"):
            gangs.take(job, run.cluster)


@pytest.mark.ray
def test_what_a_rank_raises_is_told_and_what_it_returns_when_asked_to_end(tmp_path: Path) -> None:
    run = described(tmp_path, cpus_per_worker=0.5)
    job = Job(name="train-copy", kind="train", fingerprint="")
    with connected(run) as nodes:
        gangs = Gangs(environment={}, nodes=nodes)
        gang = gangs.take(job, Cluster(workers=2, cpus_per_worker=0.5))
        asked = threading.Event()
        threading.Timer(1.0, asked.set).start()
        assert gang.run(_until_asked, "done", gangs.stopping, asked) == "done"
        with pytest.raises(Broken) as caught:
            gang.run(_rank_1_fails, None, gangs.stopping)
        assert (caught.value.failure.rank, caught.value.failure.message) == (1, "ValueError: of rank 1")
        gang.close()


def _until_asked(result: str) -> str:
    import ray

    while not ray.get_runtime_context().is_canceled():
        time.sleep(0.01)
    return result


def _pid(_: object) -> int:
    return os.getpid()


def _dies(_: object) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def _rank_1_fails(_: object) -> None:
    if os.environ["RANK"] == "1":
        raise ValueError("of rank 1")
    time.sleep(60)
