"""Ranks on a real Ray cluster on loopback, whose nodes are killed."""

import fcntl
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest

from data_scoring.base.progress import Progress, read_progress, silent
from data_scoring.corpus.corpus import Corpus
from data_scoring.refine.refine_shards import mix_all
from flows.launch.launcher import KeptRanks, launch
from flows.launch.ray_launcher import RayLauncher
from flows.run.config import LaunchConfig
from flows.run.errors import RanksFailedError
from tests import ROOT
from tests.conftest import TINY_CHECKPOINT, TINY_TRAIN, Ranks, read_rows
from tests.flows.launch.test_failures import failing
from tests.flows.orchestration.place import wait_for
from tests.ray_cluster import RayCluster
from trainer.checkpoint_folder import list_checkpoints
from trainer.config import CheckpointConfig
from trainer.job import Job, write_job

pytest.importorskip("ray")
TWO_RANKS = (1, 1, 2)
# A step for every pair of samples: training takes seconds.
MANY_STEPS = TINY_TRAIN.model_copy(update={"global_batch_size": 4})
OFTEN = CheckpointConfig(every_steps=10)


class RayRanks(Ranks):
    """Runs jobs on nodes of the cluster."""

    def __init__(self, corpus: Corpus, folder: Path, config: LaunchConfig) -> None:
        super().__init__(corpus, folder)
        self.config = config
        self.progress: Progress = silent

    def launch(self, job: Job, name: str) -> None:
        launch(job, self.folder, name, self.progress, self.config)


@pytest.fixture
def on_ray(joined: RayCluster, tiny_corpus: Corpus, tmp_path: Path) -> RayRanks:
    joined.resize(2)
    config = LaunchConfig(kind="ray", nodes=2, address=joined.address, max_restarts=0)
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


class AtStep:
    """Does something once, when training is at a step."""

    def __init__(self, step: int, do: Callable[[], None]) -> None:
        self._step, self._do, self.seen = step, do, list[tuple[str, int]]()

    def __call__(self, what: str, done: int, total: int | None) -> None:
        self.seen.append((what.partition(" ")[0], done))
        if what.startswith("training") and done >= self._step:
            do, self._do = self._do, lambda: None
            do()


@pytest.fixture(scope="module")
def unbroken(ranks: Ranks) -> list[float]:
    """The losses of many steps on two ranks of this host."""
    return losses(ranks.train("unbroken", TWO_RANKS, train=MANY_STEPS))


def train(ranks: Ranks, checkpoint: CheckpointConfig = TINY_CHECKPOINT) -> list[float]:
    return losses(ranks.train("many", TWO_RANKS, train=MANY_STEPS, checkpoint=checkpoint))


def saved(ranks: Ranks) -> list[Path]:
    return list_checkpoints(ranks.folder / "many" / "checkpoint")


def has_ranks(node: Any) -> bool:
    [raylet] = node.all_processes["raylet"]
    commands = [process.cmdline() for process in psutil.Process(raylet.process.pid).children(recursive=True)]
    return any("trainer.worker" in command for command in commands)


def test_a_lost_node_is_replaced_and_training_goes_on(
    on_ray: RayRanks, cluster: RayCluster, unbroken: list[float]
) -> None:
    cluster.resize(1)
    nodes = [cluster.add_node(), cluster.add_node()]

    def kill() -> None:
        cluster.kill_node(next(node for node in nodes if has_ranks(node)))

    on_ray.config = on_ray.config.model_copy(update={"max_restarts": 1})
    at_step = on_ray.progress = AtStep(20, kill)
    assert train(on_ray, OFTEN) == pytest.approx(unbroken, abs=1e-6)
    after = at_step.seen[at_step.seen.index(("restarting", 0)) :]
    assert min(done for what, done in after if what == "training") > 10
    assert "reprise: restarting (1 of 1)" in (on_ray.folder / "logs" / "many.log").read_text()
    assert_ended(on_ray)


def test_a_node_that_is_lost_before_its_ranks_start_is_no_reason_to_wait(on_ray: RayRanks, cluster: RayCluster) -> None:
    cluster.resize(1)
    other = [cluster.add_node()]

    def kill(what: str, done: int, total: int | None) -> None:
        if what.startswith("starting ranks") and other:
            cluster.kill_node(other.pop())

    on_ray.progress = kill
    with pytest.raises(RanksFailedError, match=r"node 127.0.0.1 of the Ray cluster is lost"):
        on_ray.train("unstarted", TWO_RANKS)
    assert_ended(on_ray, 10)


def test_cancelled_ranks_save_and_end(on_ray: RayRanks) -> None:
    def interrupt() -> None:
        raise KeyboardInterrupt

    on_ray.progress = AtStep(10, interrupt)
    with pytest.raises(KeyboardInterrupt):
        train(on_ray)
    assert_ended(on_ray)
    assert len(saved(on_ray)) == 1


DRIVER = """
import sys
from pathlib import Path
from data_scoring.base.progress import silent
from flows.launch.launcher import launch
from flows.run.config import LaunchConfig
from trainer.job import read_job
path, address = Path(sys.argv[1]), sys.argv[2]
launch(read_job(path), path.parent, "many", silent, LaunchConfig(kind="ray", nodes=2, address=address))
"""


def test_ranks_end_with_a_killed_driver_and_the_same_command_resumes(on_ray: RayRanks, unbroken: list[float]) -> None:
    write_job(on_ray.job("many", TWO_RANKS, train=MANY_STEPS), on_ray.folder / "job.json")
    mix_all(on_ray.folder / "many" / "mix.parquet", on_ray.corpus.samples_path, 0)
    command = [sys.executable, "-c", DRIVER, str(on_ray.folder / "job.json"), str(on_ray.config.address)]
    driver = subprocess.Popen(command, env={**os.environ, "PYTHONPATH": str(ROOT)})
    wait_for("steps", lambda: (found := read_progress(on_ray.folder / "progress.json")) and found.done > 10)
    driver.kill()
    driver.wait()
    assert_ended(on_ray, 20)
    assert len(saved(on_ray)) == 1
    assert train(on_ray) == pytest.approx(unbroken, abs=1e-6)


@pytest.mark.parametrize(
    ("nodes", "resources", "asked"),
    [
        (1, {"GPU": 8}, "1 node with CPU 1, GPU 8"),
        # One node has room for two, but each has to be another.
        (2, {"slot": 1}, "2 nodes with CPU 1, slot 1"),
    ],
)
def test_nodes_that_the_cluster_never_has_are_an_error_with_what_it_has(
    on_ray: RayRanks, cluster: RayCluster, nodes: int, resources: dict[str, float], asked: str
) -> None:
    cluster.add_node(num_cpus=2, resources={"slot": 2})
    asking = {"nodes": nodes, "resources": resources, "join_minutes": 0.02}
    on_ray.config = on_ray.config.model_copy(update=asking)
    with pytest.raises(ValueError, match="has not had") as raised:
        on_ray.train("never", (1, 1, nodes))
    slots = ", slot 2" if "slot" in resources else ""
    assert str(raised.value) == (
        f"launch.resources: the Ray cluster has not had {asked} for launch.join_minutes 0.02; it has 2 nodes with "
        f"CPU 1; 1 node with CPU 2{slots}; lower launch.nodes or launch.resources, or add nodes"
    )


def test_two_launches_share_the_room_of_one(on_ray: RayRanks, cluster: RayCluster) -> None:
    cluster.add_node(resources={"slot": 1})
    one = on_ray.config.model_copy(update={"nodes": 1, "resources": {"slot": 1}, "join_minutes": 0.02})
    notes: dict[str, list[str]] = {"a": [], "b": []}
    both = [RayRanks(on_ray.corpus, on_ray.folder / name, one) for name in notes]
    threads = []
    for ranks, (name, seen) in zip(both, notes.items(), strict=True):
        ranks.folder.mkdir()
        ranks.progress = lambda what, done, total, seen=seen: seen.append(what)
        threads.append(threading.Thread(target=ranks.train, args=(name,)))
        threads[-1].start()
    for thread in threads:
        thread.join(120)
    first, second = (losses(ranks.folder / name) for ranks, name in zip(both, notes, strict=True))
    assert first == second
    waits = [sum(what.startswith("waiting for room") for what in seen) for seen in notes.values()]
    # For the time that the other takes.
    assert max(waits) > 20 > min(waits)


def test_a_rank_s_own_words_are_the_error(on_ray: RayRanks) -> None:
    on_ray.config = on_ray.config.model_copy(update={"nodes": 1})
    with pytest.raises(ValueError, match="lower it") as raised:
        on_ray.launch(failing(on_ray, "ValueError"), "mistaken")
    assert str(raised.value) == f"train.lr: too high; lower it (log: {on_ray.folder}/logs/mistaken.log)"


def test_nodes_are_checked_before_they_start_ranks(on_ray: RayRanks, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("flows.cluster.nodes.reprise_version", lambda: "0.1")
    with pytest.raises(ValueError, match=r"^launch.address: node 127.0.0.1 of the Ray cluster has Reprise .* 0.1;"):
        on_ray.train("other-version", TWO_RANKS)


def test_what_a_node_cannot_do_is_said_with_its_address(on_ray: RayRanks, monkeypatch: pytest.MonkeyPatch) -> None:
    start = RayLauncher.start

    def start_elsewhere(launcher: RayLauncher) -> None:
        start(launcher)
        launcher.log_path = Path("/nowhere/x.log")

    monkeypatch.setattr(RayLauncher, "start", start_elsewhere)
    with pytest.raises(ValueError, match=r"^node 127.0.0.1 of the Ray cluster: .*: '/nowhere/x.*log'$"):
        on_ray.train("unlogged", TWO_RANKS)


def test_ranks_have_their_devices_and_the_launcher_s_variables(
    on_ray: RayRanks, cluster: RayCluster, monkeypatch: pytest.MonkeyPatch
) -> None:
    cluster.resize(1)
    cluster.add_node(num_cpus=4, num_gpus=2, resources={"NPU": 2})
    resources = {"CPU": 4, "GPU": 2, "NPU": 1}
    on_ray.config = on_ray.config.model_copy(update={"nodes": 1, "resources": resources})
    monkeypatch.setenv("NCCL_DEBUG", "WARN")
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    found = []

    def look(what: str, done: int, total: int | None) -> None:
        if what == "wait":
            found.extend(environments(on_ray.folder))
            raise KeyboardInterrupt

    on_ray.progress = look
    with pytest.raises(KeyboardInterrupt):
        on_ray.launch(failing(on_ray, "wait"), "looked-at")
    [environment] = found
    assert (
        environment.items()
        >= {
            "CUDA_VISIBLE_DEVICES": "0,1",
            "GLOO_SOCKET_IFNAME": "lo",
            "NCCL_DEBUG": "WARN",
            "OMP_NUM_THREADS": "1",
        }.items()
    )
    assert environment["ASCEND_RT_VISIBLE_DEVICES"] in ("0", "1")
    assert_ended(on_ray)


def environments(folder: Path) -> list[dict[str, str]]:
    """Return the environment of each rank of the run in `folder`."""
    return [
        process.environ()
        for process in psutil.process_iter(["cmdline"])
        if "trainer.worker" in (command := process.info["cmdline"] or [])
        and str(folder) in command[-1]
        and "trainer.agent" not in command
    ]
