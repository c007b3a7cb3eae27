"""The scripts of launch/: each runs here, with what it calls or, where that needs more machines, with a stand-in."""

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from lori_dist import Adapter, load_adapter
from lori_dist.folder import PARTIAL
from tests import slurm
from tests.launching import (
    ROOT,
    Launched,
    assert_equal,
    end_all,
    free_port,
    make_program,
    make_task,
    run_all,
)

LAUNCH = ROOT / "launch"
SCRIPTS = sorted([*LAUNCH.glob("*.sh"), *LAUNCH.glob("*.sbatch")])
SSH = """#!/bin/sh
# What ssh does for the deepspeed launcher: it asks the first host for its name and addresses.
while [ "$1" != localhost ]; do shift; done
case "$2 $3" in "hostname ") hostname ;; "hostname -I") echo 127.0.0.1 ;; *) exit 1 ;; esac
"""


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda script: script.name)
def test_shellcheck_finds_nothing(script: Path) -> None:
    done = subprocess.run([Path(sys.executable).with_name("shellcheck"), script], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda script: script.name)
def test_it_starts_with_how_to_use_it(script: Path) -> None:
    first, *lines = script.read_text().splitlines()
    assert first == "#!/usr/bin/env bash"
    comment = [line for line in lines if line][: next(n for n, line in enumerate(lines) if not line.startswith("#"))]
    program = "sbatch" if script.suffix == ".sbatch" else "bash"
    assert any(re.search(rf"\b{program} .*launch/{re.escape(script.name)}", line) for line in comment)


# --- one task, under launchers ---------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("launch")
    make_task(made)
    make_program(made / "bin" / "ssh", SSH)
    make_program(made / "bin" / "lori", f'#!/bin/sh\nexec {sys.executable} -m lori_dist "$@"\n')
    slurm.make_slurm(made / "bin")
    return made


@pytest.fixture(scope="module")
def alone(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Adapter:
    """What one process trains."""
    place = tmp_path_factory.mktemp("alone")
    words = ["-m", "lori_dist", "train", "mine.yaml", "--task", "math", f"output={place}"]
    launched = run_all([[sys.executable, *words]], folder, place / "log")
    assert launched.codes == [0], launched.output
    return load_adapter(adapter_of(place))


def adapter_of(output: Path) -> Path:
    return output / "demo" / "train-math" / "adapter.safetensors"


def train(script: str, place: Path, folder: Path, environments: list[dict[str, str]], *words: str) -> Launched:
    """Trains by a script, started once for each environment, with two ranks together that leave a mark."""
    mask = f"adapter.mask={{name: tests.launched, mark: {place / 'mask'}}}"
    command = ["bash", str(LAUNCH / script), "mine.yaml", "--task", "math", f"output={place}", mask, *words]
    return run_all([command] * len(environments), folder, place / "log", environments)


HOSTS = {
    "torchrun.sh on one host": ("torchrun.sh", [{"NPROC_PER_NODE": "2"}]),
    "torchrun.sh on two hosts": (
        "torchrun.sh",
        [{"NNODES": "2", "NODE_RANK": rank, "MASTER_ADDR": "127.0.0.1", "NPROC_PER_NODE": "1"} for rank in "01"],
    ),
    "deepspeed.sh on one host": ("deepspeed.sh", [{"NPROC_PER_NODE": "2"}]),
    "deepspeed.sh with a hostfile": ("deepspeed.sh", [{"HOSTFILE": "hosts"}]),
    "slurm.sbatch": ("slurm.sbatch", [dict(slurm.job(slurm.free_job(), "localhost,localhost"))]),
}


@pytest.mark.parametrize("name", HOSTS)
def test_it_trains_with_two_ranks_what_one_process_trains(
    name: str, alone: Adapter, folder: Path, tmp_path: Path
) -> None:
    script, environments = HOSTS[name]
    port = {"MASTER_PORT": free_port()}
    words = ["train.engine=deepspeed"] if script == "deepspeed.sh" else []
    launched = train(script, tmp_path, folder, [{**port, **environment} for environment in environments], *words)
    assert launched.codes == [0] * len(environments), launched.output
    assert sorted(file.name for file in tmp_path.glob("mask-*")) == ["mask-0-of-2"]
    assert_equal(load_adapter(adapter_of(tmp_path)), alone)


def test_a_slurm_job_that_runs_out_of_time_is_queued_again_and_goes_on(
    alone: Adapter, folder: Path, tmp_path: Path
) -> None:
    """As Slurm does it: a signal to the batch script before the end, and after it the same script once more."""
    job = slurm.job(slurm.free_job(), "localhost,localhost")
    words = [str(LAUNCH / "slurm.sbatch"), "mine.yaml", "--task", "math", f"output={tmp_path}"]
    words.append("train.checkpoint_every=1")
    partial = tmp_path / "demo" / f"{PARTIAL}train-math"
    until_told = f"until [ -e {partial}/metrics.jsonl ]; do sleep 0.1; done; kill -USR1 $!; wait $!"
    hanging = "train.engine={name: tests.launched, rank: 2, busy: 600.0}"
    run_all([["bash", "-c", f'bash "$@" & {until_told}', "bash", *words, hanging]], folder, tmp_path / "log", [job])
    assert (folder / f"requeued-{job['SLURM_JOB_ID']}").exists()
    launched = run_all([["bash", *words]], folder, tmp_path / "log", [job])
    assert launched.codes == [0], launched.output
    assert json.loads(adapter_of(tmp_path).with_name("job.json").read_text())["attempts"] == 2
    assert_equal(load_adapter(adapter_of(tmp_path)), alone)


# --- everything, with Ray --------------------------------------------------------------------------------------------


def address() -> str:
    """This machine's, as Ray finds it."""
    import ray

    return str(ray.util.get_node_ip_address())


@pytest.mark.ray
def test_a_slurm_job_is_a_ray_cluster_that_ends_with_it(alone: Adapter, folder: Path, tmp_path: Path) -> None:
    job = slurm.job(slurm.free_job(), f"{address()},{address()}")
    temporary, token = Path(f"/tmp/ray-{job['SLURM_JOB_ID']}"), folder / f".ray-token-{job['SLURM_JOB_ID']}"
    watch = f"until stat -c %a {token}; do sleep 0.1; done & "
    words = [str(LAUNCH / "slurm_ray.sbatch"), "mine.yaml", f"output={tmp_path}", "cluster.workers=2"]
    try:
        launched = run_all(
            [["bash", "-c", f'{watch} exec bash "$@"', "bash", *words]], folder, tmp_path / "log", [job], timeout=400
        )
    finally:
        end_all(temporary)
    assert launched.codes == [0], launched.output
    assert launched.output.startswith("600\n")
    assert not token.exists()
    assert_equal(load_adapter(adapter_of(tmp_path)), alone)
    shutil.rmtree(temporary)
