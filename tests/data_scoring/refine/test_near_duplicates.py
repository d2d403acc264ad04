"""Near duplicates against Jaccard similarities that are computed exactly."""

import json
from pathlib import Path

import numpy as np
import pytest

from data_scoring.base.progress import silent
from data_scoring.config import CorpusConfig, SourceConfig, TokenizerConfig
from data_scoring.corpus.corpus import Corpus
from data_scoring.corpus.prepare_corpus import prepare_corpus
from data_scoring.refine.near_duplicates import write_near_duplicates
from tests.conftest import read_rows


def runs(corpus: Corpus, shard: int, sample: int) -> set[tuple[int, ...]]:
    batch = corpus.read(np.array([shard]), np.array([sample]))
    tokens = batch.tokens[0, : batch.num_tokens[0] + 1].tolist()
    return {tuple(tokens[place : place + 5]) for place in range(len(tokens) - 4)}


@pytest.fixture(scope="module")
def repetitive(tmp_path_factory: pytest.TempPathFactory) -> Corpus:
    """A corpus whose text comes again and again, a little changed."""
    folder = tmp_path_factory.mktemp("repetitive")
    generator = np.random.default_rng(0)
    alphabet = np.array(list("abcdefghijklmnop"))
    first = "".join(generator.choice(alphabet, 64 * 40))
    texts = [first, "".join(generator.choice(alphabet, 64 * 60))]
    for _ in range(3):
        again = list(first)
        for place in generator.integers(0, len(again), 60):
            again[place] = "z"
        texts.append("".join(again))
    with (folder / "text.jsonl").open("w") as file:
        for text in texts:
            file.write(json.dumps({"text": text}) + "\n")
    config = CorpusConfig(
        sources=(SourceConfig(name="text", path=str(folder / "text.jsonl")),),
        seq_length=63, num_shards=3, validation_fraction=1e-9,
    )  # fmt: skip
    prepare_corpus(config, TokenizerConfig(vocab_size=257), 0, folder / "corpus", "repetitive", silent)
    return Corpus(folder / "corpus")


def test_what_is_listed_is_similar_to_something_earlier_and_all_of_it_is_listed(
    repetitive: Corpus, tmp_path: Path
) -> None:
    corpus, path, threshold = repetitive, tmp_path / "near.parquet", 0.6
    write_near_duplicates(corpus, threshold, path, 1.0, silent)
    listed = {row[:2]: row[2] for row in read_rows(path, "shard", "sample", "similarity")}
    places = [(shard, sample) for shard in range(3) for sample in range(corpus.num_samples(shard))]
    sets = [runs(corpus, *place) for place in places]
    num_near = 0
    for number, place in enumerate(places):
        similar = [len(sets[number] & other) / max(1, len(sets[number] | other)) for other in sets[:number]]
        most = max(similar, default=0.0)
        # An estimate by 128 hashes is off by 0.04 or so.
        if most > threshold + 0.15:
            assert listed[place] == pytest.approx(most, abs=0.2)
            num_near += 1
        elif most < threshold - 0.15:
            assert place not in listed
    assert num_near > 10
    written = path.stat().st_mtime_ns
    write_near_duplicates(corpus, threshold, path, 1.0, silent)
    assert path.stat().st_mtime_ns == written
    assert list(tmp_path.iterdir()) == [path]
