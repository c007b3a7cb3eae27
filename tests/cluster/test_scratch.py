"""The folder for sockets and temporary files of a run."""

import signal
import socket
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from lori_dist.cluster import scratch
from lori_dist.errors import ConfigError

HOLDER = """
import sys
from lori_dist.cluster import scratch
with scratch.folder() as place:
    print(place, flush=True)
    sys.stdin.read()
"""


@pytest.fixture
def short(monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A TMPDIR of its own in which sockets fit."""
    with tempfile.TemporaryDirectory(prefix="t-", dir="/tmp") as place:
        monkeypatch.setenv("TMPDIR", place)
        monkeypatch.setattr(tempfile, "tempdir", None)
        yield Path(place)


@pytest.mark.parametrize("variable", ["TMPDIR", "RAY_TMPDIR"])
def test_a_socket_of_ray_s_fits_whatever_tmpdir_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, variable: str
) -> None:
    long = tmp_path / ("of_a_job_on_some_cluster/" * 4)
    long.mkdir(parents=True)
    monkeypatch.setenv(variable, str(long))
    monkeypatch.setattr(tempfile, "tempdir", None)
    with scratch.folder() as place, socket.socket(socket.AF_UNIX) as listening:
        sockets = place / "r" / "session_2026-11-28_21-16-57_262673_4194304" / "sockets"
        sockets.mkdir(parents=True)
        listening.bind(str(sockets / "plasma_store"))
        assert place.stat().st_mode & 0o777 == 0o700
    assert not place.exists()
    assert list(long.iterdir()) == []


def test_it_is_in_tmpdir_where_that_is_short_enough(short: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with scratch.folder() as place:
        assert place.parent == short
    (short / "ray").mkdir()
    monkeypatch.setenv("RAY_TMPDIR", str(short / "ray"))
    with scratch.folder() as place:
        assert place.parent == short / "ray"
        (place / "left").write_text("by a process")
    assert list((short / "ray").iterdir()) == []


@pytest.mark.parametrize("variable", ["TMPDIR", "RAY_TMPDIR"])
@pytest.mark.parametrize(("place", "problem"), [("nowhere", "does not exist"), ("file", "is not a folder")])
def test_a_tmpdir_that_cannot_be_used_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, variable: str, place: str, problem: str
) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv(variable, str(tmp_path / place))
    with pytest.raises(ConfigError, match=rf"^{variable}: '{tmp_path / place}' {problem}; set it to a folder"):
        scratch.check()


def test_a_tmpdir_that_cannot_be_written_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TMPDIR", "/proc")
    with pytest.raises(ConfigError, match=r"^TMPDIR: '/proc' cannot be written \("):
        scratch.check()


def test_what_processes_still_write_is_removed_too(short: Path) -> None:
    writer = "import os, sys\nwhile True:\n os.makedirs(sys.argv[1], exist_ok=True)"
    with scratch.folder() as place:
        command = ["sh", "-c", 'trap "" TERM; exec "$@"', "sh", sys.executable, "-c", writer, str(place / "more")]
        with subprocess.Popen(command, env={"TMPDIR": str(place)}) as process:
            while not (place / "more").exists():
                assert process.poll() is None
            threading.Timer(0.1, process.wait).start()
            scratch.end_processes(place)
        assert process.returncode == -signal.SIGKILL
    assert list(short.iterdir()) == []


def test_what_a_killed_process_left_is_removed_and_what_one_works_in_is_not(short: Path) -> None:
    started = [subprocess.Popen([sys.executable, "-c", HOLDER], stdin=-1, stdout=-1) for _ in range(2)]
    try:
        killed, working = started
        places = []
        for process in started:
            assert process.stdout is not None
            places.append(Path(process.stdout.readline().decode().strip()))
        (places[0] / "session").mkdir()
        killed.send_signal(signal.SIGKILL)
        killed.wait()
        assert places[0].exists()
        with scratch.folder() as place:
            assert set(short.iterdir()) == {places[1], place}
        assert working.communicate(b"")[0] == b""
        assert list(short.iterdir()) == []
    finally:
        for process in started:
            process.kill()
            process.wait()
            for stream in (process.stdin, process.stdout):
                assert stream is not None
                stream.close()
