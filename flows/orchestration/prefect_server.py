"""Prefect's server and UI behind a guard, in a process of its own: `python -m flows.orchestration.prefect_server`."""

import argparse

import uvicorn
from prefect.server.api.server import create_app
from prefect.settings import get_current_settings

from flows.orchestration.guard import Guard, own_names


def main() -> None:
    """Serve until terminated. As `prefect server start`, but other sites' pages are refused."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--host", required=True)
    parser.add_argument("--port", type=int, required=True)
    options = parser.parse_args()
    settings = get_current_settings().server
    uvicorn.run(
        Guard(create_app(final=True), own_names(options.host)),
        host=options.host,
        port=options.port,
        timeout_keep_alive=settings.api.keepalive_timeout,
        ws_ping_interval=settings.api.websocket_ping_interval,
        ws_ping_timeout=settings.api.websocket_ping_timeout,
        log_level=settings.logging_level.lower(),
    )


if __name__ == "__main__":
    main()
