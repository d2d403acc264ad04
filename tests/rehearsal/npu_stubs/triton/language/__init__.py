"""Types by which the arguments of kernels are annotated, and functions that kernels have other names for."""

from types import SimpleNamespace
from typing import Any

math = SimpleNamespace(exp2=None)


class constexpr:  # noqa: N801 -- triton's name
    """A number that a kernel is compiled for."""

    def __init__(self, value: Any = None) -> None:
        self.value = value


def __getattr__(name: str) -> Any:
    if name.startswith("__"):
        raise AttributeError(name)
    return None
