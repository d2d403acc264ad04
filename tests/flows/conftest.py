"""What tests of operation share."""

from collections.abc import Iterator

import pytest

from tests.flows.place import Place


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Place]:
    """A folder that is served while a module's tests run, and leaves no process behind."""
    place = Place(tmp_path_factory.mktemp("place"))
    place.start()
    yield place
    place.stop()
    assert [" ".join(process.cmdline()) for process in place.processes()] == []
