"""Devices: the only module that distinguishes CUDA, Ascend NPU and CPU.

Megatron-Core hard-codes the device `cuda`. On Ascend, `torch_npu`'s `transfer_to_npu` and MindSpeed's adaptor redirect
it; on CPU, `_adapt_megatron_to_cpu` below does, so that all three run the same Megatron code. `initialise` must be
called before any Megatron module is imported.
"""

import functools
import importlib.util
import logging
import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch.utils._device import _device_constructors

from data_scoring.config import ScoreConfig
from trainer import ascend
from trainer.config import Precision, TrainConfig

_LOG = logging.getLogger(__name__)
_GIB = 1 << 30
# What `auto` selects for a field where Triton does not run.
_PORTABLE_KERNELS = {
    "train.loss_kernel": "chunked",
    "score.loss_kernel": "chunked",
    "train.activation_kernel": "recompute",
}


@dataclass(frozen=True)
class Device:
    """A device that a rank runs on: its kind, its torch device and its collective backend."""

    kind: str
    torch_device: torch.device
    backend: str

    def synchronize(self) -> None:
        """Wait for all work queued on the device (a no-op on CPU)."""
        if self.kind != "cpu":
            getattr(torch, self.kind).synchronize()

    def seed(self, seed: int) -> None:
        """Seed all generators, the same on all ranks of a pipeline stage; model parallelism must be initialised."""
        from megatron.core.tensor_parallel import model_parallel_cuda_manual_seed

        model_parallel_cuda_manual_seed(seed)
        # Must come last: on CPU the line above seeds the same generator.
        torch.manual_seed(seed)


def resolve(requested: str) -> str:
    """Return the device kind, `cuda`, `npu` or `cpu`, that `device: requested` selects on this machine.

    Raises ValueError if a device is requested by name and cannot be used here, or if `auto` finds Ascend devices but
    not MindSpeed.
    """
    if requested == "auto":
        return "cuda" if torch.cuda.is_available() else _npu_or_cpu()
    if requested == "cuda" and not torch.cuda.is_available():
        raise ValueError(
            "device: 'cuda' was requested but torch finds no CUDA device; "
            "install a CUDA build of torch and its driver, or set device: auto"
        )
    if requested == "npu":
        fault = ascend.count_devices()[1] or ascend.find_adaptor()
        if fault is not None:
            raise ValueError(f"device: 'npu' was requested but {fault}, or set device: auto")
    return requested


def _npu_or_cpu() -> str:
    count, fault = ascend.count_devices()
    if fault is not None:
        if ascend.is_installed():
            _warn(f"device: 'auto' falls back to the CPU because {fault}")
        return "cpu"
    fault = ascend.find_adaptor()
    if fault is not None:
        raise ValueError(f"device: 'auto' finds {count} Ascend devices, but {fault}, or set device: cpu")
    return "npu"


@functools.cache
def _warn(text: str) -> None:
    # Cached, so that the warning appears once, however many stages resolve the device.
    _LOG.warning("%s", text)


def resolve_precision(requested: Literal["auto"] | Precision, kind: str) -> Precision:
    """Return the precision that `train.precision: requested` selects on devices of `kind`, float32 or bfloat16."""
    return requested if requested != "auto" else "float32" if kind == "cpu" else "bfloat16"


def check_count(kind: str, num_ranks: int) -> None:
    """Raise ValueError if this host has fewer accelerators than `num_ranks`, or if they cannot be counted."""
    if kind == "cpu":
        return
    available, fault = (torch.cuda.device_count(), None) if kind == "cuda" else ascend.count_devices()
    if fault is not None:
        raise ValueError(f"device: '{kind}' cannot be used because {fault}")
    if num_ranks > available:
        raise ValueError(
            f"parallel: tensor x pipeline x data is {num_ranks} processes, but this host has {available} "
            f"{kind} devices; lower one of them"
        )


def check_layers(layers: str) -> None:
    """Raise ValueError if the package that `model.layers: layers` needs is not installed."""
    if layers == "transformer_engine" and importlib.util.find_spec("transformer_engine") is None:
        raise ValueError(
            "model.layers: 'transformer_engine' was requested but it is not installed; "
            "install transformer_engine[pytorch] for this torch, or set model.layers: torch"
        )


def resolve_kernel(field: str, requested: str, kind: str) -> Any:
    """Return the kernel, one of those that `field` offers, that `field: requested` selects on devices of `kind`.

    field: train.loss_kernel, score.loss_kernel or train.activation_kernel. Raises ValueError if the kernel is requested
    by name and is not installed or does not run there.
    """
    portable = _PORTABLE_KERNELS[field]
    is_installed = importlib.util.find_spec("triton") is not None
    if requested == "auto":
        # If the devices are on another host, Triton is expected there: torch's CUDA builds depend on it.
        is_expected = is_installed or not torch.cuda.is_available()
        return "triton" if is_expected and kind == "cuda" else portable
    if requested == "triton" and not is_installed:
        raise ValueError(
            f"{field}: 'triton' was requested but it is not installed; install it with pip install "
            f"'reprise-lm[triton]', or set {field}: {portable}"
        )
    if requested == "triton" and kind != "cuda":
        raise ValueError(
            f"{field}: 'triton' was requested but the device is {kind}; use a CUDA device, or set {field}: {portable}"
        )
    return requested


def resolve_kernels(train: TrainConfig, score: ScoreConfig, kind: str) -> tuple[TrainConfig, ScoreConfig]:
    """Return the sections with the kernels that they select on devices of `kind`; raises as `resolve_kernel` does."""
    of_training = {
        name: resolve_kernel(f"train.{name}", getattr(train, name), kind)
        for name in ("loss_kernel", "activation_kernel")
    }
    of_scoring = {"loss_kernel": resolve_kernel("score.loss_kernel", score.loss_kernel, kind)}
    return train.model_copy(update=of_training), score.model_copy(update=of_scoring)


def least_free_memory(kind: str, num_ranks: int) -> int | None:
    """Return the free bytes of the device with the least free memory among those of this host's ranks; None on CPU.

    Ranks use the first `num_ranks` devices of the kind, or all if there are fewer. Raises ValueError if the devices
    cannot be queried.
    """
    if kind == "cpu":
        return None
    if kind == "cuda":
        free = [int(torch.cuda.mem_get_info(number)[0]) for number in range(torch.cuda.device_count())]
    else:
        free, fault = ascend.measure_memory()
        if fault is not None:
            raise ValueError(f"device: '{kind}' cannot be used because {fault}")
    return min(free[:num_ranks], default=0)


def list_accelerators(kind: str) -> list[tuple[str, int]]:
    """Return the name and the memory in bytes of each of this host's devices of `kind`, cuda or npu.

    Raises ValueError if they cannot be queried.
    """
    if kind == "cuda":
        rows = [torch.cuda.get_device_properties(number) for number in range(torch.cuda.device_count())]
        return [(row.name, row.total_memory) for row in rows]
    found, fault = ascend.list_devices()
    if fault is not None:
        raise ValueError(f"device: '{kind}' cannot be used because {fault}")
    return found


def free_cached_memory(device: torch.device) -> None:
    """Return the memory that torch keeps for reuse, but does not use, to `device` (a no-op on CPU)."""
    if device.type != "cpu":
        getattr(torch, device.type).empty_cache()


def has_fused_norm(kind: str) -> bool:
    """Return whether torch has a fused RMSNorm kernel, which keeps only its input, on devices of `kind`."""
    return kind == "cuda"


def has_fused_adam(kind: str) -> bool:
    """Return whether torch updates all parameters with a single kernel of Adam on devices of `kind`."""
    return kind != "npu"


def overlaps_communication(kind: str) -> bool:
    """Return whether devices of `kind` exchange data while they compute; a CPU's cores do one or the other."""
    return kind != "cpu"


def widest_dtype(kind: str) -> torch.dtype:
    """Return the most precise dtype that devices of `kind` compute in."""
    return torch.float32 if kind == "npu" else torch.float64


def send(tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
    """Return a copy on `device` of `tensor`, in host memory, without waiting for the device; on CPU `tensor` itself."""
    return tensor if device.type == "cpu" else tensor.pin_memory().to(device, non_blocking=True)


def describe_devices() -> list[tuple[bool, str]]:
    """Return, for each kind of device, whether this host has it, and its description or how to install it."""
    rows = [(True, f"cpu: gloo {'is' if torch.distributed.is_gloo_available() else 'is not'} built into torch")]
    rows += _describe_cuda()
    rows += [(is_there, f"npu: {text}") for is_there, text in ascend.describe_installation()]
    if ascend.is_installed() and torch.version.cuda is not None:
        rows.append(
            (False, "npu: torch is a CUDA build, with which torch_npu does not load; install the CPU build of torch")
        )
    has_engine = importlib.util.find_spec("transformer_engine") is not None
    rows.append((has_engine, f"Transformer Engine: {'installed' if has_engine else 'not installed'} (model.layers)"))
    return rows


def _describe_cuda() -> list[tuple[bool, str]]:
    if not torch.cuda.is_available():
        return [(False, "cuda: none found; install a CUDA build of torch and NVIDIA's driver")]
    rows = []
    for number in range(torch.cuda.device_count()):
        free, total = torch.cuda.mem_get_info(number)
        nccl = ".".join(str(part) for part in torch.cuda.nccl.version())  # type: ignore[no-untyped-call]
        rows.append(
            (
                True,
                f"cuda {number}: {torch.cuda.get_device_name(number)}, {free / _GIB:.1f} of {total / _GIB:.1f} GiB "
                f"free, NCCL {nccl}, bfloat16 {'works' if torch.cuda.is_bf16_supported() else 'does not work'}",
            )
        )
    return rows


def initialise(kind: str, local_rank: int) -> Device:
    """Return this rank's device, set as the current one, with Megatron adapted to it.

    `kind` is the result of `resolve`; `local_rank` is the rank within this host.
    """
    # Divide the cores among the ranks: OpenMP's spinning threads slow each other down many-fold.
    ranks_here = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    torch.set_num_threads(max(1, num_cores() // ranks_here))
    if kind == "cpu":
        _adapt_megatron_to_cpu()
        return Device("cpu", torch.device("cpu"), "gloo")
    if kind == "npu":
        _adapt_megatron_to_ascend()
        torch.npu.set_device(local_rank)  # type: ignore[attr-defined]
        return Device("npu", torch.device("npu", local_rank), "hccl")
    torch.cuda.set_device(local_rank)
    return Device("cuda", torch.device("cuda", local_rank), "nccl")


def _adapt_megatron_to_ascend() -> None:
    try:
        importlib.import_module("torch_npu.contrib.transfer_to_npu")
        importlib.import_module("mindspeed.megatron_adaptor")
    except ImportError as error:
        # If ranks run on other hosts than the command, the device has not been checked before.
        raise ValueError(
            f"device: 'npu' cannot be used ({error}); {ascend.SET_ENVIRONMENT}, and run `reprise doctor` there"
        ) from error


def num_cores() -> int:
    """Return the number of cores that this process may run on."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _on_cpu(function: Callable[..., Any]) -> Callable[..., Any]:
    """Return a constructor of tensors that creates on the CPU what is requested on `cuda`."""

    @functools.wraps(function)
    def construct(*args: Any, **kwargs: Any) -> Any:
        if _is_cuda(kwargs.get("device")):
            kwargs["device"] = torch.device("cpu")
        return function(*args, **kwargs)

    return construct


def _move(
    tensor: torch.Tensor, *args: Any, function: Callable[..., torch.Tensor] = torch.Tensor.to, **kwargs: Any
) -> torch.Tensor:
    """Return `Tensor.to`, with the CPU in the place of `cuda`."""
    if args and _is_cuda(args[0]):
        args = (torch.device("cpu"), *args[1:])
    if _is_cuda(kwargs.get("device")):
        kwargs["device"] = torch.device("cpu")
    return function(tensor, *args, **kwargs)


def _name_type(
    tensor: torch.Tensor, *args: Any, function: Callable[..., Any] = torch.Tensor.type, **kwargs: Any
) -> Any:
    """Return `Tensor.type`, whose names Megatron compares with those of tensors on `cuda`: torch.cuda.FloatTensor."""
    result = function(tensor, *args, **kwargs)
    return result.replace("torch.", "torch.cuda.", 1) if isinstance(result, str) else result


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
    # A torch-function mode would do the same, but would be called for every operation.
    constructors = _device_constructors()
    for name, function in list(vars(torch).items()):
        if callable(function) and function in constructors:
            setattr(torch, name, _on_cpu(function))
    torch.Tensor.to = _move  # type: ignore[method-assign, assignment]
    torch.Tensor.type = _name_type  # type: ignore[method-assign, assignment]

    # Megatron compiles its fusions on import. None of them is used here, and importing the compiler takes each rank
    # longer than everything else.
    compile_function, torch.compile = torch.compile, lambda function: function  # type: ignore[assignment]
    try:
        from megatron.core.tensor_parallel import random
    finally:
        torch.compile = compile_function

    random._get_cuda_rng_state = lambda *args, **kwargs: torch.get_rng_state()
    random._set_cuda_rng_state = lambda state, *args, **kwargs: torch.set_rng_state(state)
