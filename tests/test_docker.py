"""The image's recipe and the cluster of docker/. Without an engine: what stands in them, and the cluster's commands."""

import contextlib
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.launching import ROOT, end_all, environment_of, free_port

DOCKERFILE = ROOT / "docker" / "Dockerfile"
COMPOSE = yaml.safe_load((ROOT / "docker" / "compose.yaml").read_text())
SERVICES: dict[str, dict[str, Any]] = COMPOSE["services"]
NUM_WORKERS = 2
PATIENCE_S = 120.0


def instructions() -> list[tuple[str, str]]:
    """(instruction, the rest), of the last stage."""
    text = re.sub(r"^#.*\n", "", DOCKERFILE.read_text(), flags=re.MULTILINE).replace("\\\n", " ")
    lines = [tuple(line.split(None, 1)) for line in text.splitlines() if line.strip()]
    last = max(number for number, line in enumerate(lines) if line[0] == "FROM")
    return lines[last:]  # type: ignore[return-value]


def test_hadolint_finds_nothing() -> None:
    done = subprocess.run([Path(sys.executable).with_name("hadolint"), DOCKERFILE], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


def test_the_image_is_for_a_user_without_rights_and_knows_its_health() -> None:
    last = dict(instructions())
    assert int(last["USER"]) > 0
    assert "lori" in last["HEALTHCHECK"]
    assert last["ENTRYPOINT"] == '["lori"]'


def test_bases_and_dependencies_have_versions() -> None:
    bases = re.findall(r"^FROM (\S+)", DOCKERFILE.read_text(), re.MULTILINE)
    assert len(set(bases)) == 1
    assert re.fullmatch(r"python:3\.11\.\d+-slim-\w+", bases[0])
    assert "--constraint constraints.txt" in DOCKERFILE.read_text()


def test_the_builder_is_sent_what_the_image_takes_and_nothing_else() -> None:
    ignored = (ROOT / "docker" / "Dockerfile.dockerignore").read_text().splitlines()
    sent = {line.removeprefix("!") for line in ignored if line.startswith("!")}
    copied = re.findall(r"^COPY (?!--from)(.*) \S+$", DOCKERFILE.read_text(), re.MULTILINE)
    assert sent == set(" ".join(copied).split())
    assert "*" in ignored
    assert all((ROOT / name).exists() for name in sent)


def test_a_head_and_two_workers_are_closed_to_all_without_the_token() -> None:
    assert set(SERVICES) == {"head", "worker", "quickstart"}
    assert SERVICES["worker"]["deploy"] == {"replicas": NUM_WORKERS}
    published = [port for service in SERVICES.values() for port in service.get("ports", [])]
    assert published == ["127.0.0.1:8265:8265"]
    for service in SERVICES.values():
        [name] = service["secrets"]
        assert COMPOSE["secrets"][name] == {"environment": "LORI_TOKEN"}
        assert service["environment"] == {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN_PATH": f"/run/secrets/{name}"}


@pytest.fixture
def place() -> Iterator[Path]:
    """A folder with a short name, as those of sockets must be. Processes that name it are ended."""
    made = Path(tempfile.mkdtemp(prefix="ray-", dir="/tmp"))
    try:
        yield made
    finally:
        end_all(made)
        shutil.rmtree(made, ignore_errors=True)  # what is ending may still write


@pytest.mark.ray
@pytest.mark.slow
def test_its_commands_run_the_quickstart(place: Path) -> None:
    """As processes of this machine: with other ports, a token in another file, and few steps."""
    import ray

    (place / "token").write_text("a" * 64)
    address, ports = ray.util.get_node_ip_address(), {port: free_port() for port in ("6379", "8265")}
    environment = environment_of(place) | {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN_PATH": str(place / "token")}

    def words(text: str) -> list[str]:
        return re.sub(r"\b(6379|8265)\b", lambda port: ports[port[0]], text.replace("head:", f"{address}:")).split()

    with (place / "log").open("wb") as log, contextlib.ExitStack() as started:
        for name in ["head", *["worker"] * NUM_WORKERS]:
            agent = free_port()
            node = [*words(SERVICES[name]["entrypoint"]), f"--dashboard-agent-listen-port={agent}"]
            node += [f"--temp-dir={place}", "--ray-client-server-port", free_port()] if name == "head" else []
            process = subprocess.Popen(node, env=environment, stdout=log, stderr=subprocess.STDOUT)
            started.callback(process.wait)
            started.callback(process.kill)
            kind, *check = SERVICES[name]["healthcheck"]["test"]
            assert kind == "CMD"
            await_health([word.replace("52365", agent) for word in check], environment, process, place / "log")
        lori = [
            f"output={place}",
            "train.steps=2",
            "train.warmup_steps=0",
            "train.calibrate.steps=2",
            "evaluate.rows=2",
        ]
        submit = [*words(SERVICES["quickstart"]["entrypoint"]), *lori, "merges={all: {method: concat}}"]
        environment["PYTHONPATH"] = str(ROOT)
        done = subprocess.run(submit, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, done.stdout + done.stderr
    assert (place / "quickstart" / "summary.json").exists()


def await_health(check: list[str], environment: dict[str, str], process: subprocess.Popen[bytes], log: Path) -> None:
    end = time.monotonic() + PATIENCE_S
    while subprocess.run(check, env=environment, capture_output=True).returncode != 0:
        assert process.poll() is None, log.read_text()
        assert time.monotonic() < end, log.read_text()
