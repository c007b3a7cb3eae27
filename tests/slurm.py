"""A Slurm of this machine: srun, scontrol and scancel that do what Slurm's do, with this machine for every node."""

import itertools
import os
import sys
from collections.abc import Mapping
from pathlib import Path

from tests.launching import make_program

SRUN = f"""#!{sys.executable}
# Starts a command once per node. When it is told to end, or a task fails, it ends all that the tasks have started.
import ctypes, itertools, os, signal, subprocess, sys, time
import psutil

options = list(itertools.takewhile(lambda word: word.startswith("--"), sys.argv[1:]))
words = sys.argv[1 + len(options):]
cpus = os.environ["SLURM_CPUS_ON_NODE"]
assert options == ["--kill-on-bad-exit=1", f"--cpus-per-task={{cpus}}"], options
ctypes.CDLL(None).prctl(36, 1)  # what a task leaves behind becomes a child of this process, as it is part of the step
signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
tasks = []
try:
    for node in range(int(os.environ["SLURM_NNODES"])):
        place = {{"SLURM_NODEID": str(node), "SLURM_PROCID": str(node), "SLURM_LOCALID": "0", "SLURM_STEP_ID": "0"}}
        place["SLURM_STEP_NUM_TASKS"] = os.environ["SLURM_NNODES"]
        tasks.append(subprocess.Popen(words, env=os.environ | place))
    while True:
        codes = [task.poll() for task in tasks]
        if any(codes) or None not in codes:
            sys.exit(max(abs(code or 0) for code in codes))
        time.sleep(0.1)
finally:
    while left := psutil.Process().children(recursive=True):
        for process in left:
            try:
                process.kill()
            except psutil.NoSuchProcess:
                pass
        psutil.wait_procs(left, timeout=5)
"""
SCONTROL = f"""#!{sys.executable}
# Names the nodes of a list; notes which job is to be queued again, and ends its steps.
import sys
import psutil
if sys.argv[1:3] == ["show", "hostnames"]:
    print(*sys.argv[3].split(","), sep="\\n")
else:
    assert sys.argv[1] == "requeue", sys.argv
    open(f"requeued-{{sys.argv[2]}}", "x").close()
    parent = psutil.Process().parent()
    steps = [process for process in parent.children() if any("srun" in word for word in process.cmdline())]
    for step in steps:
        step.terminate()
    psutil.wait_procs(steps)
"""
SCANCEL = f"""#!{sys.executable}
# Sends a signal to all that the job's steps have started.
import sys
import psutil
assert sys.argv[1] == "--signal=TERM", sys.argv
children = psutil.Process().parent().children()
steps = [process for process in children if any("srun" in word for word in process.cmdline())]
for process in [process for step in steps for process in step.children(recursive=True)]:
    try:
        process.terminate()
    except psutil.NoSuchProcess:
        pass
"""


def make_slurm(place: Path) -> None:
    """Writes the programs into a folder for PATH."""
    make_program(place / "srun", SRUN)
    make_program(place / "scontrol", SCONTROL)
    make_program(place / "scancel", SCANCEL)


def job(number: int, nodes: str, cpus: int = 1) -> Mapping[str, str]:
    """What the batch script of a job finds in its environment. nodes: their names, with commas."""
    return {
        "SLURM_JOB_ID": str(number),
        "SLURM_JOB_NODELIST": nodes,
        "SLURM_NNODES": str(len(nodes.split(","))),
        "SLURM_CPUS_ON_NODE": str(cpus),
        "SLURM_PROCID": "0",
        "SLURM_NODEID": "0",
    }


def free_job() -> int:
    """The number of a job that no other process of this machine is likely to have, another one in each call."""
    return next(_NUMBERS)


_NUMBERS = itertools.count(os.getpid())
