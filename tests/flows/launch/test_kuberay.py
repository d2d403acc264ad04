"""The RayJob that a dry run prints. Its fields were checked against the schema of KubeRay 1.7; no cluster ran it."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import yaml

from flows.cli.main import main
from tests import ROOT

DEMO = ("--set", "device=cpu", "--set", "launch={kind: ray, nodes: 2, resources: {CPU: 2}}")


def printed(folder: Path, capsys: pytest.CaptureFixture[str], *overrides: str) -> str:
    shutil.copy(ROOT / "configs" / "demo.yaml", folder / "demo.yaml")
    main(["run", str(folder / "demo.yaml"), "--dry-run", *overrides])
    return capsys.readouterr().out


def test_the_example_is_what_a_dry_run_prints(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text = printed(tmp_path, capsys, "--set", f"output={tmp_path}", *DEMO)
    assert text.replace(str(tmp_path), "/reprise") == (ROOT / "deploy" / "kuberay.yaml").read_text()


def containers(job: dict[str, Any]) -> list[dict[str, Any]]:
    cluster = job["spec"]["rayClusterSpec"]
    groups = [cluster["headGroupSpec"], *cluster["workerGroupSpecs"]]
    return [container for group in groups for container in group["template"]["spec"]["containers"]]


def test_workers_have_the_resources_of_a_node(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    launch = "launch={kind: ray, nodes: 3, resources: {GPU: 8, memory: 64.0e9, fast: 1}}"
    overrides = ("device=cuda", "parallel={data: 12}", "train.global_batch_size=96", launch, f"output={tmp_path}/runs")
    job = yaml.safe_load(printed(tmp_path, capsys, *(word for each in overrides for word in ("--set", each))))
    [workers] = job["spec"]["rayClusterSpec"]["workerGroupSpecs"]
    assert (workers["replicas"], workers["minReplicas"], workers["maxReplicas"]) == (3, 3, 3)
    assert json.loads(workers["rayStartParams"]["resources"].strip("'")) == {"fast": 1}
    head, worker = containers(job)
    limits = {"nvidia.com/gpu": "8", "memory": "64000000000"}
    assert worker["resources"] == {"requests": {"cpu": "4", **limits}, "limits": limits}
    assert "nvidia.com/gpu" not in head["resources"]["requests"]
    for container in (head, worker):
        assert container["image"] == "REPRISE_IMAGE"
        assert {"name": "RAY_USAGE_STATS_ENABLED", "value": "0"} in container["env"]
        assert container["volumeMounts"] == [{"name": "runs", "mountPath": f"{tmp_path}/runs"}]


def test_npus_are_named_for_kubernetes_and_for_ray(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    job = yaml.safe_load(printed(tmp_path, capsys, "--set", "device=npu", "--set", "launch={kind: ray, nodes: 2}"))
    _, worker = containers(job)
    assert worker["resources"]["limits"] == {"huawei.com/Ascend910": "1"}
    [workers] = job["spec"]["rayClusterSpec"]["workerGroupSpecs"]
    assert json.loads(workers["rayStartParams"]["resources"].strip("'")) == {"NPU": 1}
    # A relative output would be another folder there.
    assert f" --set output={Path.cwd() / 'runs'}" in job["spec"]["entrypoint"]


def test_a_node_with_fewer_devices_than_ranks_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    launch = "launch={kind: ray, nodes: 1, resources: {GPU: 1}}"
    config = str(ROOT / "configs" / "demo.yaml")
    assert main(["run", config, "--dry-run", "--set", "device=cuda", "--set", launch]) == 1
    error = "error: launch.resources: GPU 1 is less than the 2 ranks of a node; raise it, or launch.nodes\n"
    assert capsys.readouterr().err == error


@pytest.mark.parametrize("section", ["launch", "engine"])
def test_the_driver_is_on_the_cluster_of_its_job(capsys: pytest.CaptureFixture[str], section: str) -> None:
    overrides = [*DEMO, "--set", f"{section}.address=local"]
    assert main(["run", str(ROOT / "configs" / "demo.yaml"), "--dry-run", *overrides]) == 1
    assert capsys.readouterr().err.startswith("error: launch.address: local, but a dry run prints a RayJob, ")
    overrides += ["--set", "launch.address=auto", "--set", "engine.address=auto"]
    assert main(["run", str(ROOT / "configs" / "demo.yaml"), "--dry-run", *overrides]) == 0
