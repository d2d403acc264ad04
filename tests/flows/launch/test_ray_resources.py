"""What a launch on Ray asks of a node, and of which cluster."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from flows.launch.ray_launcher import RayLauncher
from flows.launch.ray_resources import bundle_of, describe_all
from flows.run.config import LaunchConfig, parse_config
from tests.flows.fakes import values, write_texts


def on_ray(**fields: Any) -> LaunchConfig:
    return LaunchConfig(kind="ray", nodes=2, **fields)


def test_a_node_has_a_device_and_a_cpu_for_each_rank_unless_they_are_named() -> None:
    assert bundle_of(on_ray(), "cpu", 16) == {"CPU": 8}
    assert bundle_of(on_ray(), "npu", 16) == {"CPU": 8, "NPU": 8}
    resources = {"CPU": 32, "GPU": 8, "fast": 0.5}
    assert bundle_of(on_ray(resources=resources), "cuda", 8) == resources


def test_fewer_devices_than_ranks_and_parts_of_devices_are_refused() -> None:
    with pytest.raises(ValueError, match=r"launch.resources: GPU 4 is less than the 8 ranks of a node; raise it"):
        bundle_of(on_ray(resources={"GPU": 4}), "cuda", 16)
    with pytest.raises(ValueError, match=r"launch.resources: GPU 8.5 is more than 1 and no whole number; round it"):
        bundle_of(on_ray(resources={"GPU": 8.5}), "cuda", 16)
    with pytest.raises(ValueError, match="the name of a resource"):
        on_ray(resources={"a b": 1})


def test_nodes_of_a_kind_are_counted() -> None:
    head = {"memory": 1e9, "node:127.0.0.1": 1.0}
    nodes = [head, {**head, "CPU": 4.0}, {**head, "CPU": 4.0}, {**head, "CPU": 8.0, "GPU": 2.0, "fast": 1.0}]
    assert describe_all(nodes, {"GPU": 8}) == "2 nodes with CPU 4; 1 node with CPU 8, GPU 2"
    assert describe_all(nodes[:1], {"fast": 1}) == "no such nodes"


@pytest.mark.parametrize(
    ("engine", "launch", "address"),
    [
        ({"kind": "ray", "address": "node1:6379"}, {}, "node1:6379"),
        ({"kind": "ray", "address": "local"}, {"address": "local"}, "local"),
        ({"address": "node1:6379"}, {"address": "auto"}, "auto"),
        ({"kind": "ray"}, {}, None),
    ],
)
def test_the_launch_is_on_the_cluster_of_the_engine(
    tmp_path: Path, engine: dict[str, Any], launch: dict[str, Any], address: str | None
) -> None:
    sections = {"device": "cpu", "engine": engine, "launch": {"kind": "ray", **launch}}
    config = parse_config({**values(write_texts(tmp_path), tmp_path), **sections}, "test")
    assert config.launch.address == address


@pytest.mark.parametrize(
    ("engine", "launch"), [("auto", "node1:6379"), ("node1:6379", "auto"), ("auto", "local"), ("local", "auto")]
)
def test_engine_and_launch_are_on_one_cluster(tmp_path: Path, engine: str, launch: str) -> None:
    """Ranks that end still use their connection when refining asks for one."""
    given = {"engine": {"kind": "ray", "address": engine}, "launch": {"kind": "ray", "address": launch}}
    with pytest.raises(ValueError, match=f"launch.address: {launch}, but engine.address is {engine}, .*; set the same"):
        parse_config({**values(write_texts(tmp_path), tmp_path), "device": "cpu", **given}, "test")


def test_a_cluster_of_this_host_alone_is_not_waited_for(tmp_path: Path) -> None:
    """No node joins it, so what it lacks it will always lack."""
    job: Any = SimpleNamespace(device="cpu", parallel=SimpleNamespace(world_size=4))
    launcher = RayLauncher(job, "train-1", tmp_path, LaunchConfig(kind="ray", address="local"))
    nodes: Any = SimpleNamespace(is_reserved=lambda: False, shortage=lambda: "1 node with CPU 2")
    launcher._nodes = nodes
    with pytest.raises(ValueError, match=r"^launch\.resources: 1 node with CPU 4 is more than this host's 1 node with"):
        launcher.poll()
