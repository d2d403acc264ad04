"""Ranks on a real Ray cluster on loopback, whose nodes are killed."""

import fcntl
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from data_scoring.base.progress import Progress, silent
from data_scoring.corpus.corpus import Corpus
from flows.launch.launcher import KeptRanks, launch
from flows.run.config import LaunchConfig
from tests import ROOT
from tests.conftest import ORIGIN, TINY_CHECKPOINT, TINY_TRAIN, Ranks, read_rows
from tests.flows.launch.test_failures import failing
from trainer.checkpoint_folder import list_checkpoints
from trainer.config import CheckpointConfig
from trainer.job import Job

pytest.importorskip("ray")
TWO_RANKS = (1, 1, 2)
# A step for every pair of samples: training takes seconds.
MANY_STEPS = TINY_TRAIN.model_copy(update={"global_batch_size": 4})
OFTEN = CheckpointConfig(every_steps=10)


class RayCluster:
    """Nodes on loopback, with room for a rank each."""

    def __init__(self) -> None:
        from ray.cluster_utils import Cluster

        self._cluster = Cluster(initialize_head=True, head_node_args=self._arguments(num_cpus=0))
        self.nodes = [self.add() for _ in range(2)]

    @property
    def address(self) -> str:
        return str(self._cluster.address)

    def _arguments(self, **values: Any) -> dict[str, Any]:
        return {"node_ip_address": "127.0.0.1", "object_store_memory": 80 << 20, "include_dashboard": False, **values}

    def add(self, **values: Any) -> Any:
        return self._cluster.add_node(**self._arguments(num_cpus=1, **values))

    def shutdown(self) -> None:
        self._cluster.shutdown()


@pytest.fixture(scope="module")
def cluster() -> Iterator[RayCluster]:
    import ray

    found = RayCluster()
    yield found
    ray.shutdown()
    found.shutdown()


class RayRanks(Ranks):
    """Runs jobs on nodes of the cluster."""

    def __init__(self, corpus: Corpus, folder: Path, config: LaunchConfig) -> None:
        super().__init__(corpus, folder)
        self.config = config
        self.progress: Progress = silent

    def launch(self, job: Job, name: str) -> None:
        launch(job, self.folder, name, self.progress, self.config)


@pytest.fixture
def on_ray(cluster: RayCluster, tiny_corpus: Corpus, tmp_path: Path) -> RayRanks:
    config = LaunchConfig(kind="ray", nodes=2, address=cluster.address, max_restarts=0)
    return RayRanks(tiny_corpus, tmp_path, config)


def losses(folder: Path) -> list[float]:
    return [loss for _, loss in read_rows(folder / "steps.parquet", "step", "loss")]


def assert_ended(ranks: Ranks, seconds: float = 0.0) -> None:
    """Assert that no rank holds the lock, `seconds` from now."""
    with (ranks.folder / ".ranks.lock").open() as lock:
        deadline = time.monotonic() + seconds
        while True:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                return
            except BlockingIOError:
                assert time.monotonic() < deadline
                time.sleep(0.1)


def test_two_nodes_train_and_score_as_one_host_does(on_ray: RayRanks, ranks: Ranks) -> None:
    with KeptRanks() as kept:

        def keep(job: Job, name: str) -> None:
            launch(job, on_ray.folder, name, silent, on_ray.config, kept)

        on_ray.launch = keep  # type: ignore[method-assign]
        folder = on_ray.train("train-1", TWO_RANKS)
        weights = list_checkpoints(folder / "checkpoint")[-1]
        scores = on_ray.score("scored", weights, TWO_RANKS)
    here = ranks.train("like-ray", TWO_RANKS)
    assert losses(folder) == pytest.approx(losses(here), abs=1e-6)
    rows = [read_rows(each, "sample", "loss") for each in (scores, ranks.score("like-ray-s", weights, TWO_RANKS))]
    assert [loss for _, loss in rows[0]] == pytest.approx([loss for _, loss in rows[1]], abs=1e-6)
    logs = on_ray.folder / "logs"
    # The ranks that trained have scored.
    assert sorted(path.name for path in logs.glob("*.log")) == ["train-1.log", "train-1.node-1.log"]
    text = "".join(path.read_text() for path in logs.glob("*.log"))
    assert "Traceback" not in text
    assert_ended(on_ray)
