"""Whatever is in a JSON record of a run folder: one line of error that names the file, or what the record says."""

import importlib.metadata
import json
import math
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import strategies as st

from data_scoring.base.files import fingerprint, read_json, write_json, write_record
from data_scoring.base.progress import ProgressFile, read_progress
from data_scoring.base.validation import read_record
from data_scoring.config import ScoreConfig
from data_scoring.corpus.corpus import Corpus
from flows.experiments.sweep_report import Search
from flows.launch.hosts import Announced, Joined
from flows.run.folder import read_run
from flows.run.stored_model import find_model
from flows.stages.status import read_status
from tests.conftest import ORIGIN, TINY_MODEL
from tests.fuzz.cases import check_message, numbers_of_cases, run_cases
from tests.fuzz.configurations import mutated
from trainer.checkpoint_folder import find_damage, read_checkpoint_record
from trainer.job import read_job, write_job
from trainer.jobs import ScoreJob
from trainer.parallel_config import ParallelConfig
from trainer.rank_errors import RankError, leave_error, root_cause

_GOLDEN = Path(__file__).parents[1] / "flows" / "stages" / "golden"
_STEP = Path("rounds/1/checkpoint/step-00000021")
# What reads each record, by its path in the folder of a run or a model.
READERS: dict[str, Callable[[Path], Any]] = {
    "run.yaml": read_run,
    "corpus/manifest.json": lambda run: Corpus(run / "corpus"),
    "rounds/1/train.json": read_status,
    "rounds/1/mix.json": lambda run: read_run(run).recorded("mix", 1),
    "rounds/2/refine.json": lambda run: read_run(run).recorded_files(run / "rounds/2/refine.json"),
    "rounds/2/approval.json": lambda run: read_run(run).refine_config(2),
    f"{_STEP}/reprise.json": lambda run: (find_damage(run / _STEP), read_checkpoint_record(run / _STEP, "step")),
    "logs/errors/rank-00000.json": lambda run: (root_cause(run / "logs/errors"), read_status(run)),
    "logs/progress.json": lambda run: (read_progress(run / "logs/progress.json"), read_status(run)),
    "logs/score.job.json": lambda run: read_job(run / "logs/score.job.json"),
    "logs/rendezvous.json": lambda run: read_record(run / "logs/rendezvous.json", Announced),
    "logs/nodes/host.json": lambda run: read_record(run / "logs/nodes/host.json", Joined),
    "sweep.json": lambda run: read_record(run / "sweep.json", Search),
    "model/model.yaml": lambda run: find_model(run / "model"),
    "model/import.json": lambda run: find_model(run / "model"),
    "model/checkpoint/step-00000001/reprise.json": lambda run: find_model(run / "model"),
}
# Files whose damage is no error: they are shown, and nothing depends on them.
_HARMLESS = ("logs/progress.json", "logs/errors/rank-00000.json")


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A run folder with a record of every kind."""
    shutil.copytree(_GOLDEN, tmp_path / "runs")
    shutil.move(tmp_path / "runs" / "items", tmp_path / "items")
    monkeypatch.chdir(tmp_path)
    version = importlib.metadata.version
    monkeypatch.setattr(importlib.metadata, "version", lambda name: "0.4.13" if name == "lm_eval" else version(name))
    folder = tmp_path / "runs" / "plain"
    (folder / "logs" / "errors").mkdir(parents=True)
    (folder / "logs" / "nodes").mkdir()
    leave_error(folder / "logs" / "errors", RankError(0, time.time(), "ValueError", True, "lower it", "Traceback"))
    ProgressFile(folder / "logs" / "progress.json")("training", 3, 3)
    job = ScoreJob(
        corpus=folder / "corpus", round_folder=folder / "rounds/1", model=TINY_MODEL, parallel=ParallelConfig(),
        device="cpu", precision="float32", activation_kernel="reference", seed=1, fingerprint="f",
        progress=folder / "logs/progress.json", errors=folder / "logs/errors", lock=folder / ".lock",
        score=ScoreConfig(), weights=folder / _STEP, origin=ORIGIN,
    )  # fmt: skip
    write_job(job, folder / "logs" / "score.job.json")
    rendezvous = {"id": "a", "endpoint": "h:1", "num_nodes": 2, "processes_per_node": 1, "join_seconds": 3}
    write_json(folder / "logs" / "rendezvous.json", {"job": "j", "rendezvous": {**rendezvous, "seconds_to_stop": 1.0}})
    write_json(folder / "logs" / "nodes" / "host.json", {"host": "h", "rendezvous": "a", "beat": 1})
    write_record(folder / "rounds/2/approval.json", {"policy": "top", "sampling_rate": 0.3})
    ranges = {"min_depth": 1, "max_depth": 2, "min_expansion": 1.0, "max_expansion": 2.0}
    write_record(folder / "sweep.json", {"parameters": 1000, **ranges})
    model = folder / "model"
    (model / "checkpoint" / "step-00000001").mkdir(parents=True)
    write_json(model / "model.yaml", TINY_MODEL.model_dump(mode="json"))
    write_json(model / "import.json", {"end_of_document": "</s>"})
    shutil.copy(folder / "corpus" / "tokenizer.json", model)
    write_record(model / "checkpoint" / "step-00000001" / "reprise.json", {"step": 1, "vocab_size": 300, "files": {}})
    return folder


_ODD: st.SearchStrategy[Any] = st.one_of(
    st.none(), st.booleans(), st.integers(), st.sampled_from([2**63, -(2**63) - 1, 10**400, 0, -1, 2**53, 2**31]),
    st.sampled_from([math.inf, -math.inf, math.nan, 1e308, 0.5]), st.text(max_size=5),
    st.sampled_from(["", "\0", "../..", "/dev/zero", "x" * 10_000, "subprocess:Popen", "a\nb"]),
    st.lists(st.integers(), max_size=2), st.builds(dict), st.builds(lambda: {"a": {"b": []}}),
)  # fmt: skip


@st.composite
def _contents(draw: st.DrawFn, content: bytes) -> bytes:
    """`content` with a value changed, left out or put in, and a right checksum or none; or with other bytes."""
    kind = draw(st.sampled_from(["value", "value", "value", "bytes", "nested", "whole"]))
    if kind == "nested":
        return draw(st.sampled_from([b"[", b'{"a":'])) * draw(st.sampled_from([100, 5000, 200_000]))
    if kind == "bytes":
        return mutated(draw, content)
    record = json.loads(content)
    if kind == "whole":
        return json.dumps(draw(_ODD)).encode()
    seal = record.pop("record_checksum", record.pop("checksum", None))
    for _ in range(draw(st.integers(1, 2))):
        places = list(_places(record))
        if places:
            place, key = draw(st.sampled_from(places))
            if draw(st.booleans()):
                place[key] = draw(_ODD)
            else:
                del place[key]
    if seal is not None and draw(st.booleans()):
        record["record_checksum"] = fingerprint(record)
    return json.dumps(record).encode("utf-8", "surrogatepass")


def _places(value: Any) -> Any:
    """Yield each list or mapping in `value`, with each of its places."""
    entries = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, entry in entries:
        yield value, key
        yield from _places(entry)


@numbers_of_cases(150)
def test_records(run: Path, num_cases: int) -> None:
    intact = {name: (run / name).read_bytes() for name in READERS}
    as_json = {name: content for name, content in intact.items() if not name.endswith("run.yaml")}
    # JSON is YAML, and run.yaml is checked as it is written in one of its forms.
    as_json["run.yaml"] = json.dumps({"config": read_run(run).config.model_dump(mode="json"), "versions": {}}).encode()
    for name, read in READERS.items():
        (run / name).write_bytes(as_json[name])
        read(run)
    num_read = 0
    cases = st.sampled_from(sorted(READERS)).flatmap(lambda name: st.tuples(st.just(name), _contents(as_json[name])))

    def check(case: tuple[str, bytes]) -> None:
        nonlocal num_read
        name, content = case
        (run / name).write_bytes(content)
        try:
            READERS[name](run)
        except ValueError as error:
            assert name not in _HARMLESS
            check_message(error, str(run / name))
        else:
            num_read += 1
        finally:
            (run / name).write_bytes(as_json[name])

    run_cases(cases, check, num_cases)
    assert num_cases / 20 < num_read < num_cases


def test_a_damaged_error_does_not_hide_another_rank_s(tmp_path: Path) -> None:
    leave_error(tmp_path, RankError(1, 5.0, "RuntimeError", False, "what it says", "T"))
    (tmp_path / "rank-00000.json").write_text('{"rank": null}')
    found = root_cause(tmp_path)
    assert found is not None
    assert found.message == "what it says"
    (tmp_path / "rank-00001.json").unlink()
    found = root_cause(tmp_path)
    assert found is not None
    assert str(tmp_path / "rank-00000.json") in found.message


def test_the_checksum_of_a_record_counts(tmp_path: Path) -> None:
    write_record(tmp_path / "a.json", {"a": [1]})
    assert read_json(tmp_path / "a.json") == {"a": [1]}
    (tmp_path / "a.json").write_text((tmp_path / "a.json").read_text().replace("1\n", "2\n"))
    with pytest.raises(ValueError, match="its checksum differs from its content"):
        read_json(tmp_path / "a.json")
