"""A temporary Prefect server for runs without a server: a process that ends with this one, however this one ends.

The temporary server that Prefect itself starts outlives a killed flow, and answers to every user of the machine and
every web page. This one is guarded, and has a password that it tells only this process. It starts while this process
imports Prefect: this module must not.
"""

import json
import os
import re
import select
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from types import MappingProxyType
from typing import BinaryIO

from typing_extensions import TypedDict

_STARTUP_SECONDS = 120.0
_SECONDS_TO_STOP = 15.0
_is_private = False


class Answer(TypedDict):
    """What the server's process tells: the configured URL, the one to use, and the password of a temporary server."""

    configured: str | None
    url: str
    password: str | None


def is_private() -> bool:
    """Return whether this process uses its own temporary server."""
    return _is_private


@contextmanager
def server(environment: Mapping[str, str] = MappingProxyType({})) -> Iterator[None]:
    """Provide a server for flows, as `starting_server` does, and wait until it has started."""
    with starting_server(environment) as ready, ready():
        yield


@contextmanager
def starting_server(
    environment: Mapping[str, str] = MappingProxyType({}),
) -> Iterator[Callable[[], AbstractContextManager[None]]]:
    """Start a server on the loopback interface, unless the configured one answers.

    Yields a context manager that waits for the server and has flows use it; it raises ValueError if the server does not
    start. environment: variables for the server, besides this process's own.
    """
    with tempfile.TemporaryFile() as errors:
        process = subprocess.Popen(
            [sys.executable, "-W", "ignore", "-m", "flows.orchestration.temporary_server_process"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=errors,
            env={**os.environ, **environment},
            # Ctrl-C does not reach it: flows still report their end to it.
            start_new_session=True,
        )
        try:
            yield lambda: _used(process, errors)
        finally:
            _stop(process)


@contextmanager
def _used(process: subprocess.Popen[bytes], errors: BinaryIO) -> Iterator[None]:
    global _is_private  # noqa: PLW0603 - there is one server per process
    answer = _read_answer(process, errors)
    if answer["password"] is None:
        yield
        return
    if "PREFECT_API_URL" in os.environ and answer["configured"]:
        print(
            f"no Prefect server answers at {answer['configured']} (or PREFECT_API_AUTH_STRING is not its password); "
            "this run will not be visible there",
            file=sys.stderr,
        )
    from prefect.settings import (
        PREFECT_API_AUTH_STRING,
        PREFECT_API_URL,
        PREFECT_SERVER_CSRF_PROTECTION_ENABLED,
        temporary_settings,
    )

    settings = {
        PREFECT_API_URL: answer["url"],
        PREFECT_API_AUTH_STRING: answer["password"],
        PREFECT_SERVER_CSRF_PROTECTION_ENABLED: False,
    }
    with temporary_settings(settings):
        _is_private = True
        try:
            yield
        finally:
            _is_private = False


def _read_answer(process: subprocess.Popen[bytes], errors: BinaryIO) -> Answer:
    assert process.stdout is not None
    deadline, line = time.monotonic() + _STARTUP_SECONDS, b""
    while not line.endswith(b"\n"):
        is_readable, _, _ = select.select([process.stdout], [], [], max(0.0, deadline - time.monotonic()))
        read = os.read(process.stdout.fileno(), 4096) if is_readable else b""
        if not read:
            errors.seek(0)
            found = re.findall(r"^[\w.]+(?:Error|Exception): .+", errors.read().decode(errors="replace"), re.MULTILINE)
            raise ValueError(
                f"Prefect's server did not start{f' ({found[-1][:200]})' if found else ''}; check the disk and the "
                "database of PREFECT_HOME, or start a server with `prefect server start` and set PREFECT_API_URL"
            )
        line += read
    answer: Answer = json.loads(line)
    return answer


def _stop(process: subprocess.Popen[bytes]) -> None:
    """End the process: as soon as its standard input is closed, it stores what it has received, and ends."""
    assert process.stdin is not None and process.stdout is not None
    process.stdin.close()
    process.stdout.close()
    try:
        process.wait(timeout=_SECONDS_TO_STOP)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
