"""The driver, which says for what kernels are compiled."""

from types import SimpleNamespace

_properties = {"max_shared_mem": 0, "num_vectorcore": 1, "num_aicore": 1}
active = SimpleNamespace(
    get_current_target=lambda: SimpleNamespace(backend="npu", arch="Ascend910B"),
    utils=SimpleNamespace(get_device_properties=lambda _: _properties),
)
