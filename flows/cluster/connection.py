"""The connection of this process to a Ray cluster (stand-in)."""

import threading

_LOCK = threading.Lock()


def connect(address: str) -> None:
    """Connect to the cluster, unless this process is connected."""
    import ray

    with _LOCK:
        if not ray.is_initialized():
            ray.init(address=address, log_to_driver=False, logging_level="error")
