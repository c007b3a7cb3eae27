"""Long work says how far it is: by a bar on a terminal, by lines of a log elsewhere."""

import fcntl
import os
import pty
import struct
import subprocess
import sys
import termios

import pytest

TRAINING = """
import logging
from lori_dist import progress
logging.basicConfig(level=logging.INFO, format="%(message)s")
record = {"loss": 2.0, "seconds": 0.5, "tokens_per_second": 12345.6}
with progress.of_training("math") as show:
    for step in range(1, 4):
        show({**record, "phase": "calibrate", "step": step, "num_steps": 3, "steps_left": 7203 - step})
    for step in range(3, 6):  # resumed
        show({**record, "loss": 1.25, "phase": "train", "step": step, "num_steps": 5, "steps_left": 5 - step})
"""
RUN = """
from lori_dist import progress
from lori_dist.cluster.board import Progress
from lori_dist.cluster.eta import Left
with progress.of_run() as show:
    about = dict(state="running", seconds=1.0, num_done=1, num_jobs=4)
    speed = dict(tokens_per_second=5000.0, eta_seconds=65.0, left=Left(seconds=3600.0, is_least=True))
    show(Progress(job="train-math", phase="train", step=7, num_steps=9, loss=0.5, **speed, **about))
"""
EVALUATION = """
from lori_dist import progress
with progress.of_evaluation() as show:
    show("merged: loss of math", 4, 6)
"""


def on_a_terminal(program: str) -> str:
    """What a program writes to standard error where that is a terminal of 40 lines and 120 columns."""
    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 40, 120, 0, 0))
    environment = {**os.environ, "TQDM_MININTERVAL": "0"}
    process = subprocess.Popen([sys.executable, "-c", program], stderr=theirs, env=environment)
    os.close(theirs)
    written = b""
    try:
        while chunk := os.read(ours, 4096):
            written += chunk
    except OSError:  # how Linux says that the other end is closed
        pass
    os.close(ours)
    assert process.wait(timeout=60) == 0
    return written.decode()


@pytest.mark.parametrize(
    ("program", "told"),
    [
        (TRAINING, ["math: calibrate loss 2.000 1/3", "math: train loss 1.250 3/5", "12,346 tokens/s, 1:00:01 left"]),
        (RUN, ["1/4 jobs", "at least 1:00:00 left", "train-math train 7/9 loss 0.500 5,000 tokens/s 0:01:05 left"]),
        (EVALUATION, ["merged: loss of math 4/6"]),
    ],
    ids=["training", "run", "evaluation"],
)
def test_a_terminal_shows_where_the_work_is(program: str, told: list[str]) -> None:
    written = on_a_terminal(program)
    assert all(text in written for text in told), written


def test_a_file_gets_lines_of_a_phase_s_first_and_last_step() -> None:
    result = subprocess.run([sys.executable, "-c", TRAINING], capture_output=True, text=True, check=True)
    assert result.stdout == ""
    lines = result.stderr.splitlines()
    assert [line.partition(", loss")[0] for line in lines] == [
        "math: calibrate step 1 of 3",
        "math: calibrate step 3 of 3",
        "math: train step 3 of 5",
        "math: train step 5 of 5",
    ]
    assert lines[0].endswith("step 1 of 3, loss 2.000, 12,346 tokens/s, 1:00:01 left")
    assert lines[-1].endswith("0:00:00 left")


def test_a_file_gets_lines_of_a_run_now_and_then() -> None:
    program = "import logging; logging.basicConfig(level=logging.INFO, format='%(message)s')" + RUN.replace(
        "with progress", "progress.SECONDS_BETWEEN_LINES = 0.0\nwith progress"
    )
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert result.stderr == (
        "1 of 4 jobs are done, at least 1:00:00 left; "
        "running: train-math train 7/9 loss 0.500 5,000 tokens/s 0:01:05 left\n"
    )


@pytest.mark.parametrize("program", [RUN, EVALUATION], ids=["run", "evaluation"])
def test_a_file_gets_no_bar(program: str) -> None:
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert (result.stdout, result.stderr) == ("", "")
