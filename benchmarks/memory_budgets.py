"""Peak device memory of training on one rank, the reference for estimates and for measurements on devices.

Measured by `tests/rehearsal`, which runs the training step on tensors without data and counts live bytes. A device
takes more: its context, its libraries' workspaces, and fragmentation in its allocator.
"""

from typing import NamedTuple


class Budget(NamedTuple):
    """The peak GiB of one rank in a training step of `preset`, with the preset's vocabulary."""

    preset: str
    seq_length: int
    micro_batch_size: int
    peak_gib: float
    loss_kernel: str = "reference"
    activation_kernel: str = "reference"


# In bfloat16, with the whole model on one rank.
BUDGETS = (
    Budget("pangu-pi-1b-pro", 2048, 2, 26.2),
    Budget("pangu-pi-1b-pro", 2048, 8, 54.7),
    Budget("pangu-pi-1b-pro", 2048, 8, 37.3, "chunked", "recompute"),
    Budget("pangu-pi-1b-pro", 2048, 8, 37.1, "triton", "triton"),
)
