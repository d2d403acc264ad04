"""Devices are distinguished in one module only: no other module names one."""

import ast
import importlib.util
from collections.abc import Iterator
from pathlib import Path

import pytest

from trainer.devices import check_kernel, check_layers

FOLDERS = ("flows", "data_scoring", "trainer", "kernels")
NAMES = {"cuda", "npu", "torch_npu", "mindspeed", "transfer_to_npu"}
WORDS = ("cuda", "npu", "hccl", "nccl")

# File, spelling and reason: these name the choice to the user, or in a job that was resolved from it.
ALLOWED = {
    ("flows/run/config.py", "cuda"): "device: what a user may choose",
    ("flows/run/config.py", "npu"): "device: what a user may choose",
    ("trainer/job.py", "cuda"): "a job's device: what the choice was resolved to",
    ("trainer/job.py", "npu"): "a job's device: what the choice was resolved to",
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


def test_kernels_that_are_not_there_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    for kernel in ("reference", "chunked"):
        check_kernel("score.loss_kernel", kernel, "cpu", "chunked")
    with pytest.raises(
        ValueError, match=r"score.loss_kernel: 'triton' was requested but the device is cpu; use a CUDA"
    ):
        check_kernel("score.loss_kernel", "triton", "cpu", "chunked")
    with pytest.raises(ValueError, match=r"use a CUDA device, or set train.activation_kernel: reference$"):
        check_kernel("train.activation_kernel", "triton", "cpu", "reference")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"train.loss_kernel: 'triton' .* not installed; install it with pip install"):
        check_kernel("train.loss_kernel", "triton", "cuda", "chunked")
