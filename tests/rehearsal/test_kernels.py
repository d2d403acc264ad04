"""Triton kernels compiled for absent devices: ptxas's report and their instructions."""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

# Shared memory that a program may ask for, in KiB, and what multiplies matrices on tensor cores.
ARCHITECTURES = {
    "sm_80": (163, "mma.sync"),
    "sm_90a": (227, "wgmma.mma_async"),
    "sm_100a": (227, "tcgen05.mma"),
}
HEAD = "kernels.linear_cross_entropy_triton"
ACTIVATION = "kernels.series_activation_triton"
KERNELS = [f"{HEAD}._statistics", f"{HEAD}._logit_gradients", f"{ACTIVATION}._activate", f"{ACTIVATION}._gradients"]


@pytest.fixture(scope="module")
def compiled(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """All variants of the kernels, and the kernels of which there is none."""
    if importlib.util.find_spec("triton") is None:
        pytest.skip("kernels are compiled by Triton, which is an extra and not installed")
    # Here the tests of the kernels interpret them, and so nothing can be compiled.
    environment = {name: value for name, value in os.environ.items() if not name.startswith("TRITON_")}
    environment["TRITON_CACHE_DIR"] = str(tmp_path_factory.mktemp("triton"))
    environment["PYTHONPATH"] = str(Path(__file__).parents[2])
    script = Path(__file__).with_name("compile_kernels.py")
    command = [sys.executable, str(script), "80", "90", "100"]
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)  # type: ignore[no-any-return]


def variants_of(compiled: dict[str, Any], name: str, architecture: str) -> list[dict[str, Any]]:
    variants = [
        each
        for each in compiled["variants"]
        if (each["name"], each["architecture"], each["dtype"]) == (name, architecture, "bfloat16")
    ]
    assert variants
    return variants


def test_every_kernel_is_compiled(compiled: dict[str, Any]) -> None:
    assert compiled["unused"] == [], "have `compile_kernels` launch these, and name them in KERNELS"
    found = {(each["name"], each["architecture"]) for each in compiled["variants"]}
    assert found == {(name, architecture) for name in KERNELS for architecture in ARCHITECTURES}


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_no_register_is_spilled(compiled: dict[str, Any], dtype: str) -> None:
    spilled = [each for each in compiled["variants"] if each["dtype"] == dtype and each["spilled_bytes"]]
    assert spilled == []


@pytest.mark.parametrize("name", [name for name in KERNELS if name.startswith(HEAD)])
def test_tiles_are_loaded_by_descriptor_where_devices_have_them(compiled: dict[str, Any], name: str) -> None:
    for architecture in ARCHITECTURES:
        for each in variants_of(compiled, name, architecture):
            has_descriptors = architecture != "sm_80" and each["width"] % 8 == 0
            assert (each["descriptor_loads"] > 0) == has_descriptors, each
    # Both ways are compiled for Hopper.
    assert len({each["descriptor_loads"] > 0 for each in variants_of(compiled, name, "sm_90a")}) == 2


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("name", KERNELS)
def test_shared_memory_is_the_devices(compiled: dict[str, Any], name: str, architecture: str) -> None:
    limit, _ = ARCHITECTURES[architecture]
    for each in compiled["variants"]:
        if (each["name"], each["architecture"]) == (name, architecture):
            assert each["shared_bytes"] <= limit * 1024, each


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("name", KERNELS)
def test_products_are_the_tensor_cores(compiled: dict[str, Any], name: str, architecture: str) -> None:
    _, instruction = ARCHITECTURES[architecture]
    for each in variants_of(compiled, name, architecture):
        assert each["has_products"] == name.startswith(HEAD)
        assert list(each["tensor_cores"]) == ([instruction] if each["has_products"] else []), each


@pytest.mark.parametrize("name", KERNELS)
def test_single_precision_has_no_tensor_cores(compiled: dict[str, Any], name: str) -> None:
    # Those would round to TF32.
    variants = [each for each in compiled["variants"] if (each["name"], each["dtype"]) == (name, "float32")]
    assert variants
    assert not any(each["tensor_cores"] for each in variants)
