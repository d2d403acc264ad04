"""`make bench`: each claim as a ratio to a named baseline, measured alternately, with its spread."""

import argparse
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.contamination import contamination
from benchmarks.data_stages import data_stages
from benchmarks.evaluation import evaluation
from benchmarks.head import head
from benchmarks.measure import TURNS, measure_in_turns, ratio, single_rank, spread, topics
from benchmarks.operation import prefect_overhead, stopping
from benchmarks.plain_model import PlainModel, load_megatron_weights, stacked_weights
from benchmarks.prepare import prepare
from benchmarks.scale import scale
from data_scoring.base.files import read_json, write_json
from data_scoring.losses.shard_scoring import Block
from flows.run.folder import VERIFIED, read_run
from flows.run.versions import package_versions
from flows.stages.stage_order import stages_of, steps_of
from trainer.config import ModelConfig, TrainConfig
from trainer.parallel_config import ParallelConfig

RESULTS = Path("benchmarks/results")
BATCH = 16
SEQ_LENGTH = 256
THROUGHPUT_TURNS = 20


def throughput(folder: Path) -> list[dict[str, Any]]:
    """Return training against a plain torch loop, and scoring against training, for the demo's model on one rank."""
    device = single_rank()
    from trainer.forward import read_microbatches, run_schedule
    from trainer.gradients import update_weights
    from trainer.model import Kernels, build_model
    from trainer.score import ModelScorer
    from trainer.train import make_state

    device.seed(0)
    corpus = topics(folder, SEQ_LENGTH)
    model_config, train = ModelConfig(), TrainConfig().resolve(SEQ_LENGTH)
    model = build_model(
        model_config, corpus.vocab_size, SEQ_LENGTH, ParallelConfig(), device.torch_device, False, Kernels()
    )
    plain = PlainModel(model_config, corpus.vocab_size)
    load_megatron_weights(plain, stacked_weights(model.decoders[0], model_config.num_layers))
    state = make_state(train, model, 10_000, bf16=False)
    adam = torch.optim.AdamW(plain.parameters(), lr=train.lr, betas=(0.9, 0.95), weight_decay=0.1)
    generator = np.random.default_rng(0)
    scorer = ModelScorer(model, corpus, micro_batch_size=8)

    def draw() -> np.ndarray:
        return generator.integers(0, corpus.num_samples(0) - 1, BATCH)

    def train_reprise() -> int:
        state.model.zero_grad_buffer()
        state.optimizer.zero_grad()
        microbatches = read_microbatches(corpus, np.zeros(BATCH, int), draw(), train.micro_batch_size, SEQ_LENGTH)
        run_schedule(state.model, microbatches, BATCH, train.micro_batch_size, SEQ_LENGTH, forward_only=False)
        state.scheduler.step(1)
        update_weights(state.optimizer, torch.device("cpu"))
        return BATCH * SEQ_LENGTH

    def train_plain() -> int:
        samples = draw()
        adam.zero_grad()
        for start in range(0, BATCH, train.micro_batch_size):
            chosen = samples[start : start + train.micro_batch_size]
            tokens = torch.from_numpy(corpus.read(np.zeros(len(chosen), int), chosen).tokens)
            (plain(tokens[:, :-1], tokens[:, 1:]).sum() / (BATCH * SEQ_LENGTH)).backward()
        torch.nn.utils.clip_grad_norm_(plain.parameters(), train.clip_grad)
        adam.step()
        return BATCH * SEQ_LENGTH

    def score_reprise() -> int:
        block = Block(np.zeros(BATCH, int), draw(), SEQ_LENGTH)
        scorer.score(block, scorer.read(block))
        return BATCH * SEQ_LENGTH

    names = ("training", "plain torch loop with scaled_dot_product_attention", "scoring")
    works = (train_reprise, train_plain, score_reprise)
    speeds = measure_in_turns(dict(zip(names, works, strict=True)), THROUGHPUT_TURNS)
    torch.distributed.destroy_process_group()
    for name, values in speeds.items():
        print(f"{name}: {statistics.median(values):,.0f} tokens/s (one machine's number; the ratios are the claim)")
    return [ratio(speeds, "training", names[1]), ratio(speeds, "scoring", "training")]


def demo(folder: Path) -> list[dict[str, Any]]:
    """Return the seconds of the demo in total, outside training and scoring, and for verifying its files."""
    started = time.perf_counter()
    command = [sys.executable, "-m", "flows.cli.main", "run", "configs/demo.yaml", "--set", f"output={folder}"]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    seconds = time.perf_counter() - started
    rounds = folder / "demo" / "rounds"
    stages = sum(read_json(path)["seconds"] for stage in ("train", "score") for path in rounds.glob(f"*/{stage}.json"))
    return [
        {
            "claim": "demo: seconds outside training and scoring / seconds in all",
            "seconds": round(seconds, 1),
            "outside": round(seconds - stages, 1),
            "median": round((seconds - stages) / seconds, 3),
        },
        spread(
            "demo: seconds for checksums (every file read once, and looked at before every stage) / seconds in all",
            [each / seconds for each in _verification(folder / "demo")],
        ),
    ]


def _verification(folder: Path) -> list[float]:
    """Return the seconds that a run's stages spend on checksums, measured again on its finished files."""
    run, turns = read_run(folder), []
    stages, num_stages = stages_of(run), len(steps_of(run.config))
    for _ in range(TURNS):
        (folder / VERIFIED).unlink(missing_ok=True)
        started = time.perf_counter()
        stages.verify()
        all_read = time.perf_counter()
        stages.verify()
        turns.append(all_read - started + num_stages * (time.perf_counter() - all_read))
    return turns


BENCHMARKS: dict[str, Callable[[Path], list[dict[str, Any]]]] = {
    "throughput": throughput,
    "head": head,
    "evaluation": evaluation,
    "demo": demo,
    "scale": scale,
    "prepare": prepare,
    "data_stages": data_stages,
    "contamination": contamination,
    "prefect": prefect_overhead,
    "stopping": stopping,
}


def main() -> None:
    """Run the benchmarks named on the command line, or all; print and save their results."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("names", nargs="*", help=", ".join(BENCHMARKS))
    for name in parser.parse_args().names or BENCHMARKS:
        with tempfile.TemporaryDirectory() as folder:
            rows = BENCHMARKS[name](Path(folder))
        for row in rows:
            print("  ".join(f"{key}: {value}" for key, value in row.items()), flush=True)
        hardware = f"{platform.machine()}, {len(os.sched_getaffinity(0))} cores"
        write_json(RESULTS / f"{name}.json", {"hardware": hardware, "versions": package_versions(), "results": rows})


if __name__ == "__main__":
    main()
