"""The kernels' GPU tests, and their speed relative to the matrix product."""

import importlib.util
import subprocess
import sys
from pathlib import Path
from xml.etree import ElementTree

import torch

from benchmarks.device.record import Record
from benchmarks.device.settings import SEED, TOLERANCES, Place
from benchmarks.head import heads_on
from benchmarks.measure import device_seconds, matrix_product_speed
from kernels.series_activation import ActivationKernel, series_activation
from trainer.devices import initialise

_ROOT = Path(__file__).parents[2]
_TERMS = 2


def check_kernel_tests(place: Place, record: Record) -> None:
    """Run the kernel tests that need a GPU; on a CPU, some of those that do not."""
    if importlib.util.find_spec("pytest") is None or place.kind == "npu":
        record.figures(not_run="there are none for an NPU" if place.kind == "npu" else "pytest is not installed")
        return
    chosen = (
        ["-m", "gpu"]
        if place.kind == "cuda"
        else ["-m", "not gpu and not slow", "-k", "chunked and (large_logits or needed or padding)"]
    )
    report = place.work / "tests.xml"
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-q",
        "-p",
        "no:cacheprovider",
        *chosen,
        f"--junitxml={report.absolute()}",
    ]
    done = subprocess.run([*command, "tests/kernels"], check=False, cwd=_ROOT)
    [suite] = ElementTree.parse(report).getroot().iter("testsuite")
    counts = {name: int(suite.get(name, "0")) for name in ("tests", "failures", "errors", "skipped")}
    record.figures(**counts, exit_code=done.returncode)
    record.check("tests that failed", counts["failures"] + counts["errors"], 0)
    record.check("tests that were skipped, though a device is there", counts["skipped"], 0)
    record.check("pytest's exit code", done.returncode, 0)


def check_kernel_speed(place: Place, record: Record) -> None:
    """Measure output layer and loss, and the activation, in bfloat16 relative to the device's matrix product."""
    initialise(place.kind, 0)
    product = matrix_product_speed(place.kind, place.sizes.matrix)
    record.figures(matrix_products_flop_per_second=product)
    kernels = place.kernels
    for shape in place.sizes.heads:
        rows = heads_on(place.kind, kernels, shape, product)
        record.figures(**{f"heads_of_{' x '.join(map(str, shape))}": rows})
        for row in rows[::2]:
            what = (
                f"{row['kernel']} head, {' x '.join(map(str, shape))}: difference of the mean loss from the reference's"
            )
            record.check(what, abs(row["mean loss"] - rows[0]["mean loss"]), TOLERANCES["bfloat16"])
    record.figures(activation=_activations(place, product))


def _activations(place: Place, product: float) -> list[dict[str, object]]:
    """Return the activation's time as a share of its layer's matrix products at the speed of `product`."""
    tokens, width = place.sizes.activation
    hidden = place.sizes.large.hidden_size
    torch.manual_seed(SEED)
    options = {"device": place.kind, "dtype": torch.bfloat16}
    inputs = torch.randn(tokens, 2 * width, **options).requires_grad_()  # type: ignore[call-overload]
    scale, offset = (torch.randn(_TERMS, width, **options).requires_grad_() for _ in range(2))  # type: ignore[call-overload]
    # The layer's products with gate, up and down, one forward and two backward.
    layer_seconds = 2 * tokens * 3 * hidden * width / product
    kernels: tuple[ActivationKernel, ...] = ("reference", "triton") if place.kind == "cuda" else ("reference",)
    rows: list[dict[str, object]] = []
    for kernel in kernels:

        def forward(kernel: ActivationKernel = kernel) -> torch.Tensor:
            return series_activation(inputs, scale, offset, kernel)

        def both() -> None:
            forward().sum().backward()

        for what, work, products in (("forward", forward, 1), ("forward and backward", both, 3)):
            seconds = device_seconds(place.kind, work)
            share = seconds / (products * layer_seconds)
            rows.append({"kernel": kernel, "pass": what, "ms": seconds * 1000, "share of the layer's products": share})
    return rows
