"""Stopping: what a rank does when it is asked to end."""

import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType


class StoppedError(Exception):
    """Training was asked to stop; what it had is saved."""


class StopRequest:
    """Whether this rank was asked to stop while it could heed that; at any other time SIGTERM ends it at once."""

    def __init__(self) -> None:
        self.is_made = False

    @contextmanager
    def heeded(self) -> Iterator[None]:
        """Note the first SIGTERM that comes while the body runs, instead of ending at once."""
        before = signal.signal(signal.SIGTERM, self._note)
        try:
            yield
        finally:
            signal.signal(signal.SIGTERM, before)

    def _note(self, number: int, frame: FrameType | None) -> None:
        if self.is_made:
            os._exit(128 + number)
        self.is_made = True
