"""Who can connect with a cluster of a run's own."""

import http.client
import json
import os
import stat
import subprocess
import sys
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from lori_dist import config
from lori_dist.cluster.connection import TOKEN_FILE, connected
from lori_dist.errors import ConfigError
from tests.launching import environment_of, make_task
from tests.processes import descendants, sockets

pytestmark = pytest.mark.ray

DRIVER = """
import json, os, sys
from lori_dist import config
from lori_dist.cluster.connection import connected
os.umask(0)
with connected(config.load("mine.yaml", sys.argv[1:])) as nodes:
    import ray
    context = ray.get_runtime_context()
    dashboard = ray._private.worker.global_worker.node.address_info["webui_url"]
    session = ray._private.worker._global_node.get_session_dir_path()
    print(json.dumps({"gcs": context.gcs_address, "dashboard": dashboard, "session": session}), flush=True)
    sys.stdin.read()
"""
CLIENT = """
import sys, ray
ray.init(address=sys.argv[1], log_to_driver=False)
@ray.remote(num_cpus=0)
def answer():
    return 42
print(ray.get(answer.remote()))
"""


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    make_task(tmp_path)
    return tmp_path


@contextmanager
def cluster(folder: Path, *settings: str) -> Iterator[tuple[dict[str, str], set[tuple[str, int]]]]:
    """The addresses of a run's own cluster, and addresses and ports on which its processes listen."""
    environment = {name: text for name, text in environment_of(folder).items() if not name.startswith("RAY_")}
    with (
        (folder / "log").open("w") as log,
        subprocess.Popen(
            [sys.executable, "-c", DRIVER, *settings],
            cwd=folder,
            env=environment,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=log,
        ) as process,
    ):
        try:
            assert process.stdout is not None
            line = process.stdout.readline()
            assert line, (folder / "log").read_text()
            yield json.loads(line), sockets(descendants(process.pid) | {process.pid})
        finally:
            assert process.stdin is not None
            process.stdin.close()
            assert process.wait(60) == 0, (folder / "log").read_text()


def asked(dashboard: str, path: str, token: str | None = None, **request: Any) -> int:
    """The status of an answer."""
    headers = {} if token is None else {"Authorization": f"Bearer {token}"}
    try:
        url = urllib.request.Request(f"http://{dashboard}{path}", headers=headers, **request)
        with urllib.request.urlopen(url, timeout=60) as answer:
            return int(answer.status)
    except urllib.error.HTTPError as error:
        return int(error.code)


HTTP_PATHS = ("/", "/metrics", "/api/jobs/", "/api/cluster_status", "/nodes?view=summary", "/logs")
CALLS = ("CoreWorkerService/Exit", "NodeManagerService/GetNodeStats", "NodeInfoGcsService/GetAllNodeInfo")


def answered_without_a_token(found: set[tuple[str, int]]) -> Iterator[tuple[str, int]]:
    """What HTTP servers answer: path and status. Other servers are of gRPC, and answer no call that Ray has."""
    import grpc

    for address, port in found:
        host = "127.0.0.1" if set(address) <= set("0.") else address
        for path in HTTP_PATHS:
            try:
                yield path, asked(f"{host}:{port}", path)
            except http.client.BadStatusLine:
                break
        else:
            continue
        with grpc.insecure_channel(f"{host}:{port}") as channel:
            for call in CALLS:
                with pytest.raises(grpc.RpcError) as refused:
                    channel.unary_unary(f"/ray.rpc.{call}")(b"", timeout=60)
                assert refused.value.code() in (grpc.StatusCode.UNAUTHENTICATED, grpc.StatusCode.UNIMPLEMENTED)


def joined(gcs: str, **variables: str) -> subprocess.CompletedProcess[str]:
    environment = {name: text for name, text in os.environ.items() if not name.startswith("RAY_")}
    environment |= {"RAY_gcs_server_port_wait_time_s": "1", **variables}
    return subprocess.run(
        [sys.executable, "-c", CLIENT, gcs], env=environment, capture_output=True, text=True, timeout=120
    )


def test_by_default_only_this_machine_connects_and_only_with_the_token(folder: Path) -> None:
    with cluster(folder) as (addresses, found):
        assert found
        assert any(stat.S_IMODE(parent.stat().st_mode) == 0o700 for parent in Path(addresses["session"]).parents)
        assert {address for address, _ in found if not address.startswith("127.") and address != "::1"} == set()
        assert asked(addresses["dashboard"], "/api/jobs/") == 401
        assert not (folder / "runs" / "demo" / TOKEN_FILE).exists()


@pytest.mark.slow
def test_a_cluster_that_others_reach_wants_the_token_of_a_file_of_one_s_own(folder: Path) -> None:
    file = folder / "runs" / "demo" / TOKEN_FILE
    with cluster(folder, "cluster.bind=0.0.0.0") as (addresses, found):
        assert {"0.0.0.0", "0" * 32} & {address for address, _ in found}
        assert {path for path, status in answered_without_a_token(found) if status != 401} == {"/"}, (
            "the page to log in"
        )
        assert stat.S_IMODE(file.stat().st_mode) == 0o600
        token = file.read_text()
        job = {"data": b'{"entrypoint": "touch taken"}', "method": "POST"}
        for wrong in (None, "", "0" * 64, token[:-1]):
            assert asked(addresses["dashboard"], "/api/jobs/", wrong) in (401, 403)
            assert asked(addresses["dashboard"], "/api/jobs/", wrong, **job) in (401, 403)
        assert asked(addresses["dashboard"], "/api/jobs/", token) == 200
        stranger = joined(addresses["gcs"], RAY_AUTH_MODE="disabled")
        assert stranger.returncode != 0
        assert "42" not in stranger.stdout
        wrong_token = joined(addresses["gcs"], RAY_AUTH_MODE="token", RAY_AUTH_TOKEN="0" * 64)
        assert wrong_token.returncode != 0
        friend = joined(addresses["gcs"], RAY_AUTH_MODE="token", RAY_AUTH_TOKEN_PATH=str(file))
        assert friend.stdout.split() == ["42"], friend.stderr
    assert not file.exists()


def test_nobody_opens_it_without_a_token(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(folder)
    monkeypatch.setenv("RAY_AUTH_MODE", "disabled")
    run = config.load("mine.yaml", ["cluster.bind=0.0.0.0"])
    with pytest.raises(ConfigError, match=r"^cluster.bind: '0.0.0.0' lets other machines connect"), connected(run):
        pass


def test_where_another_cluster_listens_is_not_ours_to_say(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(folder)
    with pytest.raises(ConfigError, match=r"^cluster.bind: is given, but the cluster at 'auto'"):
        config.load("mine.yaml", ["cluster.bind=0.0.0.0", "cluster.address=auto"])
