"""Losses do not depend on the layout: in training, in scoring, and when the layout changes in between."""

import shutil
from pathlib import Path

import numpy as np
import pytest

from benchmarks.plain_model import read_checkpoint
from data_scoring.corpus.corpus import Corpus
from data_scoring.refine.training_mix import write_mix
from tests.conftest import TINY_MODEL, TINY_TRAIN, Ranks, read_rows
from tests.forked_ranks import forking
from trainer.checkpoint_folder import list_checkpoints
from trainer.config import CheckpointConfig

LAYOUTS = [(2, 1, 1), (1, 2, 1), (2, 2, 1), (1, 1, 2)]
# Five batches of eight and one of three: the last batch of a round is rarely full.
NUM_SAMPLES = 43


def short_mix(path: Path, corpus_samples: Path) -> int:
    return write_mix(path, f"select shard, sample from '{corpus_samples}' where sample < 15 limit {NUM_SAMPLES}", 0, 1)


@pytest.fixture(scope="module")
def reference(ranks: Ranks, trained: Path) -> Path:
    return ranks.train(
        "reference",
        start_from=list_checkpoints(trained / "checkpoint")[-1],
        make_mix=lambda path: short_mix(path, ranks.corpus.samples_path),
    )


def assert_same_training(folder: Path, reference: Path) -> None:
    for file, identity, numbers in (
        ("steps.parquet", ("step", "num_samples", "num_tokens"), ("loss", "lr")),
        ("seen", ("step", "shard", "sample"), ("loss",)),
        ("validation.parquet", ("step", "source", "num_tokens"), ("loss",)),
        ("validation-samples.parquet", ("sample", "source", "num_tokens"), ("loss",)),
    ):
        assert read_rows(folder / file, *identity) == read_rows(reference / file, *identity)
        found, expected = (read_rows(place / file, *identity, *numbers) for place in (folder, reference))
        np.testing.assert_allclose(
            [row[len(identity) :] for row in found], [row[len(identity) :] for row in expected], atol=1e-4
        )
    norms, expected_norms = (read_rows(place / "steps.parquet", "step", "grad_norm") for place in (folder, reference))
    np.testing.assert_allclose(norms, expected_norms, rtol=1e-4)
    weights, expected_weights = (
        read_checkpoint(list_checkpoints(place / "checkpoint")[-1]) for place in (folder, reference)
    )
    assert weights.keys() == expected_weights.keys()
    for name, weight in weights.items():
        # Adam goes 0.01 a step however small the gradient: where that is all but zero, rounding is not far from it.
        np.testing.assert_allclose(weight, expected_weights[name], atol=1e-3, err_msg=name)


def test_one_rank_sees_every_sample_of_the_mix_once(reference: Path) -> None:
    seen = read_rows(reference / "seen", "shard", "sample")
    assert seen == read_rows(reference / "mix.parquet", "shard", "sample")
    assert len(set(seen)) == NUM_SAMPLES
    assert [row[0] for row in read_rows(reference / "steps.parquet", "num_samples")] == [3, 8, 8, 8, 8, 8]


def test_seen_losses_are_the_step_losses(ranks: Ranks, reference: Path) -> None:
    tokens = {row[:2]: row[2] for row in read_rows(ranks.corpus.samples_path, "shard", "sample", "num_tokens")}
    for step, loss, num_tokens in read_rows(reference / "steps.parquet", "step", "loss", "num_tokens"):
        rows = [row for row in read_rows(reference / "seen", "step", "shard", "sample", "loss") if row[0] == step]
        total = sum(row[3] * tokens[row[1:3]] for row in rows)
        assert sum(tokens[row[1:3]] for row in rows) == num_tokens
        assert total / num_tokens == pytest.approx(loss, abs=1e-5)


def test_no_two_layers_start_alike_whatever_stage_they_are_in(ranks: Ranks) -> None:
    model = TINY_MODEL.model_copy(update={"num_layers": 3})
    folder = ranks.train(
        "stages", (1, 3, 1), make_mix=lambda path: write_mix(path, "select 0 as shard, 0 as sample", 0, 1), model=model
    )
    tensors = read_checkpoint(list_checkpoints(folder / "checkpoint")[-1])
    for name in ("self_attention.linear_qkv", "mlp.linear_fc1"):
        weights = tensors[f"decoder.layers.{name}.weight"]
        assert weights.std() > 0.01
        for one, other in ((0, 1), (0, 2), (1, 2)):
            assert not np.allclose(weights[one], weights[other], atol=0.02)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_training_and_scoring_agree_with_one_rank(
    layout: tuple[int, int, int], ranks: Ranks, trained: Path, reference: Path, scored: Path
) -> None:
    name = "x".join(map(str, layout))
    weights = list_checkpoints(trained / "checkpoint")[-1]
    # One rank trained with the reference; tensor parallelism is where kernels have something to exchange.
    train = TINY_TRAIN.model_copy(update={"loss_kernel": "chunked" if layout[0] > 1 else "reference"})
    folder = ranks.train(
        f"train-{name}", layout, weights, lambda path: short_mix(path, ranks.corpus.samples_path), train=train
    )
    assert_same_training(folder, reference)
    rescored = ranks.score(f"score-{name}", weights, layout)
    for shard in range(ranks.corpus.num_shards):
        found, expected = (
            read_rows(place / "losses" / f"shard={shard:04d}.parquet", "sample", "num_tokens", "loss")
            for place in (rescored, scored)
        )
        assert [row[:2] for row in found] == [row[:2] for row in expected]
        np.testing.assert_allclose([row[2] for row in found], [row[2] for row in expected], atol=1e-4)


def test_a_checkpoint_of_four_ranks_goes_on_with_one(
    ranks: Ranks, trained: Path, reference: Path, tmp_path: Path
) -> None:
    """A sample of step 5 is corrupt: 2x2 stops there; once it is restored, 1x1 goes on from the save at step 3."""
    damaged = Ranks(Corpus(Path(shutil.copytree(ranks.corpus.folder, tmp_path / "corpus"))), tmp_path, forking)
    start_from = list_checkpoints(trained / "checkpoint")[-1]
    checkpoint = CheckpointConfig(every_steps=3)

    def make_mix(path: Path) -> int:
        return short_mix(path, ranks.corpus.samples_path)

    [(_, shard, sample), *_] = [row for row in read_rows(reference / "seen", "step", "shard", "sample") if row[0] == 5]
    tokens_path = tmp_path / "corpus" / f"shard-{shard:04d}.bin"
    whole = tokens_path.read_bytes()
    stride = 2 * (ranks.corpus.seq_length + 1)
    tokens_path.write_bytes(whole[: stride * sample] + b"\xff\xff" + whole[stride * sample + 2 :])
    with pytest.raises(ValueError, match=rf"shard-{shard:04d}.bin: corrupt: sample {sample} of shard {shard} has"):
        damaged.train("moved", (2, 2, 1), start_from, make_mix, checkpoint)
    assert [path.name for path in list_checkpoints(tmp_path / "moved" / "checkpoint")] == ["step-00000003"]
    tokens_path.write_bytes(whole)
    assert_same_training(damaged.train("moved", (1, 1, 1), start_from, make_mix, checkpoint), reference)
