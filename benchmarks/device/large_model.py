"""The 1 B parameter model: memory, speed and profile of a training step."""

import re
import statistics
import time
import warnings
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.device.record import Record
from benchmarks.device.settings import SEED, Place
from benchmarks.measure import matrix_product_speed, single_rank
from benchmarks.memory_budgets import BUDGETS
from data_scoring.corpus.corpus import Batch
from trainer.config import TrainConfig
from trainer.devices import Device
from trainer.flops import FORMULA, model_flops
from trainer.hardware import ACCELERATORS, find_accelerator
from trainer.parallel_config import ParallelConfig

NUM_MICROBATCHES = 2
_WARM_UP, _PROFILED, _TOP = 3, 2, 20
_GIB = 1 << 30
# Allowed ratio of the allocator's peak to the rehearsal's, for cuBLAS's workspaces and attention's temporaries.
_MEMORY_TOLERANCE = 1.1
_SYNCS = ("cudaStreamSynchronize", "cudaDeviceSynchronize", "cudaEventSynchronize")


class Steps:
    """Training steps of the large model on one batch of random tokens, `micro_batch_size` samples a microbatch."""

    def __init__(self, place: Place, device: Device, micro_batch_size: int) -> None:
        from trainer.model import Kernels, build_model
        from trainer.train import make_state

        sizes = place.sizes
        self.model_config, self.seq_length, self.micro_batch_size = sizes.large, sizes.seq_length, micro_batch_size
        self.vocab_size = int(sizes.large.vocab_size or 0)
        self.device = device
        device.seed(SEED)
        model = build_model(
            sizes.large, self.vocab_size, self.seq_length, ParallelConfig(), device.torch_device, True, Kernels()
        )
        batch = NUM_MICROBATCHES * micro_batch_size
        train = TrainConfig(micro_batch_size=micro_batch_size, global_batch_size=batch, lr=1e-4)
        self.state = make_state(train.resolve(self.seq_length), model, 1000, True)
        generator = np.random.default_rng(SEED)
        shape = (NUM_MICROBATCHES, micro_batch_size, self.seq_length + 1)
        lengths = np.full(micro_batch_size, self.seq_length, np.int64)
        self._batches = [Batch(tokens, lengths) for tokens in generator.integers(0, self.vocab_size, shape)]

    @property
    def num_tokens(self) -> int:
        """Return the tokens per step."""
        return NUM_MICROBATCHES * self.micro_batch_size * self.seq_length

    def step(self) -> float:
        """Run a step as training does, and return its loss, nats per token."""
        from trainer.forward import run_schedule
        from trainer.gradients import update_weights

        self.state.model.zero_grad_buffer()
        self.state.optimizer.zero_grad()
        samples = NUM_MICROBATCHES * self.micro_batch_size
        _, sums, num_tokens = run_schedule(
            self.state.model, self._batches, samples, self.micro_batch_size, self.seq_length, forward_only=False
        )
        self.state.scheduler.step(1)
        update_weights(self.state.optimizer, sums.device)
        return float(sums.sum()) / float(num_tokens.sum())


def check_steps(place: Place, record: Record, micro_batch_size: int) -> None:
    """Measure steps with `micro_batch_size` samples per microbatch: memory, speed, utilisation, kernels, syncs."""
    device = single_rank(place.kind)
    steps = Steps(place, device, micro_batch_size)
    losses = [steps.step() for _ in range(_WARM_UP)]
    seconds = []
    for _ in range(place.sizes.timed_steps):
        device.synchronize()
        started = time.perf_counter()
        losses.append(steps.step())
        device.synchronize()
        seconds.append(time.perf_counter() - started)
    record.figures(losses_nats=losses)
    record.check("loss of the last step, of one batch over and over, nats", losses[-1], losses[0])
    _memory(place, record, micro_batch_size)
    _speed(place, record, steps, statistics.median(seconds))
    if place.kind == "cuda":
        record.figures(**_count_syncs(steps))
    if place.kind != "npu":
        record.figures(**_profile(steps))


def _memory(place: Place, record: Record, micro_batch_size: int) -> None:
    if place.kind == "cpu":
        path = Path("/proc/self/status")
        status = path.read_text(encoding="utf-8") if path.exists() else ""
        found = re.search(r"VmHWM:\s+(\d+) kB", status)
        record.figures(peak_of_the_process_gib=int(found[1]) * 1024 / _GIB if found else float("nan"))
        return
    module = getattr(torch, place.kind)
    peak = module.max_memory_allocated() / _GIB
    record.figures(peak_allocated_gib=peak, peak_reserved_gib=module.max_memory_reserved() / _GIB)
    wanted = (place.sizes.large.preset, place.sizes.seq_length, micro_batch_size, "reference", "reference")
    [budget] = [each.peak_gib for each in BUDGETS if (*each[:3], each.loss_kernel, each.activation_kernel) == wanted]
    record.figures(peak_of_the_rehearsal_gib=budget)
    record.check("peak allocated / the rehearsal's", peak / budget, _MEMORY_TOLERANCE)


def _speed(place: Place, record: Record, steps: Steps, seconds: float) -> None:
    speed = steps.num_tokens / seconds
    flops = model_flops(steps.model_config, steps.vocab_size, steps.seq_length)
    product = matrix_product_speed(place.kind, place.sizes.matrix)
    name = getattr(torch, place.kind).get_device_name() if place.kind != "cpu" else "cpu"
    known = find_accelerator(name)
    peak = None if known is None else ACCELERATORS[known].peak_flops
    record.figures(
        seconds_a_step=seconds,
        tokens_a_step=steps.num_tokens,
        tokens_per_second=speed,
        model_flop_formula=FORMULA,
        model_flop_a_token=flops,
        model_flop_per_second=speed * flops,
        data_sheets_flop_per_second=peak,
        utilisation_of_the_data_sheets=speed * flops / peak if peak else None,
        matrix_products_flop_per_second=product,
        utilisation_of_the_matrix_product=speed * flops / product,
    )


def _count_syncs(steps: Steps) -> dict[str, Any]:
    """Return the number of host synchronisations in a step, and their source lines, from torch's sync debug mode."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        try:
            steps.step()
        finally:
            torch.cuda.set_sync_debug_mode("default")
    found = [each for each in caught if "synchroniz" in str(each.message)]
    places = Counter(f"{'/'.join(Path(each.filename).parts[-3:])}:{each.lineno}" for each in found)
    rows = [{"line": line, "syncs": count} for line, count in places.most_common(_TOP)]
    return {"host_syncs_a_step": len(found), "host_syncs_by_line": rows}


def _profile(steps: Steps) -> dict[str, Any]:
    """Return the kernels that take most of a step's time, and the profiler's count of host synchronisations."""
    from torch.autograd import DeviceType
    from torch.profiler import ProfilerActivity, profile

    is_cpu = steps.device.kind == "cpu"
    activities = [ProfilerActivity.CPU] if is_cpu else [ProfilerActivity.CPU, ProfilerActivity.CUDA]
    steps.device.synchronize()
    started = time.perf_counter()
    with profile(activities=activities) as profiler:
        for _ in range(_PROFILED):
            steps.step()
        steps.device.synchronize()
    milliseconds = (time.perf_counter() - started) * 1000 / _PROFILED
    averages = profiler.key_averages()
    kind = DeviceType.CPU if is_cpu else DeviceType.CUDA

    def time_of(event: Any) -> float:
        return float(event.self_cpu_time_total if is_cpu else event.self_device_time_total)

    # On a device, the profiler lists user annotations beside the kernels within them.
    found = [event for event in averages if event.device_type == kind and (is_cpu or not event.is_user_annotation)]
    kernels = sorted(found, key=time_of, reverse=True)
    total = sum(time_of(event) for event in kernels) / 1000 / _PROFILED
    rows = [
        {
            "kernel": event.key[:100],
            "ms a step": round(time_of(event) / 1000 / _PROFILED, 4),
            "calls a step": event.count / _PROFILED,
            "share": round(time_of(event) / 1000 / _PROFILED / total, 4),
        }
        for event in kernels[:_TOP]
    ]
    waits = {event.key: event.count / _PROFILED for event in averages if event.key in _SYNCS}
    return {
        "profiled_ms_a_step": milliseconds,
        "kernels_ms_a_step": total,
        "kernels_a_step": sum(event.count for event in kernels) / _PROFILED,
        "top_kernels": rows,
        "profilers_syncs_a_step": ", ".join(f"{name} {count:g}" for name, count in waits.items()) or "none",
    }
