import os
import queue
import socket

import torch.distributed as dist

from lori_dist.cluster.peers import Ended, Peers, watch
from lori_dist.training.world import from_environment
from tests.distributed import run_distributed


def live_on(num_hosts: int) -> None:
    """Makes the ranks believe that they are on several machines, which call that of rank 0 localhost."""
    name = f"host{dist.get_rank() % num_hosts}"
    socket.gethostname = lambda: name
    os.environ["MASTER_ADDR"] = "localhost"


def end(num_hosts: int, notice: str | None) -> list[Ended]:
    """The ends that each of four ranks hears of: rank 2 notifies the others or closes, then rank 3 notifies them."""
    heard: queue.Queue[Ended] = queue.Queue()
    world = from_environment()
    live_on(num_hosts)
    peers = watch(world, heard.put)
    assert peers is not None
    if world.rank == 2:
        if notice is None:
            peers.close()
        else:
            peers.notify(notice)
    if world.rank != 2 and notice is not None:
        heard.put(heard.get(timeout=60))
    dist.barrier()
    if world.rank == 3:
        peers.notify("later")
    if world.rank < 2 and notice is None:
        heard.put(heard.get(timeout=60))
    dist.barrier()
    peers.close()
    return [heard.get() for _ in range(heard.qsize())]


def test_who_ends_first_is_told_to_all_others_once() -> None:
    first = [Ended(rank=2, notice="out-of-memory")]
    assert run_distributed(end, 1, "out-of-memory", world_size=4) == [first, first, [], first]


def test_a_rank_that_is_done_is_not_told_of() -> None:
    later = [Ended(rank=3, notice="later")]
    assert run_distributed(end, 2, None, world_size=4) == [later, later, [], []]


def meet_nowhere() -> bool:
    world = from_environment()
    live_on(2)
    os.environ["MASTER_ADDR"] = "nowhere.invalid"
    return watch(world, print) is None


def test_without_a_connection_there_is_no_watch_and_training_goes_on() -> None:
    assert run_distributed(meet_nowhere, world_size=2) == [True, True]


def test_a_stranger_is_turned_away_and_its_end_is_nothing() -> None:
    heard: queue.Queue[Ended] = queue.Queue()
    peers = Peers(0, heard.put)
    host, port, password = peers.listen("127.0.0.1")
    for hello in (b"1 GET /\n", f"{password[:-1]} 1\n".encode(), b"\xff\n"):
        with socket.create_connection((host, port)) as stranger:
            stranger.sendall(hello)
            assert stranger.recv(1) == b""
    with socket.create_connection((host, port)) as rank:
        rank.sendall(f"{password} 1\n".encode())
    assert heard.get(timeout=60) == Ended(rank=1, notice=None)
    assert heard.empty()
