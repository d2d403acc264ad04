"""Ranks on a Ray cluster: a placement group with a bundle for each node, and in each an actor that runs torchrun.

The actors end with the launching process, and their ranks save and end with them; the same command resumes.
"""

import time
import uuid
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from flows.cluster.connection import connect, connected, disconnect
from flows.launch.kuberay import ray_job
from flows.launch.launcher import Launcher
from flows.launch.ray_host import Host
from flows.launch.torchrun import Rendezvous, exported_environment
from flows.run.config import LaunchConfig, RunConfig
from flows.run.errors import RanksFailedError
from flows.run.locks import wait_for_ranks_to_end
from trainer.job import Job
from trainer.job_queue import clear_queues

_SECONDS_BETWEEN_POLLS = 0.5
_SECONDS_TO_ANSWER = 0.2
# For an actor that has stopped its ranks to say so.
_SECONDS_OF_GRACE = 10.0
# Ray's name for a device of each kind.
_DEVICES = {"cuda": "GPU", "npu": "NPU"}
# Resources that are arguments of their own of Ray's actors.
_ARGUMENTS = {"CPU": "num_cpus", "GPU": "num_gpus", "memory": "memory"}


def bundle_of(launch: LaunchConfig, device: str, num_ranks: int) -> dict[str, float]:
    """Return the resources of a node, which starts its part of `num_ranks` ranks on devices of a kind.

    Raises ValueError if it has fewer devices than ranks, or parts of what only comes as a whole.
    """
    here = num_ranks // launch.nodes
    bundle: dict[str, float] = {"CPU": here, **launch.resources}
    for name, value in bundle.items():
        if value > 1 and value % 1:
            raise ValueError(f"launch.resources: {name} {value:g} is more than 1 and no whole number; round it")
    name = _DEVICES.get(device)
    if name is not None and bundle.setdefault(name, here) < here:
        raise ValueError(
            f"launch.resources: {name} {bundle[name]:g} is less than the {here} ranks of a node; raise it, or "
            "launch.nodes"
        )
    return bundle


class RayLauncher(Launcher):
    """Starts ranks on nodes of a Ray cluster, and waits for room there."""

    def __init__(self, job: Job, name: str, run_folder: Path, config: LaunchConfig) -> None:
        super().__init__(job, name, run_folder, config)
        self._bundle = bundle_of(config, job.device, job.parallel.world_size)
        self._is_connected = False
        self._group: Any = None
        self._hosts: list[Any] = []
        self._nodes: dict[str, str] = {}
        # References to what the actors were asked.
        self._asked: list[Any] = []
        self._code: int | None = None
        self._last_poll = self._had_room = 0.0

    @classmethod
    def check(cls, config: RunConfig) -> None:
        """Raise ValueError if the cluster does not answer, or if a node would have fewer devices than ranks."""
        super().check(config)
        bundle_of(config.launch, config.device, config.parallel.world_size)
        with connected(config.launch.address or "auto", "launch"):
            pass

    def plan(self, command: Sequence[str]) -> str:
        """Return a RayJob, for KubeRay, whose driver is `command`."""
        return ray_job(command, self.run_folder.absolute(), self.config.nodes, self._bundle)

    def start(self) -> None:
        """Ask for room when ranks of an earlier launch have ended. Raises ValueError if the cluster does not answer."""
        connect(self.config.address or "auto", "launch")
        self._is_connected = True
        from ray.util import placement_group

        wait_for_ranks_to_end(self.job.lock, 60 + self.job.seconds_to_stop)
        # Those of a killed launcher left them.
        clear_queues(self.job_path.parent)
        self.write_job()
        self._had_room = time.monotonic()
        self._group = placement_group([self._bundle] * self.config.nodes, strategy="STRICT_SPREAD")

    def poll(self) -> int | None:
        """Return None while ranks run or wait for room, then torchrun's exit code: 0 if it is that of all nodes.

        Raises RanksFailedError if a node is lost, ValueError if the cluster has not had nodes with such resources for
        launch.join_minutes.
        """
        now = time.monotonic()
        if self._code is None and now - self._last_poll > _SECONDS_BETWEEN_POLLS:
            self._last_poll = now
            if self._hosts:
                self._code = self._ask()
            elif self._is_placed():
                self._start_hosts()
        return self._code

    def stop(self) -> None:
        """Make ranks save and end, and give the nodes back."""
        if not self._is_connected:
            return
        try:
            self._stop_hosts()
        finally:
            self._is_connected = False
            disconnect()

    def describe(self) -> str:
        """Return what the launcher is waiting for."""
        asked = _describe(self.config.nodes, self._bundle)
        return f"starting ranks on {asked}" if self._hosts else f"waiting for room on the Ray cluster: {asked}"

    def _is_placed(self) -> bool:
        import ray
        from ray.util import placement_group_table

        if placement_group_table(self._group)["state"] == "CREATED":
            return True
        found = [node["Resources"] for node in ray.nodes() if node["Alive"]]
        fitting = [each for each in found if all(each.get(name, 0) >= need for name, need in self._bundle.items())]
        if len(fitting) >= self.config.nodes:
            # Others hold the nodes.
            self._had_room = time.monotonic()
        elif time.monotonic() - self._had_room > 60 * self.config.join_minutes:
            raise ValueError(
                f"launch.resources: the Ray cluster has not had {_describe(self.config.nodes, self._bundle)} for "
                f"launch.join_minutes {self.config.join_minutes:g}; it has {_describe_nodes(found, self._bundle)}; "
                "lower launch.nodes or launch.resources, or add nodes"
            )
        return False

    def _start_hosts(self) -> None:
        import ray
        from ray.util import placement_group_table
        from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

        placed = placement_group_table(self._group)["bundles_to_node_id"]
        addresses = {node["NodeID"]: node["NodeManagerAddress"] for node in ray.nodes()}
        self._nodes = {placed[number]: addresses[placed[number]] for number in range(self.config.nodes)}
        variables = exported_environment(self.config.interface, self.job.seconds_to_stop)
        actor = ray.remote(**_as_arguments(self._bundle))(Host)
        for number in range(self.config.nodes):
            place = PlacementGroupSchedulingStrategy(self._group, placement_group_bundle_index=number)
            self._hosts.append(actor.options(scheduling_strategy=place).remote(Path.cwd(), variables))
        rendezvous = self._rendezvous(next(iter(self._nodes.values())))
        port = self._hosts[0].free_port.remote()
        self._asked = [
            host.start.remote(
                self.job_path, rendezvous, port, number == 0, self.config.interface, self._log_of_node(number)
            )
            for number, host in enumerate(self._hosts)
        ]

    def _stop_hosts(self) -> None:
        import ray
        from ray.util import remove_placement_group

        seconds = self.job.seconds_to_stop
        try:
            stopping = [host.stop.remote(seconds) for host in self._hosts]
            if stopping:
                ray.wait(stopping, num_returns=len(stopping), timeout=seconds + _SECONDS_OF_GRACE)
        finally:
            for host in self._hosts:
                ray.kill(host)
            if self._group is not None:
                remove_placement_group(self._group)

    def _rendezvous(self, first: str) -> Rendezvous:
        """Return the rendezvous on the node with the address `first`, without its port."""
        return Rendezvous(
            id=uuid.uuid4().hex[:12],
            endpoint=first if self.config.nodes > 1 else "127.0.0.1",
            num_nodes=self.config.nodes,
            processes_per_node=self.job.parallel.world_size // self.config.nodes,
            join_seconds=round(60 * self.config.join_minutes),
            seconds_to_stop=self.job.seconds_to_stop,
        )

    def _log_of_node(self, number: int) -> Path:
        return self.log_path if number == 0 else self.log_path.with_name(f"{self.log_path.stem}.node-{number}.log")

    def _ask(self) -> int | None:
        """Return the exit code of the nodes, or None while one runs."""
        import ray

        if not self._asked:
            self._asked = [host.poll.remote() for host in self._hosts]
        answered, pending = ray.wait(self._asked, num_returns=len(self._asked), timeout=_SECONDS_TO_ANSWER)
        codes = [self._answer(each) for each in answered]
        if not pending:
            self._asked = []
        elif lost := self._nodes.keys() - {node["NodeID"] for node in ray.nodes() if node["Alive"]}:
            raise RanksFailedError(f"node {self._nodes[lost.pop()]} of the Ray cluster is lost")
        failed = [code for code in codes if code]
        if failed:
            return failed[0]
        return None if pending or None in codes else 0

    def _answer(self, reference: Any) -> int | None:
        import ray
        from ray.exceptions import ActorUnavailableError, RayActorError, RayTaskError

        node = [*self._nodes.values()][self._asked.index(reference)]
        try:
            code: int | None = ray.get(reference)
        except ActorUnavailableError:
            # The connection may come back; if not, Ray says that the actor has died.
            return None
        except RayActorError as error:
            raise RanksFailedError(f"node {node} of the Ray cluster is lost: {_first_line(error)}") from None
        except RayTaskError as error:
            if isinstance(error.cause, OSError | ValueError):
                raise ValueError(f"node {node} of the Ray cluster: {error.cause}") from None
            raise
        return code


def _first_line(error: Exception) -> str:
    return str(error).strip().splitlines()[0]


def _as_arguments(bundle: dict[str, float]) -> dict[str, Any]:
    """Return the arguments of an actor that takes a whole bundle."""
    given: dict[str, Any] = {_ARGUMENTS[name]: value for name, value in bundle.items() if name in _ARGUMENTS}
    return {**given, "resources": {name: value for name, value in bundle.items() if name not in _ARGUMENTS}}


def _describe(nodes: int, bundle: dict[str, float]) -> str:
    """Return nodes in words: 2 nodes with CPU 8, GPU 8."""
    resources = ", ".join(f"{name} {value:g}" for name, value in sorted(bundle.items()))
    return f"{nodes} {'node' if nodes == 1 else 'nodes'} with {resources}"


def _describe_nodes(found: list[dict[str, float]], bundle: dict[str, float]) -> str:
    """Return what nodes have of the resources of `bundle`, and of CPUs and devices, in words."""
    names = {"CPU", *_DEVICES.values(), *bundle}
    kinds = Counter(tuple(sorted((name, each[name]) for name in names & each.keys())) for each in found)
    # A head node often has none, so that only the driver works there.
    del kinds[()]
    return "; ".join(_describe(count, dict(kind)) for kind, count in kinds.most_common()) or "no such nodes"
