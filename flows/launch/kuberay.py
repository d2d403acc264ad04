"""A run on Kubernetes: the RayJob for which KubeRay starts a Ray cluster, and a run's command on its head node."""

import json
import math
import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

# Names of Kubernetes' devices, by Ray's.
_DEVICES = {"GPU": "nvidia.com/gpu", "NPU": "huawei.com/Ascend910"}
_IMAGE = "REPRISE_IMAGE"
_CLAIM = "reprise-runs"
_RAY_VERSION = "2.60.0"
_HEAD_RESOURCES = {"cpu": "2", "memory": "8Gi"}
_COMMENTS = f"""\
# A RayJob for KubeRay 1.5.1 and later: a head node, where the run's driver works, and a worker for each node of launch.
# Before `kubectl apply`: replace {_IMAGE}, a placeholder, by an image with reprise[ray], the same for all nodes;
# have a PersistentVolumeClaim {_CLAIM} that many nodes may write (ReadWriteMany), with the configuration and its
# text on it; and give the workers a limit of memory that suits their hosts, if they share them.
"""


def ray_job(command: Sequence[str], run_folder: Path, nodes: int, bundle: dict[str, float]) -> str:
    """Return the RayJob, in YAML, that runs `command`, whose ranks take `bundle` of Ray's resources on each node.

    The volume is mounted where the parent of `run_folder` is.
    """
    devices = {_DEVICES[name]: _count(value) for name, value in bundle.items() if name in _DEVICES}
    limits = {**devices, **({"memory": _count(bundle["memory"])} if "memory" in bundle else {})}
    named = {name: value for name, value in bundle.items() if name not in ("CPU", "GPU", "memory")}
    worker = {
        "groupName": "ranks",
        **dict.fromkeys(("replicas", "minReplicas", "maxReplicas"), nodes),
        # KubeRay finds the CPUs and GPUs in the pod's resources, and no others.
        "rayStartParams": {"resources": f"'{json.dumps(named)}'"} if named else {},
        "template": _pod("ray-worker", run_folder.parent, {"cpu": _count(bundle["CPU"]), **limits}, limits),
    }
    head = {
        "serviceType": "ClusterIP",
        # No ranks and no tasks beside the driver.
        "rayStartParams": {"num-cpus": "0"},
        "template": _pod("ray-head", run_folder.parent, _HEAD_RESOURCES, {"memory": _HEAD_RESOURCES["memory"]}),
    }
    job = {
        "apiVersion": "ray.io/v1",
        "kind": "RayJob",
        "metadata": {"name": _name_of(run_folder)},
        "spec": {
            "entrypoint": shlex.join(command),
            "submissionMode": "K8sJobMode",
            "shutdownAfterJobFinishes": True,
            "rayClusterSpec": {
                "rayVersion": _RAY_VERSION,
                # Nobody without the token reaches the dashboard, which runs what it is sent.
                "authOptions": {"mode": "token"},
                "headGroupSpec": head,
                "workerGroupSpecs": [worker],
            },
        },
    }
    return _COMMENTS + yaml.safe_dump(job, sort_keys=False, width=math.inf).rstrip()


def _pod(name: str, folder: Path, requests: dict[str, str], limits: dict[str, str]) -> dict[str, Any]:
    container = {
        "name": name,
        "image": _IMAGE,
        "env": [{"name": "RAY_USAGE_STATS_ENABLED", "value": "0"}],
        "resources": {"requests": requests, **({"limits": limits} if limits else {})},
        "volumeMounts": [{"name": "runs", "mountPath": str(folder)}],
    }
    return {
        "spec": {
            "containers": [container],
            "volumes": [{"name": "runs", "persistentVolumeClaim": {"claimName": _CLAIM}}],
        }
    }


def _count(value: float) -> str:
    """Return a number as a quantity of Kubernetes, which has no parts of devices."""
    return str(math.ceil(value))


def _name_of(run_folder: Path) -> str:
    """Return a name for Kubernetes, which takes small letters, digits and hyphens: 47 of them for a RayJob."""
    letters = "".join(
        letter if letter.isascii() and letter.isalnum() else "-" for letter in f"reprise-{run_folder.name.lower()}"
    )
    return letters[:47].strip("-")
