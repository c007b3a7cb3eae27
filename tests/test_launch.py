"""The scripts of launch/: each runs here, with what it calls or, where that needs more machines, with a stand-in."""

import json
import re
import shutil
import socket
import subprocess
import sys
from collections.abc import Iterator
from itertools import chain
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from lori_dist import Adapter, config, load_adapter
from lori_dist.folder import PARTIAL
from tests import slurm
from tests.launching import (
    ROOT,
    Launched,
    assert_equal,
    end_all,
    environment_of,
    free_port,
    left_behind,
    make_program,
    make_task,
    ray_head,
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


def test_ray_s_cluster_launcher_takes_the_cluster() -> None:
    from ray.autoscaler._private.util import prepare_config, validate_config

    cluster = prepare_config(yaml.safe_load((LAUNCH / "ray_cluster.yaml").read_text()))
    validate_config(cluster)
    [node] = cluster["available_node_types"].values()
    assert node["min_workers"] == len(cluster["provider"]["worker_ips"])
    for commands in (cluster["head_start_ray_commands"], cluster["worker_start_ray_commands"]):
        assert "RAY_AUTH_MODE=token" in commands[-1]


POD = {"securityContext": dict, "volumes": list, "containers": list}
CONTAINER = {"name": str, "image": str, "volumeMounts": list, "resources": dict}
GROUP = {"rayStartParams": dict, "template": dict}
WORKERS = {**GROUP, "groupName": str, "replicas": int, "minReplicas": int, "maxReplicas": int}
CLUSTER = {"rayVersion": str, "authOptions": dict, "headGroupSpec": dict, "workerGroupSpecs": list}
JOB = {"entrypoint": str, "backoffLimit": int, "shutdownAfterJobFinishes": bool, "rayClusterSpec": dict}
"""Of the ray.io/v1 API: the fields that are used, and their types."""


def test_the_kubernetes_job_has_the_fields_of_its_api() -> None:
    job = yaml.safe_load((LAUNCH / "rayjob.yaml").read_text())
    assert (job["apiVersion"], job["kind"], set(job)) == (
        "ray.io/v1",
        "RayJob",
        {"apiVersion", "kind", "metadata", "spec"},
    )
    assert_fields(job["spec"], JOB)
    cluster = job["spec"]["rayClusterSpec"]
    assert_fields(cluster, CLUSTER)
    assert cluster["authOptions"] == {"mode": "token"}
    assert f"ray=={cluster['rayVersion']}\n" in (LAUNCH / "constraints.txt").read_text()
    assert_fields(cluster["headGroupSpec"], GROUP)
    for group in cluster["workerGroupSpecs"]:
        assert_fields(group, WORKERS)
        assert group["minReplicas"] <= group["replicas"] <= group["maxReplicas"]
    for group in (cluster["headGroupSpec"], *cluster["workerGroupSpecs"]):
        assert all(isinstance(value, str) for value in group["rayStartParams"].values())
        pod = group["template"]["spec"]
        assert_fields(pod, POD)
        [container] = pod["containers"]
        assert_fields(container, CONTAINER)
        assert {mount["name"] for mount in container["volumeMounts"]} == {volume["name"] for volume in pod["volumes"]}
        for quantity in chain(*(amounts.values() for amounts in container["resources"].values())):
            assert re.fullmatch(r"\d+(Ki|Mi|Gi|Ti)?", str(quantity))


def test_the_kubernetes_job_asks_for_what_its_workers_have(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    spec = yaml.safe_load((LAUNCH / "rayjob.yaml").read_text())["spec"]
    program, verb, _, *overrides = spec["entrypoint"].split()
    assert [program, verb] == ["lori", "run"]
    make_task(tmp_path)
    monkeypatch.chdir(tmp_path)
    cluster = config.load("mine.yaml", overrides).cluster
    [workers] = spec["rayClusterSpec"]["workerGroupSpecs"]
    [container] = workers["template"]["spec"]["containers"]
    gpus = workers["replicas"] * container["resources"]["limits"]["nvidia.com/gpu"]
    assert cluster.workers * cluster.gpus_per_worker == gpus


def assert_fields(tree: dict[str, Any], fields: dict[str, type]) -> None:
    assert {name: type(value) for name, value in tree.items()} == fields


@pytest.mark.skipif(torch.cuda.is_available(), reason="what is tested is its error where there is no GPU")
def test_gpu_tests_are_an_error_where_there_is_no_gpu(tmp_path: Path) -> None:
    make_program(tmp_path / "launch" / "test.sh", (LAUNCH / "test.sh").read_text())
    make_program(tmp_path / "launch" / "setup.sh", "")  # this environment is set up
    (tmp_path / ".venv").mkdir()
    make_program(tmp_path / ".venv" / "bin" / "python", f'#!/bin/sh\nexec {sys.executable} "$@"\n')
    launched = run_all([["bash", str(tmp_path / "launch" / "test.sh"), "--gpu"]], tmp_path, tmp_path / "log")
    assert launched.codes == [1]
    assert "--gpu: torch finds no CUDA device" in launched.output


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


@pytest.mark.parametrize(
    "name",
    [pytest.param(name, marks=pytest.mark.slow if "two hosts" in name or "hostfile" in name else ()) for name in HOSTS],
)
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
    words.append("train.checkpoint_every=null")
    partial = tmp_path / "demo" / f"{PARTIAL}train-math"
    until_told = f"until [ -e {partial}/metrics.jsonl ]; do sleep 0.1; done; kill -USR1 $!; wait $!"
    slow = "train.engine={name: tests.launched, rank: 2, busy: 3.0}"
    run_all([["bash", "-c", f'bash "$@" & {until_told}', "bash", *words, slow]], folder, tmp_path / "log", [job])
    assert (folder / f"requeued-{job['SLURM_JOB_ID']}").exists()
    launched = run_all([["bash", *words]], folder, tmp_path / "log", [job])
    assert launched.codes == [0], launched.output
    first, second = json.loads(adapter_of(tmp_path).with_name("job.json").read_text())["attempts"]
    assert first["error"].endswith("saved and ended, as SIGTERM was received; the same command resumes from there")
    assert second["resumed_at"] == first["reached"]
    assert_equal(load_adapter(adapter_of(tmp_path)), alone)


# --- everything, with Ray --------------------------------------------------------------------------------------------


def address() -> str:
    """This machine's, as Ray finds it."""
    import ray

    return str(ray.util.get_node_ip_address())


@pytest.mark.ray
@pytest.mark.slow
def test_a_slurm_job_is_a_ray_cluster_that_ends_with_it(alone: Adapter, folder: Path, tmp_path: Path) -> None:
    job = slurm.job(slurm.free_job(), f"{address()},{address()}")
    temporary, token = Path(f"/tmp/ray-{job['SLURM_JOB_ID']}"), folder / f".ray-token-{job['SLURM_JOB_ID']}"
    look = f"until stat -c %a {token} 2>/dev/null; do sleep 0.1; done &"
    words = ["bash", str(LAUNCH / "slurm_ray.sbatch"), "mine.yaml", f"output={tmp_path}", "cluster.workers=2"]
    try:
        launched = run_all([["bash", "-c", f'{look} "$@"', "bash", *words]], folder, tmp_path / "log", [job])
        assert left_behind(temporary) == {}
    finally:
        end_all(temporary)
        shutil.rmtree(temporary)
    assert launched.codes == [0], launched.output
    assert launched.output.startswith("600\n")
    assert not token.exists()
    assert_equal(load_adapter(adapter_of(tmp_path)), alone)


@pytest.mark.ray
@pytest.mark.slow
def test_a_slurm_job_ends_when_a_node_fails(folder: Path, tmp_path: Path) -> None:
    job = slurm.job(slurm.free_job(), f"{address()},{address()}")
    with socket.create_server(("", 15000 + int(job["SLURM_JOB_ID"]) % 5000 * 3)):
        words = ["bash", str(LAUNCH / "slurm_ray.sbatch"), "mine.yaml", f"output={tmp_path}"]
        launched = run_all([words], folder, tmp_path / "log", [job])
    assert launched.codes == [1], launched.output
    assert left_behind(Path(f"/tmp/ray-{job['SLURM_JOB_ID']}")) == {}
    shutil.rmtree(f"/tmp/ray-{job['SLURM_JOB_ID']}", ignore_errors=True)


@pytest.fixture
def head(folder: Path) -> Iterator[dict[str, str]]:
    with ray_head(environment_of(folder)) as variables:
        yield variables


@pytest.mark.ray
@pytest.mark.slow
def test_a_folder_with_the_configuration_alone_is_submitted(
    head: dict[str, str], alone: Adapter, folder: Path, tmp_path: Path
) -> None:
    (tmp_path / "project").mkdir()
    paths = [f"{key}={folder / name}" for key, name in PATHS.items()]
    words = ["bash", str(LAUNCH / "ray_submit.sh"), "mine.yaml", f"output={tmp_path}", *paths, "cluster.workers=2"]
    words.append("train.engine={name: fsdp, base: replicated}")  # one word, also for the shell there
    shutil.copy(folder / "mine.yaml", tmp_path / "project")
    launched = run_all([words], tmp_path / "project", tmp_path / "log", [head])
    assert launched.codes == [0], launched.output
    assert f"{adapter_of(tmp_path)}\n" in launched.output
    assert_equal(load_adapter(adapter_of(tmp_path)), alone)
    stranger = run_all([words], tmp_path / "project", tmp_path / "refused", [{**head, "RAY_AUTH_MODE": "disabled"}])
    assert stranger.codes == [1], stranger.output
    assert "token authentication is enabled" in stranger.output.lower()


PATHS = {"model.path": "model", "tasks.math.train": "rows.jsonl", "tasks.math.test": "rows.jsonl"}
