"""A launcher that is no part of the package: a process a rank, on this host, without torchrun."""

import os
import socket
import subprocess
import sys
from collections.abc import Sequence

from flows.launch.launcher import Launcher


class PlainLauncher(Launcher):
    """Starts each rank as a process of its own."""

    tools = ("sh",)
    ranks: tuple[subprocess.Popen[bytes], ...] = ()

    def plan(self, command: Sequence[str]) -> str:
        return "\n".join(" ".join(self._command()) for _ in range(self.job.parallel.world_size))

    def start(self) -> None:
        self.write_job()
        with socket.create_server(("127.0.0.1", 0)) as probe:
            port = probe.getsockname()[1]
        size = self.job.parallel.world_size
        common = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "GLOO_SOCKET_IFNAME": "lo"}
        with self.log_path.open("ab") as log:
            for rank in range(size):
                own = {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(size), "OMP_NUM_THREADS": "1"}
                environment = {**os.environ, **common, **own}
                process = subprocess.Popen(self._command(), env=environment, stdout=log, stderr=log)
                self.ranks = (*self.ranks, process)

    def poll(self) -> int | None:
        codes = [rank.poll() for rank in self.ranks]
        failed = [code for code in codes if code]
        if failed:
            return failed[0]
        return None if None in codes else 0

    def stop(self) -> None:
        for rank in self.ranks:
            rank.terminate()
        for rank in self.ranks:
            rank.wait(self.job.seconds_to_stop)

    def describe(self) -> str:
        return f"{len(self.ranks)} plain processes"

    def _command(self) -> list[str]:
        return [sys.executable, "-W", "ignore", "-m", "trainer.worker", str(self.job_path)]
