"""What `lori status` and `lori stop` make of a run's files."""

import json
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lori_dist import folder
from lori_dist.__main__ import main
from lori_dist.cluster.eta import left
from lori_dist.cluster.status import status, stop
from lori_dist.errors import JobError

HOLDER = """
import sys, time
from pathlib import Path
from lori_dist import folder
root = Path(sys.argv[1])
with folder.lock(root) as owner:
    print("ready", flush=True)
    while not folder.stop_requested(root, owner):
        time.sleep(0.05)
"""


def record(step: int, *, at: float, phase: str = "train", tokens: int = 100) -> str:
    left = 50 - step + (50 if phase == "calibrate" else 0)
    steps = {"phase": phase, "step": step, "num_steps": 50, "steps_left": left}
    return json.dumps({**steps, "loss": 1.0, "tokens": tokens, "time": at}) + "\n"


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A run with a training that works, a failed one and what waits for both."""
    root = tmp_path / "demo"
    partial = root / ".partial-train-math"
    partial.mkdir(parents=True)
    # Five steps of half a second, with a restart of a minute among them, and a line that is being written.
    times = [100.0, 100.5, 101.0, 161.0, 161.5, 162.0]
    (partial / "metrics.jsonl").write_text(
        record(50, at=90.0, phase="calibrate") + "".join(record(n, at=at) for n, at in enumerate(times, 1)) + '{"pha'
    )
    ended = {"number": 1, "started": time.time() - 90, "seconds": 20.0, "error": "the process died"}
    attempts = [ended, {"number": 2, "started": time.time() - 70, "seconds": None, "error": None}]
    (partial / "attempts.json").write_text(json.dumps({"attempts": attempts}))
    jobs = {
        "train-math": {"state": "running", "started": time.time() - 70},
        "train-code": {"state": "failed", "seconds": 3.0, "error": "row 8\nmore", "attempts": [attempts[0]]},
        "merge-all": {"state": "blocked", "seconds": 0.0, "needs": ["train-code"]},
        "evaluate-base": {"state": "finished", "cached": True, "seconds": 2.0},
    }
    needs = {"merge-all": ["train-math", "train-code"]}
    (root / "summary.json").write_text(json.dumps({"run": "demo", "jobs": jobs, "needs": needs}))
    return root


def job(found: dict[str, Any], name: str) -> dict[str, Any]:
    [one] = [item for item in found["jobs"] if item["name"] == name]
    return dict(one)


def test_a_training_that_runs_has_progress_pace_and_attempts(run: Path) -> None:
    with folder.lock(run):
        found = status(run)
    assert found["driver"] is not None
    math = job(found, "train-math")
    assert (math["state"], math["phase"], math["step"], math["num_steps"]) == ("running", "train", 6, 50)
    assert math["steps_per_second"] == pytest.approx(2.0)
    assert math["tokens_per_second"] == pytest.approx(200.0)
    assert math["eta_seconds"] == pytest.approx(22.0)
    assert 69 < math["seconds"] < 90
    assert (math["attempts"], math["error"]) == (2, "the process died")
    assert job(found, "merge-all")["needs"] == ["train-math", "train-code"]
    assert job(found, "train-code")["error"] == "row 8\nmore"
    assert job(found, "evaluate-base")["attempts"] == 0


def test_without_a_driver_what_ran_is_interrupted(run: Path) -> None:
    found = status(run)
    assert (found["driver"], job(found, "train-math")["state"]) == (None, "interrupted")
    assert job(found, "train-math")["eta_seconds"] is None


MEASURED = [{"metric": "loss", "task": "copy", "value": 1.0, "seconds": 2.0, "time": at} for at in (100.0, 102.0)]
MERGED = {"kept": 1, "total": 2, "density": 0.5, "bytes": 3, "rank": 4, "seconds": 1.0, "time": 100.0}


@pytest.mark.parametrize("records", [MEASURED, [MERGED, MERGED], [1, None, [2], "three", {"step": "4", "time": "5"}]])
@pytest.mark.parametrize("state", ["running", "interrupted", "waiting", "finished", "failed"])
def test_records_that_are_none_of_steps_are_no_progress(
    run: Path, state: str, records: list[Any], capsys: pytest.CaptureFixture[str]
) -> None:
    (run / ".partial-train-math" / "metrics.jsonl").write_text("".join(json.dumps(one) + "\n" for one in records))
    summary = json.loads((run / "summary.json").read_text())
    summary["jobs"]["train-math"]["state"] = state
    (run / "summary.json").write_text(json.dumps(summary))
    with folder.lock(run):
        found = job(status(run), "train-math")
        assert main(["status", str(run), "--json"]) == 0
    assert (found["state"], found["step"], found["eta_seconds"]) == (state, None, None)


@pytest.mark.parametrize(
    ("saved", "shown"),
    [
        ([], "train 6/50, none saved"),
        (["calibrated.safetensors"], "train 6/50, none saved"),
        (["checkpoints/train-00000004.safetensors", "checkpoints/.train-00000006.partial"], "train 6/50, 4 saved"),
        (["checkpoints/train-00000004.safetensors", "checkpoints/train-00000006.safetensors"], "train 6/50, saved"),
    ],
)
@pytest.mark.parametrize("state", ["running", "interrupted"])
def test_an_interrupted_training_says_what_is_saved(
    run: Path, state: str, saved: list[str], shown: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """Whether its driver could write that it ended, or was killed."""
    partial = run / ".partial-train-math"
    (partial / "checkpoints").mkdir()
    for name in saved:
        (partial / name).touch()
    summary = json.loads((run / "summary.json").read_text())
    summary["jobs"]["train-math"]["state"] = state
    (run / "summary.json").write_text(json.dumps(summary))
    assert main(["status", str(run)]) == 0
    line = capsys.readouterr().out.splitlines()[3]
    assert line.split()[:2] == ["train-math", "interrupted"]
    assert shown in line


def test_progress_of_other_settings_is_not_shown_and_that_of_these_is(run: Path) -> None:
    (run / ".partial-train-math" / "checkpoints").mkdir()
    (run / ".partial-train-math" / "checkpoints" / "train-00000006.safetensors").touch()
    for begun, step in ((False, None), (True, 6)):
        summary = json.loads((run / "summary.json").read_text())
        summary["jobs"]["train-math"] = {"state": "waiting", **({"begun": True} if begun else {})}
        (run / "summary.json").write_text(json.dumps(summary))
        found = job(status(run), "train-math")
        assert (found["state"], found["step"], found["saved_step"]) == ("waiting", step, step)


def test_a_finished_job_has_no_error_of_an_earlier_attempt(run: Path) -> None:
    summary = json.loads((run / "summary.json").read_text())
    attempts = [{"number": 1, "error": "cut off with its driver"}, {"number": 2, "error": None}]
    summary["jobs"]["train-math"] = {"state": "finished", "seconds": 3.0, "attempts": attempts}
    (run / "summary.json").write_text(json.dumps(summary))
    found = job(status(run), "train-math")
    assert (found["attempts"], found["error"]) == (2, None)


def test_the_command_prints_a_table_or_json(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["status", str(run)]) == 0
    first, _, titles, *lines = capsys.readouterr().out.splitlines()
    assert first == f"{run}: no process is working on it"
    assert titles.split()[:3] == ["job", "state", "progress"]
    assert [line.split()[0] for line in lines] == ["train-math", "train-code", "merge-all", "evaluate-base"]
    assert "train 6/50" in lines[0]
    assert lines[1].endswith("row 8")
    assert main(["status", str(run), "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == status(run)


def test_training_jobs_of_lori_train_are_shown_without_a_run(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (run / "summary.json").unlink()
    done = run / "train-code"
    done.mkdir()
    (done / "job.json").write_text(json.dumps({"seconds": 3.5, "attempts": [{"number": 1}]}))
    now = time.time()
    (run / ".partial-train-math" / "metrics.jsonl").write_text("".join(record(n, at=now - 6 + n) for n in range(1, 7)))
    found = status(run)
    assert found["by_train"] and found["driver"] is None
    assert [(one["name"], one["state"]) for one in found["jobs"]] == [
        ("train-math", "running"),
        ("train-code", "finished"),
    ]
    assert job(found, "train-math")["step"] == 6 and job(found, "train-math")["eta_seconds"] == 44.0
    assert job(found, "train-code")["seconds"] == 3.5
    assert found["eta_seconds"] == 44.0 and not found["eta_is_least"]
    assert main(["status", str(run)]) == 0
    first = capsys.readouterr().out.splitlines()[0]
    assert first.startswith(f"{run}: training jobs that `lori train` has started; ") and first.endswith("0:00:44 left")
    long_ago = "".join(record(n, at=now - 600 + n) for n in range(1, 7))
    (run / ".partial-train-math" / "metrics.jsonl").write_text(long_ago)
    started = {"number": 2, "started": now - 700, "seconds": None, "error": None}
    (run / ".partial-train-math" / "attempts.json").write_text(json.dumps({"attempts": [started]}))
    assert job(status(run), "train-math")["state"] == "interrupted"


def one(
    name: str, state: str, seconds: float | None = None, eta: float | None = None, needs: Any = ()
) -> dict[str, Any]:
    return {"name": name, "state": state, "seconds": seconds, "eta_seconds": eta, "needs": needs}


def test_the_time_of_a_whole_run_follows_from_jobs_that_run_or_are_done() -> None:
    trainings = ("train-c", "train-d", "train-e")
    jobs = [
        one("train-a", "finished", 100.0),
        one("train-b", "running", 40.0, 60.0),
        *(one(name, "waiting") for name in trainings),
        one("merge-m", "waiting", needs=("train-b", *trainings)),
    ]
    alone = left(jobs)  # one at a time: the rest of b, three of 100 s, and a merge of which nothing is known
    assert alone is not None and (alone.seconds, alone.is_least) == (360.0, True)
    jobs[2] = one("train-c", "running", 10.0, 100.0)
    jobs.append(one("merge-n", "finished", 7.0))
    both = left(jobs)  # two at a time: d after b until 160, e after c until 200, then the merge
    assert both is not None and (both.seconds, both.is_least) == (207.0, False)
    assert left([one("train-a", "finished", 100.0), one("train-b", "interrupted", 3.0)]) is None
    first = left([one("train-a", "running", 5.0), one("train-b", "waiting")])  # before the first steps
    assert first is not None and first.is_least


def test_a_folder_without_a_run_is_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["status", str(tmp_path)]) == 1
    assert f"{tmp_path}: no run was started here" in capsys.readouterr().err


def test_stop_ends_the_process_that_works_and_no_other(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for _ in range(2):  # the request to the first does not reach the second
        with subprocess.Popen([sys.executable, "-c", HOLDER, str(run)], stdout=subprocess.PIPE) as holder:
            assert holder.stdout is not None
            assert holder.stdout.readline() == b"ready\n"
            time.sleep(0.2)
            assert holder.poll() is None
            assert main(["stop", str(run), "--timeout", "30"]) == 0
            assert f"process {holder.pid} on " in capsys.readouterr().out
            assert holder.wait(10) == 0
    assert main(["stop", str(run)]) == 0
    assert "no process is working on it" in capsys.readouterr().out


def test_a_process_that_does_not_end_is_named(run: Path) -> None:
    with folder.lock(run) as owner:
        with pytest.raises(JobError, match=r"process \d+ on .* has not stopped within 0.1 s"):
            stop(run, timeout=0.1)
        assert folder.stop_requested(run, owner)
        assert status(run)["stopping"]


def test_a_request_that_comes_late_is_for_nobody(run: Path) -> None:
    with folder.lock(run) as before:
        pass
    with folder.lock(run) as owner:
        folder.request_stop(run, before)
        assert not folder.stop_requested(run, owner)


def test_asking_does_not_keep_a_driver_out(run: Path) -> None:
    """Whoever asks holds the lock for a moment."""
    ended = threading.Event()

    def ask() -> None:
        while not ended.is_set():
            folder.owner(run)

    askers = [threading.Thread(target=ask) for _ in range(2)]
    for asker in askers:
        asker.start()
    try:
        for _ in range(20):
            with folder.lock(run):
                pass
    finally:
        ended.set()
        for asker in askers:
            asker.join()


@given(name=st.text(min_size=1).filter(lambda name: not name.isascii() or not name.replace("-", "").isalnum()))
def test_a_job_s_name_in_the_summary_leads_nowhere(tmp_path_factory: pytest.TempPathFactory, name: str) -> None:
    root = tmp_path_factory.mktemp("run")
    (root / "summary.json").write_text(json.dumps({"run": "demo", "jobs": {name: {"state": "running"}}}))
    allowed = name[0] not in "-_" and name.isascii() and name.replace("-", "").replace("_", "").isalnum()
    if allowed:
        assert [item["name"] for item in status(root)["jobs"]] == [name]
    else:
        with pytest.raises(JobError, match="not a job's name"):
            status(root)


def test_what_files_say_does_not_command_the_terminal(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    summary = json.loads((run / "summary.json").read_text())
    summary["jobs"]["train-code"]["error"] = "\x1b]0;title\x07\x9b2J"
    (run / "summary.json").write_text(json.dumps(summary))
    assert main(["status", str(run)]) == 0
    printed = capsys.readouterr().out
    assert "\\x1b]0;title\\x07\\x9b2J" in printed
    assert all(letter.isprintable() or letter == "\n" for letter in printed)
