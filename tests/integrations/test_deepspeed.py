"""Starts of DeepSpeed beside builds that work, and that were killed."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from lori_dist.integrations.deepspeed import release_locks
from tests.launching import environment_of, free_port, make_program

BUILD = """
import sys
from torch.utils.cpp_extension import load
load(name=sys.argv[1], sources=[sys.argv[2]])
"""
START = """
import sys
from lori_dist.integrations.deepspeed import init_distributed
init_distributed("gloo")
import torch.distributed as dist
assert dist.get_backend() == "gloo" and dist.get_world_size() == 1
dist.destroy_process_group()
"""


@contextmanager
def building(name: str, folder: Path) -> Iterator[tuple[subprocess.Popen[bytes], Path]]:
    """A build that does not come to its end, and its lock."""
    (folder / "part.cpp").write_text("int one() { return 1; }\n")
    make_program(folder / "bin" / "compiler", "#!/bin/sh\nexec sleep 300\n")
    environment = {**environment_of(folder), "CXX": str(folder / "bin" / "compiler")}
    command = [sys.executable, "-c", BUILD, name, str(folder / "part.cpp")]
    with subprocess.Popen(command, env=environment, start_new_session=True, stderr=subprocess.DEVNULL) as process:
        try:
            lock = folder / "extensions" / name / "lock"
            end = time.monotonic() + 120
            while not lock.exists():
                assert process.poll() is None
                assert time.monotonic() < end
                time.sleep(0.05)
            yield process, lock
        finally:
            os.killpg(process.pid, signal.SIGKILL)


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path / "extensions"))
    return tmp_path


def test_a_killed_build_s_lock_is_removed_and_that_of_one_that_works_is_not(
    folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with building("deepspeed_shm_comm", folder) as (process, lock):
        assert release_locks() == []
        assert lock.exists()
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        assert lock.exists()
        assert release_locks() == [lock]
    assert not lock.exists()
    assert f"{lock}: removed; the build that had made it was killed" in caplog.text


def test_a_start_on_cpus_compiles_nothing_and_waits_for_no_lock(folder: Path) -> None:
    """Also for that of a build that works, which would have to end first."""
    with building("deepspeed_shm_comm", folder) as (_, lock):
        environment = {**environment_of(folder), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": free_port()}
        environment |= {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "CUDA_VISIBLE_DEVICES": ""}
        done = subprocess.run([sys.executable, "-c", START], env=environment, capture_output=True, timeout=120)
        assert done.returncode == 0, done.stderr.decode()
        assert lock.exists()
    assert [path.name for path in (folder / "extensions").iterdir()] == ["deepspeed_shm_comm"]


@pytest.mark.parametrize("quiet", [False, True])
def test_a_lock_that_another_machine_may_hold_is_named_until_its_folder_is_quiet(
    folder: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, quiet: bool
) -> None:
    monkeypatch.setattr("lori_dist.integrations.deepspeed.NETWORKS", ("",))  # as if all file systems were such
    lock = folder / "extensions" / "py311_cpu" / "fused_adam" / "lock"
    lock.parent.mkdir(parents=True)
    lock.touch()
    if quiet:
        for path in (lock, lock.parent):
            os.utime(path, (0, 0))
    assert release_locks() == ([lock] if quiet else [])
    assert lock.exists() != quiet
    assert str(lock) in caplog.text
