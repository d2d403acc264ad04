"""Memory measurements of models, run in a separate process by `tests.trainer.test_memory`."""

import os
import pickle
import weakref
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils._python_dispatch import TorchDispatchMode

from data_scoring.corpus.corpus import Batch
from trainer.config import ModelConfig, TrainConfig
from trainer.devices import initialise
from trainer.memory import Workload
from trainer.parallel_config import ParallelConfig

SMALL = {"num_layers": 4, "hidden_size": 64, "num_attention_heads": 4, "ffn_hidden_size": 192, "vocab_size": 500}
# Tensor, pipeline and data-parallel ranks, whether tensor ranks share the sequence, and a stage's chunks, if several.
Layout = tuple[int, int, int, bool] | tuple[int, int, int, bool, int]
LAYOUTS: tuple[Layout, ...] = (
    *((1, 1, 1, False), (2, 1, 1, False), (2, 2, 2, True), (1, 4, 1, False), (4, 2, 1, True), (1, 1, 8, False)),
    (1, 2, 1, False, 2),
)
SHAPES: tuple[dict[str, Any], ...] = (
    {},
    {"tied_embeddings": True, "attention_bias": "all", "ffn_bias": True, "num_query_groups": 4, "head_size": 32},
    {"activation_terms": 3, "shortcut_reduction": 4, "attention_bias": "qkv"},
    {"activation_terms": 2, "activation_scales": "layer", "shortcut_reduction": 8, "shortcut_input": "residual"},
)


def workload(
    fields: dict[str, Any],
    layout: Layout = (1, 1, 1, False),
    precision: Any = "bfloat16",
    seq_length: int = 64,
    **train: Any,
) -> Workload:
    """Return a workload of few words: 8 microbatches a step and data-parallel rank, on an accelerator.

    Kernels are the reference ones unless given.
    """
    tensor, pipeline, data, sequence = layout[:4]
    chunks = layout[4] if len(layout) == 5 else 1
    train = {"loss_kernel": "reference", "activation_kernel": "reference", **train}
    model = ModelConfig.model_validate(fields)
    size = train.setdefault("micro_batch_size", 2)
    return Workload(
        model, model.vocab_size or 500, seq_length, TrainConfig(**train, global_batch_size=8 * size * data),
        ParallelConfig(
            tensor=tensor, pipeline=pipeline, virtual_pipeline=chunks, data=data, sequence=sequence
        ), precision, kind="cuda",
    )  # fmt: skip


def measured_workloads() -> list[Workload]:
    """Return workloads that are trained on this CPU: long enough for what is not activations to be little."""
    asked = [
        workload({**SMALL, **shape}, precision=precision, seq_length=512, micro_batch_size=8)
        for shape in SHAPES
        for precision in ("float32", "bfloat16")
    ]
    asked += [replace(each, train=each.train.model_copy(update={"recompute": "full"})) for each in asked[:4]] + [
        replace(each, train=each.train.model_copy(update={"recompute": "selective"})) for each in asked[:4]
    ]
    return [replace(each, kind="cpu") for each in asked]


def work(rank: int, folder: Path) -> None:
    """Leave in `folder` the weights of each layout's ranks, and the most bytes that a step took beside the states."""
    os.environ["LOCAL_WORLD_SIZE"] = "1"
    torch.set_num_threads(1)
    device = initialise("cpu", 0)
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    from megatron.core import parallel_state

    parallel_state.initialize_model_parallel()
    device.seed(0)
    found: dict[str, Any] = {"peaks": [_peak(each) for each in measured_workloads()], "counts": {}}
    parallel_state.destroy_model_parallel()
    torch.distributed.destroy_process_group()
    for layout in LAYOUTS:
        found["counts"][layout] = [_counts({**SMALL, **shape}, layout) for shape in SHAPES]
    (folder / "found.pickle").write_bytes(pickle.dumps(found))


def _counts(fields: dict[str, Any], layout: Layout) -> list[int]:
    """Return the number of weights that Megatron gives a rank of each pipeline stage."""
    from megatron.core import parallel_state

    tensor, pipeline, data, _ = layout[:4]
    counts = []
    for stage in range(pipeline):
        torch.distributed.init_process_group(
            "fake", store=FakeStore(), rank=stage * tensor * data, world_size=tensor * pipeline * data
        )
        parallel_state.initialize_model_parallel(
            tensor_model_parallel_size=tensor, pipeline_model_parallel_size=pipeline, create_gloo_process_groups=False
        )
        with torch.device("meta"):
            model = _build(workload(fields, layout))
        counts.append(sum(parameter.numel() for parameter in model.parameters()))
        parallel_state.destroy_model_parallel()
        torch.distributed.destroy_process_group()
    return counts


def _build(asked: Workload) -> torch.nn.Module:
    from trainer.model import Kernels, build_model

    kernels = Kernels(asked.train.loss_kernel, "chunked", asked.train.activation_kernel, asked.train.recompute)
    device, is_half = torch.get_default_device(), asked.precision == "bfloat16"
    return build_model(asked.model, asked.vocab_size, asked.seq_length, asked.parallel, device, is_half, kernels)


def _peak(asked: Workload) -> int:
    from trainer.forward import run_schedule
    from trainer.train import make_state

    train, seq_length = asked.train.resolve(asked.seq_length), asked.seq_length
    state = make_state(train, _build(asked), 10, asked.precision == "bfloat16")
    size = train.micro_batch_size
    tokens = np.ones((size, seq_length + 1), np.int64)
    state.model.zero_grad_buffer()
    state.optimizer.zero_grad()
    states = {tensor.untyped_storage()._cdata for tensor in _buffers(state.model)}
    with _LiveBytes(states) as live:
        batches = [Batch(tokens, np.full(size, seq_length, np.int64))] * 2
        run_schedule(state.model, batches, 2 * size, size, seq_length, forward_only=False)
    return live.peak


def _buffers(model: Any) -> list[torch.Tensor]:
    """Return weights and gradients, in Megatron's buffers."""
    parts = [part for chunk in model for buffer in chunk.buffers for part in (buffer.param_data, buffer.grad_data)]
    return [*model.parameters(), *[part for part in parts if part is not None]]


class _LiveBytes(TorchDispatchMode):
    """Counts the bytes of tensors that come into being and are still there, and the most that there were."""

    def __init__(self, known: set[int]) -> None:
        super().__init__()
        self.known, self.sizes, self.live, self.peak = known, dict[int, int](), 0, 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = function(*args, **(kwargs or {}))
        for tensor in torch.utils._pytree.tree_leaves(result):
            if isinstance(tensor, torch.Tensor):
                self._note(tensor.untyped_storage())
        return result

    def _note(self, storage: Any) -> None:
        key = storage._cdata
        if key not in self.known and key not in self.sizes:
            self.sizes[key] = storage.nbytes()
            self.live += storage.nbytes()
            self.peak = max(self.peak, self.live)
            weakref.finalize(storage, self._forget, key)

    def _forget(self, key: int) -> None:
        self.live -= self.sizes.pop(key)
