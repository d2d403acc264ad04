"""The size of a corpus before it is prepared, compared with the corpus that is prepared."""

import gzip
import json
from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from data_scoring.base.progress import silent
from data_scoring.corpus.corpus import Corpus
from data_scoring.corpus.prepare_corpus import prepare_corpus
from flows.planning import corpus_size
from flows.planning.corpus_size import megatron_size, prepared_size, sampled_size
from flows.run.config import RunConfig
from flows.run.folder import Run
from tests.conftest import make_documents


def write_jsonl(path: Path, documents: list[str]) -> None:
    path.write_text("".join(json.dumps({"id": number, "text": each}) + "\n" for number, each in enumerate(documents)))


def write_gzip(path: Path, documents: list[str]) -> None:
    path.write_bytes(gzip.compress("\n".join(documents).encode()))


def write_parquet(path: Path, documents: list[str]) -> None:
    pq.write_table(pa.table({"text": documents, "id": list(range(len(documents)))}), path)


def configured(folder: Path, source: dict[str, object]) -> RunConfig:
    corpus = {"sources": [{"name": "a", **source}], "seq_length": 32, "num_shards": 2}
    return RunConfig.model_validate(
        {"name": "run", "output": str(folder), "corpus": corpus, "tokenizer": {"vocab_size": 300}}
    )


def prepare(config: RunConfig) -> Run:
    run = Run(config, config.folder)
    prepare_corpus(config.corpus, config.tokenizer, config.seed, run.corpus_folder, "x", silent)
    return run


def test_text_that_is_read_as_a_whole_is_counted(tmp_path: Path) -> None:
    write_jsonl(tmp_path / "a.jsonl", make_documents(200))
    config = configured(tmp_path, {"path": str(tmp_path / "a.jsonl")})
    sampled, prepared = sampled_size(config), prepared_size(prepare(config))
    assert prepared is not None
    assert sampled.basis == "the whole text"
    for field in ("num_samples", "train_tokens", "num_validation_samples", "validation_tokens"):
        assert getattr(sampled, field) == getattr(prepared, field)
    # A token at the end of a source predicts nothing, and is in no sample.
    stored = sum(path.stat().st_size for path in config.folder.glob("corpus/*.bin"))
    assert [sampled.num_bytes, prepared.num_bytes] == pytest.approx([stored, stored], rel=0.005)


@pytest.mark.parametrize(
    ("name", "write", "fields"),
    [
        ("a.jsonl", write_jsonl, {}),
        ("a.txt.gz", write_gzip, {"document": "line"}),
        ("a.parquet", write_parquet, {}),
        ("a.jsonl", write_jsonl, {"max_documents": 400}),
    ],
)
def test_a_sample_stands_for_the_whole(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    name: str,
    write: Callable[[Path, list[str]], None],
    fields: dict[str, object],
) -> None:
    monkeypatch.setattr(corpus_size, "_SAMPLED_BYTES", 20_000)
    monkeypatch.setattr(corpus_size, "_LEAST_BYTES", 20_000)
    write(tmp_path / name, make_documents(2000))
    config = configured(tmp_path, {"path": str(tmp_path / name), **fields})
    sampled, prepared = sampled_size(config), prepared_size(prepare(config))
    assert prepared is not None
    assert sampled.basis == "an estimate from a sample of the text"
    assert sampled.train_tokens == pytest.approx(prepared.train_tokens, rel=0.1)
    assert sampled.num_samples == pytest.approx(prepared.num_samples, rel=0.1)


def test_corpora_in_place_are_counted_by_their_index(tmp_path: Path, tiny_corpus: Corpus) -> None:
    config = configured(tmp_path, {"path": str(tiny_corpus.folder / "shard-0000"), "format": "megatron"})
    size = megatron_size(config)
    assert size is not None
    tokens = (tiny_corpus.folder / "shard-0000.bin").stat().st_size / 2
    assert size.num_samples + size.num_validation_samples == pytest.approx(tokens / 33, abs=2)
    assert megatron_size(configured(tmp_path, {"path": "topics", "format": "python"})) is None
