"""Ranks on a Ray cluster: a placement group with a bundle for each node, and in each an actor that runs torchrun.

The actors end with the launching process, and their ranks save and end with them; the same command resumes.
"""

import time
import uuid
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from flows.cluster.connection import connect, connected, disconnect
from flows.launch.kuberay import ray_job
from flows.launch.launcher import Launcher
from flows.launch.ray_resources import bundle_of, describe
from flows.launch.torchrun import Rendezvous, exported_environment
from flows.run.config import LaunchConfig, RunConfig
from flows.run.locks import wait_for_ranks_to_end
from trainer.job import Job
from trainer.job_queue import clear_queues

if TYPE_CHECKING:
    from flows.launch.ray_nodes import NodeGroup

_SECONDS_BETWEEN_POLLS = 0.5


class RayLauncher(Launcher):
    """Starts ranks on nodes of a Ray cluster, and waits for room there."""

    def __init__(self, job: Job, name: str, run_folder: Path, config: LaunchConfig) -> None:
        super().__init__(job, name, run_folder, config)
        self._bundle = bundle_of(config, job.device, job.parallel.world_size)
        self._nodes: NodeGroup | None = None
        self._is_connected = self._is_started = False
        self._code: int | None = None
        self._last_poll = self._last_fit = 0.0

    @classmethod
    def check(cls, config: RunConfig) -> None:
        """Raise ValueError if the cluster does not answer, or if a node would have fewer devices than ranks."""
        super().check(config)
        bundle_of(config.launch, config.device, config.parallel.world_size)
        with connected(config.launch.address or "auto", "launch"):
            pass

    def plan(self, command: Sequence[str]) -> str:
        """Return a RayJob, for KubeRay, whose driver is `command`. Raises ValueError if that has another cluster."""
        if self.config.address not in (None, "auto"):
            raise ValueError(
                f"launch.address: {self.config.address}, but a dry run prints a RayJob, whose driver is on the job's "
                "own cluster; set auto, and engine.address, too"
            )
        return ray_job(command, self.run_folder.absolute(), self.config.nodes, self._bundle)

    def start(self) -> None:
        """Ask for nodes, when ranks of an earlier launch have ended. Raises ValueError if no cluster answers."""
        connect(self.config.address or "auto", "launch")
        self._is_connected = True
        from flows.launch.ray_nodes import NodeGroup

        wait_for_ranks_to_end(self.job.lock, 60 + self.job.seconds_to_stop)
        # Those of a killed launcher left them.
        clear_queues(self.job_path.parent)
        self.write_job()
        self._nodes, self._last_fit = NodeGroup(self._bundle, self.config.nodes), time.monotonic()

    def poll(self) -> int | None:
        """Return None while ranks run or wait for room, then torchrun's exit code: 0 if it is that of all nodes.

        Raises RanksFailedError if a node is lost, ValueError if the cluster has not had such nodes for
        launch.join_minutes, or if a node cannot start the ranks.
        """
        now = time.monotonic()
        if self._nodes is not None and self._code is None and now - self._last_poll > _SECONDS_BETWEEN_POLLS:
            self._last_poll = now
            if self._is_started:
                self._code = self._nodes.poll()
            elif self._nodes.is_reserved():
                self._start_ranks(self._nodes)
            else:
                self._check_room(self._nodes, now)
        return self._code

    def stop(self) -> None:
        """Make ranks save and end, and give the nodes back."""
        if not self._is_connected:
            return
        nodes, self._nodes = self._nodes, None
        try:
            if nodes is not None:
                nodes.stop(self.job.seconds_to_stop)
        finally:
            self._is_connected = False
            disconnect()

    def describe(self) -> str:
        """Return what the launcher is waiting for."""
        nodes = describe(self.config.nodes, self._bundle)
        return f"starting ranks on {nodes}" if self._is_started else f"waiting for room on the Ray cluster: {nodes}"

    def _start_ranks(self, nodes: "NodeGroup") -> None:
        # The group fills in the endpoint.
        rendezvous = Rendezvous(
            id=uuid.uuid4().hex[:12],
            endpoint="",
            num_nodes=self.config.nodes,
            processes_per_node=self.job.parallel.world_size // self.config.nodes,
            join_seconds=round(60 * self.config.join_minutes),
            seconds_to_stop=self.job.seconds_to_stop,
        )
        stem = self.log_path.stem
        others = [self.log_path.with_name(f"{stem}.node-{number}.log") for number in range(1, self.config.nodes)]
        variables = exported_environment(self.config.interface, self.job.seconds_to_stop)
        nodes.start(self.job_path, rendezvous, self.config.interface, [self.log_path, *others], variables)
        self._is_started = True

    def _check_room(self, nodes: "NodeGroup", now: float) -> None:
        """Raise ValueError if the cluster has not had such nodes for too long; those that others hold count."""
        found, wanted = nodes.shortage(), describe(self.config.nodes, self._bundle)
        if found is None:
            self._last_fit = now
        elif self.config.address == "local":
            # No node joins a cluster that nothing outside reaches.
            raise ValueError(
                f"launch.resources: {wanted} is more than this host's {found}; lower launch.nodes, or set "
                "launch.resources, such as {CPU: 1}"
            )
        elif now - self._last_fit > 60 * self.config.join_minutes:
            raise ValueError(
                f"launch.resources: the Ray cluster has not had {wanted} for launch.join_minutes "
                f"{self.config.join_minutes:g}; it has {found}; lower launch.nodes or launch.resources, or add nodes"
            )
