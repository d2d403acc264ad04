"""What tests of flows share."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from flows.run.config import RunConfig, parse_config
from tests.flows.fakes import FakeRanks, fake_ranks, values, write_texts
from tests.flows.orchestration.place import Place


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
