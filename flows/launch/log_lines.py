"""New lines of a run's logs, without secrets."""

import os
import re
from collections.abc import Iterator, Mapping
from pathlib import Path

_SECRET_NAME = re.compile(r"TOKEN|SECRET|PASSWORD|PASSWD|CREDENTIAL|API_KEY|ACCESS_KEY|AUTH", re.IGNORECASE)
_SECRET_TEXT = re.compile(
    r"\b(hf_|sk-|ghp_|glpat-|AKIA)[A-Za-z0-9_-]{12,}|(?<=://)[^/\s:@]*:[^/\s@]+(?=@)|(?<=\bBearer )\S+"
)
# Shorter values, such as "1" or "true", are not secrets, and replacing them would make lines unreadable.
_SHORTEST_SECRET = 8


def redact(line: str, environment: Mapping[str, str]) -> str:
    """Return `line` with `***` for anything that looks like a secret, and for values of secret variables."""
    for name, value in environment.items():
        if len(value) >= _SHORTEST_SECRET and _SECRET_NAME.search(name) and value in line:
            line = line.replace(value, "***")
    return _SECRET_TEXT.sub("***", line)


class LogTail:
    """Follows the `*.log` files of a folder, starting at their ends when this object is created."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._read = {path: path.stat().st_size for path in folder.glob("*.log")}

    def lines(self, limit: int) -> Iterator[str]:
        """Yield the new complete lines, at most `limit` per file, then how many were left out."""
        for path in sorted(self._folder.glob("*.log")):
            try:
                with path.open("rb") as file:
                    file.seek(self._read.get(path, 0))
                    fresh = file.read()
            except FileNotFoundError:
                continue
            whole = fresh[: fresh.rfind(b"\n") + 1]
            self._read[path] = self._read.get(path, 0) + len(whole)
            lines = [line for line in whole.decode("utf-8", "replace").splitlines() if line.strip()]
            for line in lines[:limit]:
                yield redact(line, os.environ)
            if len(lines) > limit:
                yield f"({len(lines) - limit} more lines in {path})"
