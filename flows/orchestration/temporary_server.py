"""A temporary Prefect server in a thread, for runs without a server. It ends with its process, however that ends.

The temporary server that Prefect itself starts is a separate process, which outlives a killed flow, and answers to
every user of the machine and every web page. This one is guarded, and has a password that only its process knows.
"""

import contextvars
import os
import secrets
import socket
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

import httpx
import uvicorn
from prefect.server.api.server import create_app
from prefect.settings import (
    PREFECT_API_AUTH_STRING,
    PREFECT_API_URL,
    PREFECT_SERVER_ANALYTICS_ENABLED,
    PREFECT_SERVER_API_AUTH_STRING,
    PREFECT_SERVER_CSRF_PROTECTION_ENABLED,
    get_current_settings,
    temporary_settings,
)

from flows.orchestration.guard import Guard, own_names

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
            print(
                f"no Prefect server answers at {url} (or PREFECT_API_AUTH_STRING is not its password); "
                "this run will not be visible there",
                file=sys.stderr,
            )
    listener = socket.create_server(("127.0.0.1", 0))
    password = f"reprise:{secrets.token_urlsafe()}"
    private = {
        PREFECT_API_URL: f"http://127.0.0.1:{listener.getsockname()[1]}/api",
        PREFECT_API_AUTH_STRING: password,
        PREFECT_SERVER_API_AUTH_STRING: password,
        PREFECT_SERVER_CSRF_PROTECTION_ENABLED: False,
        PREFECT_SERVER_ANALYTICS_ENABLED: False,
    }
    with temporary_settings(private):
        app = Guard(create_app(ephemeral=True, final=True), own_names("127.0.0.1"))
        served = uvicorn.Server(uvicorn.Config(app, log_level="critical", lifespan="on"))
        # The copied context holds the settings, by which WebSockets are checked.
        thread = threading.Thread(
            target=contextvars.copy_context().run, args=(served.run,), kwargs={"sockets": [listener]}, daemon=True
        )
        _start(served, thread)
        _is_private = True
        try:
            yield
        finally:
            _is_private = False
            served.should_exit = True
            thread.join(timeout=10)


def _start(served: uvicorn.Server, thread: threading.Thread) -> None:
    thread.start()
    deadline = time.monotonic() + _STARTUP_SECONDS
    while not served.started:
        if not thread.is_alive() or time.monotonic() > deadline:
            raise ValueError(
                "Prefect's server did not start; check the disk and the database of PREFECT_HOME, "
                "or start a server with `prefect server start` and set PREFECT_API_URL"
            )
        time.sleep(0.05)


def answers(url: str) -> bool:
    """Return whether a server answers at the API address `url`, and accepts the password of the settings."""
    password = get_current_settings().api.auth_string
    user, _, rest = (password.get_secret_value() if password else "").partition(":")
    try:
        # Unlike `health`, this address needs the password.
        return httpx.get(f"{url}/version", auth=(user, rest) if password else None, timeout=10).is_success
    except httpx.HTTPError:
        return False
