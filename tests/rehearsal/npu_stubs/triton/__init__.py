"""A stand-in for triton-ascend, which has no driver without CANN: MindSpeed decorates kernels as it is imported.

None of them is called: a function that is decorated is left alone, and everything else is nothing.
"""

from typing import Any

from triton import language, runtime  # noqa: F401

__version__ = "3.2.0"


def jit(function: Any = None, **_: Any) -> Any:
    return function or jit


def autotune(*_: Any, **__: Any) -> Any:
    return jit


def heuristics(*_: Any, **__: Any) -> Any:
    return jit


class Config:
    """A choice of an autotuner."""

    def __init__(self, *_: Any, **__: Any) -> None: ...
