"""Work that tests give to engines."""

import os
import signal
import time
from pathlib import Path

from data_scoring.base.engine import Count


def square(part: int, count: Count) -> int:
    """Return the square of the part, which has as many units."""
    for units in range(part + 1):
        count(units)
    return part * part


def fail(part: int, count: Count) -> int:
    """Fail for odd parts, the later of which do so first."""
    if part % 2:
        time.sleep(0.5 / part)
        raise ValueError(f"part {part} is odd")
    return part


def beat(folder: Path, part: int, count: Count) -> int:
    """Write the time to a file of the part, for a minute."""
    for units in range(1200):
        (folder / str(part)).write_text(repr(time.time()))
        count(units + 1)
        time.sleep(0.05)
    return part


def begin_and_sleep(folder: Path, part: int, count: Count) -> int:
    """Leave a file for each attempt at the part, which takes a second."""
    (folder / f"{part}-{os.getpid()}").touch()
    time.sleep(1)
    count(part)
    return part * part


def die_once(folder: Path, part: int, count: Count) -> int:
    """Kill the process that works on part 1 for the first time."""
    marker = folder / "killed"
    if part == 1 and not marker.exists():
        marker.touch()
        os.kill(os.getpid(), signal.SIGKILL)
    count(part)
    return part * part


def die(part: int, count: Count) -> int:
    """Kill the process."""
    os.kill(os.getpid(), signal.SIGKILL)
    return part
