"""What starts, and whether there is room for it."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lori_dist.cluster.schedule import (
    Resources,
    Shape,
    admit,
    check_room,
    possible,
    wanted,
)
from lori_dist.config import Cluster
from lori_dist.errors import ConfigError
from lori_dist.jobs import Job, Kind


def job(name: str, kind: Kind = "train") -> Job:
    return Job(name=name, kind=kind, fingerprint=name)


GANGS = [job(f"train-{number}") for number in range(4)]
MERGES = [job(f"merge-{number}", "merge") for number in range(2)]
KINDS = {item.name: item for item in [*GANGS, *MERGES]}


def test_what_jobs_take() -> None:
    cluster = Cluster(workers=4, cpus_per_worker=2.0, gpus_per_worker=2, placement="spread")
    assert wanted(job("t", "train"), cluster) == Shape(count=4, part=Resources(cpus=2.0, gpus=2), placement="spread")
    assert wanted(job("m", "merge"), cluster) == Shape(count=4, part=Resources(cpus=1.0))
    assert wanted(job("m", "merge"), Cluster(cpus_per_worker=0.5)) == Shape(count=1, part=Resources(cpus=0.5))
    assert wanted(job("e", "evaluate"), cluster) == wanted(job("t", "train"), cluster)
    searched = Job(name="m", kind="merge", fingerprint="m", settings={"search": {}})
    assert wanted(searched, cluster) == wanted(job("t", "train"), cluster)
    assert wanted(job("e", "evaluate"), Cluster()) == Shape(count=1, part=Resources(cpus=1.0))


@pytest.mark.parametrize(
    ("placement", "cpus", "room"),
    [
        ("pack", [3, 2, 0.5], 5),
        ("spread", [3, 2, 0.5], 5),
        ("strict_pack", [3, 2, 1], 3),
        ("strict_spread", [3, 2, 0.5], 2),
        ("strict_pack", [], 0),
    ],
)
def test_room_depends_on_the_placement(placement: str, cpus: list[float], room: int) -> None:
    nodes = [Resources(cpus=amount) for amount in cpus]
    assert Shape(count=1, part=Resources(cpus=1.0), placement=placement).room(nodes) == room


@pytest.mark.parametrize(("cpus", "count"), [(4, 4), (9, 4), (3, 3), (2, 2), (1, None)])
def test_a_training_goes_on_with_fewer_workers_where_that_is_allowed(cpus: float, count: int | None) -> None:
    found = possible(job("t"), Cluster(workers=4, min_workers=2), [Resources(cpus=cpus)])
    assert (found and found.count) == count
    alone = possible(job("t"), Cluster(workers=4), [Resources(cpus=cpus)])
    assert (alone and alone.count) == (4 if cpus >= 4 else None)


def test_no_more_jobs_run_side_by_side_than_the_run_asks_for() -> None:
    cluster, nodes = Cluster(max_concurrent=2), [Resources(cpus=16)]
    assert admit(GANGS, [], cluster, nodes) == GANGS[:2]
    assert admit(GANGS[1:], GANGS[:1], cluster, nodes) == [GANGS[1]]
    assert admit(GANGS[2:], GANGS[:2], cluster, nodes) == []


@pytest.mark.parametrize(
    ("cluster", "nodes", "admitted"),
    [
        (Cluster(workers=2), [Resources(cpus=2)], ["train-0"]),
        (Cluster(workers=2, cpus_per_worker=1.5), [Resources(cpus=5)], ["train-0", "merge-0"]),
        (Cluster(workers=2, cpus_per_worker=0.5), [Resources(cpus=2)], ["train-0", "train-1"]),
        (Cluster(workers=2), [Resources(cpus=4), Resources(cpus=2)], ["train-0", "train-1", "train-2"]),
        (Cluster(workers=3, cpus_per_worker=0.1), [Resources(cpus=0.9)], ["train-0", "train-1", "train-2"]),
        (Cluster(workers=2, gpus_per_worker=1), [Resources(cpus=6, gpus=4)], ["train-0", "train-1", "merge-0"]),
        (Cluster(workers=2, gpus_per_worker=1), [Resources(cpus=64, gpus=3)], ["train-0", "merge-0", "merge-1"]),
    ],
)
def test_jobs_start_in_order_as_far_as_there_is_room(
    cluster: Cluster, nodes: list[Resources], admitted: list[str]
) -> None:
    assert [item.name for item in admit([*GANGS, *MERGES], [], cluster, nodes)] == admitted


@given(
    workers=st.integers(1, 4),
    cpus_per_worker=st.sampled_from([0.1, 0.25, 0.5, 1.0, 2.0]),
    cpus=st.lists(st.integers(1, 8), min_size=1, max_size=3),
    ready=st.permutations(sorted(KINDS)),
    num_running=st.integers(0, 3),
)
def test_running_jobs_never_take_more_than_there_is(
    workers: int, cpus_per_worker: float, cpus: list[int], ready: list[str], num_running: int
) -> None:
    cluster = Cluster(workers=workers, cpus_per_worker=cpus_per_worker)
    nodes = [Resources(cpus=amount) for amount in cpus]
    running = admit([KINDS[name] for name in ready[:num_running]], [], cluster, nodes)
    waiting = [KINDS[name] for name in ready[num_running:]]
    admitted = admit(waiting, running, cluster, nodes)

    def taken(jobs: list[Job]) -> float:
        shapes = [possible(item, cluster, nodes) or wanted(item, cluster) for item in jobs]
        return sum(shape.count * shape.part.cpus for shape in shapes)

    assert taken([*running, *admitted]) <= sum(cpus) + 1e-9
    assert admitted == [item for item in waiting if item in admitted]
    for left in waiting:  # nothing that still fits is left behind
        assert left in admitted or taken([*running, *admitted, left]) > sum(cpus) + 1e-9


@pytest.mark.parametrize(
    ("cluster", "nodes", "message"),
    [
        (
            Cluster(workers=3),
            [Resources(cpus=2)],
            r"cluster.workers: train-0 takes 3 x \(1 CPU\), the cluster has room for 2 \(2 CPUs\); lower",
        ),
        (
            Cluster(workers=2, cpus_per_worker=3.0),
            [Resources(cpus=5), Resources(cpus=2)],
            r"takes 2 x \(3 CPUs\), the cluster has room for 1 \(5 CPUs; 2 CPUs\)",
        ),
        (
            Cluster(workers=2, gpus_per_worker=4),
            [Resources(cpus=32, gpus=6)],
            r"takes 2 x \(1 CPU, 4 GPUs\), the cluster has room for 1 \(32 CPUs, 6 GPUs\)",
        ),
        (Cluster(), [], r"the cluster has room for 0 \(no node\)"),
    ],
)
def test_a_gang_larger_than_the_cluster_is_refused(cluster: Cluster, nodes: list[Resources], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        check_room(GANGS, cluster, nodes)


def test_a_gang_may_be_spread_over_nodes() -> None:
    check_room(GANGS, Cluster(workers=4), [Resources(cpus=1), Resources(cpus=3)])
    check_room(GANGS, Cluster(workers=4, cpus_per_worker=0.5), [Resources(cpus=2)])
