"""Scoring with a NumPy scorer: what is scored, in which order, what survives an interruption, and origins."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from numpy.typing import NDArray

from data_scoring.base.progress import silent
from data_scoring.corpus.corpus import Batch, Corpus
from data_scoring.losses.origin import Origin, check_origins, read_origin
from data_scoring.losses.shard_scoring import (
    Block,
    LossFiles,
    Scorer,
    longest_first,
    losses_path,
    score_samples,
    score_shards,
)
from tests.conftest import ORIGIN, read_rows


class InterruptedScoringError(Exception):
    """The process was killed here."""


class FakeScorer:
    """Takes the mean of a sample's tokens for its loss; notes what it scored; stops after `blocks` blocks."""

    is_writer = True

    def __init__(self, corpus: Corpus, block_size: int, blocks: int = 1_000_000) -> None:
        self.corpus, self.block_size, self.left = corpus, block_size, blocks
        self.scored: list[Block] = []

    def read(self, block: Block) -> Batch:
        return self.corpus.read(block.shards, block.samples, block.seq_length)

    def score(self, block: Block, share: Batch) -> NDArray[np.float32] | None:
        if not self.left:
            raise InterruptedScoringError
        self.left -= 1
        self.scored.append(block)
        return (share.tokens[:, 1:].sum(axis=1) / share.num_tokens).astype(np.float32)[:, None]

    def agree(self, numbers: NDArray[np.int64]) -> NDArray[np.int64]:
        return numbers


def score(corpus: Corpus, folder: Path, scorer: Scorer, longest: int = 32, commit_seconds: float = 0.0) -> None:
    score_shards(corpus, scorer, LossFiles(folder, corpus, longest, "f", ORIGIN, commit_seconds), silent)


def rows_of(corpus: Corpus, folder: Path) -> list[tuple[int, int, int, float]]:
    return [
        (shard, *row)
        for shard in range(corpus.num_shards)
        for row in read_rows(losses_path(folder, shard), "sample", "num_tokens", "loss")
    ]


def num_scored(scorer: FakeScorer) -> int:
    return sum(len(block.samples) for block in scorer.scored)


@pytest.mark.parametrize("longest", [32, 5])
def test_every_sample_has_its_loss_whatever_the_order_they_are_scored_in(
    tiny_corpus: Corpus, tmp_path: Path, longest: int
) -> None:
    scorer = FakeScorer(tiny_corpus, 7)
    score(tiny_corpus, tmp_path, scorer, longest)
    expected = []
    for shard in range(tiny_corpus.num_shards):
        for sample in range(tiny_corpus.num_samples(shard)):
            batch = tiny_corpus.read(np.array([shard]), np.array([sample]))
            count = min(int(batch.num_tokens[0]), longest)
            expected.append((shard, sample, count, pytest.approx(batch.tokens[0, 1 : count + 1].mean())))
    assert rows_of(tiny_corpus, tmp_path) == expected
    assert {path.name for path in (tmp_path / "losses").iterdir()} == {
        f"shard=000{shard}.parquet" for shard in (0, 1, 2)
    }
    # Any reader knows the shard.
    together = pq.read_table(tmp_path / "losses")
    assert together.schema.field("shard").type == pa.int32()
    columns = [together[name].to_pylist() for name in ("shard", "sample", "num_tokens", "loss")]
    assert sorted(zip(*columns, strict=True)) == rows_of(tiny_corpus, tmp_path)


def test_blocks_are_as_wide_as_their_longest_sample(tiny_corpus: Corpus, tmp_path: Path) -> None:
    scorer = FakeScorer(tiny_corpus, 1)
    score(tiny_corpus, tmp_path, scorer)
    lengths = [tiny_corpus.lengths(int(block.shards[0]))[block.samples[0]] for block in scorer.scored]
    assert [block.seq_length for block in scorer.scored] == lengths
    assert len(set(lengths)) > 1
    batch = tiny_corpus.read(np.zeros(3, int), np.arange(3))
    assert tiny_corpus.lengths(0)[:3].tolist() == batch.num_tokens.tolist()


def test_samples_of_several_shards_are_returned_in_their_own_order(tiny_corpus: Corpus) -> None:
    shards, samples = np.array([2, 0, 1, 0]), np.array([3, 0, tiny_corpus.num_samples(1) - 1, 1])
    lengths = np.array([tiny_corpus.lengths(shard)[sample] for shard, sample in zip(shards, samples, strict=True)])
    found = score_samples(tiny_corpus, FakeScorer(tiny_corpus, 2), shards, samples, lengths)
    batch = tiny_corpus.read(shards, samples)
    assert found is not None
    np.testing.assert_allclose(found[:, 0], batch.tokens[:, 1:].sum(axis=1) / batch.num_tokens)


def test_the_order_is_by_length_and_then_by_number() -> None:
    assert longest_first(np.array([3, 9, 3, 9, 1], np.int32)).tolist() == [1, 3, 0, 2, 4]


@pytest.mark.parametrize("block_size", [4, 9])
def test_cut_off_inside_a_shard_only_the_rest_is_scored(tiny_corpus: Corpus, tmp_path: Path, block_size: int) -> None:
    """The second shard is cut off; who goes on has the same or another size of blocks."""
    score(tiny_corpus, tmp_path / "unbroken", FakeScorer(tiny_corpus, 4))
    first_blocks = -(-tiny_corpus.num_samples(0) // 4)
    with pytest.raises(InterruptedScoringError):
        score(tiny_corpus, tmp_path / "cut", FakeScorer(tiny_corpus, 4, first_blocks + 3))
    parts = tmp_path / "cut" / "losses" / "parts"
    assert [path.name for path in sorted(parts.iterdir())] == [
        f"shard=0001-start={start:012d}.parquet" for start in (0, 4, 8)
    ]
    (parts / ".leftover.tmp").touch()
    rest = FakeScorer(tiny_corpus, block_size)
    score(tiny_corpus, tmp_path / "cut", rest)
    assert num_scored(rest) == sum(map(tiny_corpus.num_samples, (1, 2))) - 12
    assert rows_of(tiny_corpus, tmp_path / "cut") == rows_of(tiny_corpus, tmp_path / "unbroken")
    assert not parts.exists()
    again = FakeScorer(tiny_corpus, 4)
    score(tiny_corpus, tmp_path / "cut", again)
    assert again.scored == []


def test_parts_of_other_inputs_and_beyond_a_gap_are_not_used(tiny_corpus: Corpus, tmp_path: Path) -> None:
    with pytest.raises(InterruptedScoringError):
        score(tiny_corpus, tmp_path, FakeScorer(tiny_corpus, 4, 5))
    parts = sorted((tmp_path / "losses" / "parts").iterdir())
    parts[1].unlink()
    files = LossFiles(tmp_path, tiny_corpus, 32, "f", ORIGIN)
    assert files.starts().tolist() == [4, 0, 0]
    assert sorted((tmp_path / "losses" / "parts").iterdir()) == parts[:1]
    assert LossFiles(tmp_path, tiny_corpus, 32, "other", ORIGIN).starts().tolist() == [0, 0, 0]
    assert list((tmp_path / "losses" / "parts").iterdir()) == []


def test_killed_before_its_parts_were_put_together_nothing_is_scored_again(
    tiny_corpus: Corpus, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def die(files: LossFiles, shard: int) -> None:
        files._commit_part(shard)
        raise InterruptedScoringError

    with monkeypatch.context() as patch, pytest.raises(InterruptedScoringError):
        patch.setattr(LossFiles, "_complete", die)
        score(tiny_corpus, tmp_path, FakeScorer(tiny_corpus, 50))
    rest = FakeScorer(tiny_corpus, 50)
    score(tiny_corpus, tmp_path, rest)
    assert {int(block.shards[0]) for block in rest.scored} == {1, 2}
    score(tiny_corpus, tmp_path / "unbroken", FakeScorer(tiny_corpus, 50))
    assert rows_of(tiny_corpus, tmp_path) == rows_of(tiny_corpus, tmp_path / "unbroken")


def test_parts_are_committed_on_a_clock(tiny_corpus: Corpus, tmp_path: Path) -> None:
    with pytest.raises(InterruptedScoringError):
        score(tiny_corpus, tmp_path, FakeScorer(tiny_corpus, 4, 5), commit_seconds=60.0)
    assert not (tmp_path / "losses" / "parts").exists()


def test_a_loss_that_is_not_finite_is_never_committed(tiny_corpus: Corpus, tmp_path: Path) -> None:
    files = LossFiles(tmp_path, tiny_corpus, 32, "f", ORIGIN, 0.0)
    block = Block(np.full(3, 1), np.array([7, 8, 9]), 32)
    with pytest.raises(ValueError, match=r"shard=0001.parquet: sample 8 of shard 1 has the loss nan \(1 in all"):
        files.append(block, np.array([1.0, np.nan, 2.0], np.float32))
    assert not (tmp_path / "losses").exists()


def test_losses_say_where_they_come_from(tiny_corpus: Corpus, tmp_path: Path) -> None:
    score(tiny_corpus, tmp_path, FakeScorer(tiny_corpus, 50))
    paths = [losses_path(tmp_path, shard) for shard in range(tiny_corpus.num_shards)]
    assert read_origin(paths[2]) == check_origins(paths, "c") == ORIGIN
    with pytest.raises(ValueError, match=r"shard=0000.parquet: its losses are of another corpus: corpus is 'c' there"):
        check_origins(paths, "d")
    with pytest.raises(ValueError, match=r"none.parquet: no such file; score the round first"):
        check_origins([tmp_path / "none.parquet"], "c")
    pq.write_table(pq.read_table(paths[1]).replace_schema_metadata(None), paths[1])
    with pytest.raises(ValueError, match=r"shard=0001.parquet: has no record of the origin of its losses; delete it"):
        check_origins(paths, "c")


@pytest.mark.parametrize("field", ["checkpoint", "tokenizer", "corpus", "precision", "budget"])
def test_losses_of_different_origins_are_not_mixed(tiny_corpus: Corpus, tmp_path: Path, field: str) -> None:
    other: Origin = replace(ORIGIN, **{field: "another"})
    for name, origin in (("one", ORIGIN), ("two", other)):
        scorer = FakeScorer(tiny_corpus, 50)
        score_shards(tiny_corpus, scorer, LossFiles(tmp_path / name, tiny_corpus, 32, "f", origin), silent)
    paths = [losses_path(tmp_path / name, shard) for shard, name in enumerate(("one", "two", "one"))]
    message = (
        rf"two/losses/shard=0001.parquet: its losses are not comparable with those in .*one/losses/shard=0000.parquet: "
        rf"{field} is 'another' here and '{getattr(ORIGIN, field)}' there; delete the file"
    )
    with pytest.raises(ValueError, match=message):
        check_origins(paths, ORIGIN.corpus)
