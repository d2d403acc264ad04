"""A thread reads ahead; it hands over its errors, and ends with its reader."""

import threading
import time
from collections.abc import Iterator
from itertools import count

import pytest

from data_scoring.base.read_ahead import read_ahead

SECONDS = 600


def test_reading_runs_ahead_and_its_errors_come_in_their_place() -> None:
    begun = []

    def items() -> Iterator[int]:
        for number in range(4):
            begun.append(number)
            yield number
        raise KeyError("gone")

    reader = read_ahead(items())
    assert next(reader) == 0
    deadline = time.monotonic() + SECONDS
    while len(begun) < 3 and time.monotonic() < deadline:
        time.sleep(0.001)
    assert len(begun) >= 3
    assert list(zip(range(3), reader, strict=False)) == [(0, 1), (1, 2), (2, 3)]
    with pytest.raises(KeyError, match="gone"):
        next(reader)


@pytest.mark.parametrize("depth", [1, 2])
@pytest.mark.parametrize("is_full", [True, False])
def test_the_thread_ends_when_its_reader_is_closed(depth: int, is_full: bool) -> None:
    """While it waits for room, and while it reads an item."""
    begun, go_on = threading.Semaphore(0), threading.Event()

    def items() -> Iterator[int]:
        for number in count():
            begun.release()
            if number == 2 + depth or (number == 2 and not is_full):
                go_on.wait(SECONDS)
            yield number

    if is_full:
        go_on.set()
    before = set(threading.enumerate())
    reader = read_ahead(items(), depth)
    assert next(reader) == 0
    [thread] = set(threading.enumerate()) - before
    for _ in range(2 + depth if is_full else 3):
        assert begun.acquire(timeout=SECONDS)
    reader.close()
    go_on.set()
    thread.join(SECONDS)
    assert not thread.is_alive()
