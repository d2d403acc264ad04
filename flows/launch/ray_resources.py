"""The resources of a job's nodes, by Ray's names: a bundle is what a node has to have."""

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from flows.run.config import LaunchConfig
from trainer.hardware import SCHEDULER_NAMES

# Resources that are arguments of their own of Ray's actors.
_ARGUMENTS = {"CPU": "num_cpus", "GPU": "num_gpus", "memory": "memory"}


def bundle_of(launch: LaunchConfig, device: str, num_ranks: int) -> dict[str, float]:
    """Return the resources of a node, which starts its part of `num_ranks` ranks on devices of a kind.

    Raises ValueError if it has fewer devices than ranks, or parts of what only comes as a whole.
    """
    here = num_ranks // launch.nodes
    bundle: dict[str, float] = {"CPU": here, **launch.resources}
    for name, value in bundle.items():
        if value > 1 and value % 1:
            raise ValueError(f"launch.resources: {name} {value:g} is more than 1 and no whole number; round it")
    devices = SCHEDULER_NAMES.get(device)
    if devices is not None and bundle.setdefault(devices, here) < here:
        raise ValueError(
            f"launch.resources: {devices} {bundle[devices]:g} is less than the {here} ranks of a node; raise it, or "
            "launch.nodes"
        )
    return bundle


def as_arguments(bundle: Mapping[str, float]) -> dict[str, Any]:
    """Return the arguments of an actor that takes a whole bundle."""
    given: dict[str, Any] = {_ARGUMENTS[name]: value for name, value in bundle.items() if name in _ARGUMENTS}
    return {**given, "resources": {name: value for name, value in bundle.items() if name not in _ARGUMENTS}}


def has(resources: Mapping[str, float], bundle: Mapping[str, float]) -> bool:
    """Return whether a node with `resources` has those of `bundle`."""
    return all(resources.get(name, 0) >= needed for name, needed in bundle.items())


def describe(num_nodes: int, bundle: Mapping[str, float]) -> str:
    """Return nodes in words: 2 nodes with CPU 8, GPU 8."""
    resources = ", ".join(f"{name} {value:g}" for name, value in sorted(bundle.items()))
    return f"{num_nodes} {'node' if num_nodes == 1 else 'nodes'} with {resources}"


def describe_all(nodes: Sequence[Mapping[str, float]], bundle: Mapping[str, float]) -> str:
    """Return what nodes have of the resources of `bundle`, and of CPUs and devices, in words."""
    names = {"CPU", *SCHEDULER_NAMES.values(), *bundle}
    kinds = Counter(tuple((name, node[name]) for name in sorted(names & node.keys())) for node in nodes)
    # A head node often has none, so that only the driver works there.
    del kinds[()]
    return "; ".join(describe(count, dict(kind)) for kind, count in kinds.most_common()) or "no such nodes"
