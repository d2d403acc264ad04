"""Device memory that training takes at its peak, on one rank: what estimates and devices are held against.

Measured by `tests/rehearsal`, which runs the training step on tensors without data and counts the bytes that are alive.
A device takes more: its context, its libraries' workspaces, and what its allocator holds in pieces that fit nothing.
"""

from typing import NamedTuple


class Budget(NamedTuple):
    """The GiB that one rank holds at most in a step that trains `preset`, vocabulary and sizes as the preset names."""

    preset: str
    seq_length: int
    micro_batch_size: int
    peak_gib: float
    loss_kernel: str = "reference"
    activation_kernel: str = "reference"


# In bfloat16, on one rank that has the whole model.
BUDGETS = (
    Budget("pangu-pi-1b-pro", 2048, 2, 26.8),
    Budget("pangu-pi-1b-pro", 2048, 8, 57.1),
)
