"""The connection of this process to a Ray cluster, which engines and launchers share.

A driver ends with the node or the head that it is connected to, so the connection lasts no longer than it is used.
Ray is imported at the first connection.
"""

import json
import logging
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from typing import Any

# With the import of Ray, from a slow disk; a cluster that answers does so at once.
_SECONDS_TO_ANSWER = 20
_ENVIRONMENT = {
    "RAY_USAGE_STATS_ENABLED": "0",
    # How often a task is started again after memory has run out; otherwise, without end.
    "RAY_task_oom_retries": "5",
}

_lock = threading.Lock()
_num_users = 0
_address: str | None = None
_is_ours = False


def check_installed(field: str) -> None:
    """Raise ValueError, for the configuration's `field`, such as engine.kind, if Ray is not installed."""
    if find_spec("ray") is None:
        raise ValueError(f"{field}: ray is not installed; install it with `pip install 'reprise-lm[ray]'`")


def set_environment() -> None:
    """Set what Ray reads as it is imported, unless the user has set it."""
    for name, value in _ENVIRONMENT.items():
        os.environ.setdefault(name, value)


@contextmanager
def connected(address: str, field: str) -> Iterator[None]:
    """Connect this process to a Ray cluster; see `connect`."""
    connect(address, field)
    try:
        yield
    finally:
        disconnect()


def connect(address: str, field: str) -> None:
    """Connect this process to the Ray cluster at `address`, unless it is connected; `disconnect` has to follow.

    address: auto, the cluster that RAY_ADDRESS names or that runs on this host; HOST:PORT; or local, which starts a
    cluster on this host that nothing outside reaches, and that ends with the connection. field: of the
    configuration, such as engine, whose `address` an error names. Threads may share the connection.

    Raises ValueError, within half a minute, if Ray is not installed, if no cluster answers there, if its versions of
    Ray and Python are others, or if this process is connected to another cluster.
    """
    global _num_users, _address, _is_ours  # noqa: PLW0603 - a process has one connection
    check_installed(f"{field}.kind")
    named = os.environ.get("RAY_ADDRESS", "") if address == "auto" else address
    if named.startswith("ray://"):
        raise ValueError(
            f"{field}.address: {named} is of Ray's client; start the run on a node of the cluster, and give auto or "
            "the HOST:PORT of its head"
        )
    with _lock:
        if _num_users == 0:
            set_environment()
            # Who uses Ray besides, in a notebook, has connected, and stays connected.
            _is_ours = "ray" not in sys.modules or not sys.modules["ray"].is_initialized()
            if _is_ours:
                if address != "local":
                    _check_answer(address, field)
                try:
                    _initialize(address)
                except (ConnectionError, RuntimeError) as error:
                    reason = " ".join(str(error).split())
                    raise ValueError(
                        f"{field}.address: {address}: Ray does not connect ({reason}); see its logs in /tmp/ray"
                    ) from None
            _address = address
        elif address != _address:
            raise ValueError(f"{field}.address: {address}, but this process is connected to {_address}; set the same")
        _num_users += 1


def disconnect() -> None:
    """End a use of the connection, and with the last one the connection."""
    global _num_users  # noqa: PLW0603 - a process has one connection
    with _lock:
        _num_users -= 1
        if _num_users == 0 and _is_ours:
            import ray

            ray.shutdown()


def _check_answer(address: str, field: str) -> None:
    """Raise ValueError if this process cannot connect; tried in a process of its own, as Ray may never return."""
    here = f"{field}.address: {address}"
    # How long Ray looks for the head, and for the node on this host.
    limits = {
        "RAY_gcs_server_port_wait_time_s": "1",
        "RAY_py_gcs_connect_timeout_s": "2",
        "RAY_gcs_rpc_server_connect_timeout_s": "2",
        "RAY_gcs_server_request_timeout_seconds": "5",
    }
    command = [sys.executable, "-m", "flows.cluster.connection", address]
    try:
        tried = subprocess.run(
            command, check=False, capture_output=True, text=True, timeout=_SECONDS_TO_ANSWER,
            env={**os.environ, **limits},
        )  # fmt: skip
    except subprocess.TimeoutExpired:
        tried = None
    answer = "" if tried is None else tried.stdout.strip().rpartition("\n")[2]
    if answer == "connected":
        return
    if not answer:
        raise ValueError(
            f"{here}: no Ray cluster answers; start one with `ray start --head`, correct the address, or set local"
        )
    error, cause = json.loads(answer)
    if "AuthenticationError" in cause:
        raise ValueError(
            f"{here}: the cluster asks for a token; set RAY_AUTH_MODE=token, and RAY_AUTH_TOKEN_PATH to the file that "
            "has it, unless that is ~/.ray/auth_token"
        )
    if "Version mismatch" in error:
        raise ValueError(f"{here}: {error}; install the same versions here and there")
    if "No node info found" in error:
        raise ValueError(f"{here}: no node of the cluster is on this host; start the run on a node, or `ray start` one")
    raise ValueError(f"{here}: no Ray cluster answers ({error}); start one with `ray start --head`, or set local")


def _initialize(address: str) -> None:
    """Connect to Ray, quietly. Raises ConnectionError, RuntimeError or ValueError if that is not possible."""
    is_main = threading.current_thread() is threading.main_thread()
    handler = signal.getsignal(signal.SIGTERM)
    import ray
    from ray._private import ray_constants, worker

    options: dict[str, Any] = {"include_dashboard": False} if address == "local" else {}
    replaced = [
        # Ray takes 127.0.0.1 for this host's address in its network; a cluster that it starts would listen there.
        (ray_constants, "ENABLE_RAY_CLUSTER", False),
        # What this thread prints on the terminal, such as the loss of a node, is in Ray's logs, too.
        (worker, "listen_error_messages", lambda *arguments: None),
    ]
    kept = [getattr(module, name) for module, name, _ in replaced]
    try:
        for module, name, value in replaced:
            setattr(module, name, value)
        ray.init(address, log_to_driver=False, logging_level=logging.CRITICAL, **options)
    finally:
        for (module, name, _), value in zip(replaced, kept, strict=True):
            setattr(module, name, value)
        if is_main:
            # Ray has its own, which keeps this process's from being called.
            signal.signal(signal.SIGTERM, handler)


def _try() -> None:
    """Print, as JSON, why this process cannot connect to the cluster that the command line names, or that it can."""
    try:
        _initialize(sys.argv[1])
    except (ConnectionError, RuntimeError, ValueError) as error:
        print(json.dumps([" ".join(str(error).split()), str(error.__cause__)]))
        # Threads of Ray may still wait for the cluster.
        sys.stdout.flush()
        os._exit(1)
    print("connected")


if __name__ == "__main__":
    _try()
