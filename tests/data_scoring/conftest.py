"""The engines that the tests of steps use: each must have the same result."""

from collections.abc import Callable, Iterator

import pytest

from data_scoring.base.engine import Engine, LocalEngine

# What opens each kind of engine. To test with another one, add an entry.
ENGINES: dict[str, Callable[[], Engine]] = {
    "in-process": lambda: LocalEngine(1),
    "two-processes": lambda: LocalEngine(2),
}


@pytest.fixture(scope="session", params=ENGINES)
def engine(request: pytest.FixtureRequest) -> Iterator[Engine]:
    """One engine after another."""
    with ENGINES[request.param]() as engine:
        yield engine


@pytest.fixture(scope="session")
def in_process() -> Engine:
    """The engine that works in this process, for tests in which the engine does not matter."""
    return LocalEngine(1)
