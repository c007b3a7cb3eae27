"""Runs that are submitted from a folder with no more than a configuration, looked at and ended from other terminals."""

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from lori_dist.__main__ import main
from lori_dist.cluster import submission
from lori_dist.config import load
from lori_dist.errors import ConfigError, JobError
from tests.launching import ROOT, environment_of, make_task, ray_head

DEADLINE = 240.0

LORI = [sys.executable, "-m", "lori_dist"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("submission")
    make_task(made)
    (made / "client").mkdir()
    shutil.copy(made / "mine.yaml", made / "client")
    return made


def settings(folder: Path, *more: str) -> list[str]:
    inputs = {"model.path": "model", "tasks.math.train": "rows.jsonl", "tasks.math.test": "rows.jsonl"}
    return [f"output={folder / 'runs'}", *(f"{key}={folder / name}" for key, name in inputs.items()), *more]


@pytest.fixture(scope="module")
def head(folder: Path) -> Iterator[dict[str, str]]:
    """A cluster on which another version of the package is installed, which cannot even be imported."""
    (folder / "other" / "lori_dist").mkdir(parents=True)
    (folder / "other" / "lori_dist" / "__init__.py").write_text("raise ImportError('the version of the cluster')\n")
    with ray_head({**environment_of(folder), "PYTHONPATH": str(folder / "other")}) as variables:
        yield variables


SECRET = "hf_nobody_may_see_this"

LONG = ["name=long", "train.steps=100000", "train.checkpoint_every=5"]


@pytest.fixture(scope="module", params=[pytest.param("story", marks=pytest.mark.slow)])
def story(head: dict[str, str], folder: Path) -> dict[str, Any]:
    """A long run: submitted, submitted again, its client interrupted, the run stopped, submitted again, stopped."""
    words = [*LORI, "run", "mine.yaml", *settings(folder, *LONG), "--address", head["RAY_ADDRESS"]]
    told: dict[str, Any] = {}
    with started(words, folder / "first", head) as client:
        told["working"] = await_step(folder, client, folder / "first")
        told["twice"] = ended(words, folder / "client", head)
        client.send_signal(signal.SIGINT)
        told["interrupted"] = client.wait(60), (folder / "first").read_text()
    told["alone"] = lori_status(folder)
    told["stop"] = stop(folder)
    told["stopped"] = lori_status(folder)
    with started(words, folder / "again", head) as client:
        told["continued"] = await_step(folder, client, folder / "again", beyond=steps(folder)[-1]["step"])
        stop(folder)
        told["ended"] = client.wait(60), (folder / "again").read_text()
    return told


@contextmanager
def started(words: list[str], log: Path, head: dict[str, str]) -> Iterator[subprocess.Popen[bytes]]:
    environment, place = environment_of(log.parent) | head | {"HF_TOKEN": SECRET}, log.parent / "client"
    with (
        log.open("wb") as stream,
        subprocess.Popen(words, cwd=place, env=environment, stdout=stream, stderr=subprocess.STDOUT) as process,
    ):
        try:
            yield process
        finally:
            process.kill()


def await_step(folder: Path, client: subprocess.Popen[bytes], log: Path, beyond: int = 0) -> dict[str, Any]:
    """What `lori status` says once the training has done steps in this driver's time."""
    end = time.monotonic() + DEADLINE
    while time.monotonic() < end:
        assert client.poll() is None, log.read_text()
        found = lori_status(folder)
        if (
            found
            and found["driver"]
            and (found["jobs"][0]["step"] or 0) > beyond
            and "train-math: running" in log.read_text()
        ):
            return found
        time.sleep(0.5)
    pytest.fail(f"it does not get on: {log.read_text()}")


def steps(folder: Path) -> list[dict[str, Any]]:
    metrics = folder / "runs" / "long" / ".partial-train-math" / "metrics.jsonl"
    return [json.loads(line) for line in metrics.read_text().splitlines(keepends=True) if line.endswith("\n")]


def lori_status(folder: Path) -> dict[str, Any]:
    words = [*LORI, "status", "mine.yaml", *settings(folder, *LONG), "--json"]
    done = subprocess.run(words, cwd=folder / "client", env=environment_of(folder), capture_output=True, text=True)
    return dict(json.loads(done.stdout)) if done.returncode == 0 else {}


def stop(folder: Path) -> "subprocess.CompletedProcess[str]":
    return ended([*LORI, "stop", str(folder / "runs" / "long")], folder / "client", {})


def ended(words: list[str], place: Path, variables: dict[str, str]) -> "subprocess.CompletedProcess[str]":
    """A command at its end. stdout has all that it wrote."""
    environment = environment_of(place.parent) | variables
    return subprocess.run(
        words,
        cwd=place,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=DEADLINE,
    )


@pytest.mark.ray
def test_a_run_goes_on_without_its_client_and_ends_when_told(story: dict[str, Any], folder: Path) -> None:
    training = story["working"]["jobs"][0]
    assert (training["name"], training["state"]) == ("train-math", "running")
    assert 0 < training["step"] <= training["num_steps"]
    code, output = story["interrupted"]
    assert code == 130
    assert "/#/jobs/lori-long-" in output.splitlines()[0], output
    assert "continues. See `lori status mine.yaml" in output
    assert story["alone"]["driver"] == story["working"]["driver"]
    assert story["stop"].returncode == 0, story["stop"].stdout
    assert story["stopped"]["driver"] is None
    stopped = story["stopped"]["jobs"][0]
    assert stopped["state"] == "interrupted"
    assert stopped["saved_step"] == stopped["step"] >= training["step"]


@pytest.mark.ray
def test_a_run_that_is_being_worked_on_is_refused(story: dict[str, Any]) -> None:
    assert story["twice"].returncode == 1
    assert "is working on this run; wait for it, or end it with `lori stop" in story["twice"].stdout


@pytest.mark.ray
def test_a_stopped_run_goes_on_and_its_client_says_that_it_was_stopped(story: dict[str, Any], folder: Path) -> None:
    code, output = story["ended"]
    assert code == 3, output
    assert "stopped by `lori stop`; the same command continues from here" in output
    attempts = json.loads((folder / "runs" / "long" / ".partial-train-math" / "attempts.json").read_text())["attempts"]
    assert [attempt["number"] for attempt in attempts] == [1, 2]
    first = next(step for step in steps(folder) if step["time"] >= attempts[1]["started"])
    assert (first["phase"], first["step"] > 1) == ("train", True)


@pytest.mark.ray
def test_no_secret_of_the_client_or_the_cluster_is_in_what_a_run_leaves(story: dict[str, Any], folder: Path) -> None:
    files = [file for file in [*(folder / "runs").rglob("*"), folder / "first", folder / "again"] if file.is_file()]
    assert len(files) > 5
    for secret in (b"a" * 64, SECRET.encode()):
        assert [file for file in files if secret in file.read_bytes()] == []


@pytest.mark.ray
def test_a_run_s_end_is_its_client_s(head: dict[str, str], folder: Path) -> None:
    words = [*LORI, "run", "mine.yaml", *settings(folder, "name=short"), "--address", head["RAY_ADDRESS"]]
    short = ended(words, folder / "client", head)
    assert short.returncode == 0, short.stdout
    assert str(folder / "runs" / "short" / "summary.json") in short.stdout
    [wrong] = [word for word in words if word.startswith("tasks.math.test")]
    words[words.index(wrong)] = "tasks.math.test=/nowhere.jsonl"
    wanting = ended(words, folder / "client", head)
    assert wanting.returncode == 2
    assert "tasks.math.test: there is no file '/nowhere.jsonl'" in wanting.stdout


@pytest.mark.ray
def test_a_job_that_ray_is_told_to_stop_ends_its_client_as_lori_stop_does(head: dict[str, str], folder: Path) -> None:
    words = [*LORI, "run", "mine.yaml", *settings(folder, "name=halted"), "--address", head["RAY_ADDRESS"]]
    with started(words, folder / "halted", head) as client:
        end = time.monotonic() + DEADLINE
        while "Running entrypoint" not in (said := (folder / "halted").read_text()):
            assert client.poll() is None, said
            assert time.monotonic() < end
            time.sleep(0.1)
        ray = [str(Path(sys.executable).with_name("ray")), "job", "stop", "--no-wait", said.partition(":")[0]]
        assert ended(ray, folder / "client", head).returncode == 0
        assert client.wait(60) == 3, (folder / "halted").read_text()


@pytest.mark.ray
@pytest.mark.slow
def test_a_cluster_that_cannot_take_a_job_yet_is_asked_again_and_its_answer_is_passed_on(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another program has the port of its agent."""
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with ray_head(environment_of(folder), agent_port=port) as variables:
            for name, value in variables.items():
                monkeypatch.setenv(name, value)
            monkeypatch.chdir(folder / "client")
            monkeypatch.setattr(submission, "SUBMIT_SECONDS", 3.0)
            monkeypatch.setattr(submission, "RETRY_SECONDS", 1.0)
            with pytest.raises(JobError, match="try again later") as refused:
                submission.submit("mine.yaml", settings(folder), variables["RAY_ADDRESS"])
    assert "token" not in str(refused.value)


@pytest.mark.ray
def test_without_the_token_nothing_is_taken(head: dict[str, str], folder: Path) -> None:
    words = [*LORI, "run", "mine.yaml", *settings(folder), "--address", head["RAY_ADDRESS"]]
    stranger = ended(words, folder / "client", {**head, "RAY_AUTH_MODE": "disabled"})
    assert stranger.returncode == 1
    assert "set RAY_AUTH_MODE=token and RAY_AUTH_TOKEN_PATH" in stranger.stdout


@pytest.mark.ray
def test_the_project_is_enough_where_the_package_is_not_installed(head: dict[str, str], folder: Path) -> None:
    """And a relative output is refused there."""
    project = folder / "project"
    shutil.copytree(ROOT / "lori_dist", project / "lori_dist", ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(folder / "mine.yaml", project)
    words = [
        "bash",
        str(ROOT / "launch" / "ray_submit.sh"),
        "mine.yaml",
        *settings(folder, "name=project", "output=runs"),
    ]
    environment = {**head, "PYTHONPATH": str(project)}
    relative = ended(words, project, environment)
    assert relative.returncode != 0
    assert "output: got 'runs', which would be lost with the folder of this Ray job" in relative.stdout


def test_what_no_other_machine_finds_is_refused_at_once(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(folder / "client")
    assert main(["run", "mine.yaml", "--address", "http://127.0.0.1:1", "train.lr=fast"]) == 2
    assert capsys.readouterr().err.startswith("train.lr: ")
    assert main(["run", "mine.yaml", "--address", "http://127.0.0.1:1"]) == 2
    places = ("output", "model.path", "tasks.math.train", "tasks.math.test")
    assert [line.partition(":")[0] for line in capsys.readouterr().err.splitlines()] == list(places)
    assert main(["run", "mine.yaml", "--address", "127.0.0.1:1", *settings(folder)]) == 2
    assert "--address: got '127.0.0.1:1'; wanted that of Ray's dashboard" in capsys.readouterr().err


def test_a_cluster_that_is_not_there_is_told(folder: Path) -> None:
    words = [*LORI, "run", "mine.yaml", *settings(folder), "--address", "http://127.0.0.1:1"]
    done = subprocess.run(
        words, cwd=folder / "client", env=environment_of(folder) | {"RAY_AUTH_MODE": "disabled"}, capture_output=True
    )
    assert done.returncode == 1
    assert done.stderr.startswith(b"--address: http://127.0.0.1:1 does not accept the job (")


def test_a_job_s_own_folder_is_no_place_for_results(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(folder)
    load("mine.yaml")
    monkeypatch.setenv("RAY_JOB_CONFIG_JSON_ENV_VAR", "{}")
    for output in ("runs", str(folder / "runs")):
        with pytest.raises(ConfigError, match=r"^output: .* would be lost with the folder of this Ray job"):
            load("mine.yaml", [f"output={output}"])
    load("mine.yaml", [f"output={os.sep}tmp"])
