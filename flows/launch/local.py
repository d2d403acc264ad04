"""Ranks under torchrun, on this host and on the hosts that join it with `reprise join`."""

import shlex
import subprocess
import uuid
from collections.abc import Sequence
from pathlib import Path

from flows.launch import torchrun
from flows.launch.hosts import Leader
from flows.launch.launcher import Launcher
from flows.launch.torchrun import Rendezvous, local_address
from flows.run.config import LaunchConfig, RunConfig
from flows.run.errors import RanksFailedError
from flows.run.locks import wait_for_ranks_to_end
from trainer.devices import check_count, resolve
from trainer.job import Job
from trainer.job_queue import clear_queues


class LocalLauncher(Launcher):
    """Starts ranks under torchrun on this host, and on the hosts that join it."""

    def __init__(self, job: Job, name: str, run_folder: Path, config: LaunchConfig) -> None:
        super().__init__(job, name, run_folder, config)
        self._rendezvous = Rendezvous(
            id=uuid.uuid4().hex[:12],
            endpoint=config.rendezvous if config.nodes > 1 and config.rendezvous else "127.0.0.1:0",
            num_nodes=config.nodes,
            processes_per_node=job.parallel.world_size // config.nodes,
            join_seconds=round(60 * config.join_minutes),
            seconds_to_stop=job.seconds_to_stop,
        )
        self._leader: Leader | None = None
        self._process: subprocess.Popen[bytes] | None = None

    @classmethod
    def check(cls, config: RunConfig) -> None:
        """Raise ValueError if this host lacks devices for its ranks, or launch.rendezvous is not on this host."""
        super().check(config)
        launch = config.launch
        check_count(resolve(config.device), config.parallel.world_size // launch.nodes)
        if launch.nodes > 1 and launch.rendezvous is not None:
            local_address(launch.rendezvous, is_head=True)

    def plan(self, command: Sequence[str]) -> str:
        """Return torchrun's command, and the command for the other hosts."""
        here = shlex.join(torchrun.command(self.job_path, self._rendezvous, is_head=True, address="ADDRESS"))
        others = self.config.nodes - 1
        join = shlex.join(["reprise", "join", str(self.run_folder)])
        return here if not others else f"{here}\n# and on {others} more hosts:\n{join}"

    def start(self) -> None:
        """Start this host's ranks when those of an earlier launch have ended, and announce the job to other hosts."""
        wait_for_ranks_to_end(self.job.lock, 60 + self.job.seconds_to_stop)
        # Those of a killed launcher left them.
        clear_queues(self.job_path.parent)
        self.write_job()
        if self.config.nodes > 1:
            self._leader = Leader(self.run_folder, self.job_path, self._rendezvous)
        with self.log_path.open("ab") as log:
            self._process = torchrun.start(
                self.job_path, self._rendezvous, is_head=True, interface=self.config.interface, log=log
            )

    def poll(self) -> int | None:
        """Return torchrun's exit code. Raises RanksFailedError if a joined host no longer sends heartbeats."""
        lost = self._leader.lost_host() if self._leader is not None else None
        if lost is not None:
            raise RanksFailedError(f"host {lost} is lost: no heartbeat; run `reprise join` there again")
        return None if self._process is None else self._process.poll()

    def stop(self) -> None:
        """Make torchrun stop its ranks, and withdraw the announcement."""
        try:
            if self._process is not None:
                torchrun.stop(self._process, self.job.seconds_to_stop)
        finally:
            if self._leader is not None:
                self._leader.end()

    def describe(self) -> str:
        """Return what the launcher is waiting for."""
        return "starting ranks" if self._leader is None else "starting ranks, and waiting for the other hosts to join"
