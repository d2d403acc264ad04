"""The fused output layer and loss compared with float64, at odd shapes and real vocabulary sizes."""

import itertools
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, get_args

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from data_scoring import config
from kernels import linear_cross_entropy as module
from kernels import linear_cross_entropy_chunked, linear_cross_entropy_triton
from kernels.linear_cross_entropy import LossKernel, linear_cross_entropy, score_labels
from tests.forked_ranks import run_ranks

IS_INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = "cpu" if IS_INTERPRETED else "cuda"
# Tokens, rows of the vocabulary, channels; the large ones cross the borders of chunks.
SHAPES = [(252, 507, 123), (1, 2, 8), (129, 257, 65), (1100, 4999, 33)]
# For descriptors, which take whole multiples of 16 bytes: ends inside of tiles, and more blocks of tokens than a group.
ALIGNED_SHAPES = [(252, 507, 136), (1100, 70, 16)]
VOCABULARIES = [(5, 48_000, 24), (5, 151_936, 24)]
# A kernel may be as far from float64 as the reference in the same dtype, and one rounding further.
TOLERANCE = {torch.float32: 1e-6, torch.bfloat16: 2**-8}


@pytest.fixture(autouse=True)
def bfloat16_in_interpreter(monkeypatch: pytest.MonkeyPatch) -> None:
    """Triton 3.9's interpreter multiplies the bits of bfloat16 as if they were integers."""
    if not IS_INTERPRETED:
        return
    from triton import language as tl
    from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

    create_dot = InterpreterBuilder.create_dot

    def expanded(handle: Any) -> Any:
        if handle.dtype.scalar != tl.bfloat16:
            return handle
        return TensorHandle((handle.data.astype(np.uint32) << 16).view(np.float32), tl.float32)

    monkeypatch.setattr(
        InterpreterBuilder,
        "create_dot",
        lambda self, a, b, *rest: create_dot(self, expanded(a), expanded(b), *rest),
    )


def inputs(shape: tuple[int, int, int], dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return hidden states, weight, labels, and gradients of the losses, every third of which is zero."""
    tokens, rows, channels = shape
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(tokens, channels, generator=generator).to(dtype)
    weight = (torch.randn(rows, channels, generator=generator) * 3 * channels**-0.5).to(dtype)
    labels = torch.randint(0, rows, (tokens,), generator=generator)
    labels[:2] = torch.tensor([0, rows - 1])[: len(labels)]
    grad = torch.randn(tokens, generator=generator)
    grad[2::3] = 0
    return hidden, weight, labels, grad


def run(loss_of: Callable[..., Tensor], *tensors: Tensor) -> list[Tensor]:
    """Return the losses and the gradients of hidden states and weight."""
    hidden, weight, labels, grad = tensors
    hidden, weight = hidden.clone().requires_grad_(), weight.clone().requires_grad_()
    loss = loss_of(hidden, weight, labels)
    loss.backward(grad.to(loss.dtype))
    return [loss.detach(), hidden.grad, weight.grad]


def with_kernel(kernel: LossKernel, group: Any = None) -> Callable[..., Tensor]:
    return lambda hidden, weight, labels: linear_cross_entropy(hidden, weight, labels, kernel, group)


def truth(shape: tuple[int, int, int], dtype: torch.dtype) -> list[Tensor]:
    hidden, weight, labels, grad = inputs(shape, dtype)

    def loss_of(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
        return F.cross_entropy(hidden @ weight.t(), labels, reduction="none")

    return run(loss_of, hidden.double(), weight.double(), labels, grad)


def errors(found: list[Tensor], expected: list[Tensor]) -> list[float]:
    return [float((a.cpu().double() - b).abs().max() / b.abs().max()) for a, b in zip(found, expected, strict=True)]


def assert_as_good_as_the_reference(kernel: LossKernel, shape: tuple[int, int, int], dtype: torch.dtype) -> None:
    device = DEVICE if kernel == "triton" else "cpu"
    tensors = [tensor.to(device) for tensor in inputs(shape, dtype)]
    found = run(with_kernel(kernel), *tensors)
    assert [tensor.dtype for tensor in found] == [torch.float32, dtype, dtype]
    expected = truth(shape, dtype)
    reference = errors(run(with_kernel("reference"), *tensors), expected)
    for error, bound in zip(errors(found, expected), reference, strict=True):
        assert error <= bound + TOLERANCE[dtype]
    again = run(with_kernel(kernel), *tensors)
    assert all(torch.equal(a, b) for a, b in zip(found, again, strict=True))


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("shape", [*SHAPES, *VOCABULARIES])
def test_chunks_are_as_exact_as_the_reference_and_bitwise_reproducible(
    shape: tuple[int, int, int], dtype: torch.dtype
) -> None:
    assert_as_good_as_the_reference("chunked", shape, dtype)


@pytest.mark.parametrize("has_instructions", [True, False])
def test_chunks_in_bfloat16_are_as_exact_on_every_cpu(has_instructions: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without instructions for bfloat16, products are in float32, and logits still rounded as the reference's are."""
    monkeypatch.setattr(linear_cross_entropy_chunked, "_multiplies_bfloat16", lambda: has_instructions)
    product_dtypes = set()
    mm = torch.mm
    monkeypatch.setattr(torch, "mm", lambda a, b, out: product_dtypes.add(a.dtype) or mm(a, b, out=out))
    assert_as_good_as_the_reference("chunked", SHAPES[0], torch.bfloat16)
    assert product_dtypes == {torch.bfloat16 if has_instructions else torch.float32}
    hidden, weight, labels, _ = inputs(SHAPES[0], torch.bfloat16)
    _, _, target = linear_cross_entropy_chunked.statistics(hidden, weight, labels, SHAPES[0][1])
    assert torch.equal(target, target.bfloat16().float())


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("shape", [*SHAPES[:3], *ALIGNED_SHAPES])
def test_triton_is_as_exact_as_the_reference_and_bitwise_reproducible(
    shape: tuple[int, int, int], dtype: torch.dtype
) -> None:
    assert_as_good_as_the_reference("triton", shape, dtype)


@pytest.mark.skipif(not IS_INTERPRETED, reason="a device has one capability")
@pytest.mark.parametrize("capability", [80, 90, 100])
@pytest.mark.parametrize("width", [64, 72, 65])
def test_every_device_has_its_tiles_and_its_loads(capability: int, width: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whole blocks of channels, an end of a block, and rows that no descriptor takes."""
    launches: list[Any] = []
    launch_of = linear_cross_entropy_triton._Launch

    def launch(*tensors: Tensor) -> Any:
        launches.append(launch_of(*tensors))
        return launches[-1]

    monkeypatch.setattr(linear_cross_entropy_triton, "_INTERPRETED", (capability, 3))
    monkeypatch.setattr(linear_cross_entropy_triton, "_Launch", launch)
    assert_as_good_as_the_reference("triton", (129, 300, width), torch.bfloat16)
    assert {each.options["HAS_DESCRIPTORS"] for each in launches} == {capability >= 90 and width != 65}
    assert {each.options["IS_EVEN"] for each in launches} == {width == 64}
    assert {each.tile.block_v for each in launches} == {256 if capability == 90 and width != 65 else 128}


@pytest.mark.skipif(not IS_INTERPRETED, reason="a device has one number of multiprocessors")
@pytest.mark.parametrize(
    ("tokens", "rows", "programs", "tiles"),
    [(8192, 48_000, 132, 64 * 188), (8192, 131_072, 132, 64 * 512), (130, 300, 4, 2 * 2)],
)
def test_a_program_per_multiprocessor_takes_whole_waves_of_tiles(
    tokens: int, rows: int, programs: int, tiles: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(linear_cross_entropy_triton, "_INTERPRETED", (90, 132))
    hidden, weight = (torch.empty(size, 8, dtype=torch.bfloat16) for size in (tokens, rows))
    launch = linear_cross_entropy_triton._Launch(hidden, weight)
    assert launch.grid(rows) == (programs,)
    assert -(-tokens // launch.tile.block_n) * -(-rows // launch.tile.block_v) == tiles
    assert tiles / programs / -(-tiles // programs) > 0.97


@pytest.mark.skipif(not IS_INTERPRETED, reason="it is the interpreter's number of multiprocessors that changes")
def test_the_number_of_multiprocessors_changes_no_result(monkeypatch: pytest.MonkeyPatch) -> None:
    tensors = inputs((300, 700, 24), torch.float32)
    found = []
    for processors in (1, 7, 132):
        monkeypatch.setattr(linear_cross_entropy_triton, "_INTERPRETED", (90, processors))
        found.append(run(with_kernel("triton"), *tensors))
    for other in found[1:]:
        assert all(torch.equal(a, b) for a, b in zip(found[0], other, strict=True))


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("kernel", ["reference", "chunked", "triton"])
@pytest.mark.parametrize(
    ("shape", "num_rows"), [((7, 40, 12), 33), ((9, 384, 16), 300), ((9, 384, 16), 257), ((5, 4224, 8), 4097)]
)
def test_rows_of_padding_count_for_nothing(
    shape: tuple[int, int, int], num_rows: int, kernel: LossKernel, dtype: torch.dtype
) -> None:
    hidden, weight, labels, grad = inputs(shape, dtype)
    # Padding with the greatest logits would show.
    weight[num_rows:] = 10 * hidden[0]
    labels = labels % num_rows
    device = DEVICE if kernel == "triton" else "cpu"

    def loss_of(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
        return linear_cross_entropy(hidden, weight, labels, kernel, num_rows=num_rows)

    def cut(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
        return linear_cross_entropy(hidden, weight[:num_rows], labels, kernel)

    tensors = [tensor.to(device) for tensor in (hidden, weight, labels, grad)]
    found, expected = run(loss_of, *tensors), run(cut, *tensors)
    assert max(errors(found, [each.cpu().double() for each in expected])) < TOLERANCE[dtype]
    assert not found[2][num_rows:].any()


def judged(shape: tuple[int, int, int]) -> tuple[Tensor, Tensor, Tensor, int]:
    """Return hidden states, weight, labels, every other one the most probable, and the rows that are no padding."""
    hidden, weight, labels, _ = inputs(shape, torch.float32)
    num_rows = shape[1] - 5
    labels = labels % num_rows
    labels[::2] = (hidden.double() @ weight[:num_rows].double().t()).argmax(dim=1)[::2]
    return hidden, weight, labels, num_rows


@pytest.mark.parametrize("kernel", ["reference", "chunked", "triton"])
@pytest.mark.parametrize("shape", SHAPES[:3])
def test_the_most_probable_label_is_told(kernel: LossKernel, shape: tuple[int, int, int]) -> None:
    *tensors, num_rows = judged(shape) if shape[1] > 5 else (*inputs(shape, torch.float32)[:3], 2)
    hidden, weight, labels = (tensor.to(DEVICE if kernel == "triton" else "cpu") for tensor in tensors)
    losses, are_greatest = score_labels(hidden, weight, labels, kernel, num_rows=num_rows)
    logits = hidden.cpu().double() @ weight[:num_rows].cpu().double().t()
    expected = F.cross_entropy(logits, labels.cpu(), reduction="none")
    assert float((losses.cpu() - expected).abs().max()) < 1e-5
    assert torch.equal(are_greatest.cpu(), logits.argmax(dim=1) == labels.cpu())
    assert not losses.requires_grad


@pytest.mark.parametrize("kernel", ["reference", "chunked"])
@pytest.mark.parametrize("shape", [SHAPES[0], SHAPES[3]])
def test_of_labels_that_rounding_makes_equal_the_first_is_told(kernel: LossKernel, shape: tuple[int, int, int]) -> None:
    """Labels are the last of the greatest, which are several for many tokens in bfloat16: argmax has the first."""
    hidden, weight, _, _ = inputs(shape, torch.bfloat16)
    logits = F.linear(hidden, weight)
    is_greatest = logits == logits.amax(dim=1, keepdim=True)
    labels = (is_greatest * torch.arange(shape[1])).argmax(dim=1)
    expected = is_greatest.sum(dim=1) == 1
    assert 0.01 < 1 - expected.float().mean() < 0.5
    assert torch.equal(score_labels(hidden, weight, labels, kernel)[1], expected)
    assert score_labels(hidden, weight, logits.argmax(dim=1), kernel)[1].all()


@pytest.mark.parametrize("shape", VOCABULARIES)
def test_triton_at_large_vocabularies(shape: tuple[int, int, int], monkeypatch: pytest.MonkeyPatch) -> None:
    if IS_INTERPRETED:
        # The interpreter's time goes by the number of tiles, whatever their size.
        large = linear_cross_entropy_triton._SINGLE_TILE._replace(block_n=16, block_v=16_384)
        monkeypatch.setattr(linear_cross_entropy_triton, "_SINGLE_TILE", large)
    assert_as_good_as_the_reference("triton", shape, torch.float32)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("shape", [(4096, 48_000, 1792), (2048, 131_072, 4096)])
def test_triton_on_a_gpu(shape: tuple[int, int, int], dtype: torch.dtype) -> None:
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    assert_as_good_as_the_reference("triton", shape, dtype)


@pytest.mark.parametrize("kernel", ["chunked", "triton"])
def test_large_logits_do_not_overflow(kernel: LossKernel) -> None:
    hidden = torch.full((3, 8), 100.0, device=DEVICE)
    weight = torch.arange(300.0, device=DEVICE)[:, None].expand(300, 8).contiguous()
    labels = torch.tensor([299, 298, 0], device=DEVICE)
    losses = linear_cross_entropy(hidden, weight, labels, kernel)
    assert losses.tolist() == pytest.approx([0.0, 800.0, 299 * 800.0])


@pytest.mark.parametrize("kernel", ["chunked", "triton"])
def test_only_the_gradients_that_are_needed_are_computed(kernel: LossKernel) -> None:
    hidden, weight, labels, grad = (tensor.to(DEVICE) for tensor in inputs((9, 70, 8), torch.float32))
    whole = run(with_kernel(kernel), hidden, weight, labels, grad)
    wanted = hidden.clone().requires_grad_()
    linear_cross_entropy(wanted, weight, labels, kernel).backward(grad)
    assert torch.equal(wanted.grad, whole[1])
    wanted = weight.clone().requires_grad_()
    linear_cross_entropy(hidden, wanted, labels, kernel).backward(grad)
    assert torch.equal(wanted.grad, whole[2])


def _rank(rank: int, ranks: int, folder: Path) -> None:
    torch.set_num_threads(1)
    store = torch.distributed.FileStore(str(folder / "store"), ranks)
    torch.distributed.init_process_group("gloo", store=store, rank=rank, world_size=ranks)
    reduced: list[tuple[int, ...]] = []

    def counted(tensor: Tensor, *arguments: Any) -> None:
        reduced.append(tuple(tensor.shape))
        torch.distributed.all_reduce(tensor, *arguments)

    module.all_reduce = counted
    hidden, weight, labels, grad = inputs(SHARDED, torch.float32)
    part = weight.chunk(ranks)[rank]
    group = torch.distributed.group.WORLD
    results = {
        kernel: run(with_kernel(kernel, group), hidden, part, labels, grad) for kernel in ("reference", "chunked")
    }
    # The second rank has padding alone.
    padded = {
        kernel: run(
            lambda *tensors, kernel=kernel: linear_cross_entropy(*tensors, kernel, group, FEW),
            hidden, part, labels % FEW, grad,
        )
        for kernel in ("reference", "chunked")
    }  # fmt: skip
    hidden, weight, labels, num_rows = judged(SHARDED)
    part = weight.chunk(ranks)[rank]
    told = {kernel: score_labels(hidden, part, labels, kernel, group, num_rows) for kernel in results}
    # Where both ranks have the same rows, a label of the second has its like on the first.
    again = {
        kernel: [score_labels(hidden, weight, labels + first, kernel, group)[1] for first in (0, len(weight))]
        for kernel in results
    }
    found = {"results": results, "padded": padded, "reduced": reduced[:6], "told": told, "again": again}
    torch.save(found, folder / f"{rank}.pt")
    torch.distributed.destroy_process_group()


SHARDED = (252, 506, 123)
# Rows that are no padding, on the first of two ranks.
FEW = 200


def test_ranks_with_parts_of_the_vocabulary_agree_with_one_and_exchange_little(tmp_path: Path) -> None:
    run_ranks(_rank, 2, tmp_path, num_ranks=2)
    found = [torch.load(tmp_path / f"{rank}.pt") for rank in range(2)]
    expected = run(with_kernel("reference"), *inputs(SHARDED, torch.float32))
    tokens, _, channels = SHARDED
    for kernel in ("reference", "chunked"):
        (loss, hidden_grad, part), (other_loss, other_hidden_grad, other_part) = (
            entry["results"][kernel] for entry in found
        )
        assert torch.equal(loss, other_loss)
        assert torch.equal(hidden_grad, other_hidden_grad)
        for tensor, one in zip((loss, hidden_grad, torch.cat([part, other_part])), expected, strict=True):
            torch.testing.assert_close(tensor, one, atol=2e-6, rtol=1e-5)
    hidden, weight, labels, grad = inputs(SHARDED, torch.float32)
    expected = run(with_kernel("reference"), hidden, weight[:FEW], labels % FEW, grad)
    for kernel, rank in itertools.product(("reference", "chunked"), range(2)):
        loss, hidden_grad, part = found[rank]["padded"][kernel]
        whole = torch.zeros_like(part) if rank else torch.cat([expected[2], torch.zeros(len(part) - FEW, channels)])
        for tensor, one in zip((loss, hidden_grad, part), (*expected[:2], whole), strict=True):
            torch.testing.assert_close(tensor, one, atol=2e-6, rtol=1e-5)
    hidden, weight, labels, num_rows = judged(SHARDED)
    logits = hidden @ weight[:num_rows].t()
    for kernel, rank in itertools.product(("reference", "chunked"), found):
        losses, are_greatest = rank["told"][kernel]
        torch.testing.assert_close(losses, F.cross_entropy(logits, labels, reduction="none"), atol=2e-6, rtol=1e-5)
        assert torch.equal(are_greatest, logits.argmax(dim=1) == labels)
        on_first, on_second = rank["again"][kernel]
        assert torch.equal(on_first, (hidden @ weight.t()).argmax(dim=1) == labels)
        assert on_first.any() and not on_second.any()
    # Of each kernel: the maxima, the sums with the targets, and in the backward pass the hidden states' gradient.
    assert found[0]["reduced"] == [(tokens,), (2, tokens), (tokens, channels)] * 2


MEMORY = """
import re
from pathlib import Path
import torch
from kernels.linear_cross_entropy import linear_cross_entropy

def peak():
    return int(re.search(r"VmHWM:\\s+(\\d+) kB", Path("/proc/self/status").read_text())[1]) / 1024

hidden, weight, labels = torch.ones(1024, 24), torch.ones(151_936, 24), torch.zeros(1024, dtype=torch.int64)
Path("/proc/self/clear_refs").write_text("5")
before = peak()
with torch.no_grad():
    linear_cross_entropy(hidden, weight, labels, "chunked")
print(peak() - before)
"""


@pytest.mark.parametrize("kernel", ["reference", "chunked", "triton"])
def test_a_rank_with_padding_alone_has_no_probability(kernel: LossKernel) -> None:
    """Its statistics are those of no rows, and its gradients 0."""
    hidden, weight, labels, grad = (tensor.to(DEVICE) for tensor in inputs((9, 70, 8), torch.float32))
    if kernel == "reference":
        maximum, total, target = module._reference_statistics(hidden, weight, labels, 0, torch.zeros_like(labels))
        assert target.tolist() == [0] * 9 and set(maximum.tolist()) == {-torch.inf}
        return
    functions = module._kernel(kernel)
    maximum, total, target = functions.statistics(hidden, weight, labels, 0)
    assert set(maximum.tolist()) == {-torch.inf} and not total.any() and not target.any()
    hidden_grad, weight_grad = functions.gradients(hidden, weight, labels, grad, grad, 0, True, True)
    assert not hidden_grad.any() and not weight_grad.any()


def test_scoring_holds_64_megabytes_of_a_large_vocabulary_at_most() -> None:
    """The peak of a fresh process's memory, code loaded on first use included; the logits would take 593 MiB."""
    megabytes = float(subprocess.run([sys.executable, "-c", MEMORY], capture_output=True, text=True, check=True).stdout)
    assert megabytes * 1.048576 < 64


def test_configurations_offer_the_kernels_that_there_are() -> None:
    assert get_args(config.LossKernel) == ("auto", *get_args(LossKernel))
