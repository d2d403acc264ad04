"""What processes wrote to a run's logs, line by line as it comes, without secrets."""

import os
import re
from collections.abc import Iterator, Mapping
from pathlib import Path

_SECRET_NAME = re.compile(r"TOKEN|SECRET|PASSWORD|PASSWD|CREDENTIAL|API_KEY|ACCESS_KEY|AUTH", re.IGNORECASE)
_SECRET_TEXT = re.compile(
    r"\b(hf_|sk-|ghp_|glpat-|AKIA)[A-Za-z0-9_-]{12,}|(?<=://)[^/\s:@]*:[^/\s@]+(?=@)|(?<=\bBearer )\S+"
)
# Shorter values, such as "1" or "true", are no secrets and would blot out half of every line.
_SHORTEST_SECRET = 8


def redact(line: str, environment: Mapping[str, str]) -> str:
    """Return `line` with what looks like a secret, or is the value of a variable that bears one, blotted out."""
    for name, value in environment.items():
        if len(value) >= _SHORTEST_SECRET and _SECRET_NAME.search(name) and value in line:
            line = line.replace(value, "***")
    return _SECRET_TEXT.sub("***", line)


class LogTail:
    """Follows the `*.log` files of a folder from where they ended when this was made."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._read = {path: path.stat().st_size for path in folder.glob("*.log")}

    def lines(self, limit: int) -> Iterator[str]:
        """Yield the complete lines that came since the last call, `limit` a file at most, then how many are missing."""
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
