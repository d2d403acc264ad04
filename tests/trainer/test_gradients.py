"""The gradient's norm and the update are Megatron's, and torch's, on every layout."""

from pathlib import Path
from typing import Any

import pytest
import torch

from tests.conftest import TINY_MODEL
from tests.forked_ranks import read_found, run_ranks, write_found
from tests.trainer.training_states import make, values
from trainer.parallel_config import ParallelConfig

VOCAB_SIZE, SEQ_LENGTH, MAX_NORM = 256, 8, 1.0
LAYOUTS = {
    "data": ParallelConfig(data=2),
    "tensor": ParallelConfig(tensor=2),
    "sequence": ParallelConfig(tensor=2, sequence=True),
    "pipeline": ParallelConfig(pipeline=2),
}
MODELS = {"apart": TINY_MODEL, "tied": TINY_MODEL.model_copy(update={"tied_embeddings": True})}
CASES = [
    *("data apart float32", "data tied bfloat16", "tensor apart float32", "tensor tied bfloat16"),
    *("sequence apart float32", "pipeline apart bfloat16", "pipeline tied float32"),
]


def work(rank: int, folder: Path) -> None:
    """Leave in `folder` what a rank finds on every layout."""
    from trainer.devices import initialise

    torch.set_num_threads(1)
    store = torch.distributed.FileStore(str(folder / "store"), 2)
    torch.distributed.init_process_group("gloo", store=store, rank=rank, world_size=2)
    device = initialise("cpu", 0)
    from megatron.core import parallel_state

    found: dict[str, Any] = {"functions": compare_functions(rank)}
    for layout, parallel in LAYOUTS.items():
        parallel_state.initialize_model_parallel(parallel.tensor, parallel.pipeline)
        for case in CASES:
            named, model, precision = case.split()
            if named == layout:
                found[case] = compare_updates(device, MODELS[model], parallel, precision == "bfloat16", rank)
        parallel_state.destroy_model_parallel()
    write_found(folder, rank, found)
    torch.distributed.destroy_process_group()


def compare_functions(rank: int) -> list[tuple[Any, ...]]:
    """Return, of gradients that are small, large, or on the other rank alone, norms and clipped gradients.

    Those of ours on two ranks, and of torch's `clip_grad_norm_` and Megatron's fallback on all gradients.
    """
    from megatron.core.optimizer.clip_grads import clip_grad_by_total_norm_fp32, get_grad_norm_fp32

    from trainer.gradients import clip, measure_norm

    found = []
    for size, num_here in ((1e-4, (3, 2)), (7.0, (3, 2)), (7.0, (5, 0))):
        generator = torch.Generator().manual_seed(1)
        gradients = [torch.randn(5, 3 + number, generator=generator) * size for number in range(5)]
        parameters = [torch.nn.Parameter(torch.zeros_like(each)) for each in gradients]
        for parameter, gradient in zip(parameters, gradients, strict=True):
            parameter.grad = gradient.clone()
        torchs = torch.nn.utils.clip_grad_norm_(parameters, MAX_NORM)
        here = slice(0, num_here[0]) if rank == 0 else slice(num_here[0], None)
        ours = [each.clone() for each in gradients[here]]
        norm = measure_norm(ours, None, torch.device("cpu"))
        clip(ours, MAX_NORM, norm)
        megatrons = [torch.nn.Parameter(torch.zeros_like(each)) for each in gradients[here]]
        for parameter, gradient in zip(megatrons, gradients[here], strict=True):
            parameter.grad = gradient.clone()
        megatrons_norm = get_grad_norm_fp32([each.grad for each in megatrons if each.grad is not None])
        clip_grad_by_total_norm_fp32(megatrons, MAX_NORM, megatrons_norm)
        found.append(
            (
                (float(norm), ours),
                (float(torchs), [each.grad for each in parameters[here]]),
                (megatrons_norm, [each.grad for each in megatrons]),
            )
        )
    return found


def compare_updates(device: Any, model: Any, parallel: ParallelConfig, bf16: bool, rank: int) -> dict[str, Any]:
    """Return norm and state after the same step with our update, and with Megatron's own."""
    from trainer.gradients import update_weights

    found: dict[str, Any] = {}
    for way in ("ours", "megatron"):
        state = make(device, model, VOCAB_SIZE, SEQ_LENGTH, parallel, bf16, seed=1 + rank)
        for step in range(2):
            generator = torch.Generator().manual_seed(10 * step + rank)
            state.model.zero_grad_buffer()
            for parameter in state.model.parameters():
                parameter.main_grad.copy_(torch.randn(parameter.shape, generator=generator))
            for chunk in state.model:
                chunk.finish_grad_sync()
            state.scheduler.step(1)
            norm = update_weights(state.optimizer, torch.device("cpu")) if way == "ours" else state.optimizer.step()[1]
        found[way] = (float(norm), values(state))
    return found


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """What two ranks found."""
    folder = tmp_path_factory.mktemp("gradients")
    run_ranks(work, folder, num_ranks=2)
    return read_found(folder, 2)


def test_norm_and_clipping_are_those_of_torch_and_of_megatron(ranks: list[dict[str, Any]]) -> None:
    for rank in ranks:
        clipped = []
        for (norm, gradients), *others in rank["functions"]:
            clipped.append(norm > MAX_NORM)
            for expected_norm, expected in others:
                assert norm == pytest.approx(expected_norm, rel=1e-6)
                assert len(gradients) == len(expected)
                for found, gradient in zip(gradients, expected, strict=True):
                    torch.testing.assert_close(found, gradient, rtol=1e-6, atol=0)
        assert clipped == [False, True, True]


@pytest.mark.parametrize("case", CASES)
def test_an_update_is_megatron_s(case: str, ranks: list[dict[str, Any]]) -> None:
    for rank in ranks:
        (norm, found), (expected_norm, expected) = rank[case]["ours"], rank[case]["megatron"]
        assert norm > MAX_NORM
        assert norm == pytest.approx(expected_norm, rel=1e-6)
        assert found.keys() == expected.keys()
        for name, value in expected.items():
            torch.testing.assert_close(found[name], value, rtol=1e-6, atol=1e-7, msg=name)
