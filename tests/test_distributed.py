"""The harness itself: what a test sees when its ranks work, fail, warn, hang or die."""

import os
import signal
import threading
import warnings

import pytest
import torch
import torch.distributed as dist

from tests.distributed import run_distributed

Failed = pytest.fail.Exception


def sum_of_ranks(offset: int) -> tuple[int, int, int]:
    total = torch.tensor([dist.get_rank() + offset])
    dist.all_reduce(total)
    return dist.get_rank(), int(total), torch.get_num_threads()


def fail_on(rank: int) -> None:
    if dist.get_rank() == rank:
        raise ValueError(f"this is rank {rank}")
    dist.barrier()


def hang_on(rank: int) -> None:
    if dist.get_rank() == rank:
        threading.Event().wait()
    dist.barrier()


def die_on(rank: int, signal_number: int) -> None:
    if dist.get_rank() == rank:
        os.kill(os.getpid(), signal_number)
    dist.barrier()


def exit_on(rank: int) -> None:
    if dist.get_rank() == rank:
        os.write(2, b"leaving now\n")
        os._exit(3)
    dist.barrier()


def warn() -> None:
    warnings.warn("from a rank", UserWarning, stacklevel=1)


def read_environment() -> tuple[str | None, str | None, bool]:
    return os.environ.get("LORI_TEST"), os.environ.get("RANK"), dist.is_initialized()


def test_ranks_form_a_group_and_return_their_results() -> None:
    assert run_distributed(sum_of_ranks, 10, world_size=3) == [(0, 33, 1), (1, 33, 1), (2, 33, 1)]


@pytest.mark.parametrize("rank", [0, 1])
def test_the_first_failing_rank_is_what_the_test_shows(rank: int) -> None:
    with pytest.raises(Failed, match=rf"(?s)rank {rank} of 2 failed.*in fail_on.*ValueError: this is rank {rank}"):
        run_distributed(fail_on, rank, world_size=2)


def test_a_hang_ends_and_shows_where_each_rank_stands() -> None:
    with pytest.raises(Failed, match=r"(?s)rank 0, 1 did not finish within 3 seconds.*in hang_on.*in hang_on"):
        run_distributed(hang_on, 0, world_size=2, timeout=3)


def test_a_stopped_rank_ends_as_well(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tests.distributed.GRACE", 1.0)
    with pytest.raises(Failed, match="did not finish within 2 seconds"):
        run_distributed(die_on, 1, int(signal.SIGSTOP), world_size=2, timeout=2)


def test_a_killed_rank_is_reported_with_its_signal() -> None:
    with pytest.raises(Failed, match=r"rank 1 of 2 was killed by signal 9 \(SIGKILL\)"):
        run_distributed(die_on, 1, int(signal.SIGKILL), world_size=2)


def test_a_rank_that_exits_is_reported_with_its_code_and_output() -> None:
    with pytest.raises(Failed, match=r"(?s)rank 0 of 2 exited with code 3 before it was done.*leaving now"):
        run_distributed(exit_on, 0, world_size=2)


def test_warnings_are_errors_in_ranks_too() -> None:
    with pytest.raises(Failed, match="UserWarning: from a rank"):
        run_distributed(warn, world_size=1)


@pytest.mark.filterwarnings("ignore:from a rank:UserWarning")
def test_a_test_s_own_filters_hold_in_its_ranks() -> None:
    run_distributed(warn, world_size=1)


def test_ranks_have_the_test_s_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LORI_TEST", "here")
    assert run_distributed(read_environment, world_size=1) == [("here", "0", True)]
    assert run_distributed(read_environment, world_size=1, process_group=False) == [("here", None, False)]


def test_no_process_is_left() -> None:
    [(pid, _)] = run_distributed(own_process, world_size=1)
    with pytest.raises(ProcessLookupError):
        os.kill(pid, 0)


def own_process() -> tuple[int, int]:
    return os.getpid(), os.getppid()
