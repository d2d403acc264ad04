"""One node of a job on Ray: an actor that runs torchrun, which starts the node's ranks."""

import os
import socket
import subprocess
from dataclasses import replace
from pathlib import Path

from flows.launch import torchrun
from flows.launch.torchrun import Rendezvous


class Host:
    """Starts and stops the ranks of its node. An actor: the ranks end with its process.

    Its methods run one after another, in the thread that starts torchrun: torchrun gets a signal when this thread ends.
    """

    def __init__(self, folder: Path, variables: dict[str, str]) -> None:
        """Work in `folder`, that of the launcher, if this node has it, with the launcher's environment `variables`."""
        os.environ.update(variables)
        if folder.is_dir():
            os.chdir(folder)
        self._process: subprocess.Popen[bytes] | None = None

    def free_port(self) -> int:
        """Return a port of this node that nobody listens on."""
        with socket.create_server(("", 0)) as probe:
            return int(probe.getsockname()[1])

    def start(
        self,
        job_path: Path,
        rendezvous: Rendezvous,
        port: int,
        is_head: bool,
        interface: str | None,
        log_path: Path,
    ) -> None:
        """Start this node's ranks, whose output goes to `log_path`; they meet at `port` of the rendezvous' endpoint.

        Raises OSError if the log cannot be written.
        """
        here = replace(rendezvous, endpoint=f"{rendezvous.endpoint}:{port}")
        with log_path.open("ab") as log:
            self._process = torchrun.start(job_path, here, is_head, interface, log)

    def poll(self) -> int | None:
        """Return torchrun's exit code, or None while it runs."""
        return None if self._process is None else self._process.poll()

    def stop(self, seconds: float) -> None:
        """Make the ranks save and end; kill them after `seconds`."""
        if self._process is not None:
            torchrun.stop(self._process, seconds)
