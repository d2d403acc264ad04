"""Runs parts of the check in this process: `python -m benchmarks.device.part NAME,… PREPARED OUTPUT DEVICE`."""

import sys
import time
from importlib import import_module
from pathlib import Path
from typing import Any, NamedTuple

from benchmarks.device.record import Record
from benchmarks.device.settings import Place


class Part(NamedTuple):
    """A part: its module and function, the function's further arguments, and its time limit in seconds."""

    module: str
    function: str
    arguments: dict[str, Any]
    seconds: float


# Run in this order, the most failure-prone first; the limits add up to less than ten minutes.
PARTS: dict[str, Part] = {
    "small_model": Part("small_model", "check_small_model", {}, 75),
    "resuming": Part("small_model", "check_resuming", {}, 75),
    "steps_of_2": Part("large_model", "check_steps", {"micro_batch_size": 2}, 60),
    "steps_of_8": Part("large_model", "check_steps", {"micro_batch_size": 8}, 60),
    "checkpoints": Part("checkpoints", "check_checkpoints", {}, 110),
    "stopping": Part("checkpoints", "check_stopping", {}, 80),
    "kernel_speed": Part("kernels", "check_kernel_speed", {}, 30),
    "kernel_tests": Part("kernels", "check_kernel_tests", {}, 105),
}


def main() -> None:
    """Run the parts named on the command line one after another."""
    names, prepared, output, kind = sys.argv[1:]
    for name in names.split(","):
        started = time.monotonic()
        place = Place(Path(prepared), Path(output), kind)  # type: ignore[arg-type]
        place.empty_work()
        record = Record(place.output / "parts" / f"{name}.json")
        # Imported lazily, so that listing the parts does not need torch.
        function = getattr(import_module(f"benchmarks.device.{PARTS[name].module}"), PARTS[name].function)
        function(place, record, **PARTS[name].arguments)
        record.end(time.monotonic() - started)


if __name__ == "__main__":
    main()
