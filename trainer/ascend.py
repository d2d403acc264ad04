"""Checks of the installation that Ascend devices need, item by item as in docs/devices.md.

torch_npu is imported in subprocesses only: an import that fails half-way leaves torch modified and may raise anything.
"""

import functools
import importlib.metadata
import importlib.util
import json
import os
import platform
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

_GIB = 1 << 30
# Covers the import of torch and the start of the driver.
_SECONDS_TO_ANSWER = 120
# Prefix of the line that holds the answer.
_MARK = "reprise: "
# Python expression: name, free and total memory of each device.
_NAMES_AND_MEMORY = (
    "[(torch.npu.get_device_name(n), *torch.npu.mem_get_info(n)) for n in range(torch.npu.device_count())]"
)
# Variables that CANN's set_env.sh sets and torch_npu needs.
_VARIABLES = ("ASCEND_HOME_PATH", "ASCEND_OPP_PATH")

# The only version for which triton-ascend 3.2.0 has a wheel.
_PYTHON = "3.11."

SET_ENVIRONMENT = "source CANN's set_env.sh in the shell that starts reprise"
_EXTRA = "install it with pip install 'reprise-lm[ascend]'"


class _Package(NamedTuple):
    """A package that Ascend devices need: its name for pip, its module, the version required, and how to install it."""

    name: str
    module: str
    version: str = ""
    remedy: str = _EXTRA

    def find(self) -> tuple[str, str | None]:
        """Return the name and version found, and what is wrong and how to fix it, or None."""
        if importlib.util.find_spec(self.module) is None:
            return "", f"{self.name} is not installed; {self.remedy}"
        try:
            found = importlib.metadata.version(self.name)
        except importlib.metadata.PackageNotFoundError:
            found = None
        if found is None and self.module == self.name:
            return f"{self.name} on Python's path, version unknown", None
        if found is None:
            return "", f"{self.name} is not installed, but another package provides {self.module}; {self.remedy}"
        if not f"{found}.".startswith(self.version):
            return "", f"{self.name} is {found}, but {self.version}x is required; {self.remedy}"
        return f"{self.name} {found}", None


_TORCH_NPU = _Package("torch-npu", "torch_npu", "2.13.")
_MINDSPEED = _Package(
    "mindspeed",
    "mindspeed",
    "0.16.",
    "install its branch core_r0.16.0 from source with pip install --no-deps (docs/devices.md)",
)
_PACKAGES = (
    _TORCH_NPU,
    _Package("megatron-core", "megatron.core", "0.16.", "install it with pip install 'megatron-core>=0.16.1,<0.17'"),
    _MINDSPEED,
    # Imported by MindSpeed, directly or indirectly, though its metadata does not declare them.
    _Package("triton-ascend", "triton", "3.2.", f"pip uninstall triton triton-ascend, and {_EXTRA}"),
    _Package("einops", "einops"),
    _Package("pybind11", "pybind11"),
)


def is_installed() -> bool:
    """Return whether torch_npu is installed, usable or not."""
    return importlib.util.find_spec(_TORCH_NPU.module) is not None


def count_devices() -> tuple[int, str | None]:
    """Return the number of Ascend devices, and why there are none and how to fix it, or None."""
    count, fault = _ask("torch.npu.device_count()")
    if fault is None and not count:
        fault = "torch_npu finds no device; check the output of `npu-smi info` and ASCEND_RT_VISIBLE_DEVICES"
    return count or 0, fault


def find_adaptor() -> str | None:
    """Return what is wrong with MindSpeed, which adapts Megatron to Ascend, and how to fix it, or None."""
    return _MINDSPEED.find()[1]


def measure_memory() -> tuple[list[int], str | None]:
    """Return the free bytes of each device, and why they are unknown and how to fix it, or None."""
    devices, fault = _ask(_NAMES_AND_MEMORY)
    return [free for _, free, _ in devices or ()], fault


def list_devices() -> tuple[list[tuple[str, int]], str | None]:
    """Return the name and the bytes of each device, and why they are unknown and how to fix it, or None."""
    devices, fault = _ask(_NAMES_AND_MEMORY)
    return [(name, total) for name, _, total in devices or ()], fault


def describe_installation() -> Iterator[tuple[bool, str]]:
    """Yield, for each item of the installation, whether it is in order, and what was found or how to fix it.

    Yields a single item if torch_npu is not installed.
    """
    if not is_installed():
        yield False, str(_TORCH_NPU.find()[1])
        return
    yield _describe_cann()
    python = platform.python_version()
    if python.startswith(_PYTHON):
        yield True, f"Python {python}"
    else:
        yield False, f"Python is {python}, but triton-ascend requires {_PYTHON}x; create an environment with it"
    for package in _PACKAGES:
        found, fault = package.find()
        yield fault is None, fault or found
    devices, fault = _ask(_NAMES_AND_MEMORY)
    fault = fault or count_devices()[1]
    if fault is not None:
        yield False, fault
        return
    for number, (name, free, total) in enumerate(devices):
        yield True, f"device {number}: {name}, {free / _GIB:.1f} of {total / _GIB:.1f} GiB free"
    yield _import_adaptor()


def _describe_cann() -> tuple[bool, str]:
    for variable in _VARIABLES:
        folder = os.environ.get(variable)
        if folder is None:
            return False, f"CANN's variable {variable} is not set; install CANN, and {SET_ENVIRONMENT}"
        if not Path(folder).is_dir():
            return False, f"CANN's {variable} is {folder}, which is not a folder; {SET_ENVIRONMENT}"
    home = Path(os.environ[_VARIABLES[0]])
    for path in sorted(home.rglob("ascend_*_install.info")):
        version = re.search(r"^version=(.+)$", path.read_text(encoding="utf-8"), re.MULTILINE)
        if version:
            return True, f"CANN {version[1].strip()} at {home}"
    return True, f"CANN at {home}, version unknown"


def _import_adaptor() -> tuple[bool, str]:
    """Return whether MindSpeed's adaptor can be imported, as ranks do, and a description of the result."""
    try:
        done = _python("import torch_npu, mindspeed.megatron_adaptor")
    except subprocess.TimeoutExpired:
        return False, f"mindspeed.megatron_adaptor was not imported within {_SECONDS_TO_ANSWER} seconds"
    if done.returncode != 0:
        return False, f"mindspeed.megatron_adaptor cannot be imported ({_reason(done)}); {_MINDSPEED.remedy}"
    return True, "mindspeed.megatron_adaptor can be imported"


@functools.cache
def _ask(expression: str) -> tuple[Any, str | None]:
    """Return the value of `expression`, evaluated with torch_npu imported, and why there is none, or None."""
    if not is_installed():
        return None, _TORCH_NPU.find()[1]
    try:
        done = _python(f"import json, torch, torch_npu; print('\\n{_MARK}' + json.dumps({expression}))")
    except subprocess.TimeoutExpired:
        return None, f"torch_npu did not answer within {_SECONDS_TO_ANSWER} seconds; check whether `npu-smi info` does"
    if done.returncode != 0:
        return None, f"torch_npu cannot be used ({_reason(done)}); {SET_ENVIRONMENT}"
    # Other output may precede or follow the answer.
    [answer] = [line for line in done.stdout.splitlines() if line.startswith(_MARK)]
    return json.loads(answer.removeprefix(_MARK)), None


def _python(code: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code],
        capture_output=True,
        text=True,
        timeout=_SECONDS_TO_ANSWER,
        check=False,
    )


def _reason(done: subprocess.CompletedProcess[str]) -> str:
    """Return the line of a failed process that says why: the last exception, or else the last line."""
    lines = [line for line in done.stderr.splitlines() if line.strip()] or [f"exit code {done.returncode}"]
    raised = [line for line in lines if re.match(r"[\w.]*(Error|Exception)\b", line)]
    return (raised or lines)[-1].strip()
