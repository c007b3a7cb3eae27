"""Files and folders that appear at once: on disks that are full, on file systems that cannot flush, for any umask."""

import errno
import json
import os
import resource
import stat
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from lori_dist import Spec, atomic, attach, extract, folder, save_adapter, tensors
from lori_dist.__main__ import main
from lori_dist.adapter.attach import trainable
from lori_dist.errors import AdapterError
from lori_dist.jobs import Job
from lori_dist.training import metrics
from tests.models import tiny_llama
from tests.tokenizers import save

BYTES = 20_000
"""At which the disk is full: more than any of the small files, less than any with weights."""


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base and two adapters, each larger than BYTES."""
    place = tmp_path_factory.mktemp("made")
    save(tiny_llama(), place / "base")
    for seed, name in enumerate(("one", "two")):
        model = tiny_llama()
        attach(model, Spec(rank=64, alpha=4.0, seed=seed))
        values = {module: torch.ones(b.numel()) for module, b in trainable(model).items()}
        save_adapter(extract(model, name=name, values=values), place / f"{name}.safetensors")
        assert (place / f"{name}.safetensors").stat().st_size > BYTES
    return place


COMMANDS = {
    "peft": "export {made}/one.safetensors {out} --format peft --base base",
    "official": "export {made}/one.safetensors {out} --format official --base base",
    "folded": "export {made}/one.safetensors {out} --format folded --base {made}/base",
    "merge": "merge {out} {made}/one.safetensors {made}/two.safetensors --method linear",
}
FULL = """
import resource, sys
from lori_dist.__main__ import main
from lori_dist.adapter.attach import trainable
resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv[1]), resource.RLIM_INFINITY))
for words in sys.argv[2:]:
    print("exit", main(words.split()), file=sys.stderr)
"""


def test_a_full_disk_is_an_error_with_the_path_and_leaves_nothing(made: Path, tmp_path: Path) -> None:
    """The system refuses to write more bytes into a file, as a full disk does."""
    words = [command.format(made=made, out=tmp_path / name) for name, command in COMMANDS.items()]
    done = subprocess.run([sys.executable, "-c", FULL, str(BYTES), *words], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "Traceback" not in done.stderr
    said = [line for line in done.stderr.splitlines() if str(tmp_path) in line or line.startswith("exit")]
    for name, message, code in zip(COMMANDS, said[::2], said[1::2], strict=True):
        assert message.startswith(str(tmp_path / name)), said
        assert "ile too large" in message
        assert code == "exit 1"
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("umask", [0o022, 0o007])
def test_all_files_of_an_export_have_the_mode_that_the_umask_gives(made: Path, tmp_path: Path, umask: int) -> None:
    before = os.umask(umask)
    try:
        for name, command in COMMANDS.items():
            assert main(command.format(made=made, out=tmp_path / name).split()) == 0
    finally:
        os.umask(before)
    modes = {stat.S_IMODE(path.stat().st_mode) for path in tmp_path.rglob("*") if path.is_file()}
    assert modes == {0o666 & ~umask}


WRITERS: dict[str, Callable[[Path], object]] = {
    "text": lambda place: atomic.write_text(place / "file", "text"),
    "json": lambda place: folder.write_json(place / "file", {}),
    "tensors": lambda place: tensors.save(place / "file", {"a": torch.ones(3)}, {}),
    "metrics": lambda place: metrics.rewrite(place, [{"step": 1}]),
    "job": lambda place: published(place),
    "folder": lambda place: exported(place / "folder"),
}


def published(root: Path) -> None:
    job = Job(name="train-a", kind="train", fingerprint="f")
    (folder.open(root, job) / "file").write_text("x")
    folder.publish(root, job, {})
    assert folder.finished(root, job) is not None


def exported(place: Path) -> None:
    with atomic.complete(place) as partial:
        (partial / "file").write_text("x")
    assert (place / "file").exists()


@pytest.mark.parametrize("number", [errno.EINVAL, errno.ENOTSUP, errno.ENOSYS])
@pytest.mark.parametrize("writer", WRITERS)
def test_a_file_system_that_cannot_flush_folders_will_do(
    writer: str, number: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = os.fsync

    def fsync(descriptor: int) -> None:
        if stat.S_ISDIR(os.fstat(descriptor).st_mode):
            raise OSError(number, os.strerror(number))
        real(descriptor)

    monkeypatch.setattr(os, "fsync", fsync)
    WRITERS[writer](tmp_path)
    assert list(tmp_path.iterdir())


@pytest.mark.parametrize("writer", WRITERS)
def test_a_disk_that_cannot_flush_files_is_an_error(
    writer: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fsync(descriptor: int) -> None:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(os, "fsync", fsync)
    with pytest.raises((OSError, AdapterError), match=str(tmp_path)):
        WRITERS[writer](tmp_path)
    assert not list(tmp_path.glob("[!.]*"))


def test_an_error_of_a_write_names_the_file(tmp_path: Path) -> None:
    with pytest.raises(OSError, match="File too large") as caught, atomic.replacing(tmp_path / "file") as file:
        limits = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (10, limits[1]))
        try:
            file.write(bytes(100_000))
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert caught.value.filename == str(tmp_path / "file")
    assert list(tmp_path.iterdir()) == []


def test_file_names_that_are_no_text_come_back_from_json(tmp_path: Path) -> None:
    tree = {"path": os.fsdecode(b"/data/caf\xe9")}
    folder.write_json(tmp_path / "file", tree)
    assert json.loads((tmp_path / "file").read_text(encoding="utf-8")) == tree


@pytest.mark.parametrize("encoding", ["ascii", "latin-1"])
def test_what_a_terminal_cannot_print_appears_escaped(made: Path, tmp_path: Path, encoding: str) -> None:
    """And a command that has done its work does not fail by it."""
    out = tmp_path / "sortie-é-漢"
    words = ["export", str(made / "one.safetensors"), str(out), "--format", "peft", "--base", "base"]
    variables = {"PYTHONIOENCODING": encoding, "LC_ALL": "C", "PYTHONCOERCECLOCALE": "0", "PYTHONUTF8": "0"}
    command = [sys.executable, "-m", "lori_dist", *words]
    done = subprocess.run(command, env=os.environ | variables, capture_output=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.decode(encoding).startswith(str(tmp_path))
    assert rb"\u6f22" in done.stdout or rb"\udce6" in done.stdout
