"""The nodes of a job on Ray: a placement group with a bundle of resources for each, and in each an actor."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import ray
from ray.exceptions import ActorUnavailableError, RayActorError, RayTaskError
from ray.util import placement_group, placement_group_table, remove_placement_group
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from flows.cluster.nodes import Node, check_nodes, list_nodes, one_line
from flows.launch.ray_host import Host
from flows.launch.ray_resources import as_arguments, describe_all, has
from flows.launch.torchrun import Rendezvous
from flows.run.errors import RanksFailedError

_SECONDS_TO_ANSWER = 0.2
# For an actor that has stopped its ranks to say so.
_SECONDS_OF_GRACE = 10.0


class NodeGroup:
    """Nodes of the connected cluster that are reserved together, as soon as they are free, until `stop`."""

    def __init__(self, bundle: dict[str, float], num_nodes: int) -> None:
        """Ask for `num_nodes` nodes with the resources of `bundle` each."""
        self._bundle, self._num_nodes = bundle, num_nodes
        self._group = placement_group([bundle] * num_nodes, strategy="STRICT_SPREAD")
        self._nodes: list[Node] = []
        self._hosts: list[Any] = []
        # References to what the actors were asked.
        self._asked: list[Any] = []
        self._is_starting = False

    def is_reserved(self) -> bool:
        """Return whether the nodes are reserved."""
        return bool(placement_group_table(self._group)["state"] == "CREATED")

    def shortage(self) -> str | None:
        """Return which nodes the cluster has, in words, if those with the resources are too few, busy or not."""
        found = [node.resources for node in list_nodes()]
        fitting = [each for each in found if has(each, self._bundle)]
        return None if len(fitting) >= self._num_nodes else describe_all(found, self._bundle)

    def start(
        self,
        job_path: Path,
        rendezvous: Rendezvous,
        interface: str | None,
        logs: list[Path],
        variables: dict[str, str],
    ) -> None:
        """Start ranks on the reserved nodes, with a rendezvous on the first, and return at once.

        logs: where each node's output goes. variables: of the environment of ranks. Raises ValueError if a node does
        not see the run folder, or has another version of Reprise.
        """
        placed = placement_group_table(self._group)["bundles_to_node_id"]
        known = {node.id: node for node in list_nodes()}
        if not {*placed.values()} <= known.keys():
            raise RanksFailedError("a node of the Ray cluster is lost before it has started ranks")
        self._nodes = [known[placed[number]] for number in range(self._num_nodes)]
        check_nodes(self._nodes, job_path.parent.parent, "launch")
        actor = ray.remote(**as_arguments(self._bundle))(Host)
        for number in range(self._num_nodes):
            place = PlacementGroupSchedulingStrategy(self._group, placement_group_bundle_index=number)
            self._hosts.append(actor.options(scheduling_strategy=place).remote(Path.cwd(), variables))
        first = replace(rendezvous, endpoint="127.0.0.1" if self._num_nodes == 1 else self._nodes[0].address)
        port = self._hosts[0].free_port.remote()
        self._is_starting = True
        self._asked = [
            host.start.remote(job_path, first, port, number == 0, interface, log)
            for number, (host, log) in enumerate(zip(self._hosts, logs, strict=True))
        ]

    def poll(self) -> int | None:
        """Return None while a node's ranks run, then 0 if all have succeeded, else another exit code.

        Raises RanksFailedError if a node is lost.
        """
        if not self._asked:
            self._asked = [host.poll.remote() for host in self._hosts]
        answered, pending = ray.wait(self._asked, num_returns=len(self._asked), timeout=_SECONDS_TO_ANSWER)
        codes = [self._answer(each) for each in answered]
        if pending:
            # Ray may wait for another node to start an actor that has not started yet.
            self._check_presence()
        else:
            self._asked, self._is_starting = [], False
        failed = [code for code in codes if code]
        if failed:
            return failed[0]
        return None if pending or None in codes else 0

    def stop(self, seconds: float) -> None:
        """Make ranks save and end, which may take so many seconds, and give the nodes back."""
        try:
            stopping = [host.stop.remote(seconds) for host in self._hosts]
            if stopping:
                ray.wait(stopping, num_returns=len(stopping), timeout=seconds + _SECONDS_OF_GRACE)
        finally:
            for host in self._hosts:
                ray.kill(host)
            remove_placement_group(self._group)

    def _check_presence(self) -> None:
        alive = {node.id for node in list_nodes()}
        for node in self._nodes:
            if node.id not in alive:
                raise RanksFailedError(f"node {node.address} of the Ray cluster is lost")

    def _answer(self, reference: Any) -> int | None:
        node = self._nodes[self._asked.index(reference)]
        try:
            code: int | None = ray.get(reference)
        except ActorUnavailableError as error:
            if self._is_starting:
                # Nobody knows whether it has started its ranks.
                raise RanksFailedError(
                    f"node {node.address} of the Ray cluster does not answer: {one_line(error)}"
                ) from None
            # The connection may come back; if not, Ray says that the actor has died.
            return None
        except RayActorError as error:
            raise RanksFailedError(f"node {node.address} of the Ray cluster is lost: {one_line(error)}") from None
        except RayTaskError as error:
            if isinstance(error.cause, OSError | ValueError):
                raise ValueError(f"node {node.address} of the Ray cluster: {error.cause}") from None
            raise
        return code
