"""Training in bfloat16: float32 main weights are updated as in plain torch, and checkpoints contain the full state."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.distributed.checkpoint import FileSystemReader
from torch.distributed.checkpoint.state_dict_loader import load

from benchmarks.plain_model import PlainModel, load_megatron_weights, read_checkpoint
from data_scoring.corpus.corpus import VALIDATION, Corpus
from data_scoring.refine.training_mix import Mix
from tests.conftest import TINY_MODEL, TINY_TRAIN, read_rows
from tests.trainer.test_bfloat16 import (
    EVERYWHERE,
    RMS,
    assert_answers,
    assert_rounded,
    open_plain,
    relative_error,
    token_losses,
)
from tests.trainer.two_ranks_bfloat16 import MOVES, NUM_SAMPLES, NUM_STEPS, ROUNDED, STOP_AT
from trainer.checkpoint_folder import find_damage, list_checkpoints
from trainer.requests import read_requests

MOVED = [f"moved-from-{name}-{other}" for name, other in MOVES.items()]
TRAINED = [f"train-{layout}" for layout in EVERYWHERE]


def last_checkpoint(folder: Path) -> Path:
    return list_checkpoints(folder / "checkpoint")[-1]


def read_state(checkpoint: Path) -> dict[str, dict[str, Tensor]]:
    """Return what the optimizer has of each weight: its main weight (param) and moments (exp_avg, exp_avg_sq)."""
    reader = FileSystemReader(checkpoint)
    entries = reader.read_metadata().state_dict_metadata
    names = [name for name in entries if name.startswith("optimizer.state.")]
    tensors = {name: torch.empty(entries[name].size, dtype=entries[name].properties.dtype) for name in names}
    load(tensors, storage_reader=reader, no_dist=True)
    state: dict[str, dict[str, Tensor]] = {}
    for name, tensor in tensors.items():
        kind, weight = name.removeprefix("optimizer.state.").split(".", 1)
        state.setdefault(kind, {})[weight] = tensor
    return state


def as_plain(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return a checkpoint's tensors under the names of plain torch's model."""
    model = PlainModel(TINY_MODEL, 300)
    load_megatron_weights(model, tensors)
    return {name: parameter.detach() for name, parameter in model.named_parameters()}


class PlainTraining:
    """Training in plain torch, in float32 but for the weights, which are rounded from main weights before each step."""

    def __init__(self, start: dict[str, Tensor]) -> None:
        self.model = PlainModel(TINY_MODEL, 300)
        self.main = {name: weight.clone().requires_grad_() for name, weight in as_plain(start).items()}
        decayed = [name for name, weight in self.main.items() if weight.ndim > 1 and "scale" not in name]
        decayed = [name for name in decayed if "offset" not in name]
        groups = [
            {"params": [self.main[name] for name in decayed], "weight_decay": TINY_TRAIN.weight_decay},
            {"params": [self.main[name] for name in self.main if name not in decayed], "weight_decay": 0.0},
        ]
        self.optimizer = torch.optim.AdamW(groups, betas=(TINY_TRAIN.adam_beta1, TINY_TRAIN.adam_beta2))

    def step(self, tokens: Tensor, num_tokens: Tensor, lr: float) -> tuple[float, float]:
        """Return loss and gradient's norm of a step."""
        with torch.no_grad():
            for name, parameter in self.model.named_parameters():
                parameter.copy_(self.main[name].bfloat16())
        is_predicted = torch.arange(tokens.shape[1] - 1) < num_tokens[:, None]
        losses = self.model(tokens[:, :-1], tokens[:, 1:])
        loss = (losses * is_predicted).sum() / num_tokens.sum()
        gradients = torch.autograd.grad(loss, list(self.model.parameters()))
        for weight, gradient in zip(self.main.values(), gradients, strict=True):
            weight.grad = gradient.clone()
        norm = torch.nn.utils.clip_grad_norm_(list(self.main.values()), TINY_TRAIN.clip_grad)
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        self.optimizer.step()
        return float(loss), float(norm)


@pytest.fixture(scope="module")
def plainly_trained(found: list[dict[str, Any]], tiny_corpus: Corpus) -> dict[str, Any]:
    """Losses, norms and main weights of the same round in plain torch."""
    folder = Path(found[0]["bfloat16"])
    training = PlainTraining(read_checkpoint(folder / ROUNDED))
    start = {name: weight.detach().clone() for name, weight in training.main.items()}
    mix, size, steps = Mix(folder / "mix.parquet"), TINY_TRAIN.global_batch_size, []
    for step, lr in read_rows(folder / "train-one" / "steps.parquet", "step", "lr"):
        batch = tiny_corpus.read(*mix.read((step - 1) * size, min(step * size, NUM_SAMPLES)))
        steps.append(training.step(torch.from_numpy(batch.tokens), torch.from_numpy(batch.num_tokens), lr))
    return {"steps": steps, "start": start, "main": {name: each.detach() for name, each in training.main.items()}}


@pytest.mark.parametrize("name", [*TRAINED, *MOVED])
def test_a_round_is_what_it_is_in_plain_torch(name: str, left: Path, plainly_trained: dict[str, Any]) -> None:
    """Losses over 250 tokens; norms, and how far main weights went: Adam makes much of small gradients' errors."""
    rows = read_rows(left / name / "steps.parquet", "step", "loss", "grad_norm")
    expected = plainly_trained["steps"]
    assert len(rows) == len(expected) == NUM_STEPS
    # Before any step: rounding alone. After it, weights differ too.
    assert rows[0][1] == pytest.approx(expected[0][0], abs=4 * RMS / 250**0.5)
    assert rows[0][2] == pytest.approx(expected[0][1], rel=2**-6)
    np.testing.assert_allclose([row[1] for row in rows], [row[0] for row in expected], atol=2**-6)
    np.testing.assert_allclose([row[2] for row in rows], [row[1] for row in expected], rtol=0.1)
    main = as_plain(read_state(last_checkpoint(left / name))["param"])
    start = plainly_trained["start"]
    errors = {
        weight: relative_error(main[weight] - start[weight], plainly_trained["main"][weight] - start[weight])
        for weight in main
    }
    assert 0 < np.median(list(errors.values())) < 0.15
    assert max(errors.values()) < 0.3, errors


@pytest.mark.parametrize("name", [*TRAINED, *MOVED, "resumed-one", "resumed-tensor", "background-one"])
def test_checkpoints_hold_main_weights_and_moments_in_float32(name: str, left: Path) -> None:
    checkpoint = last_checkpoint(left / name)
    weights, state = read_checkpoint(checkpoint), read_state(checkpoint)
    assert state.keys() == {"param", "exp_avg", "exp_avg_sq"}
    for tensors in state.values():
        assert tensors.keys() == weights.keys()
        assert {tensor.dtype for tensor in tensors.values()} == {torch.float32}
    for weight, tensor in weights.items():
        assert tensor.dtype == torch.bfloat16
        assert torch.equal(tensor, state["param"][weight].bfloat16()), weight
        # What rounding takes away is what the next step adds to.
        assert not torch.equal(tensor.float(), state["param"][weight]), weight
    assert all((tensor >= 0).all() for tensor in state["exp_avg_sq"].values())


@pytest.mark.parametrize("name", [*TRAINED, *MOVED])
def test_seen_losses_are_the_step_losses(name: str, left: Path, tiny_corpus: Corpus) -> None:
    tokens = {row[:2]: row[2] for row in read_rows(tiny_corpus.samples_path, "shard", "sample", "num_tokens")}
    seen = read_rows(left / name / "seen", "step", "shard", "sample", "loss")
    assert sorted(row[1:3] for row in seen) == read_rows(left / "mix.parquet", "shard", "sample")
    for step, loss, num_tokens in read_rows(left / name / "steps.parquet", "step", "loss", "num_tokens"):
        total = sum(row[3] * tokens[row[1:3]] for row in seen if row[0] == step)
        assert total / num_tokens == pytest.approx(loss, abs=1e-6)


@pytest.mark.parametrize(("name", "start"), [*((each, ROUNDED) for each in TRAINED), ("round-2-one", None)])
def test_a_round_starts_where_its_weights_left_off(
    name: str, start: Path | None, left: Path, tiny_corpus: Corpus
) -> None:
    """Trained in float32 or, for round 2, in bfloat16; validation losses are those of the last weights."""
    first = open_plain(left / start if start is not None else last_checkpoint(left / "train-one"))
    last = open_plain(last_checkpoint(left / name))
    found, expected = [], []
    by_shard = [token_losses(first, tiny_corpus, shard) for shard in range(tiny_corpus.num_shards)]
    for step, shard, sample, loss in read_rows(left / name / "seen", "step", "shard", "sample", "loss"):
        if step == 1:
            tokens, counts = by_shard[shard]
            found.append(loss)
            expected.append(tokens[sample][: counts[sample]].mean())
    assert len(found) == TINY_TRAIN.global_batch_size
    assert_rounded(np.array(found), np.array(expected), 32)
    tokens, counts = token_losses(last, tiny_corpus, VALIDATION)
    sources = np.array(tiny_corpus.validation_sources)
    rows = read_rows(left / name / "validation.parquet", "step", "source", "loss", "num_tokens")[-len(set(sources)) :]
    assert {row[:2] for row in rows} == {(NUM_STEPS, source) for source in sources}
    for _, source, loss, num_tokens in rows:
        chosen = [row[:count] for row, count, each in zip(tokens, counts, sources, strict=True) if each == source]
        assert len(np.concatenate(chosen)) == num_tokens
        assert loss == pytest.approx(np.concatenate(chosen).mean(), abs=4 * RMS / num_tokens**0.5)


def assert_same_records(one: Path, other: Path) -> None:
    for file, columns in (
        ("steps.parquet", ("step", "loss", "lr", "grad_norm", "num_samples", "num_tokens")),
        ("seen", ("step", "shard", "sample", "loss")),
    ):
        assert read_rows(one / file, *columns) == read_rows(other / file, *columns)
    # Who evaluates in between validates then too.
    rows, others = (
        [row for row in read_rows(place / "validation.parquet", "step", "source", "loss") if row[0] == NUM_STEPS]
        for place in (one, other)
    )
    assert len(rows) == 2 and rows == others


def assert_same_checkpoints(one: Path, other: Path) -> None:
    assert find_damage(one) is None
    weights, others = read_checkpoint(one), read_checkpoint(other)
    assert weights.keys() == others.keys()
    assert all(torch.equal(weights[name], others[name]) for name in weights)
    state, other_state = read_state(one), read_state(other)
    for kind, tensors in state.items():
        assert all(torch.equal(tensor, other_state[kind][name]) for name, tensor in tensors.items())


@pytest.mark.parametrize("layout", ["one", "tensor"])
def test_a_run_that_was_stopped_equals_an_unbroken_one(layout: str, left: Path) -> None:
    """That it evaluated on the way changes nothing either; on one rank, a checkpoint was written in the background."""
    assert [path.name for path in list_checkpoints(left / f"stopped-{layout}" / "checkpoint")][-1] == "step-00000003"
    resumed, unbroken = (left / f"{name}-{layout}" for name in ("resumed", "train"))
    assert_same_records(resumed, unbroken)
    assert_same_checkpoints(last_checkpoint(resumed), last_checkpoint(unbroken))


@pytest.mark.parametrize(("name", "other"), MOVES.items())
def test_a_run_goes_on_under_another_layout(name: str, other: str, left: Path) -> None:
    """Up to the move it is the run that was stopped; then it is off by rounding from where it would have gone."""
    moved, unbroken = left / f"moved-from-{name}-{other}", left / f"train-{name}"
    columns = ("step", "loss", "grad_norm")
    rows, expected = (read_rows(place / "steps.parquet", *columns) for place in (moved, unbroken))
    assert rows[:STOP_AT] == expected[:STOP_AT]
    np.testing.assert_allclose([row[1] for row in rows], [row[1] for row in expected], atol=2**-8)
    np.testing.assert_allclose([row[2] for row in rows], [row[2] for row in expected], rtol=2**-6)
    state, other_state, before = (
        read_state(last_checkpoint(place))["param"] for place in (moved, unbroken, left / f"stopped-{name}")
    )
    for weight, tensor in state.items():
        went, would_have = tensor - before[weight], other_state[weight] - before[weight]
        assert relative_error(went, would_have) < 0.2, weight


def test_checkpoints_written_in_the_background_are_those_that_training_waited_for(left: Path) -> None:
    waiting, background = (list_checkpoints(left / f"{name}-one" / "checkpoint") for name in ("waiting", "background"))
    assert [path.name for path in background] == [f"step-{step:08d}" for step in (2, 4, 5)]
    for one, other in zip(waiting, background, strict=True):
        assert one.name == other.name
        assert_same_checkpoints(one, other)


@pytest.mark.parametrize("layout", MOVES)
def test_answers_while_training_are_those_of_the_weights_of_that_step(layout: str, left: Path) -> None:
    plain = open_plain(last_checkpoint(left / f"stopped-{layout}"))
    requests = read_requests(left / "requests" / "some.parquet")
    assert_answers(plain, requests, left / f"train-{layout}" / "answers" / f"step-{STOP_AT:08d}" / "some.parquet")
