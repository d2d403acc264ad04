"""A file to which one rank appends tokens while it generates them, and which another process reads meanwhile.

It holds pairs of int32: the number of the sequence, and a token, or `_END` after the last token of the sequence.
"""

from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np

_END = -1
_PAIR_BYTES = 8


class TokenStreamWriter:
    """Appends the tokens of sequences to a file."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._written: dict[int, int] = {}
        path.write_bytes(b"")

    def write(self, number: int, tokens: Sequence[int], is_open: bool) -> None:
        """Append those of a sequence's `tokens` that are new, and, unless it `is_open`, that it has ended."""
        written = self._written.get(number, 0)
        if written == _END:
            return
        new = [*tokens[written:], *([] if is_open else [_END])]
        self._written[number] = len(tokens) if is_open else _END
        if new:
            with self._path.open("ab") as file:
                file.write(np.array([(number, token) for token in new], "<i4").tobytes())


class TokenStreamReader:
    """Reads what a `TokenStreamWriter` has appended."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._num_read = 0

    def read(self) -> Iterator[tuple[int, int | None]]:
        """Yield (sequence, token) pairs that were appended since the last call; None: the sequence has ended."""
        if not self._path.exists():
            return
        with self._path.open("rb") as file:
            file.seek(self._num_read)
            content = file.read()
        whole = len(content) - len(content) % _PAIR_BYTES
        self._num_read += whole
        for number, token in np.frombuffer(content[:whole], "<i4").reshape(-1, 2).tolist():
            yield number, None if token == _END else token
