"""Every job on simulated NPUs: a separate device type in host memory that rejects what an NPU rejects.

This does not cover the computations of HCCL and of the NPU's own kernels (see docs/devices.md). If REPRISE_MINDSPEED is
the path of a checkout of MindSpeed's branch core_r0.16.0, its adaptor is used.
"""

import os
import subprocess
import sys
from collections.abc import Callable
from functools import cache
from pathlib import Path

import numpy as np
import pytest

from data_scoring.base.files import read_json
from data_scoring.corpus.corpus import Corpus
from tests.rehearsal.npu_jobs import STEPS, STOPPED_AT, Layout, Numbers, Place, read_results
from tests.rehearsal.npu_library import compile_library, find_compiler

HERE = Path(__file__).parent
MINDSPEED = os.environ.get("REPRISE_MINDSPEED")
LAYOUTS = {"one": (1, 1, 1), "tensor and sequence": (2, 1, 1), "pipeline": (1, 2, 1), "data": (1, 1, 2)}
# Of float32, and of bfloat16, whose sums go in other orders from one layout to the next.
TOLERANCES = {"float32": 1e-4, "bfloat16": 1e-2}
ADAPTORS = {"stand-in": HERE / "npu_adaptor", "MindSpeed": MINDSPEED}

Results = dict[str, Numbers]


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The simulated device."""
    compiler = find_compiler()
    if compiler is None:
        pytest.skip("needs a C++ compiler, which users do not")
    target = tmp_path_factory.mktemp("npu") / "npu_device.so"
    compile_library(compiler, target)
    return target


def environment(library: Path, adaptor: Path | str) -> dict[str, str]:
    """Return the variables of a process that has simulated NPUs."""
    path = [HERE / "npu_packages", adaptor, Path.cwd()]
    # What MindSpeed imports and does not use: no compiler, nor the real Triton, is wanted.
    if adaptor == MINDSPEED:
        path.insert(0, HERE / "npu_stubs")
    return {"SIMULATED_NPU": str(library), "PYTHONPATH": os.pathsep.join(map(str, path))}


@pytest.fixture(scope="module")
def on_cpu(tiny_corpus: Corpus, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], tuple[Path, Results]]:
    """Returns, for a precision, the checkpoint that jobs begin with, and what they find on a single CPU rank."""
    variables = {"PYTHONPATH": str(Path.cwd())}

    @cache
    def run(precision: str) -> tuple[Path, Results]:
        folder, layout = tmp_path_factory.mktemp("cpu"), Layout("cpu", precision=precision)
        weights = Place(tiny_corpus, folder / "start", variables).start(layout)
        Place(tiny_corpus, folder / "jobs", variables).run(layout, weights)
        return weights, read_results(folder / "jobs")

    return run


CASES = [
    ("stand-in", "one", "float32"),
    ("stand-in", "tensor and sequence", "float32"),
    ("stand-in", "pipeline", "float32"),
    ("stand-in", "data", "float32"),
    ("stand-in", "one", "bfloat16"),
    ("stand-in", "tensor and sequence", "bfloat16"),
    ("stand-in", "pipeline", "bfloat16"),
    ("MindSpeed", "one", "float32"),
    ("MindSpeed", "tensor and sequence", "float32"),
    ("MindSpeed", "pipeline", "float32"),
    ("MindSpeed", "one", "bfloat16"),
]


# One case runs every time, so that the rehearsal keeps up with what it rehearses.
@pytest.mark.parametrize(
    ("adaptor", "name", "precision"),
    [pytest.param(*case, marks=() if case == ("stand-in", "one", "bfloat16") else pytest.mark.slow) for case in CASES],
)
def test_jobs_find_what_they_find_on_the_cpu(
    adaptor: str,
    name: str,
    precision: str,
    library: Path,
    tiny_corpus: Corpus,
    on_cpu: Callable[[str], tuple[Path, Results]],
    tmp_path: Path,
) -> None:
    path = ADAPTORS[adaptor]
    if path is None:
        pytest.skip("REPRISE_MINDSPEED names no checkout of MindSpeed")
    weights, expected = on_cpu(precision)
    tensor, pipeline, data = LAYOUTS[name]
    place = Place(tiny_corpus, tmp_path / "npu", environment(library, path))
    place.run(Layout("npu", tensor, pipeline, data, precision), weights)
    found = read_results(tmp_path / "npu")
    differences = {job: compare(found[job], expected[job]) for job in expected}
    print(
        f"{adaptor}, {name}, {precision}: largest differences",
        {job: f"{value:.1e}" for job, value in differences.items()},
    )
    assert len(found["stopped"]["loss"]) == len(found["trained"]["loss"]) == STEPS
    # Going on, after step 3, is as if nobody had stopped. Each checkpoint begins new files of losses.
    firsts = {path.name.partition("-")[0] for path in (tmp_path / "npu" / "stopped" / "seen").glob("*.parquet")}
    assert firsts == {f"step={step:08d}" for step in (1, 3, STOPPED_AT + 1, 5)}
    assert compare(found["stopped"], found["trained"]) <= TOLERANCES[precision] / 10
    assert read_json(tmp_path / "npu" / "generation.json")["device"] == "npu"
    for job, difference in differences.items():
        assert difference <= TOLERANCES[precision], job


def compare(found: Numbers, expected: Numbers) -> float:
    """Return the largest difference, relative to the largest number where that is above 1."""
    assert found.keys() == expected.keys()
    differences = []
    for name, numbers in expected.items():
        assert found[name].shape == numbers.shape, name
        assert np.isfinite(numbers).all()
        differences.append(np.abs(found[name] - numbers).max() / max(1.0, np.abs(numbers).max()))
    return float(max(differences))


REFUSED = """
import torch
import torch_npu
from torch_npu.contrib import transfer_to_npu
device, host = torch.ones(3, device="npu"), torch.ones(3)
assert torch.zeros(2, device="cuda").device.type == host.cuda().device.type == "npu"
assert (device * 2).cpu().tolist() == [2.0, 2.0, 2.0]
assert (device + torch.tensor(1.0)).device.type == "npu"
{code}
"""


@pytest.mark.slow
@pytest.mark.parametrize(
    ("code", "reason"),
    [
        ("device + host", "found at least two devices, npu:0 and cpu!"),
        ("torch.cat([device, host])", "tensors of npu and cpu are mixed"),
        ("device[torch.tensor([0, 1])]", "aten::index: tensors of npu and cpu are mixed"),
        ("device.double() + 1", "an NPU does not compute in float64"),
        ("group(host)", "hccl takes device tensors, and one is on cpu"),
        ("group(device.to(torch.float64))", "hccl does not reduce torch.float64"),
        ("group(device > 0)", "hccl does not reduce torch.bool"),
        ("group(torch.ones(2, 2, device='npu').t())", "hccl takes contiguous tensors alone"),
    ],
)
def test_the_simulated_device_refuses_what_an_npu_refuses(code: str, reason: str, library: Path) -> None:
    group = (
        "def group(tensor):\n"
        "    import torch.distributed as dist\n"
        "    dist.init_process_group('hccl', store=dist.HashStore(), rank=0, world_size=1)\n"
        "    dist.all_reduce(tensor)\n"
    )
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", REFUSED.format(code=group + code)],
        env={**os.environ, **environment(library, ADAPTORS["stand-in"] or "")},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 1
    assert reason in done.stderr, done.stderr
