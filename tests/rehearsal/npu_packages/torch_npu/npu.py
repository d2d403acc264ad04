"""What `torch.npu` is: one of eight devices is current, and all there is to wait for is done already."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

_COUNT = 8
default_generators = (torch.default_generator,) * _COUNT


class Stream:
    """A stream, and an event: what is in it is done."""

    def __init__(self, *_: Any, **__: Any) -> None: ...

    def wait_stream(self, _: Any) -> None: ...

    def synchronize(self) -> None: ...


Event = Stream


class device:  # noqa: N801 -- torch's name
    """A context in which a device is current."""

    def __init__(self, number: int) -> None:
        self._number = number

    def __enter__(self) -> None: ...

    def __exit__(self, *_: Any) -> None: ...


class mstx:  # noqa: N801 -- torch_npu's name
    """Marks for a profiler, which nobody reads."""

    @staticmethod
    def range_start(*_: Any) -> int:
        return 0

    @staticmethod
    def range_end(*_: Any) -> None: ...


def is_available() -> bool:
    return True


def is_initialized() -> bool:
    return True


def _is_in_bad_fork() -> bool:
    return False


def _lazy_call(call: Callable[[], None], **_: Any) -> None:
    call()


def _lazy_init() -> None: ...


def device_count() -> int:
    return _COUNT


def current_device() -> int:
    """Return the device that the memory is on, whichever was set: all ranks have a process of their own."""
    return 0


def set_device(_: Any) -> None: ...


def synchronize(_: Any = None) -> None: ...


def current_stream(_: Any = None) -> Stream:
    return Stream()


def get_device_name(_: Any = None) -> str:
    return "simulated"


def mem_get_info(_: Any = None) -> tuple[int, int]:
    return 60 << 30, 64 << 30


def empty_cache() -> None: ...


def get_amp_supported_dtype() -> list[torch.dtype]:
    return [torch.bfloat16]


def manual_seed(seed: int) -> None:
    torch.default_generator.manual_seed(seed)


manual_seed_all = manual_seed


def get_rng_state(device: Any = "npu") -> Tensor:
    return torch.get_rng_state()


def set_rng_state(state: Tensor, device: Any = "npu") -> None:
    torch.set_rng_state(state.cpu())
