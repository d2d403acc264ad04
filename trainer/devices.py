"""Devices: the one place where CUDA, Ascend NPU and CPU differ.

Megatron-Core spells its device `cuda` throughout. On CUDA that is the truth; on Ascend `torch_npu`'s
`transfer_to_npu` and MindSpeed's adaptor redirect it; on CPU `_adapt_megatron_to_cpu` below does, so that all
three run the same Megatron code. `initialise` must be called before anything of Megatron is imported.
"""

import functools
import importlib.util
import os
from dataclasses import dataclass
from typing import Any

import torch
from torch.overrides import TorchFunctionMode


@dataclass(frozen=True)
class Device:
    """A device that a rank runs on: its kind, its torch device and its collective backend."""

    kind: str
    torch_device: torch.device
    backend: str

    def synchronize(self) -> None:
        """Wait for all work queued on the device (nothing to wait for on CPU)."""
        if self.kind != "cpu":
            getattr(torch, self.kind).synchronize()

    def seed(self, seed: int) -> None:
        """Seed everything that ranks of one pipeline stage draw; Megatron's layout has to be initialised."""
        from megatron.core.tensor_parallel import model_parallel_cuda_manual_seed

        model_parallel_cuda_manual_seed(seed)
        # Comes last: on CPU the line above has just seeded the same generator.
        torch.manual_seed(seed)


def _missing_for_ascend() -> list[str]:
    """Return what an Ascend device needs beside torch and is not installed."""
    return [name for name in ("torch_npu", "mindspeed") if importlib.util.find_spec(name) is None]


def resolve(requested: str) -> str:
    """Return the device kind, `cuda`, `npu` or `cpu`, that `device: requested` means on this machine.

    Raises ValueError where a device is requested by name and cannot be used here.
    """
    has_npu = importlib.util.find_spec("torch_npu") is not None
    if requested == "auto":
        return "cuda" if torch.cuda.is_available() else "npu" if has_npu else "cpu"
    if requested == "cuda" and not torch.cuda.is_available():
        raise ValueError(
            "device: 'cuda' was requested but torch finds no CUDA device; "
            "install a CUDA build of torch and its driver, or set device: auto"
        )
    missing = _missing_for_ascend()
    if requested == "npu" and missing:
        raise ValueError(
            f"device: 'npu' was requested but {' and '.join(missing)} {'is' if len(missing) == 1 else 'are'} not "
            "installed; install torch_npu and MindSpeed for this torch (docs/devices.md), or set device: auto"
        )
    return requested


def resolve_precision(requested: str, kind: str) -> str:
    """Return what a device of `kind` computes in, float32 or bfloat16, under `train.precision: requested`."""
    return requested if requested != "auto" else "float32" if kind == "cpu" else "bfloat16"


def check_count(kind: str, num_ranks: int) -> None:
    """Raise ValueError where this host has fewer accelerators than `num_ranks`."""
    if kind == "cpu":
        return
    available = getattr(torch, kind).device_count()
    if num_ranks > available:
        raise ValueError(
            f"parallel: tensor x pipeline x data makes {num_ranks} processes, but this host has {available} "
            f"{kind} devices; lower one of them"
        )


def check_layers(layers: str) -> None:
    """Raise ValueError where what `model.layers: layers` asks for is not installed."""
    if layers == "transformer_engine" and importlib.util.find_spec("transformer_engine") is None:
        raise ValueError(
            "model.layers: 'transformer_engine' was requested but it is not installed; "
            "install transformer_engine[pytorch] for this torch, or set model.layers: torch"
        )


def check_kernel(field: str, kernel: str, kind: str, other: str) -> None:
    """Raise ValueError where `kernel`, the value of `field`, is not installed or does not run on devices of `kind`.

    `other` is the kernel that the error names instead.
    """
    if kernel != "triton":
        return
    remedy = f"or set {field}: {other}"
    if importlib.util.find_spec("triton") is None:
        raise ValueError(
            f"{field}: 'triton' was requested but it is not installed; install it with pip install 'reprise[triton]', "
            f"{remedy}"
        )
    if kind != "cuda":
        raise ValueError(f"{field}: 'triton' was requested but the device is {kind}; use a CUDA device, {remedy}")


def free_memory(kind: str) -> int | None:
    """Return the bytes that are free on all devices of a kind together, or None for the CPU, whose are the host's."""
    if kind == "cpu":
        return None
    module = getattr(torch, kind)
    return sum(int(module.mem_get_info(number)[0]) for number in range(module.device_count()))


def describe_devices() -> list[tuple[bool, str]]:
    """Return, for each kind of device, whether this host has it, and what it has or how to get it."""
    gib = 1 << 30
    rows = [(True, f"cpu: gloo {'is' if torch.distributed.is_gloo_available() else 'is not'} built into torch")]
    if torch.cuda.is_available():
        for number in range(torch.cuda.device_count()):
            free, total = torch.cuda.mem_get_info(number)
            nccl = ".".join(str(part) for part in torch.cuda.nccl.version())  # type: ignore[no-untyped-call]
            rows.append(
                (
                    True,
                    f"cuda {number}: {torch.cuda.get_device_name(number)}, {free / gib:.1f} of {total / gib:.1f} GiB "
                    f"free, NCCL {nccl}, "
                    f"bfloat16 {'works' if torch.cuda.is_bf16_supported() else 'does not work'}",
                )
            )
    else:
        rows.append((False, "cuda: none found; it takes a CUDA build of torch and NVIDIA's driver"))
    missing = _missing_for_ascend()
    if missing:
        rows.append((False, f"npu: {' and '.join(missing)} not installed; docs/devices.md says how"))
    else:
        rows.append((True, f"npu: {_ascend()}"))
    has_engine = importlib.util.find_spec("transformer_engine") is not None
    rows.append((has_engine, f"Transformer Engine: {'installed' if has_engine else 'not installed'} (model.layers)"))
    return rows


def _ascend() -> str:
    import torch_npu  # noqa: F401

    npu = torch.npu  # type: ignore[attr-defined]
    return f"{npu.device_count()} of {npu.get_device_name(0) if npu.device_count() else 'no kind'}"


def initialise(kind: str, local_rank: int) -> Device:
    """Return this rank's device, made current, with Megatron adapted to it.

    `kind` is what `resolve` returned; `local_rank` counts the ranks of this host.
    """
    if kind == "cpu":
        # One thread a rank where ranks fill the cores: OpenMP's spinning threads slow each other down many-fold.
        ranks_here = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
        torch.set_num_threads(max(1, _num_cores() // ranks_here))
        _adapt_megatron_to_cpu()
        return Device("cpu", torch.device("cpu"), "gloo")
    if kind == "npu":
        import mindspeed.megatron_adaptor  # noqa: F401
        import torch_npu  # noqa: F401
        from torch_npu.contrib import transfer_to_npu  # noqa: F401

        torch.npu.set_device(local_rank)  # type: ignore[attr-defined]
        return Device("npu", torch.device("npu", local_rank), "hccl")
    torch.cuda.set_device(local_rank)
    return Device("cuda", torch.device("cuda", local_rank), "nccl")


def _num_cores() -> int:
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


class _CudaMeansCpu(TorchFunctionMode):
    """Sends every tensor that is asked for on `cuda` to the CPU, and reports CPU tensors' types as Megatron expects."""

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if "device" in kwargs and _is_cuda(kwargs["device"]):
            kwargs["device"] = torch.device("cpu")
        if func is torch.Tensor.to and len(args) > 1 and _is_cuda(args[1]):
            args = (args[0], torch.device("cpu"), *args[2:])
        if func is torch.Tensor.type and len(args) == 1 and not kwargs:
            # The gradient buffers are sorted by names such as torch.cuda.FloatTensor.
            return str(func(*args)).replace("torch.", "torch.cuda.", 1)
        return func(*args, **kwargs)


def _is_cuda(device: Any) -> bool:
    if isinstance(device, torch.device):
        return device.type == "cuda"
    return isinstance(device, str) and device.startswith("cuda")


@functools.cache
def _adapt_megatron_to_cpu() -> None:
    cpu = torch.device("cpu")
    torch.cuda.current_device = lambda: cpu  # type: ignore[assignment, return-value]
    torch.cuda.synchronize = lambda device=None: None
    torch.cuda.set_device = lambda device: None
    torch.cuda.manual_seed = torch.manual_seed  # type: ignore[assignment]
    torch.cuda.get_rng_state = lambda device="cuda": torch.get_rng_state()
    torch.cuda.set_rng_state = lambda state, device="cuda": torch.set_rng_state(state)  # type: ignore[assignment]
    torch.Tensor.cuda = lambda self, *args, **kwargs: self  # type: ignore[method-assign]
    torch.nn.Module.cuda = lambda self, device=None: self  # type: ignore[method-assign]
    _CudaMeansCpu().__enter__()  # type: ignore[no-untyped-call]

    # Megatron compiles its fusions as they are imported. None of them is used here, and the compiler takes each
    # rank longer to import than all else.
    compile_function, torch.compile = torch.compile, lambda function: function  # type: ignore[assignment]
    try:
        from megatron.core.tensor_parallel import random
    finally:
        torch.compile = compile_function

    random._get_cuda_rng_state = lambda *args, **kwargs: torch.get_rng_state()
    random._set_cuda_rng_state = lambda state, *args, **kwargs: torch.set_rng_state(state)
