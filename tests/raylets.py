"""Ray nodes on this machine that can be killed one by one, each a process group of its own."""

import contextlib
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import pytest

# Ray lets no node claim GPUs that this variable hides.
ENVIRONMENT = {key: value for key, value in os.environ.items() if key != "CUDA_VISIBLE_DEVICES"}
ENVIRONMENT |= {"RAY_AUTH_MODE": "disabled", "PYTHONUNBUFFERED": "1"}
RAY = str(Path(sys.executable).with_name("ray"))
START_SECONDS = 120.0


class Node:
    """A `ray start` that stays in the foreground."""

    def __init__(self, log: Path, words: Sequence[str], environment: Mapping[str, str]) -> None:
        self._log = log
        with log.open("wb") as stream:
            self._process = subprocess.Popen(
                words, stdout=stream, stderr=subprocess.STDOUT, env=dict(environment), start_new_session=True
            )

    def said(self, pattern: str) -> str:
        """What the pattern's last group matches, as soon as it has been said."""
        end = time.monotonic() + START_SECONDS
        while time.monotonic() < end:
            text = self._log.read_text(errors="replace")
            if found := re.search(pattern, text):
                return found[found.lastindex or 0]
            assert self._process.poll() is None, text
            time.sleep(0.05)
        raise AssertionError(f"a node did not start: {text}")

    def pids(self) -> list[int]:
        """It and all that it has started, also what leads a process group of its own."""
        found = [self._process.pid]
        for parent in found:
            for task in Path(f"/proc/{parent}/task").glob("*/children"):
                with contextlib.suppress(OSError):
                    found += [int(child) for child in task.read_text().split()]
        return found

    def kill(self) -> None:
        """All its processes, as when the machine loses its power."""
        for pid in self.pids():
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        self._process.wait()


@dataclass(frozen=True, kw_only=True)
class Machine:
    """Where a node is started, if not simply on this machine."""

    prefix: tuple[str, ...]
    """What stands before a command that is to run there."""
    options: tuple[str, ...]
    """Of `ray start`."""


class Nodes:
    """A head without CPUs, and nodes that join it. Nodes that the test has not ended end with the block."""

    def __init__(
        self, folder: Path, machines: Sequence[Machine] = (), environment: Mapping[str, str] = ENVIRONMENT
    ) -> None:
        """machines: for the head and each node that is added, in this order. environment: of all of them."""
        self._environment = environment
        self.folder = folder
        self._machines = machines
        self.nodes: list[Node] = []
        self.head = self._start("--head", "--port=0", "--num-cpus=0", "--include-dashboard=false")
        self.address = self.head.said(r"--address='([^']+)'")

    def __enter__(self) -> "Nodes":
        return self

    def __exit__(self, *error: object) -> None:
        for node in reversed(self.nodes):
            node.kill()

    def add(self, count: int, *, cpus: int, gpus: int = 0) -> list[Node]:
        """Returns once they have joined: one by one, as nodes of one machine would look for the same free ports.

        gpus: that each only claims to have.
        """
        added = []
        for _ in range(count):
            added.append(self._start(f"--address={self.address}", f"--num-cpus={cpus}", f"--num-gpus={gpus}"))
            added[-1].said("Ray runtime started")
        return added

    def _start(self, *words: str) -> Node:
        log = self.folder / f"node{len(self.nodes)}.log"
        machine = self._machines[len(self.nodes)] if self._machines else Machine(prefix=(), options=())
        ray = [RAY, "start", "--block", "--disable-usage-stats", "--object-store-memory=100000000"]
        node = Node(log, [*machine.prefix, *ray, *machine.options, *words], self._environment)
        self.nodes.append(node)
        return node


@contextlib.contextmanager
def machines(count: int, folder: Path) -> Iterator[list[Machine]]:
    """As if there were several machines: network namespaces with addresses of their own, joined by a bridge.

    Needs the rights to make them; skips the test without. folder: a short path, as sockets have their names in it.
    """
    name = f"lori{os.getpid() % 10000}"
    subnet = f"10.{os.getpid() % 200 + 20}.7"
    made: list[list[str]] = []

    def ip(*words: str, undo: Sequence[str] = ()) -> None:
        done = subprocess.run(["ip", *words], capture_output=True, text=True, check=False)
        if done.returncode and not made:
            pytest.skip(f"cannot make a network: {done.stderr.strip()}")
        assert done.returncode == 0, done.stderr
        if undo:
            made.append(["ip", *undo])

    try:
        ip("link", "add", name, "type", "bridge", undo=("link", "del", name))
        ip("addr", "add", f"{subnet}.1/24", "dev", name)
        ip("link", "set", name, "up")
        found = []
        for number in range(count):
            space, address = f"{name}n{number}", f"{subnet}.{number + 10}"
            ip("netns", "add", space, undo=("netns", "del", space))
            ip("link", "add", f"{name}v{number}", "type", "veth", "peer", "name", "eth0", "netns", space)
            ip("link", "set", f"{name}v{number}", "master", name, "up")
            for words in (("addr", "add", f"{address}/24", "dev", "eth0"), ("link", "set", "lo", "up")):
                ip("-n", space, *words)
            ip("-n", space, "link", "set", "eth0", "up")
            options = (f"--node-ip-address={address}", f"--temp-dir={folder}/{number}")
            found.append(Machine(prefix=("ip", "netns", "exec", space), options=options))
        yield found
    finally:
        for words in reversed(made):
            subprocess.run(words, capture_output=True, check=False)
