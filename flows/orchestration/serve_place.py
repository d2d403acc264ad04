"""Whether `reprise serve` can start here: told without Prefect, which takes seconds to import."""

import socket
from pathlib import Path

_PORTS = range(1, 65_535)


def check_place(host: str, port: int) -> None:
    """Raise ValueError if this folder has no prefect.yaml, or if `port` of `host`, or the next one here, is taken."""
    if not Path("prefect.yaml").is_file():
        raise ValueError(
            f"{Path.cwd()}: has no prefect.yaml; run this command in a folder made by `reprise init FOLDER`"
        )
    if port not in _PORTS:
        raise ValueError(f"--port: {port} is not between {_PORTS[0]} and {_PORTS[-1]}; choose another port")
    _check_free(host, port)
    _check_free("127.0.0.1", port + 1)


def _check_free(host: str, port: int) -> None:
    with socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError as error:
            raise ValueError(
                f"--port: {host}:{port} cannot be used ({error.strerror}); stop what uses it, or choose another port"
            ) from None
