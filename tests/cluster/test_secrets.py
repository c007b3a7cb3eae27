"""While a run works: who can reach it, and where its secrets are to be read."""

import contextlib
import dataclasses
import json
import os
import re
import secrets
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from lori_dist import config
from tests.cluster.trained import described, driven
from tests.processes import command, descendants, listening
from tests.raylets import Machine, Nodes

pytestmark = pytest.mark.ray

LEAKY = """
import os

def merge(updates, *, weights):
    raise RuntimeError("no answer from " + os.environ["STORE_URL"] + " with " + os.environ["STORE_PASSWORD"])
"""


def files_with(folder: Path, text: str) -> list[Path]:
    found = []
    for path in folder.rglob("*"):
        with contextlib.suppress(FileNotFoundError):  # Ray removes some while it works
            if path.is_file() and text.encode() in path.read_bytes():
                found.append(path)
    return found


def is_of_this_machine(address: str) -> bool:
    return address.startswith("127.") or address == "::1"


def watched(pid: int, seen: dict[str, set[str]], commands: set[str]) -> None:
    """Adds where each process of a family listens, and how all of them were called."""
    for member in descendants(pid) | {pid}:
        words = command(member)
        commands.add(words)
        seen.setdefault(words.split(" ")[0], set()).update(listening({member}))


def variable(pid: int, name: str) -> str:
    """Of a process's environment, as it was started."""
    found = re.search(rf"(?:^|\0){name}=([^\0]*)", Path(f"/proc/{pid}/environ").read_text())
    return found[1] if found else ""


@pytest.mark.slow
def test_a_run_is_reached_from_nowhere_else_and_keeps_its_secrets(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All through a run: its gang trains, its merge fails with secrets in the error."""
    password, key, login = (secrets.token_urlsafe(16) for _ in range(3))
    (tmp_path / "leaky").mkdir()
    (tmp_path / "leaky" / "method.py").write_text(LEAKY)
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(tmp_path), *sys.path[:1], os.environ.get("PYTHONPATH", "")]))
    monkeypatch.setenv("STORE_PASSWORD", password)
    monkeypatch.setenv("WANDB_API_KEY", key)
    monkeypatch.setenv("STORE_URL", f"s3://me:{login}@store/bucket")
    monkeypatch.delenv("RAY_AUTH_MODE", raising=False)
    run = described(tmp_path, workers=2, cpus_per_worker=0.5, retries=0)
    bad = config.Merge(method=config.Choice(name="leaky.method"))
    run = dataclasses.replace(run, merges={"bad": bad}, train=dataclasses.replace(run.train, steps=15))
    seen: dict[str, set[str]] = {}
    commands: set[str] = set()
    token = session = ""
    leaking: list[Path] | None = None
    with driven(run, tmp_path) as driver:
        while driver.process.poll() is None:
            watched(driver.process.pid, seen, commands)
            if leaking is None and token and "ray::Process.run" in seen:
                assert any(Path(session).iterdir())
                leaking = files_with(Path(session), token)
            for pid in descendants(driver.process.pid) if not token else ():
                if found := re.search(r"--session_dir=(\S+)", command(pid)):
                    session, token = found[1], variable(pid, "RAY_AUTH_TOKEN")
            time.sleep(0.05)
        assert driver.ends() == 1
        said = driver.said()
    assert seen["ray::Process.run"]  # of the gang while it trained
    assert {address for found in seen.values() for address in found if not is_of_this_machine(address)} == set()
    assert "no answer from s3://***@store/bucket with ***" in said
    assert files_with(run.folder, "no answer from s3://***@store/bucket with ***")
    assert len(token) == 64
    for secret in (password, key, login, token):
        assert secret not in said
        assert files_with(run.folder, secret) == []
        assert [words for words in commands if secret in words] == []
    assert leaking == []  # of Ray's own folder, which ends with the run


def own_address() -> str:
    """Of this machine, as others see it."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            probe.connect(("192.0.2.1", 9))  # sends nothing
        except OSError:
            pytest.skip("this machine has no network")
        return str(probe.getsockname()[0])


def test_a_training_alone_is_reached_from_nowhere_else(tmp_path: Path) -> None:
    """Also where the machine's name stands for an address that others reach, as on most."""
    (tmp_path / "hosts").write_text(f"127.0.0.1 localhost\n{own_address()} elsewhere\n")
    named = 'mount --bind $0 /etc/hosts && hostname elsewhere && exec "$@"'
    prefix = ["unshare", "--mount", "--uts", "sh", "-c", named, str(tmp_path / "hosts")]
    if shutil.which("unshare") is None or subprocess.run([*prefix, "true"], capture_output=True).returncode:
        pytest.skip("may not give this process a name of its own")
    run = described(tmp_path)
    (tmp_path / "run.yaml").write_text(json.dumps(config.dump(run)))
    words = [*prefix, sys.executable, "-m", "lori_dist", "train", str(tmp_path / "run.yaml"), "--task", "copy"]
    seen: dict[str, set[str]] = {}
    with subprocess.Popen(words, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True) as process:
        while process.poll() is None:
            watched(process.pid, seen, set())
            time.sleep(0.02)
        assert process.stderr is not None
        assert process.returncode == 0, process.stderr.read()
    assert {address for found in seen.values() for address in found if not is_of_this_machine(address)} == set()


@pytest.fixture(scope="module")
def token(tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("token") / "token"
    with os.fdopen(os.open(file, os.O_CREAT | os.O_WRONLY, 0o600), "w") as stream:
        stream.write(secrets.token_hex(32))
    return file


@pytest.fixture(scope="module")
def nodes(tmp_path_factory: pytest.TempPathFactory, token: Path) -> Iterator[Nodes]:
    """A cluster on this machine's own address, which wants a token."""
    environment = {name: text for name, text in os.environ.items() if not name.startswith("RAY_")}
    environment |= {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN_PATH": str(token), "PYTHONUNBUFFERED": "1"}
    with tempfile.TemporaryDirectory(prefix="ray", dir="/tmp", ignore_cleanup_errors=True) as short:
        places = [Machine(prefix=(), options=(f"--temp-dir={short}/{number}",)) for number in range(2)]
        with Nodes(tmp_path_factory.mktemp("nodes"), places, environment) as nodes:
            nodes.folder = Path(short)
            nodes.add(1, cpus=2)
            yield nodes


@pytest.fixture
def without(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A user who has no token."""
    for name in [name for name in os.environ if name.startswith("RAY_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("HOME", str(tmp_path))


@pytest.mark.usefixtures("without")
@pytest.mark.parametrize("given", ["nothing", "another token"])
def test_a_run_without_the_cluster_s_token_is_refused(
    nodes: Nodes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, given: str
) -> None:
    assert not nodes.address.startswith("127.")
    if given == "another token":
        monkeypatch.setenv("RAY_AUTH_TOKEN", "0" * 64)
    run = described(tmp_path, address=nodes.address)
    with driven(run, tmp_path) as driver:
        assert driver.ends() == 1
        assert f"cluster.address: no Ray cluster answers at '{nodes.address}'" in driver.said()
        assert "RAY_AUTH_TOKEN_PATH" in driver.said()
    assert not (run.folder / "train-copy").exists()


@pytest.mark.usefixtures("without")
@pytest.mark.parametrize(
    "where",
    ["RAY_AUTH_TOKEN_PATH", *(pytest.param(other, marks=pytest.mark.slow) for other in ("RAY_AUTH_TOKEN", "home"))],
)
def test_a_run_finds_the_user_s_token_and_tells_it_to_nobody(
    nodes: Nodes, token: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, where: str
) -> None:
    if where == "home":
        (tmp_path / ".ray").mkdir()
        shutil.copy(token, tmp_path / ".ray" / "auth_token")
    else:
        monkeypatch.setenv(where, token.read_text() if where == "RAY_AUTH_TOKEN" else str(token))
    run = described(tmp_path, address=nodes.address)
    run = dataclasses.replace(run, train=dataclasses.replace(run.train, steps=2))
    commands: set[str] = set()
    with driven(run, tmp_path) as driver:
        while driver.process.poll() is None:
            watched(driver.process.pid, {}, commands)
            commands |= {command(pid) for node in nodes.nodes for pid in node.pids()}
            time.sleep(0.1)
        assert driver.ends() == 0, driver.said()
    assert (run.folder / "train-copy" / "adapter.safetensors").exists()
    assert any(words.startswith("ray::Process") for words in commands)
    assert token.read_text() not in driver.said()
    assert [words for words in commands if token.read_text() in words] == []
    assert files_with(run.folder, token.read_text()) == []
    assert files_with(nodes.folder, token.read_text()) == []
