"""Trainings on several Ray nodes: where their ranks are, and that they go on when a node is lost."""

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

from lori_dist import config
from tests.cluster.trained import OTHER_WORLD, assert_undisturbed, attempts, described, driven, last_step, process_of
from tests.raylets import Nodes, machines

pytestmark = pytest.mark.ray

GANGS = """
import json, os, sys
from lori_dist import config
from lori_dist.cluster.connection import connected
from lori_dist.cluster.gang import Gangs
from lori_dist.jobs import Job

def variables(argument):
    import ray
    names = "MASTER_ADDR RANK WORLD_SIZE LOCAL_RANK LOCAL_WORLD_SIZE GROUP_RANK CUDA_VISIBLE_DEVICES"
    own = {name: os.environ.get(name) for name in names.split()}
    own["node"] = ray.get_runtime_context().get_node_id()
    own["address"] = ray.util.get_node_ip_address()
    own["own"] = ray.get_runtime_context().get_accelerator_ids()["GPU"]
    import torch, torch.distributed as dist
    dist.init_process_group("gloo")
    everything = [None] * dist.get_world_size()
    dist.all_gather_object(everything, own)
    return everything

tree = json.load(sys.stdin)
job = Job(name="train-copy", kind="train", fingerprint="")
described = config.validate(tree["run"])
with connected(described) as nodes:
    gangs = Gangs(environment={}, nodes=nodes)
    found = []
    for wanted in tree["gangs"]:
        cluster = config.Cluster(**wanted)
        gang = gangs.take(job, cluster)
        found.append(gang.run(variables, None, gangs.stopping))
        gang.close()
    print(json.dumps(found))
"""


@pytest.fixture(scope="module")
def nodes(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Nodes]:
    with Nodes(tmp_path_factory.mktemp("nodes")) as nodes:
        nodes.add(3, cpus=2, gpus=4)
        yield nodes


@pytest.mark.slow
def test_ranks_are_placed_as_the_run_asks(nodes: Nodes, tmp_path: Path) -> None:
    run = described(tmp_path, address=nodes.address)
    wanted = [
        {"workers": 4, "gpus_per_worker": 2, "placement": "pack"},
        {"workers": 3, "gpus_per_worker": 1, "placement": "strict_spread"},
        {"workers": 2, "gpus_per_worker": 1, "placement": "strict_pack"},
        {"workers": 2, "cpus_per_worker": 2.0, "placement": "pack"},
    ]
    packed, spread, alone, wide = in_a_process(GANGS, {"run": config.dump(run), "gangs": wanted})
    for gang in (packed, spread, alone, wide):
        assert [rank["RANK"] for rank in gang] == [str(number) for number in range(len(gang))]
        assert {rank["WORLD_SIZE"] for rank in gang} == {str(len(gang))}
        for node in {rank["node"] for rank in gang}:
            there = [rank for rank in gang if rank["node"] == node]
            assert [rank["LOCAL_RANK"] for rank in there] == [str(number) for number in range(len(there))]
            assert {rank["LOCAL_WORLD_SIZE"] for rank in there} == {str(len(there))}
            # Each finds its own first GPU at the index of its local rank.
            visible = (there[0]["CUDA_VISIBLE_DEVICES"] or "").split(",")
            assert sorted(filter(None, visible)) == sorted(gpu for rank in there for gpu in rank["own"])
            assert all(rank["own"][0] == visible[int(rank["LOCAL_RANK"])] for rank in there if rank["own"])
    assert len({rank["node"] for rank in packed}) == 2
    assert all(len(rank["own"]) == 2 for rank in packed)
    assert len({rank["node"] for rank in spread}) == 3
    assert [rank["GROUP_RANK"] for rank in spread] == ["0", "1", "2"]
    assert len({rank["node"] for rank in alone}) == 1
    assert len({rank["node"] for rank in wide}) == 2


@pytest.mark.slow
def test_a_run_on_three_nodes_goes_on_with_two(nodes: Nodes, tmp_path: Path) -> None:
    run = described(tmp_path, address=nodes.address, workers=3, min_workers=2, placement="strict_spread")
    with driven(run, tmp_path) as driver:
        driver.until(lambda: last_step(run)[1] >= 15)
        process = process_of(run, 2, 1)
        [lost] = [node for node in nodes.nodes if process in node.pids()]
        lost.kill()
        assert driver.ends() == 0, driver.said()
    first, second = attempts(run)
    assert (first["workers"], second["workers"]) == (3, 2)
    reached, resumed = first["reached"], second["resumed_at"]
    assert reached["phase"] != resumed["phase"] or 0 <= reached["step"] - resumed["step"] <= 10
    assert 0 < second["recovery_seconds"] < 120
    assert_undisturbed(run, tmp_path, world_size=3, tolerance=OTHER_WORLD)


@pytest.mark.slow
def test_nodes_with_networks_of_their_own(tmp_path: Path) -> None:
    """As on several machines: the head has no ranks, and a node that computes is lost."""
    with (
        tempfile.TemporaryDirectory(prefix="ray", dir="/tmp") as short,
        machines(4, Path(short)) as places,
        Nodes(tmp_path, places) as nodes,
    ):
        workers = nodes.add(3, cpus=1)
        run = described(tmp_path, address=nodes.address, workers=3, min_workers=2, placement="spread")
        [ranks] = in_a_process(
            GANGS, {"run": config.dump(run), "gangs": [{"workers": 3, "placement": "strict_spread"}]}, places[0].prefix
        )
        assert len({rank["address"] for rank in ranks}) == 3
        assert {rank["MASTER_ADDR"] for rank in ranks} == {ranks[0]["address"]}
        assert ranks[0]["address"] != nodes.address.partition(":")[0]
        assert [rank["LOCAL_WORLD_SIZE"] for rank in ranks] == ["1", "1", "1"]
        with driven(run, tmp_path, places[0].prefix) as driver:
            driver.until(lambda: last_step(run) >= ("train", 15))
            workers[1].kill()
            assert driver.ends() == 0, driver.said()
    assert [attempt["workers"] for attempt in attempts(run)] == [3, 2]
    assert_undisturbed(run, tmp_path, world_size=3, tolerance=OTHER_WORLD)


def in_a_process(program: str, tree: Any, prefix: Sequence[str] = ()) -> Any:
    """What a program prints as JSON. Ray reads its environment only once in a process."""
    done = subprocess.run(
        [*prefix, sys.executable, "-c", program],
        input=json.dumps(tree).encode(),
        capture_output=True,
        env=dict(os.environ),
        check=False,
    )
    assert done.returncode == 0, done.stderr.decode()
    return json.loads(done.stdout)
