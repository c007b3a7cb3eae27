"""Only regular files are opened, whatever has the path."""

import os
import socket
from collections.abc import Iterator
from pathlib import Path

import pytest

from lori_dist.files import open_regular, read_regular, require_regular


@pytest.fixture
def pipe(tmp_path: Path) -> Path:
    os.mkfifo(tmp_path / "pipe")
    return tmp_path / "pipe"


@pytest.fixture
def listening(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    monkeypatch.chdir(tmp_path)  # the paths of sockets are short
    with socket.socket(socket.AF_UNIX) as server:
        server.bind("s")
        yield Path("s")


def refused(path: str | Path) -> str:
    reasons = set()
    for function in (open_regular, require_regular, read_regular):
        with pytest.raises(OSError) as error:
            function(path)
        reasons.add(str(error.value.strerror))
    (reason,) = reasons
    return reason


def test_a_regular_file_is_read_also_through_a_link(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"some bytes")
    (tmp_path / "link").symlink_to("file")
    for name in ("file", "link"):
        assert read_regular(tmp_path / name) == b"some bytes"
        with open_regular(tmp_path / name) as file:
            assert file.read(4) == b"some"


def test_pipes_devices_sockets_and_directories_are_refused_at_once(pipe: Path, listening: Path, tmp_path: Path) -> None:
    (tmp_path / "to_device").symlink_to("/dev/zero")
    assert "a named pipe" in refused(pipe)
    assert "a device" in refused("/dev/zero")
    assert "a device" in refused(tmp_path / "to_device")
    assert "a socket" in refused(listening)
    assert "a directory" in refused(tmp_path)


@pytest.mark.parametrize("path", ["a\0b", "half of a pair \ud800", "missing"])
def test_a_path_without_a_file_is_an_os_error(path: str) -> None:
    assert refused(path)


def test_a_file_above_the_limit_is_not_held_in_memory(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"12345")
    assert read_regular(tmp_path / "file", limit=5) == b"12345"
    with pytest.raises(OSError, match="more than the 4 bytes"):
        read_regular(tmp_path / "file", limit=4)
    with open(tmp_path / "huge", "wb") as file:
        file.truncate(2**40)
    with pytest.raises(OSError, match="more than"):
        read_regular(tmp_path / "huge")
