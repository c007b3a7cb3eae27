"""Decisions that one process shows; test_gang.py has ranks that fail in gangs, test_launchers.py under launchers."""

from typing import Any

import pytest
import torch.distributed as dist

from lori_dist.cluster.failures import (
    Failure,
    cause,
    from_record,
    is_final,
    is_of_connection,
    member,
    record_of,
    retry,
)
from lori_dist.errors import AdapterError, ConfigError, JobError


def failure(rank: int, time: float, error: BaseException | None) -> Failure:
    if error is None:
        return Failure(rank=rank, time=time, types=(), message="died")
    return from_record(record_of(error, rank, time))


def test_a_failure_survives_the_way_through_json() -> None:
    found = from_record(record_of(ConfigError("a: b\nc: d"), 3, 12.5))
    assert (found.rank, found.time, found.message) == (3, 12.5, "a: b\nc: d")
    assert found.types[:2] == ("ConfigError", "LoriError")


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (RuntimeError("first line\nsecond line"), "RuntimeError: first line"),
        (KeyError("x"), "KeyError: 'x'"),
        (MemoryError(), "MemoryError"),
        (JobError("rank 1: differs"), "rank 1: differs"),
    ],
)
def test_a_message_says_what_a_user_can_use(error: BaseException, message: str) -> None:
    assert record_of(error, 0, 0.0)["message"] == message


@pytest.mark.parametrize(
    ("error", "final"),
    [
        (ConfigError("x"), True),
        (AdapterError("x"), True),
        (JobError("x"), True),
        (TypeError("x"), True),
        (KeyError("x"), True),
        (ModuleNotFoundError("x"), True),
        (RuntimeError("Connection closed by peer"), False),
        (OSError("No space left on device"), False),
        (MemoryError(), False),
        (None, False),
    ],
)
def test_mistakes_are_not_tried_again(error: BaseException | None, final: bool) -> None:
    found = failure(0, 0.0, error)
    assert is_final(found) == final
    assert retry(found, 1, 1) != final


def test_attempts_are_counted() -> None:
    died = failure(0, 0.0, None)
    assert [retry(died, number, 2) for number in (1, 2, 3)] == [True, True, False]
    assert not retry(died, 1, 0)


CLOSED = RuntimeError("Connection closed by peer")


@pytest.mark.parametrize(
    ("reported", "lost", "rank"),
    [
        ([(1, 2.0, CLOSED), (0, 1.0, OSError("disk"))], [], 0),
        ([(0, 1.0, CLOSED)], [1], 1),
        ([(0, 1.0, CLOSED), (2, 2.0, ConfigError("x"))], [1], 2),
        ([(0, 3.0, ConfigError("x")), (1, 2.0, ConfigError("x"))], [], 1),
        ([], [3], 3),
    ],
)
def test_the_first_cause_is_told_and_not_its_consequences(
    reported: list[tuple[int, float, Any]], lost: list[int], rank: int
) -> None:
    found = cause([failure(*item) for item in reported], [failure(item, 0.0, None) for item in lost])
    assert found is not None
    assert found.rank == rank


def test_without_a_failure_there_is_no_cause() -> None:
    assert cause([], []) is None


def caused(error: Exception, cause: Exception) -> Exception:
    try:
        raise error from cause
    except Exception as raised:
        return raised


@pytest.mark.parametrize(
    "error",
    [
        RuntimeError("[../third_party/gloo/gloo/transport/tcp/pair.cc:534] Connection closed by peer [127.0.0.1]:1"),
        RuntimeError("Read error [127.0.0.1]:33452: Connection reset by peer"),
        RuntimeError("Timed out waiting 300000ms for recv operation to complete"),
        dist.DistBackendError("remote process exited or there was a network error"),
        dist.DistNetworkError("failed to recv, got 0 bytes"),
        caused(ValueError("no state"), RuntimeError("Connection closed by peer")),
    ],
)
def test_errors_of_a_connection_are_known(error: Exception) -> None:
    assert is_of_connection(error)


@pytest.mark.parametrize(
    "error", [RuntimeError("CUDA out of memory"), ValueError("gloo"), KeyError("a"), JobError("the loss is nan")]
)
def test_other_errors_are_a_rank_s_own(error: Exception) -> None:
    assert not is_of_connection(error)


@pytest.mark.parametrize("environment", [{}, {"RANK": "0"}, {"RANK": "0", "WORLD_SIZE": "1"}])
def test_a_single_process_sees_nothing_of_it(environment: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    more = {"LOCAL_RANK": "0", "MASTER_ADDR": "localhost", "MASTER_PORT": "1"} if "WORLD_SIZE" in environment else {}
    for name in ("RANK", "WORLD_SIZE", "SLURM_PROCID"):
        monkeypatch.delenv(name, raising=False)
    for name, value in {**environment, **more}.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ZeroDivisionError), member(lambda error: ("never", 3)):
        raise ZeroDivisionError
