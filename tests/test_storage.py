"""What one machine's mirror puts on storage, another's fetches; drivers keep each other out."""

import dataclasses
import json
import time
from pathlib import Path

import pytest

from lori_dist import folder, storage
from lori_dist.errors import ConfigError, JobError
from lori_dist.storage import Mirror


@pytest.fixture
def machines(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[Mirror, Mirror]:
    """Two mirrors of one run, with nothing in common but the storage."""
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    one = storage.open(f"file://{tmp_path}/store", "demo")
    other = tmp_path / "other"
    other.mkdir()
    return one, dataclasses.replace(one, here=other)


def test_what_one_puts_the_other_fetches_and_only_once(machines: tuple[Mirror, Mirror]) -> None:
    one, other = machines
    (one.here / "job").mkdir()
    (one.here / "job" / "job.json").write_text("{}")
    (one.here / "job" / ".cut-off").write_text("x")
    one.push("job")
    other.pull()
    fetched = (other.here / "job" / "job.json").stat()
    other.pull()
    assert (other.here / "job" / "job.json").stat() == fetched
    assert not (other.here / "job" / ".cut-off").exists()
    (one.here / "job" / "job.json").write_text("{ }")
    one.push("job")
    other.pull()
    assert (other.here / "job" / "job.json").read_text() == "{ }"


def test_fetching_leaves_what_is_newer_here(machines: tuple[Mirror, Mirror]) -> None:
    one, _ = machines
    (one.here / "metrics").write_text("1\n")
    one.push()
    (one.here / "metrics").write_text("1\n2\n")
    one.pull()
    assert (one.here / "metrics").read_text() == "1\n2\n"


def test_a_second_driver_is_refused_until_the_first_has_ended_or_is_silent(machines: tuple[Mirror, Mirror]) -> None:
    one, other = machines
    with one.lease(), pytest.raises(JobError, match=r"process \d+ on .* is working on this run"), other.lease():
        pass
    with other.lease():
        pass
    lease = Path(one.there) / storage.LEASE
    lease.write_text(json.dumps({"owner": "a dead one", "token": "x", "beat": time.time() - storage.STALE_SECONDS - 1}))
    with one.lease():
        pass


@pytest.mark.parametrize("output", ["nowhere://bucket/runs", "file:///proc/runs"])
def test_storage_that_cannot_be_used_is_named(output: str) -> None:
    with pytest.raises(ConfigError, match=f"output: '{output}'"):
        storage.open(output, "demo")


def test_a_mirror_that_is_open_to_others_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    storage.mirror_folder("file:///x", "demo").parent.parent.mkdir(mode=0o755)
    with pytest.raises(ConfigError, match="not this user's alone"):
        storage.open(f"file://{tmp_path}/store", "demo")


def test_an_attempt_stops_once_there_is_a_newer_one(machines: tuple[Mirror, Mirror]) -> None:
    one, other = machines
    partial = other.here / ".partial-job"
    partial.mkdir()
    first = folder.attempt(partial)
    other.push(partial.name)
    markers = f"{partial.name}/{folder.ATTEMPT}"
    one.check(markers, first.number, first.token)
    folder.attempt(partial)
    other.push(partial.name)
    with pytest.raises(JobError, match="does not own the folder"):
        one.check(markers, first.number, first.token)
