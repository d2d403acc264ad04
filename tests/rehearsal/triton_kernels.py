"""Triton's kernels on an absent device: launches are counted, and nothing is computed."""

from collections.abc import Callable
from typing import Any


def pretend_triton(note_kernel: Callable[[str], None]) -> None:
    """Have launches of Triton's kernels, which tests interpret, noted by the kernel's name instead."""
    from triton.runtime.interpreter import InterpretedFunction

    def run(self: Any, *args: Any, **options: Any) -> None:
        note_kernel(self.fn.__name__)

    InterpretedFunction.run = run
