"""Layouts that are chosen, compared with rehearsed peaks and with what Megatron can divide."""

import math
from dataclasses import replace
from typing import Any

import pytest

from benchmarks.memory_budgets import BUDGETS
from tests.trainer.memory_rank import SMALL, workload
from trainer.config import TrainConfig
from trainer.hardware import CAPACITIES, GIB, Hardware, assumed_hardware
from trainer.layout_choice import choose_layout, choose_micro_batch, fits, largest_micro_batch, remedy, with_micro_batch
from trainer.memory import Workload
from trainer.parallel_config import ParallelConfig, check_layout

PRO, LLAMA = {"preset": "pangu-pi-1b-pro"}, {"preset": "llama-7b"}

ONE = "set train.micro_batch_size: 1"


def asked(fields: dict[str, Any], batch: int = 512, seq_length: int = 2048, **parallel: int) -> Workload:
    found = workload(fields, seq_length=seq_length)
    kernels = {"loss_kernel": "reference", "activation_kernel": "reference"}
    train = TrainConfig.model_validate({"global_batch_size": batch, "micro_batch_size": 1, **kernels})
    return replace(found, train=train, parallel=ParallelConfig(**parallel))


def test_micro_batches_that_fit_are_those_of_rehearsed_peaks() -> None:
    """Rehearsed: 26.2 GiB with 2 samples, 35.7 with 4, 54.7 with 8, 92.8 with 16 (`trainer.memory`)."""
    assert [(each.micro_batch_size, each.peak_gib) for each in BUDGETS[:2]] == [(2, 26.2), (8, 54.7)]
    found = {
        size: largest_micro_batch(asked(PRO), Hardware("cuda", 1, 1, round(gib * GIB)))
        for size, gib in CAPACITIES.items()
    }
    # Tensors may take 21.6, 36.8, 74.9 and 133.2 GiB.
    assert found == {24: 1, 40: 4, 80: 8, 141: 16}


@pytest.mark.parametrize("hardware", ["1xh100", "8xh100", "2x8xh100", "8xascend910b", "3xrtx4090", "6xa100", "1xh200"])
@pytest.mark.parametrize("fields", [PRO, LLAMA], ids=["pro", "llama"])
def test_a_choice_fits_and_divides_everything(hardware: str, fields: dict[str, Any]) -> None:
    devices, before = assumed_hardware(hardware), asked(fields)
    choice = choose_layout(before, devices)
    if choice is None:
        # 6.7 G parameters with 18 bytes each, and 4 more in the optimizer's step, are 138 GiB.
        assert fields == LLAMA
        assert devices.count * devices.memory < 138 * GIB or hardware == "1xh200"
        return
    chosen = with_micro_batch(replace(before, parallel=choice.parallel), choice.micro_batch_size)
    check_layout(chosen.model, chosen.train, chosen.parallel, chosen.seq_length)
    assert fits(chosen, devices)
    assert chosen.parallel.world_size <= devices.count
    assert chosen.parallel.world_size % devices.num_nodes == 0
    assert devices.per_node % chosen.parallel.tensor == 0
    assert choose_layout(before, devices) == choice


def test_a_model_that_fits_is_not_split() -> None:
    choice = choose_layout(asked(PRO), assumed_hardware("8xh100"))
    assert choice is not None
    assert (choice.parallel, choice.micro_batch_size) == (ParallelConfig(data=8), 8)


def test_a_model_that_does_not_fit_is_split_over_a_host_first() -> None:
    """18 bytes each for 6.7 G parameters are 112 GiB: 28 on each of four devices, which have 36.8 for tensors."""
    choice = choose_layout(asked(LLAMA), assumed_hardware("4xa100-40"))
    assert choice is not None
    assert (choice.parallel.tensor, choice.parallel.pipeline, choice.parallel.sequence) == (4, 1, True)


def test_a_pipeline_keeps_microbatches_enough_to_be_busy() -> None:
    # 32 samples over 2 stages: at least 8 microbatches.
    before = asked(PRO, batch=32, pipeline=3)
    assert choose_micro_batch(before, assumed_hardware("3xh200")) == 2


def test_devices_that_do_not_divide_the_batch_stay_idle() -> None:
    choice = choose_layout(asked(SMALL, batch=4, seq_length=64), assumed_hardware("7xh100"))
    assert choice is not None
    assert choice.parallel.world_size == 4
    assert any("3 devices stay idle" in reason for reason in choice.reasons)


@pytest.mark.parametrize(
    ("fields", "seq_length", "size", "hardware", "start"),
    [
        (PRO, 2048, 32, "1xh100", "set train.micro_batch_size: 8"),
        (
            LLAMA,
            2048,
            1,
            "1xh100",
            "set train.micro_batch_size: 1 and parallel: {tensor: 2, sequence: true}, on 2 devices",
        ),
        (PRO, 2048, 2, "1xrtx4090", ONE),
        (PRO, 4096, 1, "1xrtx4090", f"{ONE}, train.loss_kernel: chunked, train.recompute: full"),
    ],
)
def test_what_does_not_fit_is_told_with_the_smallest_change(
    fields: dict[str, Any], seq_length: int, size: int, hardware: str, start: str
) -> None:
    assert remedy(with_micro_batch(asked(fields, seq_length=seq_length), size), assumed_hardware(hardware)) == start


def test_on_cpu_a_host_has_one_rank() -> None:
    before = replace(asked(SMALL, batch=16, seq_length=256), kind="cpu")
    choice = choose_layout(before, Hardware("cpu", 1, 1, 8 * GIB))
    assert choice is not None
    assert (choice.parallel, choice.micro_batch_size) == (ParallelConfig(), 8)
    assert math.prod((choice.micro_batch_size, 256)) == 2048
