"""Ascend devices are queried, not inferred from installed packages, and each fault of an installation has a remedy."""

import os
import platform
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

from trainer import ascend, devices

NO_CANN = "raise ImportError('libhccl.so: cannot open shared object file: No such file or directory')"
# torch_npu raises bare exceptions where CANN's variables are wrong, with an error code in a line of its own.
NO_OPERATORS = (
    r"raise Exception('ASCEND_OPP_PATH environment variable is not set.\n[ERROR] ERR00005 PTA internal error')"
)
CRASH = "import os, signal; os.kill(os.getpid(), signal.SIGKILL)"
DEVICES = """
import types, torch
print("Warning: something that comes before any answer.")
torch.npu = types.SimpleNamespace(
    device_count=lambda: {count},
    get_device_name=lambda number: "Ascend910B",
    mem_get_info=lambda number: (30 << 30, 64 << 30),
    set_device=lambda number: None,
)
def _autoload(): pass
"""
ADAPTOR = "import sys; assert 'torch_npu' in sys.modules"
EXTRA = "install it with pip install 'reprise-lm[ascend]'"
SOURCE = "install its branch core_r0.16.0 from source with pip install --no-deps (docs/devices.md)"
ENVIRONMENT = "source CANN's set_env.sh in the shell that starts reprise"
VARIABLES = ("ASCEND_HOME_PATH", "ASCEND_OPP_PATH")


class Machine:
    """A machine that has fake packages, which this process and those that it starts find first."""

    def __init__(self, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.folder, self.site, self.monkeypatch = folder, folder / "site", monkeypatch
        self.site.mkdir()
        monkeypatch.syspath_prepend(str(self.site))
        monkeypatch.setenv("PYTHONPATH", str(self.site))
        for variable in VARIABLES:
            monkeypatch.delenv(variable, raising=False)
        monkeypatch.setattr(platform, "python_version", lambda: "3.11.9")

    def install(self, name: str, version: str, module: str, code: str = "") -> Path:
        """Install the package `name`, whose `module` is `code`; return the module's folder."""
        package, record = self.site / module, self.site / f"{name.replace('-', '_')}-{version}.dist-info"
        for folder in (package, record):
            folder.mkdir(parents=True)
        (package / "__init__.py").write_text(code)
        (record / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")
        return package

    def install_torch(self) -> None:
        """Give processes that ask devices a torch that takes no seconds to import; this one has its own."""
        (self.site / "torch").mkdir()
        (self.site / "torch" / "__init__.py").write_text("")

    def install_torch_npu(self, code: str, version: str = "2.13.0") -> None:
        contrib = self.install("torch-npu", version, "torch_npu", code) / "contrib"
        contrib.mkdir()
        (contrib / "__init__.py").write_text("")
        (contrib / "transfer_to_npu.py").write_text("")
        # By this, torch imports the package as it is imported itself.
        entry_points = self.site / f"torch_npu-{version}.dist-info" / "entry_points.txt"
        entry_points.write_text("[torch.backends]\ntorch_npu = torch_npu:_autoload\n")

    def install_mindspeed(self, adaptor: str = ADAPTOR) -> None:
        (self.install("mindspeed", "0.16.0", "mindspeed") / "megatron_adaptor.py").write_text(adaptor)

    def install_all(self) -> None:
        """Make an installation that lacks nothing, CANN 9.0.0 and two devices included."""
        self.install_torch_npu(DEVICES.format(count=2))
        self.install_mindspeed()
        self.install("triton-ascend", "3.2.0", "triton")
        self.install("einops", "0.8.2", "einops")
        self.install("pybind11", "3.1.0", "pybind11")
        self.install_cann()

    def install_cann(self) -> None:
        for variable in VARIABLES:
            self.monkeypatch.setenv(variable, str(self.folder / variable))
        toolkit = self.folder / VARIABLES[0] / "x86_64-linux"
        toolkit.mkdir(parents=True)
        (self.folder / VARIABLES[1]).mkdir()
        (toolkit / "ascend_toolkit_install.info").write_text("package_name=Ascend-cann-toolkit\nversion=9.0.0\n")


@pytest.fixture(autouse=True)
def answers() -> Iterator[None]:
    """What a process keeps of what it was told of its devices: each test asks anew, and so does the next."""

    def forget() -> None:
        for cached in (ascend._ask, devices._warn):
            cached.cache_clear()

    forget()
    yield
    forget()


@pytest.fixture
def machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Machine:
    machine = Machine(tmp_path, monkeypatch)
    machine.install_torch()
    return machine


def refusal(call: Callable[[], object]) -> str:
    """Return the message of the ValueError that `call` raises."""
    with pytest.raises(ValueError) as raised:
        call()
    return str(raised.value)


def describe() -> list[tuple[bool, str]]:
    """Return the doctor's rows about Ascend devices."""
    return [(is_there, text) for is_there, text in devices.describe_devices() if text.startswith("npu")]


def test_broken_packages_of_devices_keep_nothing_from_starting(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    Machine(tmp_path, monkeypatch).install_torch_npu(NO_CANN)
    monkeypatch.delenv("TORCH_DEVICE_BACKEND_AUTOLOAD")
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(tmp_path / "site"), str(Path.cwd())]))
    # Without care, torch itself does not.
    status, error = start("import torch")
    assert status == 1
    assert "Failed to load the backend extension: torch_npu" in error
    for module in ("flows.cli.main", "trainer.rank"):
        assert start(f"import {module}, torch") == (0, "")


def start(code: str) -> tuple[int, str]:
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", code], capture_output=True, text=True, check=False)
    return done.returncode, done.stderr


@pytest.mark.parametrize(
    ("code", "fault"),
    [
        (NO_CANN, r"torch_npu cannot be used \(ImportError: libhccl.so: .*\); source CANN's set_env.sh in the shell"),
        (NO_OPERATORS, r"torch_npu cannot be used \(Exception: ASCEND_OPP_PATH .* is not set.\); source CANN's"),
        (CRASH, r"torch_npu cannot be used \(exit code -9\); source CANN's set_env.sh"),
        (DEVICES.format(count=0), "torch_npu finds no device; check the output of `npu-smi info` and ASCEND_RT_VIS"),
    ],
    ids=["no CANN", "no operators", "crash", "no device"],
)
def test_devices_that_cannot_be_used_are_passed_over_unless_requested(
    machine: Machine, caplog: pytest.LogCaptureFixture, code: str, fault: str
) -> None:
    machine.install_torch_npu(code)
    machine.install_mindspeed()
    requested = refusal(lambda: devices.resolve("npu"))
    assert re.search(rf"^device: 'npu' was requested but {fault}.*, or set device: auto$", requested), requested
    assert [devices.resolve("auto"), devices.resolve("auto")] == ["cpu", "cpu"]
    # Asked twice, it is said once.
    (said,) = caplog.messages
    assert re.search(rf"^device: 'auto' falls back to the CPU because {fault}", said), said
    counted = refusal(lambda: devices.check_count("npu", 1))
    assert re.search(rf"^device: 'npu' cannot be used because {fault}", counted), counted
    assert [text for is_there, text in describe() if not is_there and re.search(f"^npu: {fault}", text)]


def test_cuda_comes_first_and_nobody_asks_a_broken_installation(
    machine: Machine, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    machine.install_torch_npu(NO_CANN)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert devices.resolve("auto") == "cuda"
    assert not caplog.messages
    assert ascend._ask.cache_info().misses == 0


def test_nothing_is_said_of_what_nobody_installed(machine: Machine, caplog: pytest.LogCaptureFixture) -> None:
    assert devices.resolve("auto") == "cpu"
    assert not caplog.messages
    fault = f"torch-npu is not installed; {EXTRA}"
    assert refusal(lambda: devices.resolve("npu")) == f"device: 'npu' was requested but {fault}, or set device: auto"
    assert describe() == [(False, f"npu: {fault}")]


def test_devices_that_are_there_are_taken_and_counted(machine: Machine) -> None:
    machine.install_all()
    assert [devices.resolve("auto"), devices.resolve("npu")] == ["npu", "npu"]
    devices.check_count("npu", 2)
    assert devices.least_free_memory("npu", 2) == 30 << 30
    assert refusal(lambda: devices.check_count("npu", 3)) == (
        "parallel: tensor x pipeline x data is 3 processes, but this host has 2 npu devices; lower one of them"
    )


def test_devices_are_not_left_idle_where_mindspeed_alone_is_missing(machine: Machine) -> None:
    machine.install_torch_npu(DEVICES.format(count=2))
    assert refusal(lambda: devices.resolve("auto")) == (
        f"device: 'auto' finds 2 Ascend devices, but mindspeed is not installed; {SOURCE}, or set device: cpu"
    )
    assert refusal(lambda: devices.resolve("npu")) == (
        f"device: 'npu' was requested but mindspeed is not installed; {SOURCE}, or set device: auto"
    )


def test_ranks_say_what_is_missing_where_nobody_asked_before(machine: Machine) -> None:
    machine.install_torch_npu(NO_CANN)
    assert refusal(lambda: devices.initialise("npu", 0)) == (
        "device: 'npu' cannot be used (libhccl.so: cannot open shared object file: No such file or directory); "
        f"{ENVIRONMENT}, and run `reprise doctor` there"
    )
    assert refusal(lambda: devices.least_free_memory("npu", 2)).startswith(
        "device: 'npu' cannot be used because torch_npu "
    )


def test_doctor_names_each_line_of_an_installation(machine: Machine) -> None:
    machine.install_all()
    assert describe() == [
        (True, f"npu: CANN 9.0.0 at {machine.folder / VARIABLES[0]}"),
        (True, "npu: Python 3.11.9"),
        (True, "npu: torch-npu 2.13.0"),
        (True, "npu: megatron-core 0.16.1"),
        (True, "npu: mindspeed 0.16.0"),
        (True, "npu: triton-ascend 3.2.0"),
        (True, "npu: einops 0.8.2"),
        (True, "npu: pybind11 3.1.0"),
        (True, "npu: device 0: Ascend910B, 30.0 of 64.0 GiB free"),
        (True, "npu: device 1: Ascend910B, 30.0 of 64.0 GiB free"),
        (True, "npu: mindspeed.megatron_adaptor can be imported"),
    ]


def test_doctor_names_the_remedy_of_each_fault(machine: Machine, monkeypatch: pytest.MonkeyPatch) -> None:
    machine.install_torch_npu(DEVICES.format(count=1), version="2.7.1")
    machine.install_mindspeed(adaptor="import torchair")
    # As stock Triton is.
    machine.install("triton", "3.9.0", "triton")
    monkeypatch.setenv("ASCEND_HOME_PATH", str(machine.site))
    monkeypatch.setenv("ASCEND_OPP_PATH", "/nowhere")
    monkeypatch.setattr(torch.version, "cuda", "12.8")
    monkeypatch.setattr(platform, "python_version", lambda: "3.12.1")
    assert [text for is_there, text in describe() if not is_there] == [
        f"npu: CANN's ASCEND_OPP_PATH is /nowhere, which is not a folder; {ENVIRONMENT}",
        "npu: Python is 3.12.1, but triton-ascend requires 3.11.x; create an environment with it",
        f"npu: torch-npu is 2.7.1, but 2.13.x is required; {EXTRA}",
        "npu: triton-ascend is not installed, but another package provides triton; "
        f"pip uninstall triton triton-ascend, and {EXTRA}",
        f"npu: einops is not installed; {EXTRA}",
        f"npu: pybind11 is not installed; {EXTRA}",
        "npu: mindspeed.megatron_adaptor cannot be imported (ModuleNotFoundError: No module named 'torchair'); "
        f"{SOURCE}",
        "npu: torch is a CUDA build, with which torch_npu does not load; install the CPU build of torch",
    ]
    monkeypatch.delenv("ASCEND_HOME_PATH")
    assert describe()[0] == (
        False,
        f"npu: CANN's variable ASCEND_HOME_PATH is not set; install CANN, and {ENVIRONMENT}",
    )
