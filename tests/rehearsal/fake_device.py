"""Enables FakeTensors on CUDA in a CPU build of torch: compiles the missing parts and loads them before torch."""

import ctypes
import importlib.util
import shutil
import subprocess
import sys
from pathlib import Path

_SOURCE = Path(__file__).with_name("fake_device.cpp")


def find_compiler() -> str | None:
    """Return the path of a C++ compiler, or None where there is none."""
    return shutil.which("c++") or shutil.which("g++")


def compile_library(compiler: str, target: Path) -> None:
    """Compile the library for the torch that is installed, without importing that, to the file `target`."""
    torch = _torch_folder()
    includes = [f"-I{torch / 'include'}", f"-I{torch / 'include/torch/csrc/api/include'}"]
    command = [compiler, "-shared", "-fPIC", "-std=c++20", *includes, str(_SOURCE), "-o", str(target)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)}\n{done.stderr}")


def load(library: Path) -> None:
    """Load the library that `compile_library` made, before torch, which looks for hooks once, as it is imported."""
    assert "torch" not in sys.modules, "torch is imported already, and has found no hooks"
    for name in ("libc10.so", "libtorch_cpu.so"):
        ctypes.CDLL(str(_torch_folder() / "lib" / name), mode=ctypes.RTLD_GLOBAL)
    ctypes.CDLL(str(library))


def _torch_folder() -> Path:
    found = importlib.util.find_spec("torch")
    assert found is not None
    assert found.origin is not None
    return Path(found.origin).parent
