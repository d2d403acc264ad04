"""Gradients and weights that replicas exchange while they compute: everything is as if they waited."""

from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from benchmarks.plain_model import read_checkpoint
from data_scoring.corpus.corpus import Batch
from tests.conftest import TINY_MODEL
from tests.forked_ranks import read_found, run_ranks, write_found
from tests.trainer.training_states import make
from trainer.parallel_config import ParallelConfig

RANKS, VOCAB_SIZE, SEQ_LENGTH, MICRO_BATCH, NUM_SAMPLES, STEPS = 4, 256, 16, 2, 8, 2
LAYOUTS = {
    "tensor": ParallelConfig(tensor=2, sequence=True, data=2),
    "pipeline": ParallelConfig(pipeline=2, data=2),
    "interleaved": ParallelConfig(pipeline=2, virtual_pipeline=2, data=2),
}
MODEL = TINY_MODEL.model_copy(update={"num_layers": 4})
MODELS = {"apart": MODEL, "tied": MODEL.model_copy(update={"tied_embeddings": True})}
CASES = [
    *("tensor apart float32", "tensor tied bfloat16", "pipeline apart bfloat16", "pipeline tied float32"),
    *("interleaved apart float32", "interleaved tied bfloat16"),
]


def work(rank: int, folder: Path) -> None:
    """Leave in `folder` what a rank finds in every case."""
    from trainer.devices import initialise

    torch.set_num_threads(1)
    store = torch.distributed.FileStore(str(folder / "store"), RANKS)
    torch.distributed.init_process_group("gloo", store=store, rank=rank, world_size=RANKS)
    device = initialise("cpu", 0)
    from megatron.core import parallel_state

    found = {}
    for layout, parallel in LAYOUTS.items():
        chunks = parallel.virtual_pipeline if parallel.virtual_pipeline > 1 else None
        parallel_state.initialize_model_parallel(parallel.tensor, parallel.pipeline, chunks)
        for case in CASES:
            if case.startswith(layout):
                for way in ("overlapped", "waiting"):
                    found[f"{case} {way}"] = train(device, case, way == "overlapped", folder / case / way)
        parallel_state.destroy_model_parallel()
    write_found(folder, rank, found)
    torch.distributed.destroy_process_group()


def train(device: Any, case: str, is_overlapped: bool, folder: Path) -> dict[str, Any]:
    """Return the losses of all steps, those after a resumption from the first step, and what has been exchanged how."""
    from megatron.core.distributed import DistributedDataParallelConfig

    from trainer import data_parallel
    from trainer.checkpoint import load_checkpoint
    from trainer.data_parallel import gather_weights
    from trainer.saver import CheckpointSaver

    layout, model, precision = case.split()
    data_parallel.overlaps_communication = lambda kind: is_overlapped
    # One bucket a parameter, where there is more than one.
    data_parallel.DistributedDataParallelConfig = partial(DistributedDataParallelConfig, bucket_size=1)

    def start(seed: int) -> Any:
        bf16 = precision == "bfloat16"
        state = make(device, MODELS[model], VOCAB_SIZE, SEQ_LENGTH, LAYOUTS[layout], bf16, seed)
        for group in bucket_groups(state):
            # A bucket is gathered when the first module that uses it is called, and at no other time: what would be
            # used too early has not been gathered.
            group.next_param_gather_bucket_group = None
        return state

    state, steps = start(1), []
    if torch.distributed.get_rank() == 0:
        folder.mkdir(parents=True)
    torch.distributed.barrier()
    saver = CheckpointSaver(folder, 2, is_asynchronous=True)
    for step in range(STEPS):
        steps.append(run_step(state, step))
        if step == 0:
            # The weights have not been gathered since the update, and the next step begins while they are written.
            saver.save(1, state, {"fingerprint": "f"}, is_waiting=False)
    saver.finish()
    before = [parameter.detach().float().clone() for parameter in state.model.parameters()]
    gather_weights(state.model)
    resumed = start(2)
    load_checkpoint(folder / "step-00000001", resumed)
    again = [run_step(resumed, step)[0] for step in range(1, STEPS)]
    saver.save(STEPS, resumed, {"fingerprint": "f"}, is_waiting=True)
    return {
        "losses": [losses for losses, _ in steps],
        "norms": [norm for _, norm in steps],
        "again": again,
        "num_buckets": [len(chunk.bucket_groups) for chunk in state.model],
        "num_weights": [len(list(chunk.parameters())) for chunk in state.model],
        "weights": [parameter.detach().float() for parameter in state.model.parameters()],
        "weights before": before,
    }


def bucket_groups(state: Any) -> list[Any]:
    """Return what the weights and gradients of all chunks are exchanged in."""
    return [group for chunk in state.model for group in chunk.bucket_groups]


def run_step(state: Any, step: int) -> tuple[list[float], float]:
    """Run a step on random tokens, and return the samples' losses and the gradient's norm."""
    from megatron.core import parallel_state

    from trainer.forward import deal_rows, run_schedule
    from trainer.gradients import update_weights

    tokens = np.random.default_rng(step).integers(0, VOCAB_SIZE, (NUM_SAMPLES, SEQ_LENGTH + 1))
    batches = [
        Batch(tokens[rows], np.full(MICRO_BATCH, SEQ_LENGTH - step)) for rows in deal_rows(NUM_SAMPLES, MICRO_BATCH)
    ]
    assert len(batches) == NUM_SAMPLES // MICRO_BATCH // parallel_state.get_data_parallel_world_size()
    state.model.zero_grad_buffer()
    state.optimizer.zero_grad()
    _, sums, _ = run_schedule(state.model, batches, NUM_SAMPLES, MICRO_BATCH, SEQ_LENGTH, forward_only=False)
    state.scheduler.step(1)
    return sums.tolist(), float(update_weights(state.optimizer, torch.device("cpu")))


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[dict[str, Any]]]:
    """The folder of what four ranks saved, and what each found."""
    folder = tmp_path_factory.mktemp("data-parallel")
    run_ranks(work, folder, num_ranks=RANKS)
    return folder, read_found(folder, RANKS)


@pytest.mark.parametrize("case", CASES)
def test_training_is_bit_for_bit_what_it_is_when_replicas_wait(
    case: str, ranks: tuple[Path, list[dict[str, Any]]]
) -> None:
    for rank in ranks[1]:
        overlapped, waiting = rank[f"{case} overlapped"], rank[f"{case} waiting"]
        for name in ("losses", "norms", "again"):
            # The norm is a sum over a replica's part, which differs.
            tolerance = 1e-6 if name == "norms" else 0
            np.testing.assert_allclose(overlapped[name], waiting[name], rtol=tolerance, atol=0)
        assert overlapped["again"] == overlapped["losses"][1:]
        for found, expected in zip(overlapped["weights"], waiting["weights"], strict=True):
            assert torch.equal(found, expected)


@pytest.mark.parametrize("case", CASES)
def test_buckets_are_exchanged_meanwhile(case: str, ranks: tuple[Path, list[dict[str, Any]]]) -> None:
    """On a stage after the first, Megatron has one bucket, beside one of an embedding that both stages have.

    Of a chunk after the first, there is a single one.
    """
    is_pipeline = not case.startswith("tensor")
    for number, rank in enumerate(ranks[1]):
        overlapped, waiting = rank[f"{case} overlapped"], rank[f"{case} waiting"]
        is_late = is_pipeline and number >= RANKS // 2
        sizes = [1] * len(waiting["num_buckets"])
        if is_pipeline and "tied" in case and not (is_late and "interleaved" in case):
            sizes[0] += 1
        assert waiting["num_buckets"] == sizes
        if not is_late:
            sizes[0] = overlapped["num_weights"][0]
        assert overlapped["num_buckets"] == sizes
        # After an update, a replica has its own part of the new weights alone until it gathers the others.
        changed = [
            not torch.equal(*pair) for pair in zip(overlapped["weights before"], overlapped["weights"], strict=True)
        ]
        assert any(changed)
        assert all(map(torch.equal, waiting["weights before"], waiting["weights"]))


@pytest.mark.parametrize("case", CASES)
def test_checkpoints_hold_weights_that_are_gathered(case: str, ranks: tuple[Path, list[dict[str, Any]]]) -> None:
    for step in (1, STEPS):
        overlapped, waiting = (
            read_checkpoint(ranks[0] / case / way / f"step-{step:08d}") for way in ("overlapped", "waiting")
        )
        assert overlapped.keys() == waiting.keys()
        for name, weight in waiting.items():
            assert torch.equal(overlapped[name], weight), name
