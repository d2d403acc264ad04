"""The process of a temporary Prefect server: `python -m flows.orchestration.temporary_server_process`.

If a configured server answers, it ends at once. Otherwise it serves until its standard input is closed, which also
happens when the process that holds the other end is killed. Its first line of output tells which: see `Answer`.
SQLite takes one writer at a time: while another such process uses the database in Prefect's home, it uses one of its
own, which it deletes at its end.
"""

import fcntl
import json
import os
import secrets
import socket
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import uvicorn
from prefect.settings import (
    PREFECT_API_AUTH_STRING,
    PREFECT_API_URL,
    PREFECT_SERVER_ANALYTICS_ENABLED,
    PREFECT_SERVER_API_AUTH_STRING,
    PREFECT_SERVER_CSRF_PROTECTION_ENABLED,
    PREFECT_SERVER_DATABASE_CONNECTION_URL,
    get_current_settings,
    temporary_settings,
)

from data_scoring.base.exits import exit_with
from data_scoring.base.temporary_folders import temporary_folder
from flows.orchestration.configured_server import answers
from flows.orchestration.guard import Guard, own_names
from flows.orchestration.temporary_server import Answer

_SECONDS_TO_END = 10.0


def main() -> None:
    """Serve, unless a configured server answers."""
    configured = get_current_settings().api.url
    if configured and answers(configured):
        _tell({"configured": configured, "url": configured, "password": None})
        return
    listener = socket.create_server(("127.0.0.1", 0))
    url = f"http://127.0.0.1:{listener.getsockname()[1]}/api"
    password = f"reprise:{secrets.token_urlsafe()}"
    private = {
        PREFECT_API_URL: url,
        PREFECT_API_AUTH_STRING: password,
        PREFECT_SERVER_API_AUTH_STRING: password,
        PREFECT_SERVER_CSRF_PROTECTION_ENABLED: False,
        PREFECT_SERVER_ANALYTICS_ENABLED: False,
    }
    with _database() as database, temporary_settings({**private, **database}):
        from prefect.server.api.server import create_app

        app = Guard(create_app(ephemeral=True, final=True), own_names("127.0.0.1"))
        config = uvicorn.Config(app, log_level="error", lifespan="on")
        served = _Server(config, {"configured": configured, "url": url, "password": password})
        threading.Thread(target=_end_with_launcher, args=(served,), daemon=True).start()
        served.run(sockets=[listener])


@contextmanager
def _database() -> Iterator[dict[Any, str]]:
    """Yield the settings of the database to use: none, unless another process uses the one in Prefect's home."""
    settings = get_current_settings()
    if "connection_url" in settings.server.database.model_fields_set:
        yield {}
        return
    try:
        settings.home.mkdir(parents=True, exist_ok=True)
        lock = (settings.home / ".reprise.lock").open("a")
    except OSError:
        # The server says what is wrong with its home.
        yield {}
        return
    with lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            with temporary_folder() as folder:
                yield {PREFECT_SERVER_DATABASE_CONNECTION_URL: f"sqlite+aiosqlite:///{folder}/prefect.db"}
            return
        except OSError:
            # This file system has no locks.
            pass
        yield {}


class _Server(uvicorn.Server):
    """A server that tells how to reach it once it has started."""

    def __init__(self, config: uvicorn.Config, answer: Answer) -> None:
        super().__init__(config)
        self._answer = answer

    async def startup(self, sockets: list[Any] | None = None) -> None:
        """Start, and write the answer."""
        await super().startup(sockets)
        if self.started:
            _tell(self._answer)


def _tell(answer: Answer) -> None:
    print(json.dumps(answer), flush=True)


def _end_with_launcher(served: uvicorn.Server) -> None:
    sys.stdin.buffer.read()
    served.should_exit = True
    time.sleep(_SECONDS_TO_END)
    os._exit(0)


if __name__ == "__main__":
    exit_with(main)
