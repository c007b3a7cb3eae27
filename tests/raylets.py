"""Ray nodes on this machine that can be killed one by one, each a process group of its own."""

import contextlib
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

ENVIRONMENT = {**os.environ, "RAY_AUTH_MODE": "disabled", "PYTHONUNBUFFERED": "1"}
RAY = str(Path(sys.executable).with_name("ray"))
START_SECONDS = 120.0


class Node:
    """A `ray start` that stays in the foreground."""

    def __init__(self, log: Path, words: Sequence[str]) -> None:
        self._log = log
        with log.open("wb") as stream:
            self._process = subprocess.Popen(
                words, stdout=stream, stderr=subprocess.STDOUT, env=ENVIRONMENT, start_new_session=True
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


class Nodes:
    """A head without CPUs, and nodes that join it. Nodes that the test has not ended end with the block."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
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
        node = Node(log, [RAY, "start", "--block", "--disable-usage-stats", "--object-store-memory=100000000", *words])
        self.nodes.append(node)
        return node
