"""Whatever path a user names: a pipe that nobody writes to, a device or a socket is an error at once."""

import json
import os
import shutil
import signal
import socket
from collections.abc import Iterator
from pathlib import Path

import pytest

from lori_dist import Spec, attach, extract, save_adapter
from lori_dist.__main__ import main
from tests.models import tiny_llama
from tests.tokenizers import save

SECONDS = 120
"""After which what waits for a pipe has failed the test."""


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("made")
    save(tiny_llama(), place / "model")
    (place / "rows.jsonl").write_text('{"prompt": "a", "response": "b"}\n')
    model = tiny_llama()
    attach(model, Spec(rank=2, alpha=4.0, seed=0))
    save_adapter(extract(model, name="one"), place / "one.safetensors")
    for kind in ("pipe", "pipe.csv", "pipe.parquet", "pipe.safetensors"):
        os.mkfifo(place / kind)
    with socket.socket(socket.AF_UNIX) as bound:
        bound.bind(str(place / "socket"))
    (place / "device").symlink_to("/dev/zero")
    (place / "folder").mkdir()
    return place


@pytest.fixture(autouse=True)
def in_time(made: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    def fail(number: int, frame: object) -> None:
        raise AssertionError("waits for a pipe")

    monkeypatch.chdir(made)
    before = signal.signal(signal.SIGALRM, fail)
    signal.alarm(SECONDS)
    yield
    signal.alarm(0)
    signal.signal(signal.SIGALRM, before)


def configured(made: Path, **task: object) -> str:
    tree = {
        "name": "demo",
        "model": {"path": "model"},
        "tasks": {"a": {"train": "rows.jsonl", "test": "rows.jsonl", **task}},
        "train": {"steps": 1, "max_length": 32},
    }
    (made / "run.yaml").write_text(json.dumps(tree))
    return "run.yaml"


NAMES = ("pipe", "pipe.csv", "pipe.parquet", "socket", "device", "folder")


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("key", ["train", "test", "validation", "start", "mixture"])
def test_of_a_task(key: str, name: str, made: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = configured(made, **{key: {name: 0.5} if key == "mixture" else name})
    assert main(["train", path, "--task", "a"]) in (1, 2)
    assert name in capsys.readouterr().err


@pytest.mark.parametrize("file", ["config.json", "tokenizer.json", "tokenizer_config.json", "model.safetensors"])
def test_of_a_model(file: str, made: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shutil.copytree(made / "model", tmp_path / "model")
    (tmp_path / "model" / file).unlink()
    os.mkfifo(tmp_path / "model" / file)
    commands = ("train {config} --task a", "evaluate {config} --adapter one.safetensors")
    for words in (command.format(config=configured(made)).split() for command in commands):
        assert main([*words, f"model.path={tmp_path / 'model'}"]) in (1, 2)
        assert str(tmp_path / "model") in capsys.readouterr().err


@pytest.mark.parametrize("name", ["pipe", "pipe.safetensors", "socket", "device", "folder"])
@pytest.mark.parametrize(
    "words",
    [
        "show {name}",
        "merge out.safetensors {name} one.safetensors --method linear",
        "report {name} --out out",
        "report one.safetensors --out out --evaluation {name}",
        "evaluate {config} --adapter {name}",
        "export {name} out --format peft --base model",
        "evaluate {config} --adapter one.safetensors --out {name}",
    ],
)
def test_of_a_command(words: str, name: str, made: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(words.format(name=name, config=configured(made)).split()) in (1, 2)
    assert name in capsys.readouterr().err
    assert not (made / "out").exists()
