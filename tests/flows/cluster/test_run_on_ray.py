"""A run whose data stages work on a Ray cluster has the files of one whose stages work here."""

import json
from pathlib import Path
from typing import Any

import pytest

from data_scoring.base.engine import Engine
from data_scoring.base.progress import silent
from data_scoring.corpus import source_parts
from flows.run.config import EngineConfig, RunConfig
from flows.run.folder import Run, open_run
from flows.run.locks import locked
from flows.stages import stage
from flows.stages.stage_order import complete_all, steps_to_train
from tests.conftest import make_documents, read_rows
from tests.evaluation_data import write_items
from tests.flows.cluster.lossy_engine import LossyEngine
from tests.flows.complete_runs import config_of
from tests.flows.fakes import FakeRanks, write_texts
from tests.ray_cluster import RayCluster

# Files that tell when and where a run was made, or how long it took, and those with checksums of such files.
DIFFERENT = {"run.yaml", "run.yaml.bak", "ledger.duckdb", ".ledger.lock", ".verified.json", "rounds/1/budget.parquet"}
TIMES = ("started_at", "seconds", "record_checksum")
PLANTED = " ".join(f"planted{number}" for number in range(20))


@pytest.fixture
def texts(tmp_path: Path) -> Path:
    """Two sources, with an evaluation item and with text that comes again."""
    folder = write_texts(tmp_path)
    write_items(folder / "items", {"piqa.jsonl": [{"goal": PLANTED, "sol1": "yes", "sol2": "no"}] * 2})
    again = " ".join(make_documents(5, 7))
    with (folder / "a.jsonl").open("a") as file:
        for text in (f"{PLANTED} and more", *(f"{number} {again}" for number in range(5))):
            file.write("\n" + json.dumps({"text": text}))
    return folder


def trained(config: RunConfig) -> Run:
    """Return the run of `config`, whose second round is trained."""
    with locked(config.folder):
        run = open_run(config)
        complete_all(run, steps_to_train(config, 2), silent)
    return run


def files_of(run: Run) -> dict[str, Any]:
    """Return the content of all files, as far as it is the same in every such run."""
    found: dict[str, Any] = {}
    for path in (path for path in run.folder.rglob("*") if path.is_file()):
        name = str(path.relative_to(run.folder))
        found[name] = path.read_bytes()
        if name in DIFFERENT:
            found[name] = None
        elif path.suffix == ".json":
            record = json.loads(found[name])
            record["files"] = {file: each for file, each in record.get("files", {}).items() if file not in DIFFERENT}
            found[name] = {key: value for key, value in record.items() if key not in TIMES}
    return found


def test_all_stages_leave_the_same_files_though_each_loses_a_node(
    joined: RayCluster, texts: Path, tmp_path: Path, fakes: FakeRanks, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(source_parts, "_SMALLEST_PART_BYTES", 8000)
    sections: dict[str, Any] = {
        "eval": {"tasks": ["piqa"], "data": str(texts / "items"), "contamination": "remove"},
        "refine": {"near_duplicates": 0.8, "within": "part"},
        "rounds": {"num_rounds": 2},
    }
    here = trained(config_of(tmp_path / "here", texts=texts, **sections))
    engines: list[LossyEngine] = []

    def open_engine(config: EngineConfig, folder: Path) -> Engine:
        assert (config.kind, config.address) == ("ray", joined.address)
        engines.append(LossyEngine(joined, tmp_path / f"marks-{len(engines)}", num_maps=1))
        return engines[-1]

    monkeypatch.setattr(stage, "open_engine", open_engine)
    engine = {"kind": "ray", "address": joined.address}
    there = trained(config_of(tmp_path / "there", texts=texts, engine=engine, **sections))
    # Prepare, contamination and refine.
    assert len(engines) == 3
    assert all(each.num_parts[0] > 1 for each in engines)
    # What is compared is there at all.
    assert read_rows(here.corpus_folder / "contamination.parquet", "shard", "sample")
    assert read_rows(here.corpus_folder / "near-duplicates-0.8.parquet", "shard", "sample")
    expected, files = files_of(here), files_of(there)
    assert {name for name in files.keys() | expected.keys() if files.get(name) != expected.get(name)} == set()
    assert {"corpus/manifest.json", "rounds/2/selection/shard=0001.parquet", "rounds/2/mix.parquet"} <= files.keys()
