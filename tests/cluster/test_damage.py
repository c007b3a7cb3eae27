"""Every file of a run's folder, damaged in every way that hands, disks and power cuts know: the run ends as it would
have, or an error names the file and what to do with it."""

import contextlib
import dataclasses
import json
import os
import re
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch.distributed as dist

from lori_dist import config, folder
from lori_dist.cluster.attempts import publish
from lori_dist.cluster.board import Board
from lori_dist.cluster.launcher import train_task
from lori_dist.cluster.run import planned
from lori_dist.cluster.work import Assignment
from lori_dist.errors import LoriError
from lori_dist.training.world import from_environment
from tests.cluster.trained import described, evaluated

REMEDY = re.compile(r"delete|remove|restore|make the real folder")


class Killed(BaseException):
    """In the midst of a training, after what was saved."""


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size * 2 // 3])


def end_in_nuls(path: Path) -> None:
    content = path.read_bytes()
    kept = len(content) * 2 // 3
    path.write_bytes(content[:kept] + bytes(len(content) - kept))


def empty(path: Path) -> None:
    path.write_bytes(b"")


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 16
    path.write_bytes(content)


def reorder(path: Path) -> None:
    """The keys of every object, or the lines of the file, or the bytes."""
    content = path.read_bytes()
    try:
        lines = [json.loads(text) for text in (content.splitlines() if path.suffix == ".jsonl" else [content])]
    except ValueError:
        path.write_bytes(content[::-1])
        return
    path.write_text("".join(json.dumps(_reversed(line)) + "\n" for line in reversed(lines)))


def _reversed(tree: Any) -> Any:
    return {key: _reversed(item) for key, item in reversed(tree.items())} if isinstance(tree, dict) else tree


def edit(path: Path) -> None:
    """The last number."""
    content = path.read_bytes()
    numbers = list(re.finditer(rb"\d", content))
    if not numbers:
        return
    place = numbers[-1].start()
    changed = b"7" if content[place : place + 1] != b"7" else b"3"
    path.write_bytes(content[:place] + changed + content[place + 1 :])


def be_strange(path: Path) -> None:
    """JSON of other kinds than were written."""
    path.write_text('{"attempts": [1, {"number": "x"}], "phase": 3, "files": 5, "inputs": []}\n[1]\nnull\n"a"\n')


def be_a_folder(path: Path) -> None:
    path.unlink()
    path.mkdir()


def be_a_pipe(path: Path) -> None:
    path.unlink()
    os.mkfifo(path)


def lead_out(path: Path) -> None:
    outside = next(place for place in path.parents if place.name == "demo").parent / "outside"
    outside.write_bytes(b"outside")
    path.unlink()
    path.symlink_to(outside)


def be_gone(path: Path) -> None:
    path.unlink()


DAMAGES: list[Callable[[Path], None]] = [
    truncate,
    end_in_nuls,
    empty,
    flip,
    reorder,
    edit,
    be_strange,
    be_a_folder,
    be_a_pipe,
    lead_out,
    be_gone,
]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> config.Run:
    run = described(tmp_path_factory.mktemp("run"))
    rows = run.tasks["copy"].train
    tasks = {"copy": dataclasses.replace(run.tasks["copy"], validation=rows)}
    train = dataclasses.replace(
        run.train, steps=6, checkpoint_every=2, spike=3.0, on_divergence="skip", validate_every=2, early_stop=2
    )
    return dataclasses.replace(run, tasks=tasks, train=train, trackers=())


def trained(run: config.Run, killed_at: int | None = None) -> Path:
    def progress(record: dict[str, Any]) -> None:
        if (record["phase"], record["step"]) == ("train", killed_at):
            raise Killed

    try:
        return train_task(run, "copy", from_environment(), progress=progress)
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()


@pytest.fixture(scope="module")
def killed(run: config.Run) -> config.Run:
    """Killed after four steps of the second phase were saved."""
    with pytest.raises(Killed):
        trained(run, killed_at=5)
    return run


@pytest.fixture(scope="module")
def wanted(killed: config.Run, tmp_path_factory: pytest.TempPathFactory) -> bytes:
    with copied(killed, tmp_path_factory.mktemp("whole")) as run:
        return trained(run).read_bytes()


@contextlib.contextmanager
def copied(run: config.Run, place: Path) -> Iterator[config.Run]:
    """The same run in another folder."""
    shutil.copytree(run.folder, place / run.name)
    yield dataclasses.replace(run, output=str(place))
    shutil.rmtree(place)


UNFINISHED = (
    "started.json",
    "attempt-1",
    "attempts.json",
    "metrics.jsonl",
    "calibrated.safetensors",
    "checkpoints/train-00000004.safetensors",
    "checkpoints/train-00000002.safetensors",
)
QUICK = (truncate, end_in_nuls, be_strange, be_a_pipe)


def test_these_are_the_files_that_a_killed_training_leaves(killed: config.Run) -> None:
    partial = killed.folder / ".partial-train-copy"
    files = {path.relative_to(partial).as_posix() for path in partial.rglob("*") if path.is_file()}
    assert files == set(UNFINISHED)


@pytest.mark.parametrize("name", UNFINISHED)
def test_a_training_resumes_from_damaged_files_or_names_them(
    name: str, killed: config.Run, wanted: bytes, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    for damage in QUICK:
        check(killed, name, damage, wanted, tmp_path / damage.__name__)
        if name == "metrics.jsonl" and damage is end_in_nuls:
            assert "metrics.jsonl: 1 line is not whole" in caplog.text


@pytest.mark.slow
@pytest.mark.parametrize("name", UNFINISHED)
def test_a_training_resumes_from_files_damaged_in_any_way_or_names_them(
    name: str, killed: config.Run, wanted: bytes, tmp_path: Path
) -> None:
    for damage in DAMAGES:
        check(killed, name, damage, wanted, tmp_path / damage.__name__)


def check(killed: config.Run, name: str, damage: Callable[[Path], None], wanted: bytes, place: Path) -> None:
    with copied(killed, place) as run:
        path = run.folder / ".partial-train-copy" / name
        damage(path)
        try:
            assert trained(run).read_bytes() == wanted, (name, damage)
        except LoriError as error:
            assert str(path) in str(error), (name, damage)
            assert REMEDY.search(str(error)), (name, damage, error)
            assert damage not in (truncate, end_in_nuls, empty, be_strange), (name, damage, error)  # of a power cut


# --- what has finished -----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def finished(run: config.Run, killed: config.Run, tmp_path_factory: pytest.TempPathFactory) -> config.Run:
    """Its training and the evaluation of its base."""
    place = tmp_path_factory.mktemp("finished")
    shutil.copytree(killed.folder, place / run.name)
    done = dataclasses.replace(run, output=str(place))
    trained(done)
    job = next(job for job in planned(done) if job.name == "evaluate-base")
    partial = folder.open(done.folder, job)
    assignment = Assignment(tree=config.dump(done), job=job, attempt=folder.attempt(partial))
    from lori_dist.cluster.attempts import History

    publish(done, assignment, History(partial, 1), 0.0, {}, evaluated(assignment))
    board(done).write()
    return done


def board(run: config.Run) -> Board:
    return Board(run=run, jobs=planned(run), progress=lambda event: None)


FINISHED = (
    "train-copy/job.json",
    "train-copy/adapter.safetensors",
    "train-copy/metrics.jsonl",
    "train-copy/calibrated.safetensors",
    "evaluate-base/job.json",
    "evaluate-base/evaluation.json",
    "evaluate-base/metrics.jsonl",
    "summary.json",
)


@pytest.mark.parametrize("damage", DAMAGES)
@pytest.mark.parametrize("name", FINISHED)
def test_figures_are_those_that_were_found_or_the_damaged_file_is_named(
    name: str, damage: Callable[[Path], None], finished: config.Run, tmp_path: Path
) -> None:
    before = board(finished).summary()
    with copied(finished, tmp_path / "copy") as run:
        path = run.folder / name
        damage(path)
        try:
            folder.check_free(run.folder)
            found = board(run)
        except LoriError as error:
            assert str(path) in str(error)
            assert REMEDY.search(str(error)), error
            return
        if name.endswith("job.json") and damage is not reorder:  # the job is done again, and what is there is kept
            [said] = found.superseded()
            assert f"{path.parent.name}.1" in said
            return
        assert found.summary()["evaluation"] == before["evaluation"]
        adapters = {name: {**made, "path": ""} for name, made in found.summary()["adapters"].items()}
        assert adapters == {name: {**made, "path": ""} for name, made in before["adapters"].items()}


def test_figures_that_are_not_those_of_the_evaluation_are_refused_in_records_without_a_digest(
    finished: config.Run, tmp_path: Path
) -> None:
    with copied(finished, tmp_path / "copy") as run:
        path = run.folder / "evaluate-base" / "job.json"
        record = json.loads(path.read_text())
        record["result"]["evaluation"]["copy"]["loss"] = 0.01
        for key in ("digest", "none"):
            record.pop(key, None)
            path.write_text(json.dumps(record))
            with pytest.raises(LoriError, match=rf"{path}: does not agree with evaluation.json beside it; restore"):
                board(run)
