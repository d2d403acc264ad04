"""A stand-in for einops, which MindSpeed imports and jobs do not use."""

from typing import Any


def rearrange(*_: Any, **__: Any) -> Any:
    raise NotImplementedError("einops is not installed")


repeat = reduce = rearrange
