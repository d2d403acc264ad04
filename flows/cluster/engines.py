"""The engine that a configuration names."""

from data_scoring.base.engine import Engine, LocalEngine
from flows.run.config import EngineConfig


def open_engine(config: EngineConfig) -> Engine:
    """Return the engine of `config`, a context manager."""
    return LocalEngine(config.processes)
