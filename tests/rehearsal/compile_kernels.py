"""Compiles every Triton kernel that the presets launch for absent devices, and prints the results.

usage: python tests/rehearsal/compile_kernels.py ARCHITECTURE…, numbers such as 90, in a process without Triton's
interpreter mode. The functions that launch kernels are called as usual, on tensors without data, and Triton compiles
the launched kernels with the usual specialisation. Prints a JSON object: the variants, and the kernels without any.
"""

import contextlib
import importlib
import io
import json
import re
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import torch
import triton
from triton import knobs
from triton.backends.compiler import GPUTarget
from triton.runtime.jit import JITFunction

import kernels
from data_scoring.config import padded_vocab_size
from trainer.config import ModelConfig
from trainer.presets import PRESETS

# What stands in the place of a vocabulary that is the tokenizer's, and the tokens of two samples of 2,048.
_VOCAB_SIZE, _NUM_TOKENS = 32_000, 4096
# Single precision is nobody's default: one preset on one architecture says that it compiles.
_SINGLE_PRECISION = ("pangu-pi-1b-pro", 90)
# Rows that no descriptor takes.
_UNALIGNED = ModelConfig(hidden_size=516, num_attention_heads=6, vocab_size=48_000)
# What multiplies matrices on tensor cores, by the generation's name for it.
_TENSOR_CORES = ("mma.sync", "wgmma.mma_async", "tcgen05.mma")


def main(architectures: list[int]) -> None:
    """Compile, and print the variants."""
    modules = [
        importlib.import_module(f"kernels.{path.stem}")
        for path in sorted(Path(kernels.__file__).parent.glob("*_triton.py"))
    ]
    # By the compiled kernel's number; the kernel is kept beside, lest another gets that number.
    variants: dict[int, tuple[Any, dict[str, Any]]] = {}
    for architecture in architectures:
        triton.runtime.driver.set_active(_Driver(architecture))
        with _compiling(variants):
            for name in PRESETS:
                _launch(modules, ModelConfig(preset=name), torch.bfloat16)
            if architecture == _SINGLE_PRECISION[1]:
                _launch(modules, ModelConfig(preset=_SINGLE_PRECISION[0]), torch.float32)
                _launch(modules, _UNALIGNED, torch.bfloat16)
    found = [variant for _, variant in variants.values()]
    print(json.dumps({"variants": found, "unused": _find_unused(modules, {each["name"] for each in found})}))


class _Driver(SimpleNamespace):
    """What Triton asks of a driver before it launches: which device, of what architecture."""

    def __init__(self, architecture: int) -> None:
        super().__init__(
            get_current_device=lambda: architecture,
            get_current_stream=lambda device: 0,
            get_current_target=lambda: GPUTarget("cuda", architecture, 32),
            utils=SimpleNamespace(get_device_properties=lambda device: {"multiprocessor_count": 132}),
        )


@contextlib.contextmanager
def _compiling(variants: dict[int, tuple[Any, dict[str, Any]]]) -> Iterator[None]:
    """Compile what is launched, and no more, into `variants`."""
    run = JITFunction.run

    def compile_only(self: Any, *args: Any, warmup: bool, **options: Any) -> Any:
        log = io.StringIO()
        with contextlib.redirect_stdout(log):
            kernel = run(self, *args, warmup=True, **options)
        if id(kernel) not in variants:
            variants[id(kernel)] = kernel, _describe(self, kernel, args, log.getvalue())
        return kernel

    knobs.nvidia.dump_ptxas_log = True
    JITFunction.run = compile_only
    try:
        yield
    finally:
        JITFunction.run = run


def _describe(function: Any, kernel: Any, args: tuple[Any, ...], log: str) -> dict[str, Any]:
    """Return what ptxas says of a variant, and which instructions it has."""
    spills = re.findall(r"(\d+) bytes spill (?:stores|loads)", log)
    registers = re.search(r"Used (\d+) registers", log)
    assert registers is not None, log
    ptx = kernel.asm["ptx"]
    return {
        "name": f"{function.fn.__module__}.{function.fn.__name__}",
        "architecture": re.search(r"\.target (sm_\w+)", ptx)[1],  # type: ignore[index]
        "dtype": str(getattr(args[0], "base", args[0]).dtype).removeprefix("torch."),
        "sizes": [value for value in args if isinstance(value, int)],
        "width": next((each for each in reversed(args) if isinstance(each, int)), 0),
        "spilled_bytes": sum(map(int, spills)),
        "registers": int(registers[1]),
        "shared_bytes": kernel.metadata.shared,
        "has_products": "tt.dot" in kernel.asm["ttir"],
        "descriptor_loads": ptx.count("cp.async.bulk.tensor"),
        "tensor_cores": {name: ptx.count(name) for name in _TENSOR_CORES if name in ptx},
    }


def _launch(modules: list[ModuleType], model: ModelConfig, dtype: torch.dtype) -> None:
    for module in modules:
        launch = _LAUNCHES.get(module.__name__)
        if launch is not None:
            launch(module, model, dtype)


def _launch_head(module: Any, model: ModelConfig, dtype: torch.dtype) -> None:
    hidden_nh = torch.empty(_NUM_TOKENS, model.hidden_size, dtype=dtype, device="meta")
    num_rows = model.vocab_size or _VOCAB_SIZE
    weight_vh = torch.empty(padded_vocab_size(num_rows), model.hidden_size, dtype=dtype, device="meta")
    labels_n = torch.empty(_NUM_TOKENS, dtype=torch.int64, device="meta")
    number_n = torch.empty(_NUM_TOKENS, device="meta")
    module.statistics(hidden_nh, weight_vh, labels_n, num_rows)
    module.gradients(hidden_nh, weight_vh, labels_n, number_n, number_n, num_rows, True, True)


def _launch_activation(module: Any, model: ModelConfig, dtype: torch.dtype) -> None:
    if model.activation_terms == 1:
        return
    inputs_n2c = torch.empty(_NUM_TOKENS, 2 * model.ffn_size, dtype=dtype, device="meta")
    weights = [torch.empty(model.activation_terms, model.ffn_size, dtype=dtype, device="meta") for _ in range(2)]
    module.activate(inputs_n2c, *weights)
    module.gradients(inputs_n2c, *weights, inputs_n2c[:, : model.ffn_size].contiguous())


# How each module's kernels are launched: all of its public functions.
_LAUNCHES: dict[str, Callable[[Any, ModelConfig, torch.dtype], None]] = {
    "kernels.linear_cross_entropy_triton": _launch_head,
    "kernels.series_activation_triton": _launch_activation,
}


def _find_unused(modules: list[ModuleType], compiled: set[str]) -> list[str]:
    """Return the kernels of all modules that have neither been compiled nor are called by one that has been."""
    functions = {
        f"{module.__name__}.{name}": each
        for module in modules
        for name, each in vars(module).items()
        if isinstance(each, JITFunction)
    }
    called = {name for key in compiled for name in functions[key].fn.__code__.co_names}
    return sorted(key for key in functions if key not in compiled and key.rpartition(".")[2] not in called)


if __name__ == "__main__":
    main([int(each) for each in sys.argv[1:]])
