"""Layer ablation on two ranks, under every layout of two ranks, and in plain torch."""

import re
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import torch
from torch import Tensor

from benchmarks.plain_model import PlainModel, load_megatron_weights, stacked_weights
from data_scoring.base.progress import silent
from data_scoring.corpus.corpus import Corpus
from data_scoring.losses.calibration import draw_calibration_set
from tests.trainer.rendezvous import meet
from trainer.config import ModelConfig
from trainer.devices import Device
from trainer.jobs import AblationJob
from trainer.parallel_config import ParallelConfig

MODEL = ModelConfig(
    num_layers=4,
    hidden_size=32,
    num_attention_heads=4,
    num_query_groups=2,
    ffn_hidden_size=64,
    activation_terms=2,
    shortcut_reduction=4,
)
# No multiple of the samples that two replicas take at once.
NUM_SAMPLES, MICRO_BATCH_SIZE, SEED = 21, 4, 3
# Of four layers in two stages, blocks of three always cross the border.
LAYOUTS = {
    "data": ParallelConfig(data=2),
    "pipeline": ParallelConfig(pipeline=2),
    "tensor": ParallelConfig(tensor=2),
    "sequence": ParallelConfig(tensor=2, sequence=True),
}
# Models of two layers cannot be divided like this.
DEEP_LAYOUTS = {**LAYOUTS, "interleaved": ParallelConfig(pipeline=2, virtual_pipeline=2)}


def skip_layers(device: Device, corpus: Corpus, rank: int) -> dict[str, Any]:
    """Return what each layout measures, on its writer, the rows that went through layers, and what plain torch says."""
    whole = random_model(device, corpus)
    found: dict[str, Any] = {"plain": _plain_losses(corpus, whole)}
    for name, parallel in DEEP_LAYOUTS.items():
        found[name] = _measure(corpus, shared_model(device, corpus, parallel, whole, rank), parallel)
    stages = LAYOUTS["pipeline"]
    found["bfloat16"] = _measure(corpus, shared_model(device, corpus, stages, whole, rank, bf16=True), stages)
    return found


def random_model(device: Device, corpus: Corpus) -> Any:
    """Return a model that no ranks share, far enough from its start for every layer to matter."""
    share(ParallelConfig())
    whole = _build(device, corpus, ParallelConfig())
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for parameter in whole.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.15)
    return whole


def shared_model(
    device: Device, corpus: Corpus, parallel: ParallelConfig, whole: Any, rank: int, bf16: bool = False
) -> Any:
    """Return this rank's part of a model that has the weights of the whole one."""
    share(parallel)
    model = _build(device, corpus, parallel, bf16)
    for decoder in model.decoders:
        _fill(decoder, dict(whole.decoders[0].named_parameters()), rank)
    return model


def share(parallel: ParallelConfig) -> None:
    from megatron.core import parallel_state

    meet()
    chunks = parallel.virtual_pipeline if parallel.virtual_pipeline > 1 else None
    parallel_state.initialize_model_parallel(parallel.tensor, parallel.pipeline, chunks)


def _build(device: Device, corpus: Corpus, parallel: ParallelConfig, bf16: bool = False) -> Any:
    from trainer.model import Kernels, build_model

    device.seed(5)
    place = torch.get_default_device()
    return build_model(MODEL, corpus.vocab_size, corpus.seq_length, parallel, place, bf16, Kernels()).eval()


def _fill(gpt: Any, whole: dict[str, Tensor], rank: int) -> None:
    """Give a chunk of the model the weights of the whole one."""
    from tests.trainer.two_ranks import _part

    first = gpt.decoder.layers[0].layer_number - 1
    with torch.no_grad():
        for name, parameter in gpt.named_parameters():
            number = re.search(r"layers\.(\d+)", name)
            value = whole[name.replace(number[0], f"layers.{int(number[1]) + first}", 1) if number else name]
            parameter.copy_(value if parameter.shape == value.shape else _part(value, parameter, name, rank))


def _measure(corpus: Corpus, model: Any, parallel: ParallelConfig) -> dict[str, Any]:
    from trainer.layer_ablation import measure_ablation

    rows_through_layers: list[int] = []
    layers = [module for module in model.modules() if type(module).__name__ == "Layer"]
    for layer in layers:
        layer.register_forward_hook(lambda _layer, _inputs, output: rows_through_layers.append(output[0].shape[1]))
    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder)
        job = AblationJob(
            corpus=corpus.folder, round_folder=place, model=MODEL, parallel=parallel, device="cpu", fingerprint="f",
            precision="float32", activation_kernel="reference", seed=SEED, progress=place, errors=place, lock=place,
            weights=place, num_samples=NUM_SAMPLES, micro_batch_size=MICRO_BATCH_SIZE,
        )  # fmt: skip
        measure_ablation(job, corpus, model, silent)
        rows = pq.read_table(job.result).to_pylist() if job.result.exists() else None
    return {"rows": rows, "rows through layers": sum(rows_through_layers)}


def _plain_losses(corpus: Corpus, whole: Any) -> dict[str, Any]:
    """Return the samples' losses with layers left out of the plain model, by what is left out, and their tokens."""
    plain = PlainModel(MODEL, corpus.vocab_size)
    load_megatron_weights(plain, stacked_weights(whole.decoders[0], MODEL.num_layers))
    drawn = draw_calibration_set(
        [corpus.num_samples(shard) for shard in range(corpus.num_shards)], NUM_SAMPLES, SEED, 0
    )
    batch = corpus.read(*drawn)
    tokens, layers = torch.from_numpy(batch.tokens), list(plain.layers)
    losses = {}
    with torch.no_grad():
        for start, length in [(0, 0), *((i, n) for n in (1, 2, 3) for i in range(MODEL.num_layers - n + 1))]:
            plain.layers = torch.nn.ModuleList(layers[:start] + layers[start + length :])
            token_losses = plain(tokens[:, :-1], tokens[:, 1:]).double().numpy()
            losses[start, length] = np.array(
                [row[:count].mean() for row, count in zip(token_losses, batch.num_tokens, strict=True)]
            )
    return {"losses": losses, "num_tokens": batch.num_tokens}
