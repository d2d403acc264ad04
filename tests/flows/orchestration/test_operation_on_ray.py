"""A flow that a worker starts drives ranks on a Ray cluster; Prefect cancels it, and it goes on."""

import pytest

from flows.run.locks import is_locked
from tests.flows.orchestration.place import CONFIG, Place, wait_for
from tests.ray_cluster import RayCluster
from trainer.checkpoint_folder import list_checkpoints

pytestmark = pytest.mark.slow


def test_prefect_cancels_ranks_on_ray_and_resumes_them(place: Place, cluster: RayCluster) -> None:
    cluster.resize(2)
    launch = {"kind": "ray", "nodes": 2, "address": cluster.address}
    config = {**CONFIG, "name": "on-ray", "device": "cpu", "rounds": {"num_rounds": 1}, "launch": launch}
    run = place.submit(config)
    folder = place.training("on-ray")
    assert len(place.ranks()) == 2
    place.cancel(run)
    wait_for("the ranks' end", lambda: not place.ranks(), 30)
    place.wait(run, "Cancelled", 30)
    assert list_checkpoints(folder / "rounds" / "1" / "checkpoint")
    wait_for("the lock", lambda: not is_locked(folder))
    place.wait(place.submit(config), "Completed")
    assert (folder / "logs" / "train-1.node-1.log").exists()
