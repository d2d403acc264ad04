"""A web server for the reports, pictures and logs of runs: `python -m flows.orchestration.report_server runs 4201`."""

import argparse
import os
from pathlib import Path

import uvicorn
from starlette.responses import FileResponse, PlainTextResponse, Response
from starlette.types import Receive, Scope, Send

from flows.orchestration.guard import Guard, own_names

# Reports need no scripts, and nothing from elsewhere.
_POLICY = "default-src 'none'; img-src 'self' data:; style-src 'unsafe-inline'; frame-ancestors 'self'; sandbox"
_PAGES = {".html": "text/html", ".png": "image/png", ".svg": "image/svg+xml"}
_LOG = "text/plain"


class ReportServer:
    """An ASGI application that answers with report pages and pictures in `folder`, and with logs of the runs there.

    Everything else is 404: folders, hidden files, other files of runs, and links that lead out of the folder.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder.resolve()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer a request."""
        if scope["type"] == "websocket":
            await send({"type": "websocket.close", "code": 1008})
        else:
            await self._answer(scope["method"], scope["path"])(scope, receive, send)

    def _answer(self, method: str, address: str) -> Response:
        if method not in ("GET", "HEAD"):
            return PlainTextResponse("only GET and HEAD\n", status_code=405, headers={"Allow": "GET, HEAD"})
        path = self._find(address)
        if path is None:
            return PlainTextResponse("not a report, picture or log of a run\n", status_code=404)
        kind = _PAGES.get(path.suffix, _LOG)
        # Reports change while a run is going.
        headers = {"Content-Security-Policy": _POLICY, "Cache-Control": "no-cache"}
        return FileResponse(path, media_type=kind, headers=headers)

    def _find(self, address: str) -> Path | None:
        """Return the file at the decoded `address`, or None if it is not to be served."""
        asked = Path(address.lstrip("/"))
        if "\0" in address or address != f"/{asked.as_posix()}" or not _is_served(asked):
            return None
        try:
            path = (self._folder / asked).resolve(strict=True)
        except (OSError, RuntimeError):
            # It does not exist, cannot be read, or is a circle of links.
            return None
        # A link inside of the folder must not lead to another kind of file either.
        if not path.is_relative_to(self._folder) or not _is_served(path.relative_to(self._folder)):
            return None
        return path if path.is_file() and os.access(path, os.R_OK) else None


def _is_served(path: Path) -> bool:
    """Return whether `path`, relative to the folder of runs, is the name of a report, a picture or a log."""
    if any(part.startswith(".") for part in path.parts):
        return False
    return path.suffix in _PAGES or (path.suffix == ".log" and path.parent.name == "logs")


def main() -> None:
    """Serve on the loopback interface until terminated."""
    parser = argparse.ArgumentParser()
    parser.add_argument("folder", type=Path)
    parser.add_argument("port", type=int)
    options = parser.parse_args()
    app = Guard(ReportServer(options.folder), own_names("127.0.0.1"))
    uvicorn.run(app, host="127.0.0.1", port=options.port, lifespan="off", log_level="warning")


if __name__ == "__main__":
    main()
