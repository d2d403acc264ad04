"""What of MindSpeed's adaptor Megatron cannot do without, and what it refuses."""

from typing import Any

import torch

_type = torch.Tensor.type


def _cuda_type(tensor: torch.Tensor, *arguments: Any, **options: Any) -> Any:
    """Return what `Tensor.type` does, whose names Megatron knows by CUDA's."""
    found = _type(tensor, *arguments, **options)
    return found.replace("npu", "cuda") if isinstance(found, str) else found


torch.Tensor.type = _cuda_type
# Megatron compiles its fusions as it is imported, which MindSpeed keeps it from.
torch.compile = lambda function=None, **_: function or (lambda function: function)
