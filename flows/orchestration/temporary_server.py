"""A temporary Prefect server in a thread, for runs without a server. It ends with its process, however that ends.

The temporary server that Prefect itself starts is a separate process, which outlives a killed flow.
"""

import os
import socket
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

import httpx
import uvicorn
from prefect.server.api.server import create_app
from prefect.settings import PREFECT_API_URL, get_current_settings, temporary_settings

_STARTUP_SECONDS = 60.0
_is_private = False


def is_private() -> bool:
    """Return whether this process uses its own temporary server."""
    return _is_private


@contextmanager
def server() -> Iterator[None]:
    """Provide a server for flows: the configured one, else a temporary one on the loopback interface."""
    global _is_private  # noqa: PLW0603 - there is one server per process
    url = get_current_settings().api.url
    if url is not None:
        if answers(url):
            yield
            return
        if "PREFECT_API_URL" in os.environ:
            print(f"no Prefect server answers at {url}; this run will not be visible there", file=sys.stderr)
    listener = socket.create_server(("127.0.0.1", 0))
    app = create_app(ephemeral=True, final=True)
    served = uvicorn.Server(uvicorn.Config(app, log_level="critical", lifespan="on"))
    thread = threading.Thread(target=served.run, kwargs={"sockets": [listener]}, daemon=True)
    thread.start()
    deadline = time.monotonic() + _STARTUP_SECONDS
    while not served.started:
        if not thread.is_alive() or time.monotonic() > deadline:
            raise ValueError(
                "Prefect's server did not start; check the disk and the database of PREFECT_HOME, "
                "or start a server with `prefect server start` and set PREFECT_API_URL"
            )
        time.sleep(0.05)
    _is_private = True
    try:
        with temporary_settings({PREFECT_API_URL: f"http://127.0.0.1:{listener.getsockname()[1]}/api"}):
            yield
    finally:
        _is_private = False
        served.should_exit = True
        thread.join(timeout=10)


def answers(url: str) -> bool:
    """Return whether a server answers at the API address `url`."""
    try:
        return httpx.get(f"{url}/health", timeout=10).is_success
    except httpx.HTTPError:
        return False
