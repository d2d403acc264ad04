"""Answering lm-eval's requests against its `hf` backend, with identical weights, each in a process of its own.

A process loads its side's model once, and measures whenever it is told to: starting takes longer than measuring.
"""

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml

from benchmarks.head import resident
from benchmarks.measure import single_rank, topics
from flows.models.hugging_face_models import export_model
from flows.run.stored_model import MODEL, find_model
from trainer.checkpoint_shapes import shapes_of
from trainer.config import ModelConfig
from trainer.parallel_config import ParallelConfig
from trainer.requests import Likelihood
from trainer.weights import write_weights

VOCAB_SIZE, SEQ_LENGTH, TURNS, PASSES = 16_000, 1024, 3, 2
SHAPE = ModelConfig(num_layers=6, hidden_size=384, num_attention_heads=6, vocab_size=VOCAB_SIZE)
# Batch sizes tried for lm-eval's backend (`auto` relies on out-of-memory errors); the best is the baseline.
BATCH_SIZES = (1, 4, 16)


def evaluation(folder: Path) -> list[dict[str, Any]]:
    """Return requests per second and peak memory of our evaluation against lm-eval's `hf` on a CPU."""
    _make_models(folder)
    rows = []
    for name, make in WORKLOADS.items():
        with _Side(folder, name, "hf") as side:
            tried = {size: side.measure(size)["seconds"] for size in BATCH_SIZES}
        best = min(tried, key=lambda size: tried[size])
        ours, theirs = [], []
        # New processes, so that no other batch size has left memory behind.
        with _Side(folder, name, "reprise") as our_side, _Side(folder, name, "hf") as their_side:
            for _ in range(TURNS):
                ours.append(our_side.measure(0))
                theirs.append(their_side.measure(best))
        difference = max(abs(a - b) for a, b in zip(ours[0]["answers"], theirs[0]["answers"], strict=True))
        assert difference < 1e-3, difference
        ratios = [b["seconds"] / a["seconds"] for a, b in zip(ours, theirs, strict=True)]
        baseline = f"lm-eval's hf, batch_size {best} (the best of {', '.join(map(str, BATCH_SIZES))})"
        count = len(make())
        for side, runs in (("reprise", ours), ("hf", theirs)):
            speed = count / statistics.median(run["seconds"] for run in runs)
            print(
                f"{name}, {side}: {speed:,.1f} requests/s of one thread (one machine's number; the ratio is the claim)"
            )
        rows.append(
            {
                "claim": f"requests per second of one thread, {name} / {baseline}",
                "median": round(statistics.median(ratios), 2),
                "min": round(min(ratios), 2),
                "max": round(max(ratios), 2),
                "requests": count,
                "largest difference of log-likelihoods": difference,
            }
        )
        for what, key in (("above the loaded model", "added"), ("whole process", "whole")):
            # The first turn's: in later ones, memory that the first has left to the process is used again.
            memory = [runs[0][key] for runs in (ours, theirs)]
            rows.append(
                {
                    "claim": f"peak memory, {name} / {baseline}: {what}",
                    "median": round(memory[0] / memory[1], 3),
                    "MB": memory,
                }
            )
    return rows


def five_shots() -> list[Likelihood]:
    """Return requests of 5-shot multiple choice: four one-letter options per question, shared examples per subject."""
    generator = np.random.default_rng(0)
    requests = []
    for _ in range(2):
        shots = _draw(generator, 5 * 75)
        for _ in range(10):
            question = np.concatenate([shots, _draw(generator, int(generator.integers(50, 100)))])
            requests += [Likelihood(question, np.array([letter], np.int32)) for letter in (40, 41, 42, 43)]
    return requests


def endings() -> list[Likelihood]:
    """Return requests of 0-shot story completion, four endings each, as in HellaSwag."""
    generator = np.random.default_rng(0)
    requests = []
    for _ in range(32):
        story = _draw(generator, int(generator.integers(20, 80)))
        requests += [Likelihood(story, _draw(generator, int(generator.integers(15, 40)))) for _ in range(4)]
    return requests


WORKLOADS: dict[str, Callable[[], list[Likelihood]]] = {
    "5-shot multiple choice": five_shots,
    "0-shot endings as HellaSwag's": endings,
}


def _draw(generator: np.random.Generator, count: int) -> Any:
    return generator.integers(100, 10_000, count).astype(np.int32)


def _make_models(folder: Path) -> None:
    """Write the same random model as a Reprise folder and as a Hugging Face folder."""
    generator = torch.Generator().manual_seed(0)
    shapes = shapes_of(SHAPE, VOCAB_SIZE)
    weights = {name: torch.randn(shape, generator=generator) * 0.05 for name, shape in shapes.items()}

    def produce(name: str, layer: int | None) -> torch.Tensor:
        return weights[name] if layer is None else weights[name][layer]

    described = {name: (shape, torch.float32) for name, shape in shapes.items()}
    record = {"step": 0, "vocab_size": VOCAB_SIZE}
    write_weights(folder / "model" / "checkpoint" / "step-00000000", described, produce, record)
    (folder / "model" / MODEL).write_text(yaml.safe_dump(SHAPE.model_dump(mode="json")))
    shutil.copy(topics(folder, SEQ_LENGTH).tokenizer_path, folder / "model" / "tokenizer.json")
    export_model(folder / "model", None, folder / "hf")


class _Side:
    """A process that answers a workload on one side, whenever it is told to; a context manager that ends it."""

    def __init__(self, folder: Path, workload: str, side: str) -> None:
        self._command = [sys.executable, "-m", "benchmarks.evaluation", str(folder), workload, side]

    def __enter__(self) -> "_Side":
        self._process = subprocess.Popen(
            self._command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env={**os.environ, **QUIET}
        )
        return self

    def __exit__(self, *_: object) -> None:
        self._process.communicate()

    def measure(self, batch_size: int) -> dict[str, Any]:
        """Return a turn's measurements: least seconds of one thread, memory in MB, log-likelihoods.

        Raises RuntimeError if the process has ended.
        """
        assert self._process.stdin is not None and self._process.stdout is not None
        print(batch_size, file=self._process.stdin, flush=True)
        for line in self._process.stdout:
            if line.startswith(_MEASURED):
                measured: dict[str, Any] = json.loads(line.removeprefix(_MEASURED))
                return measured
        raise RuntimeError(f"{' '.join(self._command)} has ended with exit code {self._process.wait()}")


QUIET = {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "true", "PYTHONWARNINGS": "ignore"}


_MEASURED = "measured: "


def _reprise(folder: Path) -> Callable[[list[Likelihood], int], list[float]]:
    device = single_rank()
    from data_scoring.tokenizer.tokenizer import open_tokenizer
    from trainer.checkpoint import load_weights
    from trainer.evaluate import answer_requests
    from trainer.model import Kernels, build_model

    stored = find_model(folder / "model")
    gpt = build_model(SHAPE, VOCAB_SIZE, SEQ_LENGTH, ParallelConfig(), device.torch_device, False, Kernels())
    load_weights(stored.checkpoint, gpt)
    tokenizer = open_tokenizer(stored.tokenizer, None)

    def answer(requests: list[Likelihood], _: int) -> list[float]:
        answers = answer_requests(gpt, requests, tokenizer)
        assert answers is not None
        return [float(each[0]) for each in answers]

    return answer


def _hf(folder: Path) -> Callable[[list[Likelihood], int], list[float]]:
    from lm_eval.models.huggingface import HFLM

    harness = HFLM(str(folder / "hf"), device="cpu", dtype="float32", max_length=SEQ_LENGTH)

    def answer(requests: list[Likelihood], batch_size: int) -> list[float]:
        harness.batch_size_per_gpu = batch_size
        asked = [
            ((str(number), ""), request.context.tolist(), request.continuation.tolist())
            for number, request in enumerate(requests)
        ]
        return [each[0] for each in harness._loglikelihood_tokens(asked, disable_tqdm=True)]

    return answer


def main() -> None:
    """Print one side's measurements for a workload, once for each batch size that is read from the input."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("workload", choices=WORKLOADS)
    parser.add_argument("side", choices=["reprise", "hf"])
    arguments = parser.parse_args()
    answer = _reprise(arguments.folder) if arguments.side == "reprise" else _hf(arguments.folder)
    requests = WORKLOADS[arguments.workload]()
    # CPU seconds of one thread do not depend on the machine's load.
    torch.set_num_threads(1)
    for line in sys.stdin:
        print(_MEASURED, json.dumps(_measure(answer, requests, int(line))), flush=True)


def _measure(
    answer: Callable[[list[Likelihood], int], list[float]], requests: list[Likelihood], batch_size: int
) -> dict[str, Any]:
    before = resident("VmRSS")
    # Reset the peak memory counter.
    Path("/proc/self/clear_refs").write_text("5")
    # Warm-up.
    answer(requests[:16], batch_size)
    seconds = []
    for _ in range(PASSES):
        started = time.process_time()
        answers = answer(requests, batch_size)
        seconds.append(time.process_time() - started)
    whole = resident("VmHWM")
    memory = {"added": round(whole - before), "whole": round(whole)}
    return {"seconds": min(seconds), "answers": answers, **memory}


if __name__ == "__main__":
    main()
