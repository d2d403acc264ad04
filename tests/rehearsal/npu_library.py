"""The simulated NPU's library, compiled for the installed torch."""

import importlib.util
import shutil
import subprocess
from pathlib import Path

_SOURCE = Path(__file__).with_name("npu_device.cpp")


def find_compiler() -> str | None:
    """Return the path of a C++ compiler, or None where there is none."""
    return shutil.which("c++") or shutil.which("g++")


def compile_library(compiler: str, target: Path) -> None:
    """Compile the library to the file `target`. Raises RuntimeError, with what the compiler says, where it cannot."""
    found = importlib.util.find_spec("torch")
    assert found is not None
    assert found.origin is not None
    torch = Path(found.origin).parent
    includes = [f"-I{torch / 'include'}", f"-I{torch / 'include/torch/csrc/api/include'}"]
    linked = [f"-L{torch / 'lib'}", "-lc10", "-ltorch_cpu"]
    command = [compiler, "-shared", "-fPIC", "-O1", "-std=c++20", *includes, str(_SOURCE), "-o", str(target), *linked]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)}\n{done.stderr}")
