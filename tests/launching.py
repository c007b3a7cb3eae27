"""A task to train in processes that others start, and what became of the commands that started them."""

import contextlib
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

from lori_dist import Adapter
from tests.models import tiny_llama
from tests.tokenizers import save

YAML = """
name: demo
output: runs
model: {path: model}
tasks:
  math: {train: rows.jsonl, test: rows.jsonl}
adapter: {rank: 2, alpha: 4, density: 0.25, targets: [q_proj, down_proj]}
train: {steps: 2, batch_size: 5, micro_batch_size: 2, max_length: 32, calibrate: {steps: 3}}
merges: {}
"""
PDSH = """#!/usr/bin/env python
# What pdsh does for `deepspeed --hostfile`, with this machine for every host: it runs a command line once per host.
import subprocess, sys
assert sys.argv[1:5] == ["-S", "-f", "1024", "-w"], sys.argv
hosts, command = sys.argv[5].split(","), " ".join(sys.argv[6:])
shells = [subprocess.Popen(["sh", "-c", command.replace("%n", str(node))]) for node in range(len(hosts))]
sys.exit(max(abs(shell.wait()) for shell in shells))
"""
ROOT = Path(__file__).parents[1]
TIMEOUT_S = 150.0
"""For a launch, on a machine that others use as well."""


def make_task(place: Path) -> None:
    """A model, rows, a configuration of them, a file of two hosts, and a stand-in for pdsh."""
    save(tiny_llama(), place / "model")
    rows = [{"prompt": f"go {word} {number}", "response": word} for number in range(3) for word in ("left", "right")]
    (place / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (place / "mine.yaml").write_text(YAML)
    (place / "hosts").write_text("localhost slots=1\n127.0.0.1 slots=1\n")
    make_program(place / "bin" / "pdsh", PDSH)


def make_program(path: Path, text: str) -> None:
    path.parent.mkdir(exist_ok=True)
    path.write_text(text)
    path.chmod(0o755)


def free_port() -> str:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return str(probe.getsockname()[1])


@dataclass(frozen=True, kw_only=True)
class Launched:
    """What became of the commands of one launch."""

    codes: list[int]
    output: str
    """Of all of them, stdout and stderr, in the order in which it was written."""
    end: float
    """When the last of them ended, as files have it."""


def run_all(
    commands: Sequence[Sequence[str]],
    folder: Path,
    log: Path,
    environments: Sequence[Mapping[str, str]] = (),
    timeout: float = TIMEOUT_S,
) -> Launched:
    """Runs commands side by side in a folder, with its `bin` first in PATH. Fails if they do not end.

    environments: what each of them finds besides. None may leave a process whose command line names the log's folder.
    """
    environment = environment_of(folder)
    started = []
    try:
        with log.open("ab") as stream:
            for number, command in enumerate(commands):
                own = environment | (environments[number] if environments else {})
                started.append(subprocess.Popen(command, cwd=folder, env=own, stdout=stream, stderr=subprocess.STDOUT))
        end = time.monotonic() + timeout
        codes = [process.wait(max(0.0, end - time.monotonic())) for process in started]
        launched = Launched(codes=codes, output=log.read_text(), end=time.time())
        assert left_behind(log.parent) == {}, launched.output
        return launched
    except subprocess.TimeoutExpired:
        pytest.fail(f"it hangs; its output is\n{log.read_text()}")
    finally:
        for process in started:
            process.kill()
            process.wait()
        end_all(log.parent)


def environment_of(folder: Path) -> dict[str, str]:
    """In which programs of a folder's `bin`, then this interpreter and package, are found."""
    path = os.pathsep.join([str(folder / "bin"), str(Path(sys.executable).parent), os.environ["PATH"]])
    python_path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    return os.environ | {"PATH": path, "PYTHONPATH": python_path}


def end_all(place: Path) -> None:
    """Kills the processes whose command line names a folder."""
    for number in left_behind(place):
        with contextlib.suppress(ProcessLookupError):
            os.kill(number, signal.SIGKILL)


def left_behind(place: Path) -> dict[int, str]:
    """Processes whose command line names a folder: number -> command line."""

    def named() -> Iterator[tuple[int, str]]:
        for file in Path("/proc").glob("[0-9]*/cmdline"):
            with contextlib.suppress(OSError):
                text = file.read_text().replace("\0", " ")
                if str(place) in text:
                    yield int(file.parent.name), text

    return dict(named())


def assert_equal(together: Adapter, alone: Adapter) -> None:
    """That an adapter is the one that one process trains, up to the order of sums."""
    for name, entries in alone.blocks[0].entries.items():
        other = together.blocks[0].entries[name]
        assert entries.index is not None
        assert other.index is not None
        assert torch.equal(other.index, entries.index)
        assert torch.dist(other.values, entries.values) <= 5e-6 * entries.values.norm()


@contextlib.contextmanager
def ray_head(environment: Mapping[str, str], agent_port: int = 0) -> Iterator[dict[str, str]]:
    """A Ray cluster of two CPUs with token authentication. Gives what reaches it: the variables for clients."""
    place = Path(tempfile.mkdtemp(prefix="ray-", dir="/tmp"))  # a short name, as those of sockets must be
    (place / "token").write_text("a" * 64)
    secret = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN_PATH": str(place / "token")}
    port, dashboard, client = free_port(), free_port(), free_port()
    words = f"start --head --block --disable-usage-stats --num-cpus 2 --temp-dir {place} --port {port} "
    words += f"--dashboard-port {dashboard} --ray-client-server-port {client} "
    words += f"--dashboard-agent-listen-port {agent_port} "
    words += "--min-worker-port 0 --max-worker-port 0"
    command = [Path(sys.executable).with_name("ray"), *words.split()]
    with (place / "log").open("wb") as log:
        process = subprocess.Popen(command, env={**environment, **secret}, stdout=log, stderr=subprocess.STDOUT)
    try:
        await_answer(int(dashboard), process, place / "log")
        yield {"RAY_ADDRESS": f"http://127.0.0.1:{dashboard}", **secret}
    finally:
        process.kill()
        process.wait()
        end_all(place)
        shutil.rmtree(place)


def await_answer(port: int, process: subprocess.Popen[bytes], log: Path) -> None:
    while process.poll() is None:
        with contextlib.suppress(OSError):
            socket.create_connection(("127.0.0.1", port)).close()
            return
        time.sleep(0.1)
    pytest.fail(log.read_text())
