"""RMSNorm and SwiGLU, whose backward passes are written out, compared with torch's own in float64."""

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from kernels.rms_norm import rms_norm
from kernels.swiglu import swiglu

WIDTH, EPSILON = 48, 1e-2
Function = Callable[..., Tensor]


def plain_swiglu(gate_and_up: Tensor) -> Tensor:
    gate, up = gate_and_up.chunk(2, dim=-1)
    return F.silu(gate) * up


PAIRS: dict[str, tuple[Function, Function, int]] = {
    "norm": (lambda x, w: rms_norm(x, w, EPSILON), lambda x, w: F.rms_norm(x, (WIDTH,), w, EPSILON), 2),
    "norm without weights": (lambda x: rms_norm(x, None, EPSILON), lambda x: F.rms_norm(x, (WIDTH,), None, EPSILON), 1),
    "swiglu": (swiglu, plain_swiglu, 1),
}


def results(function: Function, inputs: list[Tensor], dtype: torch.dtype) -> list[Tensor]:
    """Return the output and the gradients of its weighted sum, in float64."""
    leaves = [each.to(dtype).requires_grad_() for each in inputs]
    output = function(*leaves)
    assert output.dtype == dtype
    weights = torch.linspace(-1, 2, output.numel()).view_as(output).bfloat16().to(dtype)
    return [output.detach().double(), *(each.double() for each in torch.autograd.grad(output, leaves, weights))]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", PAIRS)
def test_errors_are_no_greater_than_torchs(name: str, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    ours, torchs, num_inputs = PAIRS[name]
    inputs = [torch.randn(7, 3, WIDTH).bfloat16(), torch.randn(WIDTH).bfloat16()][:num_inputs]
    truth = results(torchs, inputs, torch.float64)
    for exact, reference, found in zip(
        truth, results(torchs, inputs, dtype), results(ours, inputs, dtype), strict=True
    ):
        error, allowed = (found - exact).square().mean().sqrt(), (reference - exact).square().mean().sqrt()
        # In single precision both are a few units in the last place.
        assert error <= 1.1 * allowed + 1e-7


@pytest.mark.parametrize("name", ["norm", "swiglu"])
def test_only_inputs_are_saved(name: str) -> None:
    ours, _, num_inputs = PAIRS[name]
    inputs = [torch.randn(4, WIDTH, requires_grad=True), torch.randn(WIDTH, requires_grad=True)][:num_inputs]
    saved: list[int] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda each: saved.append(each.numel()) or each, lambda each: each):
        ours(*inputs)
    assert sum(saved) == sum(each.numel() for each in inputs) + (4 if name == "norm" else 0)
