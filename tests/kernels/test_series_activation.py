"""The fused series informed activation compared with float64, at odd shapes and numbers of terms."""

import os
from typing import Any, get_args

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from kernels import series_activation_recompute
from kernels.series_activation import ActivationKernel, series_activation
from trainer import config

IS_INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = "cpu" if IS_INTERPRETED else "cuda"
# Leading dimensions, channels, terms; tiles are of 32 tokens and 64 channels.
SHAPES = [((5, 3), 7, 1), ((65, 2), 70, 2), ((1,), 129, 3), ((200,), 64, 4)]
# A kernel may be as far from float64 as the reference in the same dtype, and one rounding further.
TOLERANCE = {torch.float32: 1e-6, torch.bfloat16: 2**-8}


def inputs(shape: tuple[tuple[int, ...], int, int], dtype: torch.dtype) -> list[Tensor]:
    """Return gate and up, scales, offsets, and the gradient of the result."""
    leading, channels, terms = shape
    generator = torch.Generator().manual_seed(0)
    shapes = ((*leading, 2 * channels), (terms, channels), (terms, channels), (*leading, channels))
    return [torch.randn(each, generator=generator).to(dtype) for each in shapes]


def run(kernel: ActivationKernel, tensors: list[Tensor]) -> list[Tensor]:
    """Return the result and the gradients of all inputs."""
    *arguments, grad = tensors
    arguments = [argument.clone().requires_grad_() for argument in arguments]
    out = series_activation(*arguments, kernel)
    out.backward(grad)
    return [out.detach(), *(argument.grad for argument in arguments if argument.grad is not None)]


def truth(tensors: list[Tensor]) -> list[Tensor]:
    """Return the same by formula, in float64."""
    gate_and_up, scale, offset, grad = (tensor.cpu().double() for tensor in tensors)
    x, u = gate_and_up.chunk(2, dim=-1)
    z = x[..., None, :] * scale + offset
    sigmoid = torch.sigmoid(z)
    slope = sigmoid * (1 + z * (1 - sigmoid))
    total = (z * sigmoid).sum(dim=-2)
    tokens = tuple(range(x.dim() - 1))
    by_term = (grad * u)[..., None, :] * slope
    return [
        total * u,
        torch.cat([(by_term * scale).sum(dim=-2), grad * total], dim=-1),
        (by_term * x[..., None, :]).sum(dim=tokens),
        by_term.sum(dim=tokens),
    ]


def errors(found: list[Tensor], expected: list[Tensor]) -> list[float]:
    return [float((a.cpu().double() - b).abs().max() / b.abs().max()) for a, b in zip(found, expected, strict=True)]


def assert_as_good_as_the_reference(
    kernel: ActivationKernel, shape: tuple[tuple[int, ...], int, int], dtype: torch.dtype
) -> None:
    tensors = [tensor.to(DEVICE) for tensor in inputs(shape, dtype)]
    found, expected = run(kernel, tensors), truth(tensors)
    assert {tensor.dtype for tensor in found} == {dtype}
    for error, bound in zip(errors(found, expected), errors(run("reference", tensors), expected), strict=True):
        assert error <= bound + TOLERANCE[dtype]
    assert all(torch.equal(a, b) for a, b in zip(found, run(kernel, tensors), strict=True))


@pytest.mark.parametrize("shape", SHAPES)
def test_the_reference_is_the_formula(shape: tuple[tuple[int, ...], int, int]) -> None:
    tensors = [tensor.double() for tensor in inputs(shape, torch.float32)]
    assert max(errors(run("reference", tensors), truth(tensors))) < 1e-12


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("kernel", ["recompute", "triton"])
def test_kernels_are_as_exact_as_the_reference_and_bitwise_reproducible(
    kernel: ActivationKernel, shape: tuple[tuple[int, ...], int, int], dtype: torch.dtype
) -> None:
    assert_as_good_as_the_reference(kernel, shape, dtype)


@pytest.mark.parametrize("dtype", TOLERANCE)
def test_recomputing_block_by_block_of_tokens_adds_up(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(series_activation_recompute, "_CPU_ELEMENTS", 30 * 70)
    assert_as_good_as_the_reference("recompute", SHAPES[1], dtype)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("shape", [((4096, 2), 4864, 2), ((1000, 3), 5461, 4)])
def test_triton_on_a_gpu(shape: tuple[tuple[int, ...], int, int], dtype: torch.dtype) -> None:
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    assert_as_good_as_the_reference("triton", shape, dtype)


def test_scales_shared_by_all_channels_get_the_sum_of_their_gradients() -> None:
    gate_and_up, _, _, grad = (tensor.to(DEVICE) for tensor in inputs(((66,), 70, 2), torch.float32))
    gradients = []
    for kernel in get_args(ActivationKernel):
        scale = torch.tensor([[1.0], [-0.5]], device=DEVICE, requires_grad=True)
        offset = torch.tensor([[0.0], [0.3]], device=DEVICE, requires_grad=True)
        series_activation(gate_and_up, scale.expand(-1, 70), offset.expand(-1, 70), kernel).backward(grad)
        gradients.append((scale.grad, offset.grad))
    for other in gradients[1:]:
        torch.testing.assert_close(gradients[0], other, atol=1e-4, rtol=1e-5)


def test_the_plain_activation_is_a_case_of_it() -> None:
    gate_and_up, scale, offset, _ = inputs(((9, 2), 12, 2), torch.float32)
    gate, up = gate_and_up.chunk(2, dim=-1)
    scale[0], scale[1], offset[:] = 1, 0, 0
    assert torch.equal(series_activation(gate_and_up, scale, offset, "reference"), F.silu(gate.contiguous()) * up)


def test_the_backward_pass_of_fused_kernels_keeps_the_inputs_alone() -> None:
    kept: dict[str, list[Any]] = {}
    for kernel in get_args(ActivationKernel):
        tensors = [tensor.to(DEVICE).requires_grad_() for tensor in inputs(((64,), 32, 2), torch.float32)[:3]]
        kept[kernel] = []
        with torch.autograd.graph.saved_tensors_hooks(kept[kernel].append, lambda tensor: tensor):
            series_activation(*tensors, kernel)
        if kernel != "reference":
            assert {tensor.data_ptr() for tensor in kept[kernel]} == {tensor.data_ptr() for tensor in tensors}
    assert len(kept["triton"]) == len(kept["recompute"]) == 3 < len(kept["reference"])


def test_configurations_offer_the_kernels_that_there_are() -> None:
    assert get_args(config.ActivationKernel) == ("auto", *get_args(ActivationKernel))
