"""The interleaved pipeline schedule computes what one rank does, and its checkpoints are those of any layout."""

import shutil
from pathlib import Path

import numpy as np
import pytest

from benchmarks.plain_model import read_checkpoint
from data_scoring.corpus.corpus import Corpus
from data_scoring.refine.training_mix import write_mix
from tests.conftest import TINY_MODEL, Layout, Ranks, read_rows
from tests.forked_ranks import forking
from trainer.checkpoint_folder import list_checkpoints
from trainer.config import CheckpointConfig, ModelConfig

MODEL = TINY_MODEL.model_copy(update={"num_layers": 4})
TIED = MODEL.model_copy(update={"tied_embeddings": True})
ONE, INTERLEAVED = (1, 1, 1), (1, 2, 1, 2)
# Five batches of four microbatches, and a last one of two samples, which fill one.
NUM_SAMPLES = 42
FLOAT32_ERROR, BFLOAT16_ERROR = 1e-5, 0.03


def train(
    ranks: Ranks,
    name: str,
    layout: Layout,
    start_from: Path | None,
    checkpoint: CheckpointConfig | None = None,
    model: ModelConfig = MODEL,
    precision: str = "float32",
) -> Path:
    """Train a round on the short mix, or go on with it, and return its folder."""
    folder = ranks.folder / name
    if not (folder / "mix.parquet").exists():
        some = f"select shard, sample from '{ranks.corpus.samples_path}' where sample < 15 limit {NUM_SAMPLES}"
        write_mix(folder / "mix.parquet", some, 0, 1)
    job = ranks.job(name, layout, start_from, checkpoint or CheckpointConfig(), model=model)
    ranks.launch(job.model_copy(update={"precision": precision}), name)
    return folder


def last(folder: Path) -> Path:
    return list_checkpoints(folder / "checkpoint")[-1]


def losses(folder: Path) -> dict[str, np.ndarray]:
    """Return the losses of steps, samples and validation, and the norms of gradients."""
    return {
        "steps": np.array(read_rows(folder / "steps.parquet", "step", "num_tokens", "loss")),
        "seen": np.array(read_rows(folder / "seen", "step", "shard", "sample", "loss")),
        "validation": np.array([row[1:] for row in read_rows(folder / "validation.parquet", "source", "step", "loss")]),
        "norms": np.array(read_rows(folder / "steps.parquet", "step", "grad_norm")),
    }


def assert_same_losses(folder: Path, expected: Path, error: float) -> None:
    found, wanted = losses(folder), losses(expected)
    assert len(found["steps"]) == 6
    for name, rows in wanted.items():
        np.testing.assert_allclose(found[name], rows, atol=error, rtol=error, err_msg=name)


@pytest.fixture(scope="module")
def start(ranks: Ranks) -> Path:
    """The checkpoint of a round on one rank, from which others start."""
    return last(train(ranks, "vp-start", ONE, None))


@pytest.fixture(scope="module")
def reference(ranks: Ranks, start: Path) -> Path:
    return train(ranks, "vp-reference", ONE, start)


@pytest.mark.parametrize(
    "layout",
    [
        INTERLEAVED,
        *(pytest.param(layout, marks=pytest.mark.slow) for layout in ((1, 2, 2, 2), (2, 2, 1, 2))),
    ],
)
def test_losses_are_those_of_one_rank(layout: Layout, ranks: Ranks, start: Path, reference: Path) -> None:
    name = "x".join(map(str, layout))
    folder = train(ranks, f"vp-{name}", layout, start)
    assert_same_losses(folder, reference, FLOAT32_ERROR)
    found, expected = (read_checkpoint(last(each)) for each in (folder, reference))
    assert found.keys() == expected.keys()
    for key, weight in expected.items():
        # Adam goes 0.01 a step however small the gradient.
        np.testing.assert_allclose(found[key], weight, atol=1e-3, err_msg=key)


def test_tied_embeddings_stay_the_same_on_both_stages(ranks: Ranks) -> None:
    start = last(train(ranks, "vp-tied-start", ONE, None, model=TIED))
    expected, found = (
        train(ranks, f"vp-tied-{len(layout)}", layout, start, model=TIED) for layout in (ONE, INTERLEAVED)
    )
    assert_same_losses(found, expected, FLOAT32_ERROR)


def test_losses_in_bfloat16_are_about_those_of_one_rank(ranks: Ranks, start: Path, reference: Path) -> None:
    rounded = train(ranks, "vp-bfloat16", INTERLEAVED, start, precision="bfloat16")
    assert_same_losses(rounded, reference, BFLOAT16_ERROR)
    with pytest.raises(AssertionError):
        assert_same_losses(rounded, reference, FLOAT32_ERROR)


def test_scoring_and_generation_are_those_of_one_rank(ranks: Ranks, start: Path) -> None:
    expected, found = (ranks.score(f"vp-score-{len(layout)}", start, layout, MODEL) for layout in (ONE, INTERLEAVED))
    for shard in range(ranks.corpus.num_shards):
        file = f"losses/shard={shard:04d}.parquet"
        rows, wanted = (
            np.array(read_rows(place / file, "sample", "num_tokens", "loss")) for place in (found, expected)
        )
        np.testing.assert_allclose(rows, wanted, atol=FLOAT32_ERROR)
    one, other = (
        ranks.generate(f"vp-generate-{len(layout)}", start, layout, MODEL)["first_sequence"]
        for layout in (ONE, INTERLEAVED)
    )
    assert len(one) == 32
    assert one == other


@pytest.mark.parametrize(
    ("before", "after"),
    [(INTERLEAVED, INTERLEAVED), (INTERLEAVED, ONE), ((1, 2, 1), INTERLEAVED)],
    ids=["same", "from interleaved", "to interleaved"],
)
def test_a_round_goes_on_from_a_checkpoint_of_any_layout(
    before: Layout, after: Layout, ranks: Ranks, start: Path, reference: Path, tmp_path: Path
) -> None:
    """A sample of step 5 is corrupt: training stops there; once it is restored, it goes on from the save at step 3."""
    damaged = Ranks(Corpus(Path(shutil.copytree(ranks.corpus.folder, tmp_path / "corpus"))), tmp_path, forking)
    checkpoint = CheckpointConfig(every_steps=3)
    [(_, shard, sample), *_] = [row for row in read_rows(reference / "seen", "step", "shard", "sample") if row[0] == 5]
    tokens_path = tmp_path / "corpus" / f"shard-{shard:04d}.bin"
    whole = tokens_path.read_bytes()
    position = 2 * (ranks.corpus.seq_length + 1) * sample
    tokens_path.write_bytes(whole[:position] + b"\xff\xff" + whole[position + 2 :])
    with pytest.raises(ValueError, match="corrupt"):
        train(damaged, "moved", before, start, checkpoint)
    assert last(tmp_path / "moved").name == "step-00000003"
    tokens_path.write_bytes(whole)
    moved = train(damaged, "moved", after, start, checkpoint)
    assert_same_losses(moved, reference, FLOAT32_ERROR)
    if before == after:
        # Not interrupted.
        straight = train(ranks, "vp-straight", after, start)
        for name, rows in losses(straight).items():
            np.testing.assert_array_equal(losses(moved)[name], rows, err_msg=name)
        weights = read_checkpoint(last(straight))
        for key, weight in read_checkpoint(last(moved)).items():
            np.testing.assert_array_equal(weight, weights[key], err_msg=key)
