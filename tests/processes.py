"""What processes there are, and where they listen: from /proc."""

import os
import re
import sys
from pathlib import Path


def descendants(pid: int) -> set[int]:
    parents = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                stat = (entry / "stat").read_text()
            except OSError:  # it has just ended
                continue
            parents[int(entry.name)] = int(stat.rpartition(")")[2].split()[1])
    found: set[int] = set()
    while more := {child for child, parent in parents.items() if parent in found | {pid}} - found:
        found |= more
    return found


def command(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/cmdline").read_text().replace("\0", " ")
    except OSError:
        return ""


def listening(pids: set[int]) -> set[str]:
    """The addresses on which processes accept TCP connections."""
    return {host for host, _ in sockets(pids)}


def sockets(pids: set[int]) -> set[tuple[str, int]]:
    """Addresses and ports."""
    inodes = set()
    for pid in pids:
        for descriptor in Path(f"/proc/{pid}/fd").glob("*"):
            try:
                inodes.update(re.findall(r"socket:\[(\d+)\]", os.readlink(descriptor)))
            except OSError:
                continue
    found = set()
    for table in ("tcp", "tcp6"):
        for line in Path(f"/proc/net/{table}").read_text().splitlines()[1:]:
            _, local, _, state, *_, inode = line.split()[:10]
            if state == "0A" and inode in inodes:
                host, _, port = local.partition(":")
                found.add((address(host), int(port, 16)))
    return found


def address(digits: str) -> str:
    """Of four or sixteen bytes, as the kernel prints them: in words of the machine's byte order."""
    words = b"".join(
        int(digits[place : place + 8], 16).to_bytes(4, sys.byteorder) for place in range(0, len(digits), 8)
    )
    if len(words) == 16 and words[:12] == bytes(10) + b"\xff\xff":
        words = words[12:]
    return ".".join(map(str, words)) if len(words) == 4 else ("::1" if words == bytes(15) + b"\1" else words.hex())
