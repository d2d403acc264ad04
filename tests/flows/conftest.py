"""What tests of flows share."""

import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from flows.cluster.connection import connected
from flows.run.config import RunConfig, parse_config
from flows.run.folder import Run, read_run
from tests.conftest import MakeOnce
from tests.flows.complete_runs import complete_run, config_of
from tests.flows.fakes import FakeRanks, fake_ranks, values, write_texts
from tests.flows.orchestration.place import Place
from tests.forked_ranks import forking
from tests.ray_cluster import RayCluster, ray_cluster


@pytest.fixture
def fakes(monkeypatch: pytest.MonkeyPatch) -> FakeRanks:
    """Ranks that train nothing."""
    return fake_ranks(monkeypatch)


@pytest.fixture(scope="module")
def texts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with two sources of text."""
    return write_texts(tmp_path_factory.mktemp("texts"))


@pytest.fixture
def config(texts: Path, tmp_path: Path) -> RunConfig:
    """A configuration over them."""
    return parse_config(values(texts, tmp_path), "test")


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Place]:
    """A folder that is served while a module's tests run, and leaves no process behind."""
    place = Place(tmp_path_factory.mktemp("place"))
    place.start()
    yield place
    place.stop()
    assert [" ".join(process.cmdline()) for process in place.processes()] == []


@pytest.fixture
def three_rounds(make_once: MakeOnce, tmp_path: Path, fakes: FakeRanks) -> Run:
    """A copy of a run of three rounds that fake ranks have trained."""

    def fill(folder: Path) -> None:
        write_texts(folder)
        complete_run(config_of(folder, rounds={"num_rounds": 3}))

    shutil.copytree(make_once("run-of-three-rounds", fill) / "run", tmp_path / "run")
    return read_run(tmp_path / "run")


@pytest.fixture(scope="session")
def trained_run(make_once: MakeOnce) -> Path:
    """The folder of texts and of a run of two rounds over them, trained on real ranks."""

    def fill(folder: Path) -> None:
        write_texts(folder)
        with forking():
            complete_run(config_of(folder))

    return make_once("forked-run", fill)


@pytest.fixture
def original(trained_run: Path, tmp_path: Path) -> Run:
    """A copy of that run in a folder of its own."""
    shutil.copytree(trained_run / "run", tmp_path / "run")
    return read_run(tmp_path / "run")


@pytest.fixture(scope="session")
def cluster() -> Iterator[RayCluster]:
    """A Ray cluster on this host, which tests `resize` to the nodes that they need."""
    pytest.importorskip("ray")
    with ray_cluster() as started:
        yield started


@pytest.fixture(scope="module")
def joined(cluster: RayCluster) -> Iterator[RayCluster]:
    """The cluster, to which this process stays connected, as with several trials at the same time."""
    with connected(cluster.address, "engine"):
        yield cluster
