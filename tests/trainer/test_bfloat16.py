"""Jobs in bfloat16 compared with plain torch in float32 with the same weights, under every layout and on one rank.

The significand of bfloat16 has 8 bits, so rounding errors are at most 2^-9 of a value. Logits of the tests' model are
below 8, where adjacent values are 2^-5 apart: rounding errors are at most 2^-6, and 2^-7 in root mean square. The
computation before them adds about as much.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from numpy.typing import NDArray

from benchmarks.plain_model import PlainModel, load_megatron_weights, read_checkpoint
from data_scoring.base.files import read_json
from data_scoring.corpus.corpus import VALIDATION, Corpus
from data_scoring.losses.calibration import draw_calibration_set
from tests.conftest import TINY_MODEL, read_rows
from tests.hugging_face_models import MODELS
from tests.trainer.test_masks import JOB_LAYOUTS, losses
from tests.trainer.two_ranks_bfloat16 import LONG, ROUNDED, SLICED, STUDENT
from tests.trainer.two_ranks_evaluation import _judge_plainly, _logits
from tests.trainer.two_ranks_hugging_face import LAYOUTS as HUGGING_FACE_LAYOUTS
from tests.trainer.two_ranks_layers import LAYOUTS
from tests.trainer.two_ranks_masks import NUM_SAMPLES, STUDENTS
from trainer.config import ModelConfig
from trainer.masks import KINDS
from trainer.pruning import PruningPlan
from trainer.requests import Generation, Likelihood, read_answers, read_requests

EVERYWHERE = ("one", *LAYOUTS)
# The root mean square of a logit's error, and what the largest of many errors may be.
RMS, MAXIMUM = 2**-6, 2**-4


@cache
def open_plain(checkpoint: Path, config: ModelConfig = TINY_MODEL) -> PlainModel:
    """Return plain torch's model, float32, with the weights of a checkpoint in bfloat16."""
    tensors = read_checkpoint(checkpoint)
    assert {tensor.dtype for tensor in tensors.values()} == {torch.bfloat16}
    model = PlainModel(config, 300).eval()
    load_megatron_weights(model, tensors)
    return model


@cache
def token_losses(model: PlainModel, corpus: Corpus, shard: int) -> tuple[NDArray[np.float64], NDArray[np.int64]]:
    """Return the losses of a shard's tokens, [samples, seq], and how many of each sample count."""
    count = corpus.num_validation_samples if shard == VALIDATION else corpus.num_samples(shard)
    batch = corpus.read(np.full(count, shard), np.arange(count))
    tokens = torch.from_numpy(batch.tokens)
    with torch.no_grad():
        return model(tokens[:, :-1], tokens[:, 1:]).double().numpy(), batch.num_tokens


def sample_losses(model: PlainModel, corpus: Corpus, longest: int = 1_000) -> NDArray[np.float64]:
    """Return the mean losses of all samples, shard by shard, over their first tokens."""
    found = []
    for shard in range(corpus.num_shards):
        tokens, counts = token_losses(model, corpus, shard)
        found += [row[: min(count, longest)].mean() for row, count in zip(tokens, counts, strict=True)]
    return np.array(found)


def read_losses(folder: Path, corpus: Corpus) -> NDArray[np.float64]:
    files = [folder / "losses" / f"shard={shard:04d}.parquet" for shard in range(corpus.num_shards)]
    return np.array([loss for file in files for _, loss in read_rows(file, "sample", "loss")])


@contextmanager
def without_layers(model: PlainModel, start: int, length: int) -> Iterator[PlainModel]:
    layers = model.layers
    model.layers = torch.nn.ModuleList([*layers[:start], *layers[start + length :]])
    try:
        yield model
    finally:
        model.layers = layers


def assert_rounded(found: NDArray[np.float64], exact: NDArray[np.float64], num_tokens: float) -> None:
    """Means over so many tokens are off by rounding, which goes either way: summed up in bfloat16 they would not be."""
    errors = found - exact
    rms = RMS / np.sqrt(num_tokens)
    assert 0 < np.sqrt(np.square(errors).mean()) < rms
    assert np.abs(errors).max() < 4 * rms
    assert abs(errors.mean()) < max(4 * rms / np.sqrt(len(errors)), 2**-11)
    # Single precision is what they are kept in.
    assert not np.array_equal(torch.tensor(found).bfloat16().double().numpy(), found)


@pytest.mark.parametrize("layout", EVERYWHERE)
def test_scored_losses_are_those_of_plain_torch(layout: str, left: Path, tiny_corpus: Corpus) -> None:
    found = read_losses(left / f"score-{layout}", tiny_corpus)
    assert_rounded(found, sample_losses(open_plain(left / ROUNDED), tiny_corpus), 32)


def test_a_part_of_a_model_scores_as_plain_torch_does(left: Path, tiny_corpus: Corpus) -> None:
    found = read_losses(left / "student-one", tiny_corpus)
    assert_rounded(found, sample_losses(open_plain(left / SLICED, STUDENT), tiny_corpus), 32)


@pytest.mark.parametrize("layout", ["one", "pipeline"])
def test_losses_of_prefixes_are_those_of_plain_torch(layout: str, left: Path, tiny_corpus: Corpus) -> None:
    table = pq.read_table(left / f"calibrate-{layout}" / "calibration.parquet").to_pandas()
    table = table.sort_values(["shard", "sample"])
    plain = open_plain(left / ROUNDED)
    for name, longest in (("prefix:4", 4), ("prefix:8", 8), ("prefix:16", 16), ("loss", 32)):
        assert_rounded(table[name].to_numpy(float), sample_losses(plain, tiny_corpus, longest), longest)


@pytest.mark.parametrize("layout", EVERYWHERE)
def test_answers_are_those_of_plain_torch(layout: str, left: Path) -> None:
    requests = read_requests(left / "requests" / "some.parquet")
    assert_answers(open_plain(left / ROUNDED), requests, left / f"evaluate-{layout}" / "answers" / "some.parquet")


@pytest.mark.parametrize("layout", ["one", "pipeline"])
def test_answers_without_layers_are_those_of_plain_torch(layout: str, left: Path) -> None:
    requests, answers = read_requests(left / "requests" / "some.parquet"), left / f"blocks-{layout}" / "answers"
    assert read_answers(answers / "skip-00000-0" / "some.parquet") == read_answers(
        left / f"evaluate-{layout}" / "answers" / "some.parquet"
    )
    for start in range(TINY_MODEL.num_layers):
        with without_layers(open_plain(left / ROUNDED), start, 1) as plain:
            assert_answers(plain, requests, answers / f"skip-{start:05d}-1" / "some.parquet")


def assert_answers(plain: PlainModel, requests: list[Any], path: Path) -> None:
    errors, answers = [], read_answers(path)
    assert len(answers) == len(requests) > 30
    for request, answer in zip(requests, answers, strict=True):
        if isinstance(request, Likelihood):
            expected = _judge_plainly(plain, request)
            errors.append((answer.log_likelihood - expected.log_likelihood) / len(request.continuation) ** 0.5)
            if answer.is_greedy != expected.is_greedy:
                assert_nearly_greatest(plain, request.context, request.continuation)
        else:
            assert isinstance(request, Generation)
            assert_nearly_greatest(plain, request.prompt, answer)
    # Random tokens, and models without a layer, are further from what was trained than samples are.
    assert 0 < np.sqrt(np.square(errors).mean()) < 2 * RMS
    assert np.abs(errors).max() < 2 * MAXIMUM


def assert_nearly_greatest(plain: PlainModel, prompt: Any, continuation: Any) -> None:
    """Each token is the most probable one after those before it, but for rounding."""
    if len(continuation):
        logits = _logits(plain, [*prompt, *continuation])[len(prompt) - 1 : -1, :300]
        chosen = logits.gather(1, torch.tensor(continuation).long()[:, None])[:, 0]
        assert (logits.amax(dim=1) - chosen).max() < MAXIMUM


@pytest.mark.parametrize("layout", EVERYWHERE)
def test_generation_takes_the_most_probable_token_each_time(layout: str, left: Path) -> None:
    tokens = read_json(left / f"generate-{layout}" / "generation.json")["first_sequence"]
    assert (len(tokens), len(set(tokens)) > 3) == (32, True)
    assert_nearly_greatest(open_plain(left / ROUNDED), tokens[:2], tokens[2:])


@pytest.mark.parametrize("layout", EVERYWHERE)
def test_skipped_layers_cost_what_they_do_in_plain_torch(layout: str, left: Path, tiny_corpus: Corpus) -> None:
    plain, seed = open_plain(left / ROUNDED), 1
    sizes = [tiny_corpus.num_samples(shard) for shard in range(tiny_corpus.num_shards)]
    batch = tiny_corpus.read(*draw_calibration_set(sizes, 50, seed, 0))
    tokens, weights = torch.from_numpy(batch.tokens), batch.num_tokens / batch.num_tokens.sum()
    rows = read_rows(left / f"skip-{layout}" / "skips.parquet", "start", "length", "loss", "increase")
    assert [row[:2] for row in rows] == [(0, 0), (0, 1), (0, 2), (1, 1)]
    expected = []
    for start, length, *_ in rows:
        with without_layers(plain, start, length), torch.no_grad():
            losses = plain(tokens[:, :-1], tokens[:, 1:]).double().numpy()
        means = [row[:count].mean() for row, count in zip(losses, batch.num_tokens, strict=True)]
        expected.append(float(weights @ means))
    # Over some 1,500 tokens.
    for (*_, loss, increase), exact in zip(rows, expected, strict=True):
        assert loss == pytest.approx(exact, abs=2**-9)
        assert increase == pytest.approx(exact - expected[0], abs=2**-9)
    assert np.ptp(expected) > 0.05


def test_positions_are_told_apart_far_from_the_beginning(left: Path) -> None:
    """In bfloat16, positions from 256 on would be rounded to even ones, from 512 on to every fourth."""
    losses = torch.load(left / "long.pt")
    errors = (losses["found"] - losses["expected"]).double().square().mean(dim=0).view(8, -1).mean(dim=1).sqrt()
    assert errors.shape == (LONG // 128,)
    assert errors.max() < 2 * RMS
    assert errors[2:].mean() < 1.25 * errors[:2].mean()


@pytest.mark.parametrize("layout", LAYOUTS)
def test_masked_models_and_parts_lose_what_the_masked_model_in_float32_does(
    layout: str, found: list[dict[str, Any]]
) -> None:
    exact = losses(found, "grouped data", "masked")
    for what in ("masked", "sliced"):
        rounded = losses(found, f"bfloat16 {layout}", what)
        assert rounded.keys() == exact.keys() == set(range(NUM_SAMPLES))
        errors = np.array([(rounded[row] - exact[row]) / 32 for row in range(NUM_SAMPLES)])
        assert 0 < np.sqrt(np.square(errors).mean()) < 2 * RMS / 32**0.5


@pytest.mark.parametrize("layout", LAYOUTS)
def test_gradients_of_masks_are_those_in_float32(layout: str, found: list[dict[str, Any]]) -> None:
    """Off by some roundings, 2^-9 each, and not by those of sums that grow."""
    exact = found[0]["masks"]["grouped data"]["gradients"]
    for rank in found:
        rounded = rank["masks"][f"bfloat16 {layout}"]["gradients"]
        for kind in KINDS:
            assert torch.equal(rounded[kind], found[0]["masks"][f"bfloat16 {layout}"]["gradients"][kind])
            assert relative_error(rounded[kind], exact[kind]) < 2**-6, kind


def relative_error(found: torch.Tensor, exact: torch.Tensor) -> float:
    """Return the norm of the difference by that of what is exact."""
    return float((found.double() - exact.double()).norm() / exact.double().norm())


@pytest.mark.parametrize("layout", JOB_LAYOUTS)
def test_masks_learn_what_they_do_in_float32(layout: str, found: list[dict[str, Any]]) -> None:
    rounded, exact = (found[0]["masks"][name]["masks"] for name in (f"bfloat16 {layout}", "grouped data"))
    np.testing.assert_allclose(rounded["losses"], exact["losses"], atol=2**-7)
    assert not np.array_equal(rounded["losses"], exact["losses"])
    mine, theirs = (PruningPlan(**each["part"]) for each in (rounded, exact))
    for field in ("ffn", "heads"):
        # Of what is as good as the other, rounding decides.
        for kept, others in zip(getattr(mine, field), getattr(theirs, field), strict=True):
            assert len(set(kept) & set(others)) >= 0.9 * len(kept)
    assert len(mine.channels) == STUDENTS["grouped"].hidden_size


@pytest.mark.parametrize("layout", JOB_LAYOUTS)
def test_weights_times_gradients_are_those_in_float32(layout: str, found: list[dict[str, Any]]) -> None:
    """Values are kept in bfloat16 too, whose exponents are those of float32: no value vanishes."""
    values, exact = (found[0]["masks"][name]["taylor"] for name in (f"bfloat16 {layout}", "grouped data"))
    assert values.keys() == exact.keys()
    for name, value in values.items():
        assert value.dtype == torch.bfloat16
        assert relative_error(value, exact[name]) < 2**-6, name
        assert int((value > 0).sum()) == pytest.approx(int((exact[name] > 0).sum()), rel=0.01)


@pytest.mark.parametrize("layout", HUGGING_FACE_LAYOUTS)
def test_imported_models_are_as_exact_as_transformers_is_in_bfloat16(layout: str, found: list[dict[str, Any]]) -> None:
    """Root mean squares of the errors of logits: ours are a quarter larger at most, tensor parallelism included."""
    entries = [rank[f"hugging face {layout} in bfloat16"] for rank in found]
    last_stages = [entry for entry in entries if "logits" in entry["llama"]]
    assert len(last_stages) == (1 if layout == "pipeline" else 2)
    for errors in last_stages:
        for name in (*MODELS, "pangu"):
            assert 0 < errors[name]["logits"] < 1.25 * errors[name]["theirs"], name
