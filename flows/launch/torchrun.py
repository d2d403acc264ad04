"""One host's ranks under torchrun: starting them, choosing the network, and stopping them."""

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

# Settings of the allocators of CUDA and of Ascend, which torch's PYTORCH_ALLOC_CONF replaces.
_ALLOCATORS = ("PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_NPU_ALLOC_CONF")

# Beginnings of the names of variables that a job is given; others are what they are on its nodes.
_EXPORTED = (
    *("GLOO_", "NCCL_", "OMP_", "CUDA_DEVICE_MAX_", "PYTORCH_"),
    *("TORCHELASTIC_", "TORCH_ELASTIC_", "PYTHONWARNINGS"),
)

_LOG = logging.getLogger(__name__)


@dataclass(frozen=True)
class Rendezvous:
    """The rendezvous of the hosts of one attempt at a job; `id` is unique to the attempt.

    seconds_to_stop: the time that ranks have to save and end after a stop request.
    """

    id: str
    endpoint: str
    num_nodes: int
    processes_per_node: int
    join_seconds: int
    seconds_to_stop: float


def command(job_path: Path, rendezvous: Rendezvous, is_head: bool, address: str) -> list[str]:
    """Return the command that starts this host's ranks; `address` is where other hosts reach it."""
    return [
        *(sys.executable, "-W", "ignore", "-m", "trainer.agent"),
        *("--nnodes", str(rendezvous.num_nodes), "--nproc-per-node", str(rendezvous.processes_per_node)),
        *("--rdzv-backend", "c10d", "--rdzv-endpoint", rendezvous.endpoint, "--rdzv-id", rendezvous.id),
        *("--rdzv-conf", f"is_host={int(is_head)},join_timeout={rendezvous.join_seconds}"),
        # The ranks' output goes to the log, prefixed with the rank, and to one file per rank.
        *("--tee", "3", "--log-dir", str(job_path.with_name("ranks"))),
        *("--local-addr", address, "-m", "trainer.worker", str(job_path)),
    ]


def start(
    job_path: Path, rendezvous: Rendezvous, is_head: bool, interface: str | None, log: BinaryIO
) -> subprocess.Popen[bytes]:
    """Return torchrun's process, after starting this host's ranks. They end with this process; output goes to `log`."""
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
    """Return the environment of ranks that communicate over `interface`; variables set by the user take precedence.

    seconds_to_stop: the time that torchrun gives ranks to end after a stop request.
    """
    environment = dict(os.environ)
    if interface is not None and sys.platform == "linux":
        environment.setdefault("GLOO_SOCKET_IFNAME", interface)
        if interface != "lo":
            environment.setdefault("NCCL_SOCKET_IFNAME", interface)
    # Each rank then sets the number of its threads (`trainer.devices.initialise`); without this, torchrun warns.
    environment.setdefault("OMP_NUM_THREADS", "1")
    # Has the device start kernels in the order of their launch: before Blackwell, Megatron's collectives of tensor and
    # sequence parallelism would otherwise wait for the matrix product that they are to overlap.
    environment.setdefault("CUDA_DEVICE_MAX_CONNECTIONS", "1")
    for variable in _ALLOCATORS:
        # Segments that grow leave fewer holes between tensors whose sizes change, as in validation and evaluation.
        if "PYTORCH_ALLOC_CONF" not in environment:
            environment.setdefault(variable, "expandable_segments:True")
    environment.setdefault("PYTHONWARNINGS", "ignore")
    environment.setdefault("TORCH_ELASTIC_SHUTDOWN_TIMEOUT", str(math.ceil(seconds_to_stop)))
    # Shows in the log which rank wrote a line.
    environment.setdefault("TORCHELASTIC_LOG_LINE_PREFIX_TEMPLATE", "[rank ${rank}]: ")
    return environment


def exported_environment(interface: str | None, seconds_to_stop: float) -> dict[str, str]:
    """Return the variables of `rank_environment` that the ranks of other hosts are given."""
    environment = rank_environment(interface, seconds_to_stop)
    return {key: value for key, value in environment.items() if key.startswith(_EXPORTED)}


def local_address(endpoint: str, is_head: bool) -> tuple[str, str | None]:
    """Return this host's address on the route to `endpoint`, HOST:PORT, and its network interface.

    Raises ValueError if the host's name cannot be resolved, or if `is_head` and the endpoint is on another host.
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
            "and run `reprise join RUN` on the others"
        )
    interfaces = [
        name for name, entries in psutil.net_if_addrs().items() if any(entry.address == address for entry in entries)
    ]
    return address, interfaces[0] if interfaces else None


def stop(process: subprocess.Popen[bytes], seconds: float) -> None:
    """Make torchrun and its ranks save and end; kill them after `seconds`.

    An exception from a signal in the meantime, such as KeyboardInterrupt, is raised at the end.
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
        _LOG.warning("ranks did not save and end within %.0f s; the work since their last checkpoint is lost", seconds)
        process.kill()
        process.wait()
    if interruption is not None:
        raise interruption
