"""A corpus that a Ray cluster prepares is that of one process, whatever its nodes, and whichever of them is lost."""

from pathlib import Path

import pytest

from data_scoring.base.engine import Engine, LocalEngine
from data_scoring.base.progress import Progress, silent
from data_scoring.config import CorpusConfig
from data_scoring.corpus import source_parts
from data_scoring.corpus.prepare_corpus import prepare_corpus
from flows.cluster.connection import connected
from flows.cluster.engines import open_engine
from flows.run.config import EngineConfig
from tests.data_scoring.corpus.test_prepare_parts import TOKENIZER, write_text
from tests.ray_cluster import RayCluster


def prepare(config: CorpusConfig, folder: Path, engine: Engine, progress: Progress = silent) -> dict[str, bytes]:
    with engine:
        prepare_corpus(config, TOKENIZER, 5, folder, "f", progress, engine)
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_nodes_and_their_loss_change_nothing(
    cluster: RayCluster, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(source_parts, "_SMALLEST_PART_BYTES", 4000)
    text = write_text(tmp_path)
    expected = prepare(text, tmp_path / "local", LocalEngine(1))
    phases = ("sampling", "tokenising", "looking", "choosing", "packing", "writing")
    killed: list[str] = []

    def kill(what: str, done: int, total: int | None) -> None:
        """Kill a node in each phase, and add another one for it."""
        phase = what.partition(" ")[0]
        if phase not in killed:
            killed.append(phase)
            cluster.kill_newest()
            cluster.resize(3)

    with connected(cluster.address, "engine"):
        for num_nodes, progress in ((1, silent), (2, silent), (3, kill)):
            cluster.resize(num_nodes)
            folder = tmp_path / f"{num_nodes}"
            engine = open_engine(EngineConfig(kind="ray", address=cluster.address), tmp_path)
            assert prepare(text, folder, engine, progress) == expected
    assert tuple(killed) == phases
