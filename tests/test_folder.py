"""A job's folder: absent or complete, whatever happens while it is made."""

import hashlib
import itertools
import json
import os
import random
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from lori_dist import folder
from lori_dist.errors import JobError
from lori_dist.jobs import Job

RESULT = {"seconds": 1.5, "result": {"kept": 3}}


def job(fingerprint: str = "f1", name: str = "train-math") -> Job:
    return Job(name=name, kind="train", needs=("a",), settings={"task": "math"}, fingerprint=fingerprint)


def made(root: Path, what: Job, content: str = "values") -> Path:
    """A finished folder of one file."""
    (folder.open(root, what) / "adapter").write_text(content)
    return folder.publish(root, what, RESULT)


# --- publication -----------------------------------------------------------------------------------------------------


def test_a_published_folder_is_finished_and_holds_what_was_written(tmp_path: Path) -> None:
    assert folder.finished(tmp_path, job()) is None
    partial = folder.open(tmp_path, job())
    (partial / "deep").mkdir()
    (partial / "deep" / "file").write_text("12345")
    assert folder.finished(tmp_path, job()) is None
    place = folder.publish(tmp_path, job(), RESULT)
    assert place == tmp_path / "train-math"
    assert (place / "deep" / "file").read_text() == "12345"
    record = folder.finished(tmp_path, job())
    assert record == json.loads((place / "job.json").read_text())
    assert record == {
        "name": "train-math",
        "kind": "train",
        "fingerprint": "f1",
        "needs": ["a"],
        "settings": {"task": "math"},
        **RESULT,
        "files": {"deep/file": 5},
        "sha256": {"deep/file": hashlib.sha256(b"12345").hexdigest()},
        "digest": record["digest"],
    }
    assert {path.name for path in tmp_path.iterdir()} == {"train-math"}
    assert {path.name for path in place.iterdir()} == {"job.json", "deep"}


@pytest.mark.parametrize("key", ["seconds", "result", "settings", "kind", "files", "sha256", "needs"])
def test_a_figure_that_was_changed_in_a_job_s_record_is_noticed(tmp_path: Path, key: str) -> None:
    place = made(tmp_path, job())
    record = json.loads((place / "job.json").read_text())
    (place / "job.json").write_text(json.dumps(dict(reversed(record.items())), indent=3))  # the same figures
    assert folder.finished(tmp_path, job()) == record
    (place / "job.json").write_text(json.dumps({**record, key: {"kept": 4}}))
    with pytest.raises(JobError, match=rf"^{place}/job.json: was changed after .*; restore it, or delete {place}"):
        folder.finished(tmp_path, job())
    without = {name: item for name, item in record.items() if name != "digest"}  # as earlier versions wrote it
    (place / "job.json").write_text(json.dumps(without))
    assert folder.finished(tmp_path, job()) == without


def test_a_changed_byte_in_a_finished_folder_is_noticed(tmp_path: Path) -> None:
    (folder.open(tmp_path, job()) / "file").write_text("12345")
    place = folder.publish(tmp_path, job(), RESULT)
    (place / "file").write_text("12845")
    with pytest.raises(JobError, match=rf"^{place}/file: has changed since .*; delete {place} to do the job again$"):
        folder.finished(tmp_path, job())


def test_what_a_killed_publisher_left_is_cleaned_up(tmp_path: Path) -> None:
    folder.open(tmp_path, job())
    place = folder.publish(tmp_path, job(), RESULT)
    going_on = folder.open(tmp_path, job(name="train-code"))
    for left in (place / "checkpoints", tmp_path / ".replaced-train-math", going_on / "checkpoints"):
        left.mkdir()
    folder.clean(tmp_path, scratch=["checkpoints"])
    assert {path.name for path in tmp_path.iterdir()} == {"train-math", ".partial-train-code"}
    assert {path.name for path in place.iterdir()} == {"job.json"}
    assert (going_on / "checkpoints").is_dir()  # from which the training goes on


def test_scratch_is_not_kept(tmp_path: Path) -> None:
    partial = folder.open(tmp_path, job())
    for name in ("checkpoints", "kept"):
        (partial / name).mkdir()
        (partial / name / "file").write_text("x")
    place = folder.publish(tmp_path, job(), RESULT, scratch=["checkpoints"])
    record = folder.finished(tmp_path, job())
    assert record is not None
    assert record["files"] == {"kept/file": 1}
    assert not (place / "checkpoints").exists()


def test_half_done_work_is_taken_up_again(tmp_path: Path) -> None:
    (folder.open(tmp_path, job()) / "checkpoint").write_text("x")
    assert (folder.open(tmp_path, job()) / "checkpoint").read_text() == "x"


def test_half_done_work_of_another_fingerprint_is_wiped(tmp_path: Path) -> None:
    (folder.open(tmp_path, job("f1")) / "checkpoint").write_text("x")
    assert not (folder.open(tmp_path, job("f2")) / "checkpoint").exists()


def test_half_done_work_with_checkpoints_is_kept_and_comes_back_with_its_settings(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    for fingerprint in ("f1", "f2"):
        (folder.open(tmp_path, job(fingerprint)) / "train-1.safetensors").write_text(fingerprint)
    assert "is kept as .partial-train-math.1" in caplog.text
    assert (folder.open(tmp_path, job("f1")) / "train-1.safetensors").read_text() == "f1"
    assert (folder.open(tmp_path, job("f2")) / "train-1.safetensors").read_text() == "f2"


def test_half_done_work_of_unknown_origin_is_wiped(tmp_path: Path) -> None:
    partial = folder.open(tmp_path, job())
    (partial / "checkpoint").write_text("x")
    (partial / "started.json").write_text('{"name": "tra')
    assert not (folder.open(tmp_path, job()) / "checkpoint").exists()


def test_a_finished_folder_of_another_fingerprint_stays_until_the_new_one_is_complete(tmp_path: Path) -> None:
    place = made(tmp_path, job("f1"), "old")
    assert folder.finished(tmp_path, job("f2")) is None
    (folder.open(tmp_path, job("f2")) / "adapter").write_text("new")
    assert (place / "adapter").read_text() == "old"
    assert folder.finished(tmp_path, job("f1")) is not None
    folder.publish(tmp_path, job("f2"), RESULT)
    assert (place / "adapter").read_text() == "new"
    assert folder.finished(tmp_path, job("f2")) is not None
    made(tmp_path, job("f3"), "newest")
    assert {path.name for path in tmp_path.iterdir()} == {"train-math", "train-math.1", "train-math.2"}
    kept = folder.kept(tmp_path, "train-math")
    assert [(path / "adapter").read_text() for path in kept] == ["old", "new"]


def test_what_differs_from_a_finished_job_is_named(tmp_path: Path) -> None:
    def of(settings: dict[str, Any]) -> Job:
        return Job(name="train-math", kind="train", settings={"task": "math", **settings}, fingerprint=str(settings))

    before = {"train": {"lr": 0.005}, "data": {"rows": "a" * 64}, "model": {"content": {"config.json": "c" * 64}}}
    place = made(tmp_path, of(before))
    assert folder.superseded(tmp_path, of({"other": 1, **before})) == (
        "train-math: settings changed since it finished: other not set -> 1; it is done again, and what is there is "
        "kept as train-math.1"
    )
    after = {"train": {"lr": 0.004}, "data": {"rows": "b" * 64}, "model": {"content": {"config.json": "d" * 64}}}
    text = folder.superseded(tmp_path, of(after))
    assert text is not None
    assert ": train.lr 0.005 -> 0.004, tasks.math.train: the file has changed, model.path: config.json has" in text
    (place / "job.json").write_text("{")
    text = folder.superseded(tmp_path, of(before))
    assert text is not None
    assert f"{place / 'job.json'} is missing or cannot be read" in text
    assert folder.superseded(tmp_path / "other", of(before)) is None


@pytest.mark.parametrize("content", [None, "", "{", "[]", '{"name": "train-math"}'])
def test_a_folder_without_a_readable_description_is_not_finished(tmp_path: Path, content: str | None) -> None:
    (tmp_path / "train-math").mkdir()
    if content is not None:
        (tmp_path / "train-math" / "job.json").write_text(content)
    assert folder.finished(tmp_path, job()) is None
    made(tmp_path, job())
    assert folder.finished(tmp_path, job()) is not None


def test_a_file_where_the_folder_should_be_is_kept_beside_it(tmp_path: Path) -> None:
    (tmp_path / "train-math").write_text("x")
    assert folder.finished(tmp_path, job()) is None
    made(tmp_path, job())
    assert folder.finished(tmp_path, job()) is not None
    assert (tmp_path / "train-math.1").read_text() == "x"


def test_a_finished_folder_that_lost_a_file_is_not_passed_off_as_finished(tmp_path: Path) -> None:
    place = made(tmp_path, job())
    (place / "adapter").write_text("")
    with pytest.raises(
        JobError, match=r"train-math/adapter: has 0 bytes, not 6, .*; delete .*train-math to do the job"
    ):
        folder.finished(tmp_path, job())
    (place / "adapter").unlink()
    with pytest.raises(JobError, match=r"train-math/adapter: is missing"):
        folder.finished(tmp_path, job())


STEPS = st.lists(st.sampled_from(["open f1", "open f2", "publish", "wipe"]), max_size=12)


@given(STEPS)
@settings(max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_any_order_of_work_leaves_what_was_published_last(
    tmp_path_factory: pytest.TempPathFactory, steps: list[str]
) -> None:
    root = tmp_path_factory.mktemp("run")
    opened: str | None = None
    published: str | None = None
    for step in steps:
        if step.startswith("open"):
            opened = step.split()[1]
            (folder.open(root, job(opened)) / "adapter").write_text(opened)
        elif step == "publish" and opened is not None:
            folder.publish(root, job(opened), RESULT)
            opened, published = None, opened
        for fingerprint in ("f1", "f2"):
            assert (folder.finished(root, job(fingerprint)) is not None) == (fingerprint == published)
        if published is not None:
            assert (root / "train-math" / "adapter").read_text() == published


# --- kills -----------------------------------------------------------------------------------------------------------

PUBLISHER = """
import itertools, sys
from pathlib import Path
from lori_dist import folder
from lori_dist.jobs import Job
root = Path(sys.argv[1])
for number in itertools.count():
    job = Job(name="job", kind="train", fingerprint=str(number))
    partial = folder.open(root, job)
    for name in "abcde":
        (partial / name).write_text(f"{number}\\n" * 1000)
    folder.publish(root, job, {"number": number})
    if number == 0:
        print(flush=True)
"""


def test_a_publisher_that_is_killed_leaves_a_complete_folder_or_none(tmp_path: Path) -> None:
    """A process publishes one result after the other, each in place of the one before, until a kill at any time."""
    chance = random.Random(0)
    seen = set()
    for trial in range(12):
        root = tmp_path / str(trial)
        with subprocess.Popen([sys.executable, "-c", PUBLISHER, str(root)], stdout=subprocess.PIPE) as process:
            assert process.stdout is not None
            process.stdout.readline()
            with pytest.raises(subprocess.TimeoutExpired):
                process.wait(timeout=chance.uniform(0, 0.02))
            process.send_signal(signal.SIGKILL)
        place = root / "job"
        seen.add(place.exists())
        if place.exists():
            number = json.loads((place / "job.json").read_text())["number"]
            assert folder.finished(root, Job(name="job", kind="train", fingerprint=str(number))) is not None
            assert {(place / name).read_text() for name in "abcde"} == {f"{number}\n" * 1000}
        after = Job(name="job", kind="train", fingerprint="after")
        made(root, after)
        assert folder.finished(root, after) is not None
        assert not list(root.glob(".*"))
        for path in folder.kept(root, "job"):
            assert (path / "job.json").exists()
    assert True in seen


class Cut(BaseException):
    """Ends the work as a kill would: there is nothing in it that is done on the way out."""


CALLS = [(Path, name) for name in ("mkdir", "write_text", "replace", "unlink", "rename")] + [
    (os, "fsync"),
    (os, "replace"),
    (shutil, "rmtree"),
]


def test_a_publication_cut_off_at_any_call_loses_nothing(tmp_path: Path) -> None:
    """Cut off before the n-th of the calls that change something, for every n, and then done again."""
    for number in itertools.count():
        root = tmp_path / str(number)
        made(root, job("old"), "old")
        (folder.open(root, job("new")) / "checkpoint").write_text("work")
        if not cut_off(lambda root=root: work(root), number):
            assert number > 10
            break
        states = [name for name in ("old", "new") if folder.finished(root, job(name)) is not None]
        if not states:  # between the two renames
            assert not (root / "train-math").exists()
        if "new" not in states:
            assert (folder.open(root, job("new")) / "checkpoint").read_text() == "work"
            folder.publish(root, job("new"), RESULT)
        record = folder.finished(root, job("new"))
        assert record is not None
        assert record["files"] == {"checkpoint": 4}
        made(root, job("next"))
        names = {path.name for path in root.iterdir()}
        assert names == {"train-math", "train-math.1", "train-math.2"}
        assert [(path / "job.json").exists() for path in folder.kept(root, "train-math")] == [True, True]


def work(root: Path) -> None:
    folder.attempt(folder.open(root, job("new")))
    folder.publish(root, job("new"), RESULT)


def cut_off(function: Callable[[], None], number: int) -> bool:
    """Whether the function was cut off: False if it made no more calls than `number`."""
    left = itertools.count(number, -1)

    def cutting(call: Callable[..., Any]) -> Callable[..., Any]:
        def cut_or_call(*args: Any, **options: Any) -> Any:
            if next(left) <= 0:
                raise Cut
            return call(*args, **options)

        return cut_or_call

    with pytest.MonkeyPatch.context() as patch:
        for place, name in CALLS:
            patch.setattr(place, name, cutting(getattr(place, name)))
        try:
            function()
        except Cut:
            return True
    return False


# --- attempts --------------------------------------------------------------------------------------------------------


def test_a_newer_attempt_takes_the_right_to_write(tmp_path: Path) -> None:
    partial = folder.open(tmp_path, job())
    first = folder.attempt(partial)
    first.check()
    second = folder.attempt(partial)
    assert (first.number, second.number) == (1, 2)
    second.check()
    with pytest.raises(JobError, match=r"partial-train-math: attempt 1 does not own this folder"):
        first.check()


def test_an_attempt_at_a_published_or_wiped_folder_is_over(tmp_path: Path) -> None:
    first = folder.attempt(folder.open(tmp_path, job("f1")))
    second = folder.attempt(folder.open(tmp_path, job("f2")))
    assert second.number == first.number == 1
    second.check()
    with pytest.raises(JobError):
        first.check()
    folder.publish(tmp_path, job("f2"), RESULT)
    with pytest.raises(JobError):
        second.check()


ATTEMPTING = """
import sys
from pathlib import Path
from lori_dist import folder
print(folder.attempt(Path(sys.argv[1])).number)
"""


def test_attempts_at_the_same_time_get_different_numbers(tmp_path: Path) -> None:
    partial = folder.open(tmp_path, job())
    command = [sys.executable, "-c", ATTEMPTING, str(partial)]
    processes = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for _ in range(4)]
    assert sorted(process.communicate()[0].strip() for process in processes) == ["1", "2", "3", "4"]


# --- lock ------------------------------------------------------------------------------------------------------------

HOLDER = """
import sys
from pathlib import Path
from lori_dist import folder
with folder.lock(Path(sys.argv[1])):
    print(flush=True)
    sys.stdin.read()
"""


def test_two_processes_do_not_work_on_one_run_and_a_kill_ends_the_lock(tmp_path: Path) -> None:
    command = [sys.executable, "-c", HOLDER, str(tmp_path / "run")]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        process.stdout.readline()
        with (
            pytest.raises(JobError, match=rf"run: process {process.pid} on .* is working on this run"),
            locked(tmp_path),
        ):
            pass
        process.kill()
    with locked(tmp_path):
        pass


def locked(path: Path) -> Any:
    return folder.lock(path / "run")


def test_a_lock_ends_with_an_error_inside(tmp_path: Path) -> None:
    with pytest.raises(ZeroDivisionError), locked(tmp_path):
        raise ZeroDivisionError
    with locked(tmp_path):
        pass


# --- files -----------------------------------------------------------------------------------------------------------


def test_a_json_file_is_replaced_at_once(tmp_path: Path) -> None:
    path = tmp_path / "summary.json"
    folder.write_json(path, {"a": "ä"})
    inode = os.stat(path).st_ino
    with path.open(encoding="utf-8") as old:
        folder.write_json(path, {"a": 2})
        assert json.load(old) == {"a": "ä"}
    assert json.loads(path.read_text()) == {"a": 2}
    assert os.stat(path).st_ino != inode
    assert [file.name for file in tmp_path.iterdir()] == ["summary.json"]
