"""A search for the weights of a merge in a run on a real cluster: what it finds, what it sees, and going on with it.

The searched run comes first. Its trainings are then given to a second run, together with the first lines of its search,
as a killed driver leaves them, and with other test files.
"""

import dataclasses
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from lori_dist import config, folder
from lori_dist.cluster import trials
from lori_dist.cluster.run import execute, with_absolute_paths
from lori_dist.evaluation import evaluate
from lori_dist.formats import native
from lori_dist.merges import merge_files
from lori_dist.multitask.independent import plan
from tests.models import tiny_llama
from tests.tokenizers import save

pytestmark = [
    pytest.mark.ray,
    # Ray Data, which Ray Train sets up unasked, reads options of its own that it has deprecated.
    pytest.mark.filterwarnings(r"ignore:`use_\w+` is deprecated:DeprecationWarning"),
]

BUDGET, KNOWN = 8, 3
WORDS = ["abc", "dog", "four", "x y", "hello", "sun", "1 2 3", "moon"]


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model's folder and the rows of two tasks, one of them with validation rows."""
    place = tmp_path_factory.mktemp("searched")
    save(tiny_llama(), place / "model")
    for task, answer in {"copy": lambda word: word, "reverse": lambda word: word[::-1]}.items():
        rows = [json.dumps({"prompt": f"{task} {word}: ", "response": answer(word)}) + "\n" for word in WORDS]
        (place / f"{task}-train.jsonl").write_text("".join(rows))
        (place / f"{task}-test.jsonl").write_text("".join(rows[:2]))
        (place / f"{task}-validation.jsonl").write_text("".join(rows[2:6]))
    return place


def described(place: Path, name: str = "first", **search: Any) -> config.Run:
    tasks: dict[str, Any] = {
        task: {"train": str(place / f"{task}-train.jsonl"), "test": str(place / f"{task}-test.jsonl")}
        for task in ("copy", "reverse")
    }
    tasks["copy"]["validation"] = str(place / "copy-validation.jsonl")
    return config.validate(
        {
            "name": name,
            "output": str(place / "runs"),
            "model": {"path": str(place / "model")},
            "tasks": tasks,
            "adapter": {"rank": 4, "density": 0.3},
            "train": {"steps": 8, "batch_size": 4, "lr": 2e-2, "checkpoint_every": None},
            "merges": {
                "found": {"method": "concat", "search": {"rows": 3, "budget": BUDGET, "bounds": [0, 2], **search}}
            },
            "evaluate": {"metrics": ["loss"]},
            "cluster": {"cpus_per_worker": 0.5},
        }
    )


@dataclass
class Searched:
    run: config.Run
    summary: dict[str, Any]
    lines: list[dict[str, Any]]


@pytest.fixture(scope="module")
def first(place: Path) -> Searched:
    run = described(place)
    summary = execute(run)
    return Searched(run, summary, lines(run.folder / "merge-found"))


def lines(job: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (job / "search.jsonl").read_text().splitlines()]


def test_the_summary_has_the_weights_with_the_best_score(first: Searched) -> None:
    made = first.summary["merges"]["found"]
    assert len(first.lines) == made["evaluations"] == BUDGET
    best = min(first.lines, key=lambda line: line["score"])
    assert (made["weights"], made["score"]) == (best["weights"], best["score"])
    assert made["score"] < first.lines[0]["score"]  # that of equal weights
    assert first.lines[0]["weights"] == {"copy": 0.5, "reverse": 0.5}
    assert first.summary == json.loads((first.run.folder / "summary.json").read_text())


def test_the_merge_is_the_one_with_these_weights(first: Searched, tmp_path: Path) -> None:
    made = first.summary["merges"]["found"]
    paths = [first.run.folder / f"train-{task}" / "adapter.safetensors" for task in ("copy", "reverse")]
    merge_files(paths, tmp_path / "out", method="concat", weights=list(made["weights"].values()))
    assert (tmp_path / "out").read_bytes() == Path(made["path"]).read_bytes()
    assert [block.weight for block in native.load(Path(made["path"])).blocks] == list(made["weights"].values())


def test_the_scores_are_those_of_the_validation_rows_and_of_the_last_train_rows(
    first: Searched, place: Path, tmp_path: Path
) -> None:
    (tmp_path / "copy").write_text("".join((place / "copy-validation.jsonl").read_text().splitlines(True)[:3]))
    (tmp_path / "reverse").write_text("".join((place / "reverse-train.jsonl").read_text().splitlines(True)[-3:]))
    tasks = {name: dataclasses.replace(task, test=str(tmp_path / name)) for name, task in first.run.tasks.items()}
    made = first.summary["merges"]["found"]
    values = evaluate(dataclasses.replace(first.run, tasks=tasks), Path(made["path"]))
    assert sum(metrics["loss"] for metrics in values.values()) / 2 == pytest.approx(made["score"], abs=1e-6)


def test_nothing_that_was_tried_is_left(first: Searched) -> None:
    left = {path.name for path in (first.run.folder / "merge-found").iterdir()}
    assert left == {"README.md", "adapter.safetensors", "job.json", "metrics.jsonl", "search.jsonl"}


@pytest.fixture(scope="module", params=[pytest.param("second", marks=pytest.mark.slow)])
def second(first: Searched, place: Path) -> Searched:
    """A run that goes on with the search where it was cut off, while the test files are others."""
    run = described(place, "second")
    for task in ("copy", "reverse"):
        shutil.copytree(first.run.folder / f"train-{task}", run.folder / f"train-{task}")
    (job,) = (job for job in plan(with_absolute_paths(run)) if job.kind == "merge")
    partial = folder.open(run.folder, job)
    text = (first.run.folder / "merge-found" / "search.jsonl").read_text().splitlines(keepends=True)
    (partial / "search.jsonl").write_text("".join(text[:KNOWN]) + text[KNOWN][:20])
    before = {path: path.read_bytes() for path in place.glob("*-test.jsonl")}
    for path in before:
        path.write_text('{"prompt": "poison", "response": "9 9 9 9"}\n')
    try:
        execute(run)
    finally:
        for path, content in before.items():
            path.write_bytes(content)
    summary = json.loads((run.folder / "summary.json").read_text())
    return Searched(run, summary, lines(run.folder / "merge-found"))


def test_a_search_goes_on_and_ends_at_the_same_weights(first: Searched, second: Searched) -> None:
    """It never sees test rows, then: those of the second run are others."""
    about = ("weights", "score", "evaluations", "kept")
    made, wanted = (part.summary["merges"]["found"] for part in (second, first))
    assert {key: made[key] for key in about} == {key: wanted[key] for key in about}
    assert second.lines[:KNOWN] == first.lines[:KNOWN]
    assert second.lines == first.lines
    assert Path(made["path"]).read_bytes() == Path(wanted["path"]).read_bytes()


def test_what_was_measured_is_not_measured_again(first: Searched, second: Searched) -> None:
    def passes(run: config.Run) -> list[str]:
        log = (run.folder / "logs" / "merge-found.log").read_text()
        assert log.count("merge-found: attempt 1, rank 0") == 1
        return re.findall(r"merge-found: (\d+) of at most \d+ evaluations are done", log)

    assert (passes(first.run)[0], passes(second.run)[0]) == ("0", str(KNOWN))
    # The first point is alone; the second run finishes the pass of which it knows two points.
    assert len(passes(second.run)) == len(passes(first.run)) - 1 < BUDGET / 2


def test_a_search_never_sees_test_rows(first: Searched, second: Searched) -> None:
    assert "poison" not in (second.run.folder / "logs" / "merge-found.log").read_text()
    for task in ("copy", "reverse"):  # which the evaluations saw
        losses = [part.summary["evaluation"]["found"][task]["loss"] for part in (first, second)]
        assert losses[1] != pytest.approx(losses[0], rel=1e-3)


def test_a_process_of_the_search_is_not_told_the_test_files(first: Searched, tmp_path: Path) -> None:
    (job,) = (job for job in plan(first.run) if job.kind == "merge")
    told = json.dumps(config.dump(trials._on_validation_rows(first.run, job, tmp_path)))
    assert "-test.jsonl" not in told
    assert "-test.jsonl" not in json.dumps(job.settings)


@pytest.mark.slow
def test_weights_of_modules_are_learned_along_the_gradient(first: Searched, place: Path) -> None:
    run = described(place, "learned", method="gradient", per="module", budget=6)
    for task in ("copy", "reverse"):
        shutil.copytree(first.run.folder / f"train-{task}", run.folder / f"train-{task}")
    summary = execute(run)
    made, records = summary["merges"]["found"], lines(run.folder / "merge-found")
    assert made["evaluations"] == len(records) == 6
    assert made["score"] == min(record["score"] for record in records) < records[0]["score"]
    assert len(set(made["weights"]["copy"].values())) > 1
    paths = [run.folder / f"train-{task}" / "adapter.safetensors" for task in ("copy", "reverse")]
    out = place / "learned.safetensors"
    merge_files(paths, out, method="concat", weights=list(made["weights"].values()))
    assert out.read_bytes() == Path(made["path"]).read_bytes()


DRIVER = """
import json, sys
from lori_dist import config
from lori_dist.cluster.run import execute
execute(config.validate(json.load(sys.stdin)))
"""


@pytest.mark.slow
def test_a_killed_search_goes_on(first: Searched, place: Path) -> None:
    run = described(place, "third")
    for task in ("copy", "reverse"):
        shutil.copytree(first.run.folder / f"train-{task}", run.folder / f"train-{task}")
    known = run.folder / ".partial-merge-found" / "search.jsonl"
    process = subprocess.Popen([sys.executable, "-c", DRIVER], stdin=subprocess.PIPE, stderr=subprocess.DEVNULL)
    assert process.stdin is not None
    process.stdin.write(json.dumps(config.dump(run)).encode())
    process.stdin.close()
    wait(known, process)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    before = known.read_text() if known.exists() else ""
    summary = execute(run)
    assert summary["merges"]["found"]["weights"] == first.summary["merges"]["found"]["weights"]
    assert (run.folder / "merge-found" / "search.jsonl").read_text().startswith(before[: before.rfind("\n") + 1])


def wait(known: Path, process: "subprocess.Popen[bytes]") -> None:
    deadline = time.monotonic() + 120
    while not (known.exists() and known.read_text().count("\n") >= 2):
        assert process.poll() is None, "the driver ended before the search did"
        assert time.monotonic() < deadline, "the search does not get on"
        time.sleep(0.05)


@pytest.mark.slow
def test_weights_per_projection_by_cma(first: Searched, place: Path) -> None:
    pytest.importorskip("cma", reason="the extra `search` is not installed")
    run = described(place, "fourth", method="cma", per="projection", budget=6)
    for task in ("copy", "reverse"):
        shutil.copytree(first.run.folder / f"train-{task}", run.folder / f"train-{task}")
    made: Mapping[str, Any] = execute(run)["merges"]["found"]
    assert made["evaluations"] == 6
    assert set(made["weights"]["copy"]) == {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}
    assert [block.name for block in native.load(Path(made["path"])).blocks] == ["copy", "reverse"]
