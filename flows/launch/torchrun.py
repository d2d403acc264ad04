"""One host's ranks under torchrun: how they are started, over which network they meet, and how they are stopped."""

import logging
import math
import os
import socket
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import psutil

_LOG = logging.getLogger(__name__)


@dataclass(frozen=True)
class Rendezvous:
    """Where and how the hosts of one attempt at a job meet; `id` tells it from every other attempt.

    seconds_to_stop: what ranks get to save and end once they are told to stop.
    """

    id: str
    endpoint: str
    num_nodes: int
    processes_per_node: int
    join_seconds: int
    seconds_to_stop: float


def command(job_path: Path, rendezvous: Rendezvous, is_head: bool, address: str) -> list[str]:
    """Return the command that starts this host's ranks; `address` is the one that other hosts reach it at."""
    return [
        *(sys.executable, "-W", "ignore", "-m", "trainer.agent"),
        *("--nnodes", str(rendezvous.num_nodes), "--nproc-per-node", str(rendezvous.processes_per_node)),
        *("--rdzv-backend", "c10d", "--rdzv-endpoint", rendezvous.endpoint, "--rdzv-id", rendezvous.id),
        *("--rdzv-conf", f"is_host={int(is_head)},join_timeout={rendezvous.join_seconds}"),
        # What ranks say comes to the log with their number before it, and to a file of each one's own.
        *("--tee", "3", "--log-dir", str(job_path.with_name("ranks"))),
        *("--local-addr", address, "-m", "trainer.worker", str(job_path)),
    ]


def start(
    job_path: Path, rendezvous: Rendezvous, is_head: bool, interface: str | None, log: BinaryIO
) -> subprocess.Popen[bytes]:
    """Start this host's ranks, which end with this process, and return torchrun; all they say goes to `log`."""
    address, found = ("127.0.0.1", "lo") if rendezvous.num_nodes == 1 else local_address(rendezvous.endpoint, is_head)
    return subprocess.Popen(
        command(job_path, rendezvous, is_head, address),
        stdout=log,
        stderr=subprocess.STDOUT,
        stdin=subprocess.DEVNULL,
        env={
            **rank_environment(interface or found, rendezvous.seconds_to_stop),
            "REPRISE_LAUNCHER": str(os.getpid()),
        },
        start_new_session=True,
    )


def rank_environment(interface: str | None, seconds_to_stop: float) -> dict[str, str]:
    """Return the environment of ranks that talk over `interface`; what the user has set wins.

    seconds_to_stop: what torchrun gives them to end once it is told to stop.
    """
    environment = dict(os.environ)
    if interface is not None and sys.platform == "linux":
        environment.setdefault("GLOO_SOCKET_IFNAME", interface)
        if interface != "lo":
            environment.setdefault("NCCL_SOCKET_IFNAME", interface)
    environment.setdefault("OMP_NUM_THREADS", "1")
    environment.setdefault("PYTHONWARNINGS", "ignore")
    environment.setdefault("TORCH_ELASTIC_SHUTDOWN_TIMEOUT", str(math.ceil(seconds_to_stop)))
    # Whoever reads the log sees which rank speaks.
    environment.setdefault("TORCHELASTIC_LOG_LINE_PREFIX_TEMPLATE", "[rank ${rank}]: ")
    return environment


def local_address(endpoint: str, is_head: bool) -> tuple[str, str | None]:
    """Return this host's address on the way to `endpoint`, HOST:PORT, and the network interface that has it.

    Raises ValueError where the host's name means nothing, or is another host's on the one that `is_head`.
    """
    host, _, port = endpoint.rpartition(":")
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            probe.connect((host, int(port)))
        except OSError as error:
            raise ValueError(f"launch.rendezvous: {endpoint} cannot be reached ({error}); correct it") from None
        address, target = probe.getsockname()[0], probe.getpeername()[0]
    if is_head and address != target:
        raise ValueError(
            f"launch.rendezvous: {endpoint} is not this host, whose address is {address}; give this host's, "
            "and type `reprise join RUN` on the others"
        )
    interfaces = [
        name for name, entries in psutil.net_if_addrs().items() if any(entry.address == address for entry in entries)
    ]
    return address, interfaces[0] if interfaces else None


def stop(process: subprocess.Popen[bytes], seconds: float) -> None:
    """Tell torchrun and its ranks to save and end; end them after so many seconds if they do not.

    A signal that asks for the same meanwhile is raised when it is done.
    """
    if process.poll() is not None:
        return
    process.terminate()
    interruption: BaseException | None = None
    deadline = time.monotonic() + seconds
    while process.poll() is None and time.monotonic() < deadline:
        try:
            process.wait(max(0.0, deadline - time.monotonic()))
        except subprocess.TimeoutExpired:
            break
        except BaseException as error:  # noqa: BLE001 - raised below
            interruption = error
    if process.poll() is None:
        _LOG.warning("ranks did not save and end in %.0f s; what came after their last checkpoint is lost", seconds)
        process.kill()
        process.wait()
    if interruption is not None:
        raise interruption
