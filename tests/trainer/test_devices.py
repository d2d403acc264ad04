"""Devices are distinguished in one module only: no other module names one."""

import ast
import importlib.util
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from data_scoring.config import ScoreConfig
from trainer.config import TrainConfig
from trainer.devices import check_layers, resolve_kernel, resolve_kernels

FOLDERS = ("flows", "data_scoring", "trainer", "kernels")
NAMES = {"cuda", "npu", "torch_npu", "mindspeed", "transfer_to_npu"}
WORDS = ("cuda", "npu", "hccl", "nccl")

# File, spelling and reason: these name the choice to the user, or in a job that was resolved from it.
ALLOWED = {
    ("flows/run/config.py", "cuda"): "device: what a user may choose",
    ("flows/run/config.py", "npu"): "device: what a user may choose",
    ("trainer/job.py", "cuda"): "a job's device: what the choice was resolved to",
    ("trainer/job.py", "npu"): "a job's device: what the choice was resolved to",
    ("trainer/hardware.py", "cuda"): "a table of accelerators, which need not be here",
    ("trainer/hardware.py", "npu"): "a table of accelerators, which need not be here",
}


def spelled_devices(tree: ast.AST) -> Iterator[str]:
    """Yield every name, attribute, import, argument and string constant by which the code goes for a device."""
    for node in ast.walk(tree):
        match node:
            case ast.Attribute(attr=name) | ast.Name(id=name) | ast.arg(arg=name) if name in NAMES:
                yield name
            case ast.keyword(arg=str(name)) if name in NAMES:
                yield name
            case ast.alias(name=name) | ast.ImportFrom(module=str(name)) if NAMES & set(name.split(".")):
                yield name
            case ast.ImportFrom(module=str(module)) | ast.alias(name=str(module)) if "cuda" in module:
                yield module
            case ast.Constant(value=str(text)) if text.startswith(WORDS):
                yield text


def test_devices_are_spelled_in_one_module_alone() -> None:
    found = {
        (str(path), name)
        for folder in FOLDERS
        for path in sorted(Path(folder).rglob("*.py"))
        if path != Path("trainer/devices.py")
        for name in spelled_devices(ast.parse(path.read_text(encoding="utf-8")))
    }
    assert found == ALLOWED.keys()


@pytest.mark.parametrize(
    ("code", "spelled"),
    [
        ("x = torch.cuda.is_available()", ["cuda"]),
        ("model.cuda()", ["cuda"]),
        ("torch.zeros(1, device='cuda:0')", ["cuda:0"]),
        ("init_process_group('nccl')", ["nccl"]),
        ("import torch_npu.contrib", ["torch_npu.contrib"]),
        ("from torch import cuda", ["cuda"]),
        ("from torch.cuda import synchronize", ["torch.cuda"]),
        ("from megatron.core.tensor_parallel import model_parallel_cuda_manual_seed", [
            "model_parallel_cuda_manual_seed",
        ]),
        ("'a sentence that speaks of cuda'; barracuda = os.environ['NCCL_SOCKET_IFNAME']", []),
    ],
)  # fmt: skip
def test_what_counts_as_spelling_a_device(code: str, spelled: list[str]) -> None:
    assert list(spelled_devices(ast.parse(code))) == spelled


def test_layers_that_are_not_installed_are_named() -> None:
    check_layers("torch")
    if importlib.util.find_spec("transformer_engine") is None:
        with pytest.raises(
            ValueError, match=r"model.layers: 'transformer_engine' was requested .*; install .*\[pytorch"
        ):
            check_layers("transformer_engine")


PORTABLE = {"train.loss_kernel": "chunked", "score.loss_kernel": "chunked", "train.activation_kernel": "recompute"}


@pytest.mark.parametrize("field", PORTABLE)
@pytest.mark.parametrize("is_installed", [True, False])
def test_auto_is_triton_where_it_runs(field: str, is_installed: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: object() if is_installed else None)
    # Where there is none, the devices are on other hosts, and Triton is expected there.
    assert resolve_kernel(field, "auto", "cuda") == "triton"
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert resolve_kernel(field, "auto", "cuda") == ("triton" if is_installed else PORTABLE[field])
    assert resolve_kernel(field, "auto", "cpu") == resolve_kernel(field, "auto", "npu") == PORTABLE[field]
    for kind in ("cuda", "npu", "cpu"):
        for kernel in ("reference", PORTABLE[field]):
            assert resolve_kernel(field, kernel, kind) == kernel


@pytest.mark.parametrize("field", PORTABLE)
def test_kernels_that_are_requested_and_cannot_run_are_named(field: str, monkeypatch: pytest.MonkeyPatch) -> None:
    remedy = f"or set {field}: {PORTABLE[field]}$"
    with pytest.raises(ValueError, match=rf"{field}: 'triton' was requested but the device is cpu; use .*, {remedy}"):
        resolve_kernel(field, "triton", "cpu")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match=rf"{field}: 'triton' .* not installed; install it with pip .*, {remedy}"):
        resolve_kernel(field, "triton", "cuda")


def test_sections_are_resolved_field_by_field() -> None:
    train, score = TrainConfig(loss_kernel="reference", lr=0.1), ScoreConfig()
    found = resolve_kernels(train, score, "cpu")
    assert found[0] == train.model_copy(update={"activation_kernel": "recompute"})
    assert found[1] == score.model_copy(update={"loss_kernel": "chunked"})
