"""A Ray cluster on this host: nodes bound to 127.0.0.1, which can be killed as a lost machine would be."""

import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any

import psutil

# Memory of a node's object store; the engine and the launcher put little there.
_OBJECT_STORE_BYTES = 80_000_000
# Ray notices within seconds that a node is lost, rather than within half a minute.
_HEALTH_CHECKS = {
    "health_check_initial_delay_ms": 0,
    "health_check_period_ms": 200,
    "health_check_timeout_ms": 2000,
    "health_check_failure_threshold": 4,
}


class RayCluster:
    """A head, to which drivers of this host connect, and other nodes."""

    def __init__(self, head: dict[str, Any]) -> None:
        from ray.cluster_utils import Cluster

        settings = {"include_dashboard": False, "_system_config": _HEALTH_CHECKS}
        self._cluster = Cluster(initialize_head=True, head_node_args={**_options(head), **settings})
        self._others: list[Any] = []

    @property
    def address(self) -> str:
        """HOST:PORT of the cluster."""
        return str(self._cluster.address)

    @property
    def head_id(self) -> str:
        """The identity of the head."""
        return str(self._cluster.head_node.node_id)

    @property
    def num_nodes(self) -> int:
        """The number of nodes that run, with the head."""
        return 1 + len(self._others)

    def add_node(self, **options: Any) -> Any:
        """Start a node, such as with num_cpus=2, resources={"X": 1}, env_vars={"A": "b"}; return it once it is up."""
        node = self._cluster.add_node(**_options(options))
        self._others.append(node)
        return node

    def kill_node(self, node: Any) -> None:
        """Kill a node's processes, all at once."""
        self._others.remove(node)
        processes = [psutil.Process(each.process.pid) for kind in node.all_processes.values() for each in kind]
        for process in [child for parent in processes for child in parent.children(recursive=True)] + processes:
            with suppress(psutil.NoSuchProcess):
                process.kill()
        self._cluster.remove_node(node, allow_graceful=False)

    def kill(self, node_id: str) -> None:
        """Kill the node with this identity, which is not the head."""
        [node] = [node for node in self._others if node.node_id == node_id]
        self.kill_node(node)

    def kill_newest(self) -> None:
        """Kill the node that was added last."""
        self.kill_node(self._others[-1])

    def resize(self, num_nodes: int) -> None:
        """Add or kill nodes until `num_nodes` run, with the head, each with one CPU."""
        while self.num_nodes > num_nodes:
            self.kill_newest()
        while self.num_nodes < num_nodes:
            self.add_node()
        deadline = time.monotonic() + 30
        while len(self._alive()) != num_nodes:
            assert time.monotonic() < deadline, self._alive()
            time.sleep(0.1)

    def _alive(self) -> list[Any]:
        return [node for node in self._cluster.global_state.node_table() if node["Alive"]]

    def stop(self) -> None:
        """End all nodes, and this process's connection to them."""
        import ray

        ray.shutdown()
        self._cluster.shutdown()


def _options(options: dict[str, Any]) -> dict[str, Any]:
    defaults = {"node_ip_address": "127.0.0.1", "num_cpus": 1, "object_store_memory": _OBJECT_STORE_BYTES}
    return {**defaults, **options}


@contextmanager
def ray_cluster(**head: Any) -> Iterator[RayCluster]:
    """Start a cluster of one node, such as with num_cpus=2, and end it."""
    cluster = RayCluster(head)
    try:
        yield cluster
    finally:
        cluster.stop()
