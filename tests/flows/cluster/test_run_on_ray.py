"""A run whose data stages work on a Ray cluster has the files of one whose stages work here."""

import json
from pathlib import Path
from typing import Any

import pytest

from data_scoring.base.engine import Engine
from data_scoring.corpus import source_parts
from flows.run.config import EngineConfig
from flows.stages import stage
from tests.conftest import make_documents, read_rows
from tests.evaluation_data import write_items
from tests.flows.cluster.lossy_engine import LossyEngine
from tests.flows.complete_runs import complete_run, config_of
from tests.flows.fakes import FakeRanks, write_texts
from tests.ray_cluster import RayCluster

# What tells when and where a run was made.
TIMES = ("started", "finished", "seconds")
PLANTED = " ".join(f"planted{number}" for number in range(20))


@pytest.fixture
def texts(tmp_path: Path) -> Path:
    """Two sources, with an evaluation item and with text that comes again."""
    folder = write_texts(tmp_path)
    write_items(folder / "items", {"piqa.jsonl": [{"goal": PLANTED, "sol1": "yes", "sol2": "no"}] * 2})
    again = " ".join(make_documents(40, 7))
    with (folder / "a.jsonl").open("a") as file:
        for text in (f"{PLANTED} and more", again, f"once more {again}"):
            file.write("\n" + json.dumps({"text": text}))
    return folder


def files_of(folder: Path) -> dict[str, Any]:
    """Return the content of all files but those that tell the time, and records without it."""
    found: dict[str, Any] = {}
    for path in sorted(folder.rglob("*")):
        if path.is_file():
            found[str(path.relative_to(folder))] = path.read_bytes()
    return found


def test_all_stages_leave_the_same_files_though_each_loses_a_node(
    cluster: RayCluster, texts: Path, tmp_path: Path, fakes: FakeRanks, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(source_parts, "_SMALLEST_PART_BYTES", 4000)
    sections: dict[str, Any] = {
        "eval": {"tasks": ["piqa"], "data": str(texts / "items"), "contamination": "remove"},
        "refine": {"near_duplicates": 0.8, "within": "part"},
        "rounds": {"num_rounds": 2},
    }
    here = complete_run(config_of(tmp_path / "here", texts=texts, **sections))
    engines: list[LossyEngine] = []

    def open_engine(config: EngineConfig, folder: Path) -> Engine:
        assert config.kind == "ray"
        engines.append(LossyEngine(cluster, tmp_path / f"marks-{len(engines)}", num_maps=1))
        return engines[-1]

    monkeypatch.setattr(stage, "open_engine", open_engine)
    engine = {"kind": "ray", "address": cluster.address}
    there = complete_run(config_of(tmp_path / "there", texts=texts, engine=engine, **sections))
    mine, theirs = files_of(here.folder), files_of(there.folder)
    print({name for name in mine.keys() | theirs.keys() if mine.get(name) != theirs.get(name)})
    print(sorted(mine))
    print([each.num_parts for each in engines])
    print(read_rows(here.corpus_folder / "contamination.parquet", "shard", "sample"))
    print([len(read_rows(path, "shard", "sample")) for path in here.corpus_folder.glob("near-*")])
    assert 0
