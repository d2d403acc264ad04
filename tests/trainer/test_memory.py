"""Memory estimates compared with Megatron's models: counted, tracked on this CPU, and rehearsed as on CUDA."""

import pickle
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from torch.distributed.checkpoint import FileSystemReader
from torch.distributed.checkpoint.metadata import TensorStorageMetadata

from data_scoring.config import padded_vocab_size
from data_scoring.corpus.corpus import Corpus
from tests.conftest import TINY_MODEL
from tests.forked_ranks import run_ranks
from tests.trainer import memory_rank
from tests.trainer.memory_rank import LAYOUTS, SHAPES, SMALL, workload
from trainer.checkpoint_folder import list_checkpoints
from trainer.memory import checkpoint_bytes, rank_memory, stage_parameters

GIB = 1 << 30
PRO, LLAMA = ({"preset": name} for name in ("pangu-pi-1b-pro", "llama-7b"))
# The shape that was rehearsed.
LARGER_PRO = {"preset": "pangu-pi-1.5b-pro", "ffn_hidden_size": 5632}
CHUNKED, TRITON = {"loss_kernel": "chunked"}, {"activation_kernel": "triton"}
SHORT = {"num_layers": 8, "hidden_size": 1024, "num_attention_heads": 8, "ffn_hidden_size": 2752, "vocab_size": 32_000}
AUTO = {"loss_kernel": "triton", "activation_kernel": "triton"}
PORTABLE = {"loss_kernel": "chunked", "activation_kernel": "recompute"}
PLAIN = {"tied_embeddings": True, "activation_terms": 1, "shortcut_reduction": None}
ALONE = (1, 1, 1, False)


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("memory")
    run_ranks(memory_rank.work, folder, num_ranks=1)
    return dict(pickle.loads((folder / "found.pickle").read_bytes()))


def test_weights_are_those_that_megatron_gives_a_rank(found: dict[str, Any]) -> None:
    for layout in LAYOUTS:
        for shape, counts in zip(SHAPES, found["counts"][layout], strict=True):
            asked = workload({**SMALL, **shape}, layout)
            assert [stage_parameters(asked, stage) for stage in range(layout[1])] == counts, (layout, shape)


def test_a_step_takes_what_is_tracked(found: dict[str, Any]) -> None:
    """Live tensors of a step on this CPU, at their most: within 3 % of activations, logits and workspace."""
    for asked, peak in zip(memory_rank.measured_workloads(), found["peaks"], strict=True):
        memory = rank_memory(asked)
        assert memory.total - memory.states == pytest.approx(peak, rel=0.03), asked


@pytest.mark.parametrize(
    ("fields", "seq_length", "micro_batch_size", "layout", "kernels", "gib"),
    [
        (PRO, 2048, 2, ALONE, {}, 26.20),
        (PRO, 2048, 4, ALONE, {}, 35.71),
        (PRO, 2048, 8, ALONE, {}, 54.73),
        (PRO, 2048, 8, ALONE, TRITON, 45.33),
        (PRO, 2048, 8, ALONE, CHUNKED, 46.77),
        (PRO, 2048, 8, ALONE, {**TRITON, **CHUNKED}, 37.22),
        (PRO, 2048, 12, ALONE, {}, 73.74),
        (PRO, 2048, 16, ALONE, {}, 92.76),
        (PRO, 256, 1, ALONE, {}, 17.33),
        ({**PRO, **PLAIN}, 2048, 4, ALONE, {}, 28.90),
        (PRO, 2048, 4, (2, 1, 1, False), {}, 20.11),
        (PRO, 2048, 4, (2, 1, 1, True), {}, 18.67),
        (PRO, 2048, 4, (1, 3, 1, False), {}, 21.09),
        (LARGER_PRO, 2048, 4, (2, 2, 2, True), {}, 12.84),
        (LLAMA, 4096, 1, (1, 1, 8, False), {}, 64.68),
        (LLAMA, 4096, 2, (4, 1, 2, True), CHUNKED, 27.63),
        (SHORT, 2048, 2, (1, 2, 1, False), {}, 3.393),
        (SHORT, 2048, 2, (1, 2, 1, False, 2), {}, 3.688),
        (SHORT, 2048, 2, (1, 4, 1, False, 2), {}, 3.153),
        (SHORT, 2048, 2, (1, 2, 1, False, 4), {}, 3.853),
        # What `auto` selects on CUDA, and on Ascend, where Triton does not run.
        (PRO, 2048, 8, ALONE, AUTO, 37.09),
        (PRO, 2048, 8, ALONE, {**AUTO, "recompute": "full"}, 19.17),
        (PRO, 2048, 2, ALONE, PORTABLE, 22.21),
        (PRO, 2048, 8, ALONE, PORTABLE, 37.27),
        (PRO, 2048, 8, ALONE, {**PORTABLE, "recompute": "selective"}, 32.01),
        (PRO, 2048, 8, ALONE, {**PORTABLE, "recompute": "full"}, 19.58),
        (PRO, 2048, 16, ALONE, PORTABLE, 57.76),
    ],
)  # fmt: skip
def test_peaks_of_rehearsed_steps(
    fields: dict[str, Any], seq_length: int, micro_batch_size: int, layout: Any, kernels: dict[str, str], gib: float
) -> None:
    """Peaks of live FakeTensors through forward, backward and optimizer, of the rank that has most."""
    asked = workload(fields, layout, seq_length=seq_length, micro_batch_size=micro_batch_size, **kernels)
    assert rank_memory(asked).total / GIB == pytest.approx(gib, rel=0.01)


def test_states_are_divided_among_data_parallel_ranks() -> None:
    """A weight takes 6 bytes with its gradient and 12 in the optimizer, in float32 8 and 8; ranks share the latter."""
    for precision, here, shared in (("bfloat16", 6, 12), ("float32", 8, 8)):
        for data in (1, 8):
            asked = workload(LLAMA, (1, 1, data, False), precision=precision)
            # The vocabulary of 32,000 takes no padding.
            count = asked.model.num_parameters(32_000)
            assert rank_memory(asked).states == pytest.approx(count * (here + shared / data), abs=12)


@pytest.mark.parametrize(
    ("chunks", "stage", "num_microbatches", "expected"),
    [
        *((1, 0, 8, 4), (1, 3, 8, 1), (1, 0, 2, 2), (1, 1, 8, 3)),
        # Those of Megatron's schedule before the first backward pass, and one: at most all.
        *((2, 0, 8, 11), (2, 1, 8, 9), (2, 3, 8, 5), (2, 0, 4, 8), (3, 3, 8, 9)),
    ],
)
def test_passes_in_flight(chunks: int, stage: int, num_microbatches: int, expected: int) -> None:
    asked = workload(SMALL, (1, 4, 1, False, chunks))
    train = asked.train.model_copy(update={"global_batch_size": 2 * num_microbatches})
    assert replace(asked, train=train).in_flight(stage) == expected


def test_a_checkpoint_holds_what_is_counted(trained: Path, tiny_corpus: Corpus) -> None:
    checkpoint = list_checkpoints(trained / "checkpoint")[-1]
    entries = FileSystemReader(checkpoint).read_metadata().state_dict_metadata.values()
    tensors = [entry for entry in entries if isinstance(entry, TensorStorageMetadata)]
    stored = sum(entry.size.numel() * entry.properties.dtype.itemsize for entry in tensors)
    count = TINY_MODEL.num_parameters(padded_vocab_size(tiny_corpus.vocab_size))
    assert stored == checkpoint_bytes(count, "float32") == 16 * count
    assert checkpoint_bytes(count, "bfloat16") == 14 * count
