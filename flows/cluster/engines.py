"""The engine that a configuration names."""

from pathlib import Path

from data_scoring.base.engine import Engine, LocalEngine
from flows.cluster.connection import check_installed, connected, set_environment
from flows.run.config import EngineConfig


def check_engine(config: EngineConfig) -> None:
    """Raise ValueError if a package that the engine of `config` needs is not installed."""
    if config.kind == "ray":
        check_installed("engine.kind")


def check_cluster(config: EngineConfig) -> None:
    """Raise ValueError if the engine of `config` lacks a package, or if its cluster does not answer."""
    if config.kind == "ray":
        with connected(config.address, "engine"):
            pass


def open_engine(config: EngineConfig, folder: Path) -> Engine:
    """Return the engine of `config`, a context manager. folder: of the run, which all its hosts have to see."""
    check_engine(config)
    if config.kind == "local":
        return LocalEngine(config.processes)
    set_environment()
    from flows.cluster.ray_engine import RayEngine

    return RayEngine(config.address, config.cpus_per_task, folder)
