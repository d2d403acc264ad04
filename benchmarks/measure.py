"""Shared parts of the benchmarks: a single rank, a corpus, and alternating measurements of contenders."""

import os
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from data_scoring.base.progress import silent
from data_scoring.config import CorpusConfig, SourceConfig, TokenizerConfig
from data_scoring.corpus.corpus import Corpus
from data_scoring.corpus.prepare_corpus import prepare_corpus
from trainer.devices import Device, initialise

TURNS = 7


def single_rank(kind: str = "cpu") -> Device:
    """Return the device, with this process initialised as its only rank, replacing any previous process group."""
    device = initialise(kind, 0)
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0", "RANK": "0", "WORLD_SIZE": "1"}
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()
    store = torch.distributed.TCPStore("127.0.0.1", 0, 1, is_master=True)
    torch.distributed.init_process_group(device.backend, store=store, rank=0, world_size=1)
    from megatron.core import parallel_state

    parallel_state.destroy_model_parallel()
    parallel_state.initialize_model_parallel()
    return device


def topics(folder: Path, seq_length: int) -> Corpus:
    """Return a one-shard corpus of Python's built-in documentation, prepared in `folder` unless it is there."""
    if not (folder / "corpus" / "manifest.json").exists():
        source = SourceConfig(name="topics", format="python", path="topics")
        config = CorpusConfig(sources=(source,), seq_length=seq_length, num_shards=1)
        prepare_corpus(config, TokenizerConfig(), 0, folder / "corpus", "bench", silent)
    return Corpus(folder / "corpus")


def measure_in_turns(contenders: dict[str, Callable[[], int]], turns: int = TURNS) -> dict[str, list[float]]:
    """Return the tokens per second of each contender in every turn, after one warm-up turn."""
    speeds: dict[str, list[float]] = {name: [] for name in contenders}
    for turn in range(turns + 1):
        for name, work in contenders.items():
            started = time.perf_counter()
            num_tokens = work()
            if turn:
                speeds[name].append(num_tokens / (time.perf_counter() - started))
    return speeds


def ratio(speeds: dict[str, list[float]], name: str, baseline: str) -> dict[str, Any]:
    """Return the ratios of `name` to `baseline` per turn: median, minimum and maximum."""
    ratios = [a / b for a, b in zip(speeds[name], speeds[baseline], strict=True)]
    return {
        "claim": f"{name} / {baseline}",
        "median": round(statistics.median(ratios), 3),
        "min": round(min(ratios), 3),
        "max": round(max(ratios), 3),
    }


def spread(claim: str, values: list[float]) -> dict[str, Any]:
    """Return the median, minimum and maximum of `values`."""
    return {
        "claim": claim,
        "median": round(statistics.median(values), 3),
        "min": round(min(values), 3),
        "max": round(max(values), 3),
    }


def device_seconds(kind: str, work: Callable[[], object], turns: int = 10) -> float:
    """Return the median seconds of `work` on a device of `kind`, `cuda`, `npu` or `cpu`, after warm-up."""
    seconds = []
    for _ in range(turns + 2):
        if kind == "cpu":
            begun = time.perf_counter()
            work()
            seconds.append(time.perf_counter() - begun)
            continue
        started, ended = (getattr(torch, kind).Event(enable_timing=True) for _ in range(2))
        started.record()
        work()
        ended.record()
        ended.synchronize()
        seconds.append(started.elapsed_time(ended) / 1000)
    return statistics.median(seconds[2:])


def matrix_product_speed(kind: str, size: int) -> float:
    """Return the operations per second of the product of two bfloat16 matrices, [size, size], on a device."""
    square = torch.randn(size, size, device=kind, dtype=torch.bfloat16)
    return 2 * size**3 / device_seconds(kind, lambda: square @ square)
