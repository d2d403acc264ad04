"""The reading order compared with the tokens from which the corpus was prepared."""

from pathlib import Path

import numpy as np
import pytest

from data_scoring.base.progress import silent
from data_scoring.config import CorpusConfig, SourceConfig, TokenizerConfig
from data_scoring.corpus import reading_order
from data_scoring.corpus.corpus import Corpus
from data_scoring.corpus.indexed import write_index
from data_scoring.corpus.prepare_corpus import prepare_corpus
from data_scoring.corpus.reading_order import ReadingOrder


def assert_located(order: ReadingOrder, streams: list[np.ndarray], num_held_out: int) -> None:
    """Assert that the sources' tokens are `streams`, and that every training sample is one of their windows."""
    corpus, length, located = order.corpus, order.sample_length, set()
    for source, stream in enumerate(streams):
        np.testing.assert_array_equal(np.concatenate(list(order.blocks(source))), stream)
        assert order.num_source_tokens(source) == len(stream)
        samples = np.random.default_rng(0).permutation(-(-len(stream) // length) - (len(stream) % length == 1))
        for sample, shard, number in zip(samples, *order.locate(source, samples), strict=True):
            if shard == -1:
                assert number == -1
                num_held_out -= 1
                continue
            located.add((shard, number))
            batch = corpus.read(np.array([shard]), np.array([number]))
            window = stream[sample * length : (sample + 1) * length]
            np.testing.assert_array_equal(batch.tokens[0, : batch.num_tokens[0] + 1], window)
    assert num_held_out == 0
    assert len(located) == sum(corpus.num_samples(shard) for shard in range(corpus.num_shards))


def test_text_is_found_in_the_order_of_its_documents(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reading_order, "_CHUNK_TOKENS", 100)
    sources = []
    for name, count in (("a", 30), ("b", 18)):
        (tmp_path / name).write_text("\n".join(f"{name}{n} " + "x" * (n % 7) for n in range(count)))
        sources.append(SourceConfig(name=name, path=str(tmp_path / name), format="text", document="line"))
    config = CorpusConfig(sources=tuple(sources), seq_length=8, num_shards=3, validation_fraction=1e-9)
    prepare_corpus(config, TokenizerConfig(vocab_size=257), 5, tmp_path / "corpus", "prepared", silent)
    order = ReadingOrder(Corpus(tmp_path / "corpus"), 5)
    assert not order.is_in_place
    # With no merges every byte is a token, and an end comes after every document; one of each source is held out.
    end = order.corpus.manifest["end_of_document"]
    lines = [(tmp_path / name).read_text().split("\n") for name in "ab"]
    streams = [np.concatenate(list(order.blocks(source))) for source in range(2)]
    num_ends = [int((stream == end).sum()) for stream in streams]
    assert num_ends == [len(part) - 1 for part in lines]
    byte = {token: b for b in range(128) for token in [_token_of(order, chr(b))]}
    for stream, part in zip(streams, lines, strict=True):
        text = "".join("\n" if token == end else chr(byte[int(token)]) for token in stream)
        assert [line for line in part if f"{line}\n" in text] == text.split("\n")[:-1]
    assert_located(order, streams, 0)


def _token_of(order: ReadingOrder, character: str) -> int:
    from data_scoring.tokenizer.tokenizer import open_tokenizer

    return open_tokenizer(order.corpus.tokenizer_path, None).encode_batch([character])[0][0]


@pytest.mark.parametrize("names", [["wiki", "code", "web"], ["wiki"]])
def test_a_corpus_in_place_is_read_where_it_lies(
    names: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tiny_corpus: Corpus
) -> None:
    monkeypatch.setattr(reading_order, "_CHUNK_TOKENS", 100)
    generator, streams = np.random.default_rng(0), []
    for name, size in zip(names, (700, 433, 290), strict=False):
        streams.append(generator.integers(0, 300, size).astype(np.uint16))
        (tmp_path / f"{name}.bin").write_bytes(streams[-1].tobytes())
        index = (np.array([size]), np.array([0]))
        write_index(tmp_path / f"{name}.idx", streams[-1].dtype, 1, [index])
    config = CorpusConfig(
        sources=tuple(SourceConfig(name=name, path=str(tmp_path / name), format="megatron") for name in names),
        seq_length=8, num_shards=3, validation_fraction=0.2,
    )  # fmt: skip
    tokenizer = TokenizerConfig(path=str(tiny_corpus.tokenizer_path))
    prepare_corpus(config, tokenizer, 5, tmp_path / "corpus", "prepared", silent)
    order = ReadingOrder(Corpus(tmp_path / "corpus"), 5)
    assert order.is_in_place
    assert_located(order, streams, order.corpus.num_validation_samples)
