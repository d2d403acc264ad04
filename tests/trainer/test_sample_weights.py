"""Weighted losses in training: gradients are those of the weighted loss in plain torch, on every layout."""

import os
import re
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from torch import Tensor

from benchmarks.plain_model import PlainModel, load_megatron_weights, stacked_weights
from data_scoring.corpus.corpus import Batch
from tests.conftest import TINY_MODEL, Ranks, read_rows
from tests.forked_ranks import read_found, run_ranks, write_found
from tests.trainer.test_layouts import short_mix
from trainer.checkpoint_folder import list_checkpoints
from trainer.parallel_config import ParallelConfig

VOCAB_SIZE, SEQ_LENGTH, MICRO_BATCH = 256, 16, 2
# The last microbatches are padded, and so are most samples.
LENGTHS = np.array([16, 3, 9, 16, 1, 12, 7])
WEIGHTS = np.array([0.2, 3.1, 0.7, 0.0, 1.9, 0.6, 0.5], np.float32)
LAYOUTS = {
    "data": ParallelConfig(data=2),
    "tensor": ParallelConfig(tensor=2),
    "sequence": ParallelConfig(tensor=2, sequence=True),
    "pipeline": ParallelConfig(pipeline=2),
    "interleaved": ParallelConfig(pipeline=2, virtual_pipeline=2),
}
MODEL = TINY_MODEL.model_copy(update={"num_layers": 4})
KERNELS: dict[str, dict[str, Any]] = {
    "reference": {"training": "reference"},
    "chunked": {"training": "chunked"},
    "selective": {"training": "chunked", "recompute": "selective"},
    "full": {"training": "reference", "recompute": "full"},
    "triton": {"training": "triton"},
}
CASES = [
    *(f"{layout} {kernel}" for layout in LAYOUTS for kernel in ("reference", "chunked")),
    *("data selective", "data full", "data triton", "tensor full", "tensor triton", "pipeline full"),
]


class Samples:
    """Stands in for a corpus: samples of random tokens."""

    tokens = np.random.default_rng(0).integers(0, VOCAB_SIZE, (len(LENGTHS), SEQ_LENGTH + 1))

    def read(self, shards: np.ndarray, samples: np.ndarray, seq_length: int) -> Batch:
        is_padding = np.arange(seq_length + 1) > LENGTHS[samples, None]
        return Batch(np.where(is_padding, 0, self.tokens[samples]), LENGTHS[samples])


def work(rank: int, folder: Path) -> None:
    """Leave in `folder` what a rank finds on every layout."""
    os.environ["TRITON_INTERPRET"] = "1"
    from trainer.devices import initialise

    torch.set_num_threads(1)
    store = torch.distributed.FileStore(str(folder / "store"), 2)
    torch.distributed.init_process_group("gloo", store=store, rank=rank, world_size=2)
    device = initialise("cpu", 0)
    from megatron.core import parallel_state

    found: dict[str, Any] = {}
    start: dict[str, Tensor] = {}
    for layout, parallel in LAYOUTS.items():
        chunks = parallel.virtual_pipeline if parallel.virtual_pipeline > 1 else None
        parallel_state.initialize_model_parallel(parallel.tensor, parallel.pipeline, chunks)
        for case in CASES:
            if case.startswith(layout):
                weighted = run(device, parallel, KERNELS[case.split()[1]], WEIGHTS, start)
                plain = run(device, parallel, KERNELS[case.split()[1]], None, start)
                found[case] = {"losses": (weighted[0], plain[0]), "gradients": weighted[1], "plain gradients": plain[1]}
        parallel_state.destroy_model_parallel()
    found["expected"] = expected_gradients(start, WEIGHTS), expected_gradients(start, np.ones_like(WEIGHTS))
    write_found(folder, rank, found)
    torch.distributed.destroy_process_group()


def run(
    device: Any, parallel: ParallelConfig, kernels: dict[str, Any], weights: np.ndarray | None, start: dict[str, Tensor]
) -> tuple[dict[int, float], dict[str, tuple[Tensor, bool, int]]]:
    """Return the losses of this rank's samples, and the gradients of its part of the model, by whole names.

    The first call leaves in `start` the weights of the whole model, which later ones take their parts of.
    """
    from trainer.data_parallel import wrap
    from trainer.forward import read_microbatches, run_schedule
    from trainer.model import Kernels, build_model

    device.seed(3)
    gpt: Any = build_model(MODEL, VOCAB_SIZE, SEQ_LENGTH, parallel, torch.device("cpu"), False, Kernels(**kernels))
    parameters = by_whole_name(gpt)
    if not start:
        generator = torch.Generator().manual_seed(2)
        with torch.no_grad():
            for parameter in gpt.parameters():
                parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.1)
        start |= {name: parameter.detach().clone() for name, parameter in parameters.items()}
    with torch.no_grad():
        for name, parameter in parameters.items():
            parameter.copy_(own_part(start[name], parameter, name))
    wrapped = wrap(gpt, False, is_sharded=False)
    wrapped.zero_grad_buffer()
    samples: Any = Samples()
    count = len(LENGTHS)
    microbatches = read_microbatches(samples, np.zeros(count, int), np.arange(count), MICRO_BATCH, SEQ_LENGTH, weights)
    rows, sums, num_tokens = run_schedule(wrapped, microbatches, count, MICRO_BATCH, SEQ_LENGTH, forward_only=False)
    assert (num_tokens.numpy() == LENGTHS[rows]).all()
    return dict(zip(rows.tolist(), sums.tolist(), strict=True)), {
        name: (each.main_grad.clone(), getattr(each, "tensor_model_parallel", False), getattr(each, "partition_dim", 0))
        for name, each in parameters.items()
    }


def by_whole_name(gpt: Any) -> dict[str, torch.nn.Parameter]:
    """Return this rank's parameters by their names in the whole model, whose layers are numbered from 0."""
    found = {}
    for decoder in gpt.decoders:
        for name, parameter in decoder.named_parameters():
            match = re.match(r"decoder\.layers\.(\d+)\.(.*)", name)
            number = decoder.decoder.layers[int(match[1])].layer_number - 1 if match else 0
            found[f"decoder.layers.{number}.{match[2]}" if match else name] = parameter
    return found


def own_part(whole: Tensor, parameter: Tensor, name: str) -> Tensor:
    """Return this rank's part of a parameter."""
    if whole.shape == parameter.shape:
        return whole
    return part_of(whole, name, parameter.partition_dim, torch.distributed.get_rank())


def part_of(whole: Tensor, name: str, dim: int, rank: int) -> Tensor:
    if "linear_fc1" in name:
        return torch.cat([half.chunk(2)[rank] for half in whole.chunk(2)])
    if "activation_func" in name:
        return whole.chunk(2, dim=-1)[rank]
    return whole.chunk(2, dim=dim)[rank]


def expected_gradients(start: dict[str, Tensor], weights: np.ndarray) -> dict[str, Tensor]:
    """Return the gradients of the weighted loss per token in plain torch, by the plain model's names."""
    plain = PlainModel(MODEL, VOCAB_SIZE)
    load_megatron_weights(plain, as_stacked(start))
    batch = Samples().read(np.zeros(len(LENGTHS), int), np.arange(len(LENGTHS)), SEQ_LENGTH)
    tokens = torch.from_numpy(batch.tokens)
    losses = plain(tokens[:, :-1], tokens[:, 1:])
    is_real = torch.arange(SEQ_LENGTH) < torch.from_numpy(LENGTHS)[:, None]
    loss = (torch.from_numpy(weights)[:, None] * losses * is_real).sum() / LENGTHS.sum()
    loss.backward()
    return {name: parameter.grad for name, parameter in plain.named_parameters() if parameter.grad is not None}


class _Named(torch.nn.Module):
    def __init__(self, tensors: dict[str, Tensor]) -> None:
        super().__init__()
        self._tensors = tensors

    def state_dict(self, *_: Any, **__: Any) -> Any:
        return self._tensors


def as_stacked(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return stacked_weights(_Named(tensors), MODEL.num_layers)


def as_plain(gradients: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return the whole model's gradients by the plain model's names: they go the way of the weights."""
    plain = PlainModel(MODEL, VOCAB_SIZE)
    load_megatron_weights(plain, as_stacked(gradients))
    return {name: parameter.detach() for name, parameter in plain.named_parameters()}


def put_together(ranks: list[dict[str, tuple[Tensor, bool, int]]], layout: str) -> dict[str, Tensor]:
    """Return the gradients of the whole model, of those of two ranks."""
    whole: dict[str, Tensor] = {}
    for name in {**ranks[0], **ranks[1]}:
        parts = [rank[name] for rank in ranks if name in rank]
        (first, is_divided, dim), (second, *_) = parts[0], parts[-1]
        if layout not in ("tensor", "sequence") or not is_divided:
            torch.testing.assert_close(first, second, atol=1e-7, rtol=0)
            whole[name] = first
        elif "linear_fc1" in name:
            halves = zip(first.chunk(2), second.chunk(2), strict=True)
            whole[name] = torch.cat([part for half in halves for part in half])
        else:
            whole[name] = torch.cat([first, second], dim=-1 if "activation_func" in name else dim)
    return whole


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """What two ranks found."""
    folder = tmp_path_factory.mktemp("sample-weights")
    run_ranks(work, folder, num_ranks=2)
    return read_found(folder, 2)


@pytest.mark.parametrize("case", CASES)
def test_gradients_are_those_of_the_weighted_loss_in_plain_torch(case: str, found: list[dict[str, Any]]) -> None:
    layout = case.split(maxsplit=1)[0]
    for which, expected in zip(("gradients", "plain gradients"), found[0]["expected"], strict=True):
        gradients = as_plain(put_together([rank[case][which] for rank in found], layout))
        assert gradients.keys() == expected.keys()
        for name, gradient in expected.items():
            assert gradient.abs().max() > 1e-4, name
            torch.testing.assert_close(gradients[name], gradient, atol=1e-6, rtol=1e-5, msg=name)
    weighted, plain = found[0]["expected"]
    assert (weighted["head.weight"] - plain["head.weight"]).abs().max() > 1e-3


@pytest.mark.parametrize("case", CASES)
def test_the_losses_that_are_reported_are_not_weighted(case: str, found: list[dict[str, Any]]) -> None:
    for rank in found:
        weighted, plain = rank[case]["losses"]
        assert weighted == plain
    assert {sample for rank in found for sample in rank[case]["losses"][0]} == set(range(len(LENGTHS)))


def test_a_round_trains_with_the_weights_of_its_mix(ranks: Ranks, trained: Path) -> None:
    """Weights of 1 change nothing; others change the steps after the first, whose losses are not weighted."""
    start = list_checkpoints(trained / "checkpoint")[-1]

    def with_weights(weights: np.ndarray | None) -> Any:
        def make(path: Path) -> int:
            count = short_mix(path, ranks.corpus.samples_path)
            if weights is not None:
                table = pq.read_table(path)
                pq.write_table(table.append_column("weight", [weights.astype(np.float32)]), path)
            return count

        return make

    generator = np.random.default_rng(3)
    mixes = {"none": None, "ones": np.ones(43), "random": generator.exponential(size=43)}
    losses = {}
    for name, weights in mixes.items():
        folder = ranks.train(f"weights-{name}", (1, 1, 1), start, with_weights(weights))
        losses[name] = [loss for _, loss in read_rows(folder / "steps.parquet", "step", "loss")]
    assert losses["ones"] == losses["none"]
    assert losses["random"][0] == losses["none"][0]
    assert min(abs(np.subtract(losses["random"], losses["none"])[1:])) > 1e-4
