import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from lori_dist.errors import JobError
from lori_dist.training.rendezvous import first_host, rendezvous
from lori_dist.training.world import World, from_environment
from tests.distributed import run_distributed

TORCHRUN = {"RANK": "3", "WORLD_SIZE": "8", "LOCAL_RANK": "1", "MASTER_ADDR": "node01", "MASTER_PORT": "29500"}
SRUN = {
    "SLURM_JOB_ID": "4711",
    "SLURM_STEP_ID": "2",
    "SLURM_PROCID": "5",
    "SLURM_LOCALID": "1",
    "SLURM_STEP_NUM_TASKS": "8",
    "SLURM_NTASKS": "8",
    "SLURM_STEP_NODELIST": "gpu[07-08,11]",
    "SLURM_LAUNCH_NODE_IPADDR": "10.0.0.1",
}


def test_without_a_launcher_there_is_nothing_to_meet() -> None:
    assert rendezvous({"HOME": "/home/me", "MASTER_ADDR": "node01"}) is None


def test_torchrun_says_it_all() -> None:
    assert rendezvous(TORCHRUN | {"HOME": "/home/me"}) == TORCHRUN


def test_a_launcher_s_variables_go_before_slurm_s() -> None:
    assert rendezvous(SRUN | TORCHRUN) == TORCHRUN


def test_what_a_launcher_left_out_is_named() -> None:
    with pytest.raises(JobError, match="LOCAL_RANK, MASTER_PORT not; start with torchrun"):
        rendezvous({name: value for name, value in TORCHRUN.items() if name not in ("LOCAL_RANK", "MASTER_PORT")})


def test_accelerate_s_only_process_of_several_is_refused() -> None:
    with pytest.raises(JobError, match=r"--cpu starts one process.* use --multi_gpu"):
        rendezvous({"ACCELERATE_USE_CPU": "True", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29500"})


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"RANK": "8"}, "RANK is 8, WORLD_SIZE 8; ranks count from 0"),
        ({"LOCAL_RANK": "a"}, "LOCAL_RANK is 'a', wanted a"),
    ],
)
def test_ranks_that_cannot_be_are_refused(wrong: dict[str, str], message: str) -> None:
    with pytest.raises(JobError, match=message):
        rendezvous(TORCHRUN | wrong)


def test_srun_s_ranks_meet_on_the_first_host_of_the_step() -> None:
    assert rendezvous(SRUN) == {
        "RANK": "5",
        "WORLD_SIZE": "8",
        "LOCAL_RANK": "1",
        "MASTER_ADDR": "gpu07",
        "MASTER_PORT": str(15000 + 4713),
    }


def test_steps_of_one_job_meet_on_different_ports() -> None:
    ports = {rendezvous(SRUN | {"SLURM_STEP_ID": str(step)})["MASTER_PORT"] for step in range(5)}  # type: ignore[index]
    assert len(ports) == 5


def test_a_place_given_to_srun_is_taken() -> None:
    found = rendezvous(SRUN | {"MASTER_ADDR": "10.1.1.1", "MASTER_PORT": "4000"})
    assert found is not None
    assert (found["MASTER_ADDR"], found["MASTER_PORT"]) == ("10.1.1.1", "4000")


def test_a_batch_script_is_no_step() -> None:
    step = ("SLURM_STEP_ID", "SLURM_STEP_NUM_TASKS", "SLURM_STEP_NODELIST")
    assert rendezvous({name: value for name, value in SRUN.items() if name not in step}) is None


def test_what_srun_left_out_is_named() -> None:
    with pytest.raises(JobError, match="SLURM_LOCALID not; start the ranks with srun"):
        rendezvous({name: value for name, value in SRUN.items() if name != "SLURM_LOCALID"})


@pytest.mark.parametrize(
    ("nodes", "host"),
    [
        ("localhost", "localhost"),
        ("10.0.0.7", "10.0.0.7"),
        ("a,b", "a"),
        ("node[07-12,15],gpu1", "node07"),
        ("node[3,5-9]", "node3"),
        ("rack[1-2]node[004-007].cluster", "rack1node004.cluster"),
        ("login-1,node[1-2]", "login-1"),
    ],
)
def test_the_first_host_of_a_node_list(nodes: str, host: str) -> None:
    assert first_host(nodes) == host


def test_a_node_list_that_is_none_is_refused() -> None:
    with pytest.raises(JobError, match="is not a list of nodes; set MASTER_ADDR"):
        first_host("")


# --- in processes ----------------------------------------------------------------------------------------------------


def enter() -> tuple[World, World, int]:
    """The world, as found when the group is made and when it is there, and the sum of all ranks in it."""
    world, again = from_environment(), from_environment()
    total = torch.tensor([world.rank])
    dist.all_reduce(total)
    return world, again, int(total)


def enter_by_slurm(port: int, store: str) -> tuple[World, World, int]:
    """Processes number themselves, as nothing but the environment is to tell them apart."""
    number = dist.FileStore(store, 2).add("processes", 1) - 1
    own = {"SLURM_PROCID": str(number), "SLURM_LOCALID": str(number), "SLURM_STEP_NUM_TASKS": "2"}
    os.environ.update(SRUN | own | {"SLURM_STEP_NODELIST": "localhost", "MASTER_PORT": str(port)})
    return enter()


def world(rank: int, size: int) -> World:
    return World(rank=rank, size=size, local_rank=rank, device=torch.device("cpu"))


def test_without_a_launcher_it_is_a_world_of_one() -> None:
    [found] = run_distributed(enter, world_size=1, process_group=False)
    assert found == (world(0, 1), world(0, 1), 0)


def test_a_group_that_is_there_is_joined() -> None:
    assert run_distributed(enter, world_size=3) == [(world(rank, 3), world(rank, 3), 3) for rank in range(3)]


def test_ranks_of_srun_find_each_other(tmp_path: Path) -> None:
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    found = run_distributed(enter_by_slurm, port, str(tmp_path / "store"), world_size=2, process_group=False)
    assert sorted(found, key=lambda item: item[0].rank) == [(world(rank, 2), world(rank, 2), 1) for rank in range(2)]


def miss(port: int) -> str:
    os.environ.update(TORCHRUN | {"RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "localhost", "MASTER_PORT": str(port)})
    with pytest.raises(JobError) as raised:
        from_environment()
    return str(raised.value)


def test_a_port_that_is_taken_is_named() -> None:
    with socket.create_server(("localhost", 0)) as taken:
        port = taken.getsockname()[1]
        [message] = run_distributed(miss, port, world_size=1, process_group=False)
    assert f"did not find each other at localhost:{port} (" in message
    assert "EADDRINUSE" in message
    assert "with a MASTER_PORT that is free on rank 0's machine" in message


def test_torchrun_starts_a_world(tmp_path: Path) -> None:
    script = tmp_path / "launched.py"
    script.write_text(
        "import json, sys\n"
        "from lori_dist.training.world import from_environment\n"
        "world = from_environment()\n"
        "found = [world.rank, world.size, world.local_rank, str(world.device)]\n"
        "open(f'{sys.argv[1]}/{world.rank}', 'w').write(json.dumps(found))\n"
    )
    launch = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", str(script), str(tmp_path)]
    done = subprocess.run([sys.executable, *launch], capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    for rank in range(2):
        assert json.loads((tmp_path / str(rank)).read_text()) == [rank, 2, rank, "cpu"]


def test_a_rank_whose_others_do_not_come_says_for_whom_it_waits() -> None:
    program = """
from datetime import timedelta
from lori_dist.training import world
world.SILENCE, world.TIMEOUT = timedelta(seconds=0.2), timedelta(seconds=2)
world.from_environment()
"""
    left_over = {"RANK": "1", "WORLD_SIZE": "2", "LOCAL_RANK": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1"}
    done = subprocess.run(
        [sys.executable, "-c", program], env={**os.environ, **left_over}, capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 1
    assert "rank 1 has been waiting for 0 s for the other of 2 ranks at 127.0.0.1:1; " in done.stderr
    assert "unset them" in done.stderr
