"""Known accelerators, and the devices that a run is planned for."""

import re
from dataclasses import dataclass

from data_scoring.base.messages import shown

GIB = 1 << 30
# Device memory of the driver, matrix products and collectives; an estimate that has not been measured.
LIBRARY_BYTES = GIB
# Share of a device's memory that plans leave to fragmentation in the allocator.
UNUSED_SHARE = 0.04
# What the schedulers of clusters call a device of each kind.
SCHEDULER_NAMES = {"cuda": "GPU", "npu": "NPU"}
_ASSUMED = re.compile(r"(?:([1-9][0-9]{0,4})x)?([1-9][0-9]{0,3})x([a-z0-9-]+)", re.IGNORECASE)


@dataclass(frozen=True)
class Accelerator:
    """A kind of accelerator.

    kind: cuda or npu. memory: bytes that a program finds on it. peak_flops: FLOP/s of dense bfloat16 matrix products
    according to its data sheet. words: words of the name that its driver reports.
    """

    kind: str
    memory: int
    peak_flops: float
    words: tuple[str, ...]


def _row(kind: str, gib: float, teraflops: float, *words: str) -> Accelerator:
    return Accelerator(kind, round(gib * GIB), teraflops * 1e12, words)


# SXM modules where there are several forms. Of two memory sizes, the larger one comes first.
ACCELERATORS = {
    "a100": _row("cuda", 79.2, 312, "A100", "A800"),
    "a100-40": _row("cuda", 39.4, 312),
    "h100": _row("cuda", 79.1, 989, "H100", "H800"),
    "h200": _row("cuda", 139.8, 989, "H200"),
    "h20": _row("cuda", 95.0, 148, "H20"),
    "b200": _row("cuda", 178.3, 2250, "B200"),
    "l40s": _row("cuda", 44.4, 362, "L40S"),
    "rtx3090": _row("cuda", 23.6, 71, "3090"),
    "rtx4090": _row("cuda", 23.5, 165, "4090"),
    "ascend910b": _row("npu", 60.9, 313, "910B", "910B1", "910B2", "910B3", "910B4"),
}
# What a program finds on devices of so many GB.
CAPACITIES = {24: 23.5, 40: 39.4, 80: 79.1, 141: 139.8}


@dataclass(frozen=True)
class Hardware:
    """The devices of a run, all alike.

    kind: cuda, npu or cpu. num_nodes, per_node: hosts, and devices (on CPU: ranks) on each. memory: bytes that a rank
    may take. name: of the accelerator, if known. peak_flops: of a device, if known.
    """

    kind: str
    num_nodes: int
    per_node: int
    memory: int
    name: str | None = None
    peak_flops: float | None = None

    @property
    def count(self) -> int:
        """Return the number of devices."""
        return self.num_nodes * self.per_node

    @property
    def usable(self) -> int:
        """Return the bytes of a device that tensors may take."""
        return self.memory if self.kind == "cpu" else usable_bytes(self.memory)

    def describe(self) -> str:
        """Return the devices in words, such as 2 hosts of 8 h100, 79.1 GiB each."""
        hosts = "" if self.num_nodes == 1 else f"{self.num_nodes} hosts of "
        name = "ranks on CPU" if self.kind == "cpu" else self.name or f"{self.kind} devices"
        return f"{hosts}{self.per_node} {name}, {self.memory / GIB:.1f} GiB each"


def usable_bytes(memory: int) -> int:
    """Return the bytes that tensors may take on a device with `memory` bytes."""
    return max(0, round(memory * (1 - UNUSED_SHARE)) - LIBRARY_BYTES)


def assumed_hardware(text: str) -> Hardware:
    """Return the devices that `text` names: [NODESx]COUNTxNAME, such as 8xh100 or 2x8xh100.

    Raises ValueError if it has another form or names no known accelerator.
    """
    found = _ASSUMED.fullmatch(text)
    if found is None or found[3].lower() not in ACCELERATORS:
        raise ValueError(
            f"--assume: {shown(text)} is not [NODESx]COUNTxNAME, such as 8xh100 or 2x8xh100, with one of "
            f"{', '.join(ACCELERATORS)}; correct it"
        )
    return accelerators(found[3].lower(), int(found[1] or 1), int(found[2]))


def accelerators(name: str, num_nodes: int, per_node: int) -> Hardware:
    """Return `per_node` known accelerators on each of `num_nodes` hosts."""
    row = ACCELERATORS[name]
    return Hardware(row.kind, num_nodes, per_node, row.memory, name, row.peak_flops)


def accelerator_kind(device: str) -> str:
    """Return the kind of accelerator to plan for with `device`, a kind or `auto`: npu if it is that, else cuda."""
    return "npu" if device == "npu" else "cuda"


def find_accelerator(name: str) -> str | None:
    """Return the known accelerator that a driver calls `name`, or None."""
    words = {word.removeprefix("Ascend") for word in re.split(r"[ _-]", name)}
    return next((key for key, row in ACCELERATORS.items() if words & set(row.words)), None)
