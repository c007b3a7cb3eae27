"""What can be seen in one process; ranks that fail under launchers are in tests/test_launchers.py."""

import pytest
import torch.distributed as dist

from lori_dist.cluster.member import is_of_connection, member
from lori_dist.errors import JobError


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
