"""Scoring against Hugging Face's Llama with identical weights, and the head's kernels against their reference."""

import argparse
import json
import re
import statistics
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.measure import device_seconds, matrix_product_speed, measure_in_turns, ratio, single_rank, topics
from benchmarks.plain_model import PlainModel, load_megatron_weights, stacked_weights
from data_scoring.corpus.corpus import Corpus
from data_scoring.losses.shard_scoring import Block
from kernels.linear_cross_entropy import LossKernel, linear_cross_entropy
from trainer.config import ModelConfig
from trainer.parallel_config import ParallelConfig

VOCAB_SIZE = 48_000
SEQ_LENGTH = 256
BATCH = 8
SCORING_TURNS = 20
MODEL = ModelConfig(num_layers=4, hidden_size=512, num_attention_heads=8, vocab_size=VOCAB_SIZE)
LLAMA = "Hugging Face LlamaForCausalLM with cross_entropy"
# Tokens, vocabulary, hidden channels.
HEADS = [(2048, 48_000, 512), (512, 151_936, 512)]
GPU_HEADS = [(8192, 131_072, 4096), (8192, 48_000, 1792)]


def head(folder: Path) -> list[dict[str, Any]]:
    """Return speed and memory of scoring against Hugging Face's Llama, of the head alone, and of the head on a GPU."""
    corpus = topics(folder, SEQ_LENGTH)
    return [*_scoring(corpus), *_scoring_memory(folder), *_heads(), *_gpu_heads()]


def _scoring(corpus: Corpus) -> list[dict[str, Any]]:
    import transformers

    reprise, weights = _reprise(corpus)
    llama = _llama(corpus, weights)
    difference = float(np.abs(reprise(np.arange(BATCH)) - llama(np.arange(BATCH))).max())
    assert difference < 1e-4, difference
    generator = np.random.default_rng(0)

    def scorer(score: Callable[[np.ndarray], np.ndarray]) -> Callable[[], int]:
        def work() -> int:
            score(generator.integers(0, corpus.num_samples(0) - 1, BATCH))
            return BATCH * SEQ_LENGTH

        return work

    speeds = measure_in_turns({"scoring": scorer(reprise), LLAMA: scorer(llama)}, SCORING_TURNS)
    torch.distributed.destroy_process_group()
    for name, values in speeds.items():
        print(f"{name}: {statistics.median(values):,.0f} tokens/s (one machine's number; the ratio is the claim)")
    row = ratio(speeds, "scoring", LLAMA)
    return [{**row, "largest difference of losses": difference, "transformers": transformers.__version__}]


def _reprise(corpus: Corpus) -> tuple[Callable[[np.ndarray], np.ndarray], dict[str, Tensor]]:
    """Return a function that scores samples as scoring jobs do, and the model's weights."""
    device = single_rank()
    from trainer.model import Kernels, build_model
    from trainer.score import ModelScorer

    device.seed(0)
    model = build_model(MODEL, VOCAB_SIZE, SEQ_LENGTH, ParallelConfig(), device.torch_device, False, Kernels()).eval()
    scorer = ModelScorer(model, corpus, BATCH)

    def score(samples: np.ndarray) -> np.ndarray:
        block = Block(np.zeros(len(samples), int), samples, SEQ_LENGTH)
        losses = scorer.score(block, scorer.read(block))
        assert losses is not None
        return losses[:, 0]

    return score, stacked_weights(model.decoders[0], MODEL.num_layers)


def _llama(corpus: Corpus, weights: dict[str, Tensor] | None) -> Callable[[np.ndarray], np.ndarray]:
    """Return a function that scores samples with transformers, with random weights unless given."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=VOCAB_SIZE,
        hidden_size=MODEL.hidden_size,
        intermediate_size=MODEL.ffn_size,
        num_hidden_layers=MODEL.num_layers,
        num_attention_heads=MODEL.num_attention_heads,
        max_position_embeddings=SEQ_LENGTH,
        rms_norm_eps=MODEL.norm_epsilon,
        tie_word_embeddings=False,
    )
    # The baseline must not pay for the CPU adapter's torch-function mode.
    with torch._C.DisableTorchFunction():
        llama = LlamaForCausalLM(config).eval()
        if weights is not None:
            plain = PlainModel(MODEL, VOCAB_SIZE)
            load_megatron_weights(plain, weights)
            llama.load_state_dict(_llama_names(plain.state_dict()))

    def score(samples: np.ndarray) -> np.ndarray:
        batch = corpus.read(np.zeros(len(samples), int), samples)
        tokens, num_tokens = torch.from_numpy(batch.tokens), torch.from_numpy(batch.num_tokens)
        with torch._C.DisableTorchFunction(), torch.no_grad():
            logits = llama(input_ids=tokens[:, :-1], use_cache=False).logits
            losses = F.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten(), reduction="none")
            is_real = torch.arange(SEQ_LENGTH) < num_tokens[:, None]
            return ((losses.view(len(samples), -1) * is_real).sum(dim=1) / num_tokens).numpy()

    return score


def _llama_names(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return the plain model's weights under transformers' names."""
    names = {
        "query": "self_attn.q_proj",
        "key": "self_attn.k_proj",
        "value": "self_attn.v_proj",
        "out": "self_attn.o_proj",
        "gate": "mlp.gate_proj",
        "up": "mlp.up_proj",
        "down": "mlp.down_proj",
        "attention_norm": "input_layernorm",
        "ffn_norm": "post_attention_layernorm",
    }
    renamed = {
        "model.embed_tokens.weight": state["embedding.weight"],
        "model.norm.weight": state["norm.weight"],
        "lm_head.weight": state["head.weight"],
    }
    for name, tensor in state.items():
        if name.startswith("layers."):
            _, layer, part, _ = name.split(".")
            renamed[f"model.layers.{layer}.{names[part]}.weight"] = tensor
    return renamed


def _scoring_memory(folder: Path) -> list[dict[str, Any]]:
    ours, theirs = _memory_of("reprise", folder), _memory_of("llama", folder)
    return [
        {
            "claim": f"peak memory of scoring / {LLAMA}: {what}",
            "median": round(ours[key] / theirs[key], 3),
            "MB": (ours[key], theirs[key]),
        }
        for what, key in (("above the loaded model", "added"), ("whole process", "whole"))
    ]


def _heads() -> list[dict[str, Any]]:
    rows = []
    for shape in HEADS:
        tokens, vocabulary, width = shape
        contenders = {
            f"{kernel} head, {tokens} x {vocabulary} x {width}, {what}": _head_work(kernel, shape, backward)
            for what, backward in (("forward", False), ("forward and backward", True))
            for kernel in ("chunked", "reference")
        }
        speeds = measure_in_turns(contenders, turns=3)
        names = list(contenders)
        rows += [ratio(speeds, names[0], names[1]), ratio(speeds, names[2], names[3])]
        added = {kernel: _memory_of(f"{kernel}-head", Path(), shape)["added"] for kernel in ("chunked", "reference")}
        rows.append(
            {
                "claim": f"peak memory of chunked head / reference head, {tokens} x {vocabulary} x {width}, forward",
                "median": round(added["chunked"] / added["reference"], 3),
                "MB": tuple(added.values()),
            }
        )
    return rows


def _head_work(kernel: LossKernel, shape: tuple[int, int, int], backward: bool) -> Callable[[], int]:
    tokens, vocabulary, width = shape
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(tokens, width, generator=generator).requires_grad_(backward)
    weight = (torch.randn(vocabulary, width, generator=generator) * 0.05).requires_grad_(backward)
    labels = torch.randint(0, vocabulary, (tokens,), generator=generator)

    def work() -> int:
        hidden.grad = weight.grad = None
        with torch._C.DisableTorchFunction():
            loss = linear_cross_entropy(hidden, weight, labels, kernel)
            if backward:
                loss.sum().backward()
        return tokens

    return work


def _gpu_heads() -> list[dict[str, Any]]:
    """Return the speed of the Triton kernel's forward pass as a share of a plain matrix product's."""
    rows = []
    for shape in GPU_HEADS:
        tokens, vocabulary, width = shape
        claim = f"triton head / bfloat16 matrix product, {tokens} x {vocabulary} x {width}, forward"
        if not torch.cuda.is_available():
            rows.append({"claim": claim, "not measured": "no CUDA device here"})
            continue
        [forward, _] = heads_on("cuda", ("triton",), shape, matrix_product_speed("cuda", 8192))
        rows.append({"claim": claim, "median": forward["share of the matrix product"]})
    return rows


def heads_on(
    kind: str, kernels: tuple[LossKernel, ...], shape: tuple[int, int, int], product: float
) -> list[dict[str, Any]]:
    """Return the speed of kernels in bfloat16 on a device of `kind`, two rows per kernel, and the mean of their losses.

    shape: tokens, vocabulary and channels; product: the operations per second of the device's matrix product, relative
    to which the speed of a head's products, one forward and two backward, is given.
    """
    tokens, vocabulary, width = shape
    torch.manual_seed(0)
    hidden = torch.randn(tokens, width, device=kind, dtype=torch.bfloat16).requires_grad_()
    weight = (torch.randn(vocabulary, width, device=kind, dtype=torch.bfloat16) * 0.05).requires_grad_()
    labels = torch.randint(0, vocabulary, (tokens,), device=kind)
    rows = []
    for kernel in kernels:
        mean = float(linear_cross_entropy(hidden, weight, labels, kernel).mean())
        for backward in (False, True):
            seconds = device_seconds(kind, partial(_train_or_score, hidden, weight, labels, kernel, backward))
            share = 2 * (1 + 2 * backward) * tokens * vocabulary * width / seconds / product
            rows.append(
                {
                    "kernel": kernel,
                    "pass": "forward and backward" if backward else "forward",
                    "ms": round(seconds * 1000, 3),
                    "share of the matrix product": round(share, 3),
                    "mean loss": mean,
                }
            )
    return rows


def _train_or_score(hidden: Tensor, weight: Tensor, labels: Tensor, kernel: LossKernel, backward: bool) -> None:
    hidden.grad = weight.grad = None
    with torch.set_grad_enabled(backward):
        loss = linear_cross_entropy(hidden, weight, labels, kernel)
    if backward:
        loss.sum().backward()


def _memory_of(name: str, folder: Path, shape: tuple[int, int, int] = HEADS[0]) -> dict[str, int]:
    """Return the peak memory of one contender in a separate process, MB: `whole`, and `added` by its work."""
    command = [sys.executable, "-m", "benchmarks.head", name, str(folder), *map(str, shape)]
    output = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
    memory: dict[str, int] = json.loads(output.splitlines()[-1])
    return memory


def main() -> None:
    """Print the peak memory of one contender."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("name", choices=["reprise", "llama", "chunked-head", "reference-head"])
    parser.add_argument("folder", type=Path)
    parser.add_argument("shape", type=int, nargs=3)
    arguments = parser.parse_args()
    if arguments.name.endswith("-head"):
        kernel = arguments.name.removesuffix("-head")
        work: Callable[[], object] = _head_work(kernel, arguments.shape, backward=False)
    else:
        corpus = topics(arguments.folder, SEQ_LENGTH)
        score = _reprise(corpus)[0] if arguments.name == "reprise" else _llama(corpus, None)
        work = lambda: score(np.arange(BATCH))  # noqa: E731
    before = resident("VmRSS")
    # Reset the peak memory counter.
    Path("/proc/self/clear_refs").write_text("5")
    for _ in range(3):
        work()
    whole = resident("VmHWM")
    print(json.dumps({"added": round(whole - before), "whole": round(whole)}))


def resident(entry: str) -> float:
    """Return an entry of this process's memory status, in MB."""
    found = re.search(rf"{entry}:\s+(\d+) kB", Path("/proc/self/status").read_text())
    assert found is not None
    return int(found[1]) * 1024 / 1e6


if __name__ == "__main__":
    main()
