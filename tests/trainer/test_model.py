"""The trainer's losses compared with an independent implementation of the model in plain torch."""

from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch

from benchmarks.plain_model import PlainModel, load_megatron_weights, read_checkpoint
from tests.conftest import TINY_MODEL, Ranks, read_rows
from trainer.checkpoint_folder import list_checkpoints, read_checkpoint_record


def plain_model(checkpoint: Path, reset: str | None = None) -> PlainModel:
    tensors = read_checkpoint(checkpoint)
    for name, tensor in tensors.items():
        if reset is not None and name.endswith(reset):
            tensor.zero_()
    model = PlainModel(TINY_MODEL, read_checkpoint_record(checkpoint)["vocab_size"]).eval()
    load_megatron_weights(model, tensors)
    return model


def plain_losses(
    ranks: Ranks, checkpoint: Path, shard: int, longest: int = 1_000, reset: str | None = None
) -> list[float]:
    model = plain_model(checkpoint, reset)
    count = ranks.corpus.num_samples(shard)
    batch = ranks.corpus.read(np.full(count, shard), np.arange(count))
    tokens = torch.from_numpy(batch.tokens)
    with torch.no_grad():
        losses = model(tokens[:, :-1], tokens[:, 1:])
    lengths = np.minimum(batch.num_tokens, longest).tolist()
    return [float(row[:length].double().mean()) for row, length in zip(losses, lengths, strict=True)]


def test_scored_losses_equal_plain_torch(ranks: Ranks, trained: Path, scored: Path) -> None:
    checkpoint = list_checkpoints(trained / "checkpoint")[-1]
    lengths = set()
    for shard in range(ranks.corpus.num_shards):
        rows = read_rows(scored / "losses" / f"shard={shard:04d}.parquet", "sample", "num_tokens", "loss")
        lengths |= {row[1] for row in rows}
        np.testing.assert_allclose([row[2] for row in rows], plain_losses(ranks, checkpoint, shard), atol=1e-4)
    assert len(lengths) > 1, "the corpus should have samples shorter than the others"


@pytest.mark.parametrize("part", ["activation_func.offset", "activation_func.scale", "self_attn_bda.up"])
def test_what_pangu_adds_has_been_trained_and_matters(part: str, ranks: Ranks, trained: Path) -> None:
    """What the losses above, and those of the layouts, would not show if it did nothing."""
    checkpoint = list_checkpoints(trained / "checkpoint")[-1]
    losses, without = (plain_losses(ranks, checkpoint, 0, reset=reset) for reset in (None, part))
    # Ten times what losses may differ by there.
    assert np.abs(np.subtract(losses, without)).mean() > 1e-3


def test_a_calibration_s_losses_equal_plain_torch(ranks: Ranks, trained: Path) -> None:
    """All samples are calibrated with, on two pipeline stages; each prefix has its own losses."""
    checkpoint = list_checkpoints(trained / "checkpoint")[-1]
    folder = ranks.calibrate("calibrated", checkpoint, (1, 2, 1))
    table = pq.read_table(folder / "calibration.parquet").to_pandas()
    assert table.num_tokens.nunique() > 1
    for shard in range(ranks.corpus.num_shards):
        rows = table[table.shard == shard].sort_values("sample")
        for name, longest in (("prefix:4", 4), ("prefix:8", 8), ("prefix:16", 16), ("loss", 32)):
            expected = plain_losses(ranks, checkpoint, shard, longest)
            np.testing.assert_allclose(rows[name], expected, atol=1e-4)


def test_generation_takes_the_most_probable_token_each_time(ranks: Ranks, trained: Path) -> None:
    """On four ranks, with a cache; the plain model has none and computes the whole sequence anew."""
    checkpoint = list_checkpoints(trained / "checkpoint")[-1]
    measured = ranks.generate("generated", checkpoint, (2, 2, 1))
    assert measured["tokens_per_second"] > 0
    tokens = torch.tensor([measured["first_sequence"]])
    assert tokens.shape == (1, 32)
    assert len(set(tokens[0, 2:].tolist())) > 3, "a model that repeats one token would hide a wrong position"
    model = plain_model(checkpoint)
    with torch.no_grad():
        logits = model.logits(tokens[:, :-1])[0, 1:, : ranks.corpus.vocab_size]
    taken = logits.gather(1, tokens[0, 2:, None])[:, 0]
    torch.testing.assert_close(taken, logits.max(dim=1).values, atol=1e-4, rtol=0)


def test_training_has_learned(trained: Path) -> None:
    losses = [row[1] for row in read_rows(trained / "steps.parquet", "step", "loss")]
    assert losses[-1] < losses[0] - 1.0


def test_learning_rate_warms_up_linearly_and_decays_as_a_cosine(trained: Path) -> None:
    rates = np.array([row[1] for row in read_rows(trained / "steps.parquet", "step", "lr")])
    steps, warmup = len(rates), round(0.05 * len(rates))
    step = np.arange(1, steps + 1)
    cosine = 1e-3 + (1e-2 - 1e-3) * 0.5 * (1 + np.cos(np.pi * (step - warmup) / (steps - warmup)))
    np.testing.assert_allclose(rates, np.where(step < warmup, 1e-2 * step / max(warmup, 1), cosine), rtol=1e-5)
