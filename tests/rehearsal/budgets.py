"""Prints what a training step of each rehearsed layout asks of a CUDA device: `python -m tests.rehearsal.budgets`.

Kernels and syncs are counted on the rank named; the bytes moved are those that kernels read and write, if every tensor
that a kernel takes or returns is read or written as a whole, once.
"""

import os
import subprocess
import sys
import tempfile
from collections.abc import Collection
from pathlib import Path
from typing import Any

from tests.rehearsal import fake_device
from tests.rehearsal.cuda_jobs import PRESET, TRAINED, CudaJobs

_GB, _GIB = 1e9, 1 << 30


def rehearse(folder: Path, compiler: str, only: Collection[str] | None = None) -> dict[str, dict[str, Any]]:
    """Return what the rehearsals with the names `only`, or all, found, by name, leaving their files in `folder`."""
    library = folder / "fake_device.so"
    fake_device.compile_library(compiler, library)
    jobs = CudaJobs(folder)
    script = Path(__file__).with_name("rehearse.py")
    command = [sys.executable, str(script), str(library), str(jobs.write(only))]
    # Triton's kernels are interpreted, which Triton has to be told before it is imported.
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2]), "TRITON_INTERPRET": "1"}
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    if done.returncode:
        raise RuntimeError(done.stderr)
    return jobs.read()


def write_table(found: dict[str, dict[str, Any]]) -> str:
    """Return a Markdown table of the last training step of each rehearsal."""
    lines = ["| layout and rank | kernels | syncs | GB moved | peak GiB |", "|---|---|---|---|---|"]
    for name, rehearsal in found.items():
        if rehearsal["error"] is not None:
            raise RuntimeError(f"{name}: {rehearsal['error']}")
        step = rehearsal["parts"]["train_step"][-1]
        kernels, syncs, moved = (sum(step[count].values()) for count in ("kernels", "syncs", "moved"))
        lines.append(f"| {_describe(name)} | {kernels:,} | {syncs} | {moved / _GB:.4g} | {step['peak'] / _GIB:.4g} |")
    return "\n".join(lines)


def _describe(name: str) -> str:
    layout, _, number = name.partition(" ")
    if layout == "large":
        return f"{PRESET}, micro batch {number}"
    return f"tiny model, {layout}" + (f", rank {number}" if number else "")


if __name__ == "__main__":
    found_compiler = fake_device.find_compiler()
    if found_compiler is None:
        sys.exit("error: the rehearsal compiles what torch's CPU build lacks, and there is no C++ compiler")
    with tempfile.TemporaryDirectory() as temporary:
        print(write_table(rehearse(Path(temporary), found_compiler, TRAINED)))
