"""The nodes of the connected Ray cluster: which there are, and whether they can do the work of a run."""

import uuid
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import ray
from ray.exceptions import RayError, RayTaskError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from flows.run.versions import reprise_version

# With the start of a worker process, on a node that others use as well.
_SECONDS_TO_ANSWER = 60


@dataclass(frozen=True)
class Node:
    """A node that is up: its identity, its address, and the number of each of its resources, such as CPU."""

    id: str
    address: str
    resources: dict[str, float]


def list_nodes() -> list[Node]:
    """Return the nodes that are up."""
    return [
        Node(node["NodeID"], node["NodeManagerAddress"], node["Resources"]) for node in ray.nodes() if node["Alive"]
    ]


def on_node(node_id: str) -> NodeAffinitySchedulingStrategy:
    """Return the scheduling of a task or an actor on this node, and on no other."""
    return NodeAffinitySchedulingStrategy(node_id, soft=False)


def check_nodes(nodes: Sequence[Node], folder: Path, field: str) -> None:
    """Raise ValueError if a node does not see the run's `folder`, or has another version of Reprise.

    field: of the configuration, such as engine, whose `address` an error names. The checks take no CPU, so that a
    busy node answers, too. A node that is lost meanwhile is none of the cluster's.
    """
    token = folder / f".nodes-{uuid.uuid4().hex}.tmp"
    token.touch()
    try:
        look = ray.remote(num_cpus=0, max_retries=0)(_look)
        answers = [look.options(scheduling_strategy=on_node(node.id)).remote(token) for node in nodes]
        ready = set(ray.wait(answers, num_returns=len(answers), timeout=_SECONDS_TO_ANSWER)[0])
        for node, answer in zip(nodes, answers, strict=True):
            error = _fault(answer, folder) if answer in ready else f"did not answer for {_SECONDS_TO_ANSWER} s; see why"
            if error is not None and node.id in {each.id for each in list_nodes()}:
                raise ValueError(f"{field}.address: node {node.address} of the Ray cluster {error}")
    finally:
        token.unlink(missing_ok=True)


def _look(token: Path) -> tuple[str, bool]:
    """Return the version of Reprise on this node, and whether the file exists there."""
    return reprise_version(), token.exists()


def _fault(answer: "ray.ObjectRef", folder: Path) -> str | None:
    """Return what is wrong with a node, or None."""
    here = reprise_version()
    try:
        version, sees_folder = ray.get(answer)
    except RayTaskError as error:
        cause = " ".join(str(error.cause).split())
        return f"cannot run Reprise ({cause}); install reprise-lm {here} there"
    except RayError as error:
        return f"cannot run tasks ({one_line(error)}); see its logs in /tmp/ray/session_latest/logs"
    if version != here:
        return f"has Reprise {version}, and this host has {here}; install the same version there"
    if not sees_folder:
        return f"does not see the run folder {folder} at the same path; set output to a folder that all nodes share"
    return None


def one_line(error: RayError) -> str:
    """Return the first line of Ray's message, which may fill a screen."""
    return next(iter(str(error).strip().splitlines()), type(error).__name__)
