"""The connection to a Ray cluster, and the checks of its nodes."""

import os
import re
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import psutil
import pytest

from flows.cluster.connection import connect, connected
from flows.cluster.engines import open_engine
from flows.run.config import EngineConfig
from flows.run.versions import reprise_version
from tests.engine_work import square
from tests.ray_cluster import RayCluster

ray = pytest.importorskip("ray")


@pytest.fixture
def mute() -> Iterator[str]:
    """The address of a server that answers nothing."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        yield f"127.0.0.1:{server.getsockname()[1]}"


def test_an_address_at_which_no_cluster_answers_is_one_line_within_seconds(mute: str) -> None:
    started = time.monotonic()
    with pytest.raises(ValueError, match=rf"^engine\.address: {mute}: no Ray cluster answers .*ray start") as caught:
        connect(mute, "engine")
    assert time.monotonic() - started < 30
    assert "\n" not in str(caught.value)
    assert not ray.is_initialized()


def test_addresses_of_rays_client_are_rejected(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match=r"^launch\.address: ray://a:10001 .*start the run on a node"):
        connect("ray://a:10001", "launch")
    monkeypatch.setenv("RAY_ADDRESS", "ray://b:10001")
    with pytest.raises(ValueError, match=r"^engine\.address: ray://b:10001"):
        connect("auto", "engine")


def test_a_cluster_of_another_version_of_ray_is_one_line(cluster: RayCluster) -> None:
    key, namespace = b"CLUSTER_METADATA", b"cluster"
    client = ray._raylet.GcsClient(address=cluster.address)
    metadata = client.internal_kv_get(key, namespace)
    client.internal_kv_put(key, metadata.replace(ray.__version__.encode(), b"2.1.0"), True, namespace)
    try:
        with pytest.raises(ValueError, match=r"^engine\.address: .*Ray: 2\.1\.0.*same versions") as caught:
            connect(cluster.address, "engine")
    finally:
        client.internal_kv_put(key, metadata, True, namespace)
    assert "\n" not in str(caught.value)


def test_threads_share_a_connection_that_ends_with_the_last_use(
    cluster: RayCluster, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RAY_ADDRESS", cluster.address)
    barrier = threading.Barrier(3)

    def use(seconds: float) -> bool:
        with connected("auto", "engine"):
            barrier.wait(30)
            time.sleep(seconds)
            return bool(ray.is_initialized())

    with ThreadPoolExecutor(3) as threads:
        assert list(threads.map(use, [0, 0.2, 0.4])) == [True, True, True]
    assert not ray.is_initialized()


def test_a_second_cluster_is_rejected_while_connected(cluster: RayCluster) -> None:
    with connected(cluster.address, "engine"):
        with pytest.raises(ValueError, match=r"^launch\.address: node1:6379, but this process is connected to"):
            connect("node1:6379", "launch")
        assert ray.is_initialized()
    assert not ray.is_initialized()


def test_a_connection_of_the_user_is_used_and_kept(cluster: RayCluster, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ray._private.ray_constants, "ENABLE_RAY_CLUSTER", False)
    ray.init(cluster.address, log_to_driver=False, logging_level="critical")
    try:
        with connected("auto", "engine"):
            pass
        assert ray.is_initialized()
    finally:
        ray.shutdown()


def test_a_node_that_does_not_see_the_run_folder_is_named(cluster: RayCluster, tmp_path: Path) -> None:
    cluster.resize(1)
    descriptor = os.open(tmp_path, os.O_DIRECTORY)
    # Another folder in each process, or none.
    folder = Path(f"/proc/self/fd/{descriptor}/.")
    try:
        with pytest.raises(ValueError, match=r"^engine\.address: node 127\.0\.0\.1 .* does not see .*set output"):
            open_engine(EngineConfig(kind="ray", address=cluster.address), folder)
    finally:
        os.close(descriptor)
    assert not ray.is_initialized()
    assert list(tmp_path.iterdir()) == []


def test_a_node_with_another_version_of_reprise_is_named(cluster: RayCluster, tmp_path: Path) -> None:
    # A checkout's own metadata would come before that of an installed package.
    (tmp_path / "sitecustomize.py").write_text(
        "import importlib.metadata\nimportlib.metadata.version = lambda name: '9.9'\n"
    )
    cluster.resize(1)
    path = os.pathsep.join([str(tmp_path), os.environ.get("PYTHONPATH", "")])
    node = cluster.add_node(env_vars={"PYTHONPATH": path})
    try:
        line = (
            f"engine.address: node 127.0.0.1 of the Ray cluster has Reprise 9.9, and this host has {reprise_version()};"
        )
        with pytest.raises(ValueError, match=f"^{re.escape(line)}"):
            open_engine(EngineConfig(kind="ray", address=cluster.address), tmp_path)
    finally:
        cluster.kill_node(node)


def test_more_cpus_than_a_node_has_are_rejected(cluster: RayCluster, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"^engine\.cpus_per_task: 64, but the largest node .* has 1 CPUs; lower it"):
        open_engine(EngineConfig(kind="ray", address=cluster.address, cpus_per_task=64), tmp_path)
    assert not ray.is_initialized()


def test_a_busy_cluster_is_checked_and_waited_for(cluster: RayCluster, tmp_path: Path) -> None:
    cluster.resize(1)
    with connected(cluster.address, "engine"):
        other = ray.remote(num_cpus=1)(Other).remote()
        ray.get(other.wait.remote())
        with open_engine(EngineConfig(kind="ray", address=cluster.address), tmp_path) as engine:
            reports: list[int] = []
            results = engine.map(square, [3], lambda units: (reports.append(units), ray.kill(other)))  # type: ignore[arg-type, return-value]
            assert list(results) == [9]
    assert reports[0] == 0


class Other:
    """An actor of another user."""

    def wait(self) -> None:
        pass


LOCAL = """
import signal, sys
from flows.cluster.connection import connected

def handler(*arguments):
    sys.exit(7)

signal.signal(signal.SIGTERM, handler)
with connected("local", "engine"):
    import ray

    assert signal.getsignal(signal.SIGTERM) is handler
    assert ray.get(ray.remote(lambda: 32).remote()) == 32
    print(ray.get_runtime_context().gcs_address, flush=True)
    sys.stdin.read()
"""


def test_a_local_cluster_is_reached_from_this_host_alone_with_its_token_and_ends_quietly(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("RAY_AUTH_MODE", raising=False)
    # Ray keeps the token in the home.
    environment = {**os.environ, "HOME": str(tmp_path)}
    process = subprocess.Popen(
        [sys.executable, "-c", LOCAL], env=environment, text=True,
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
    )  # fmt: skip
    assert process.stdout is not None
    address = process.stdout.readline().strip()
    assert address.startswith("127.0.0.1:")
    with pytest.raises(ValueError, match=rf"^engine\.address: {address}: the cluster asks for a token; .*token$"):
        connect(address, "engine")
    children = psutil.Process(process.pid).children(recursive=True)
    listening = {
        connection.laddr.ip
        for each in [psutil.Process(process.pid), *children]
        for connection in each.net_connections("tcp")
        if connection.status == psutil.CONN_LISTEN
    }
    assert {ip.removeprefix("::ffff:") for ip in listening} == {"127.0.0.1"}
    assert process.communicate("") == ("", None)
    assert process.returncode == 0
    deadline = time.monotonic() + 20
    while any(child.is_running() and child.status() != psutil.STATUS_ZOMBIE for child in children):
        assert time.monotonic() < deadline
        time.sleep(0.1)
