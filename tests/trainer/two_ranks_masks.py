"""Results of two ranks for masks and |weight · gradient|, in the launch of `tests.trainer.two_ranks`."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.plain_model import PlainModel, load_megatron_weights, read_checkpoint
from data_scoring.base.files import read_json
from data_scoring.corpus.corpus import Corpus
from data_scoring.losses.calibration import draw_from
from tests.conftest import TINY_MODEL
from tests.trainer.rendezvous import meet
from tests.trainer.test_pruning import random_plan
from trainer.checkpoint_shapes import shapes_of
from trainer.config import ModelConfig
from trainer.devices import Device
from trainer.jobs import MaskJob, TaylorJob
from trainer.neuron_scores import choose
from trainer.parallel_config import ParallelConfig
from trainer.pruning import PruningPlan, slice_checkpoint, whole_layers
from trainer.weights import Weights, write_weights

# Of two query heads a group, and the additions; and of all biases, one matrix for embedding and head.
GROUPED = ModelConfig(
    num_layers=2,
    hidden_size=32,
    num_attention_heads=4,
    num_query_groups=2,
    ffn_hidden_size=64,
    activation_terms=2,
    shortcut_reduction=4,
)
BIASED = ModelConfig(
    num_layers=2,
    hidden_size=32,
    num_attention_heads=6,
    head_size=8,
    ffn_hidden_size=48,
    tied_embeddings=True,
    attention_bias="all",
    ffn_bias=True,
    activation_terms=2,
    activation_scales="layer",
    shortcut_reduction=4,
    shortcut_input="residual",
    norm_epsilon=1e-2,
)
SMALLER: dict[str, dict[str, Any]] = {
    "grouped": {"hidden_size": 24, "num_attention_heads": 2, "num_query_groups": 2, "head_size": 8},
    "biased": {"hidden_size": 20, "num_attention_heads": 4},
}
TEACHERS = {"grouped": GROUPED, "biased": BIASED}
STUDENTS = {
    name: teacher.model_copy(update={"ffn_hidden_size": 40, **SMALLER[name]}) for name, teacher in TEACHERS.items()
}
LAYOUTS = {
    "data": ParallelConfig(data=2),
    "tensor": ParallelConfig(tensor=2),
    "sequence": ParallelConfig(tensor=2, sequence=True),
    "pipeline": ParallelConfig(pipeline=2),
}
NUM_SAMPLES = 12
# Enough for masks to tell what does nothing.
STEPS = 50
SIZES = {"num_samples": NUM_SAMPLES, "steps": 3, "batch_size": 5, "micro_batch_size": 2}


# Twice as wide as the tests' trained model, with nothing in the first half of everything; and half as wide.
HALF_DEAD = TINY_MODEL.model_copy(
    update={
        "hidden_size": 2 * TINY_MODEL.hidden_size,
        "num_attention_heads": 8,
        "num_query_groups": 4,
        "head_size": 8,
        "ffn_hidden_size": 2 * TINY_MODEL.ffn_size,
        "shortcut_reduction": 8,
    }
)
QUARTER = HALF_DEAD.model_copy(
    update={"hidden_size": 16, "num_attention_heads": 1, "num_query_groups": 1, "ffn_hidden_size": 32}
)


def find(device: Device, corpus: Corpus, trained: Path, folder: Path, rank: int) -> dict[str, Any]:
    """Return losses of masked and of sliced models, and gradients, by teacher and layout."""
    if rank == 0:
        _write_half_dead(folder / "half dead" / "teacher" / "step-00000000", trained, corpus.vocab_size)
        for name, teacher in TEACHERS.items():
            _write_random(folder / name / "teacher" / "step-00000000", teacher, corpus.vocab_size)
            part = random_plan(teacher, STUDENTS[name], range(2), seed=7)
            slice_checkpoint(
                folder / name / "teacher" / "step-00000000", teacher, STUDENTS[name], part, folder / name / "student"
            )
    torch.distributed.barrier()
    found: dict[str, Any] = {"plain": _plain(folder / "grouped" / "teacher" / "step-00000000", corpus)}
    for layout, parallel in LAYOUTS.items():
        for name in TEACHERS:
            found[f"{name} {layout}"] = _Layout(device, corpus, folder / name, parallel).find(name, layout)
        found[f"bfloat16 {layout}"] = _Layout(device, corpus, folder / "grouped", parallel, True).find(
            "grouped", layout
        )
    alive = _Layout(device, corpus, folder / "half dead", LAYOUTS["data"])
    sizes = {"num_samples": 100, "steps": STEPS, "batch_size": 16, "micro_batch_size": 8}
    found["half dead"] = alive.jobs(HALF_DEAD, QUARTER, "data", sizes)
    if rank == 0:
        for method, place in (
            ("weights", alive.weights),
            ("values", folder / "half dead" / "data" / "taylor" / "step-00000000"),
        ):
            found["half dead"][f"by {method}"] = [choose(Weights(place), HALF_DEAD, QUARTER, power) for power in (1, 2)]
    return found


class _Layout:
    """A teacher and its student on two ranks."""

    def __init__(
        self, device: Device, corpus: Corpus, folder: Path, parallel: ParallelConfig, bf16: bool = False
    ) -> None:
        from megatron.core import parallel_state

        self.device, self.corpus, self.folder, self.parallel, self.bf16 = device, corpus, folder, parallel, bf16
        self.weights = folder / "teacher" / "step-00000000"
        meet()
        parallel_state.initialize_model_parallel(
            tensor_model_parallel_size=parallel.tensor, pipeline_model_parallel_size=parallel.pipeline
        )

    def find(self, name: str, layout: str) -> dict[str, Any]:
        from trainer.masked_model import MaskedModel

        teacher, student = TEACHERS[name], STUDENTS[name]
        part = random_plan(teacher, student, range(2), seed=7)
        model = self.build(teacher, self.weights)
        masked = MaskedModel(model, teacher, student, part.bottleneck)
        masked.put_on(hard_masks(teacher, part))
        sums = self.pass_through(model, is_forward_only=False)
        found = {"masked": sums, "gradients": masked.take_gradients()}
        found["sliced"] = self.pass_through(self.build(student, self.folder / "student"), is_forward_only=True)
        if layout != "sequence":
            found |= self.jobs(teacher, student, layout)
        if layout != "sequence" and name == "grouped":
            # What plain torch's model has too.
            found |= self.with_everything(teacher)
        return found

    def with_everything(self, teacher: ModelConfig) -> dict[str, Any]:
        """Return the gradients of masks that leave everything."""
        from trainer.masked_model import MaskedModel

        model = self.build(teacher, self.weights)
        everything = whole_layers(teacher, range(2))
        masked = MaskedModel(model, teacher, teacher, everything.bottleneck)
        masked.put_on(hard_masks(teacher, everything))
        self.pass_through(model, is_forward_only=False)
        return {"gradients of everything": masked.take_gradients()}

    def jobs(
        self,
        teacher: ModelConfig,
        student: ModelConfig,
        layout: str,
        sizes: dict[str, int] = SIZES,
    ) -> dict[str, Any]:
        """Return what the two jobs leave: values by their names, and what is in masks.json."""
        from trainer.mask_learning import learn_masks
        from trainer.taylor import measure_taylor

        place = self.folder / (f"{layout}-bfloat16" if self.bf16 else layout)
        common = {
            "corpus": self.corpus.folder,
            "round_folder": place,
            "model": teacher,
            "parallel": self.parallel,
            "device": "cpu",
            "precision": "bfloat16" if self.bf16 else "float32",
            "activation_kernel": "reference",
            "seed": 3,
            "fingerprint": "f",
            "progress": self.folder / "progress.json",
            "errors": self.folder,
            "lock": self.folder / ".ranks.lock",
            "weights": self.weights,
        }
        of_samples = {name: sizes[name] for name in ("num_samples", "micro_batch_size")}
        measure_taylor(TaylorJob(**common, **of_samples), self.corpus, self.build(teacher, self.weights), self.bf16)
        job = MaskJob(**common, student=student, **sizes)
        learn_masks(job, self.corpus, self.build(teacher, self.weights))
        torch.distributed.barrier()
        values = read_checkpoint(place / "taylor" / "step-00000000")
        return {"taylor": values, "masks": read_json(place / "masks.json")}

    def build(self, model: ModelConfig, weights: Path) -> Any:
        from trainer.checkpoint import load_weights
        from trainer.model import Kernels, build_model

        self.device.seed(5)
        gpt = build_model(
            model,
            self.corpus.vocab_size,
            self.corpus.seq_length,
            self.parallel,
            self.device.torch_device,
            self.bf16,
            Kernels(),
        )
        load_weights(weights, gpt)
        return gpt.eval()

    def pass_through(self, model: Any, is_forward_only: bool) -> dict[int, float]:
        """Return the summed losses of the samples that this rank has the losses of."""
        from trainer.forward import read_microbatches, run_schedule

        shards, samples = draw_from(self.corpus, NUM_SAMPLES, 3, 0)
        batches = read_microbatches(self.corpus, shards, samples, 2, self.corpus.seq_length)
        rows, sums, _ = run_schedule(model, batches, NUM_SAMPLES, 2, self.corpus.seq_length, is_forward_only)
        return dict(zip(rows.tolist(), sums.tolist(), strict=True))


def hard_masks(teacher: ModelConfig, part: PruningPlan) -> dict[str, Tensor]:
    """Return masks with ones for what stays."""

    def ones(numbers: tuple[int, ...], count: int) -> Tensor:
        return torch.tensor([float(number in numbers) for number in range(count)])

    heads = torch.stack([ones(each, teacher.num_attention_heads) for each in part.heads])
    return {
        "channels": ones(part.channels, teacher.hidden_size)[None],
        "ffn": torch.stack([ones(each, teacher.ffn_size) for each in part.ffn]),
        "groups": torch.stack([ones(each, teacher.num_groups) for each in part.groups]),
        "heads": heads.view(teacher.num_layers * teacher.num_groups, -1),
    }


def _write_half_dead(folder: Path, trained: Path, vocab_size: int) -> None:
    """Write a checkpoint that computes what the `trained` one does, with as many zeros before all that it has."""
    tensors = {}
    for name, tensor in read_checkpoint(trained).items():
        # Norms are over twice as many channels.
        scaled = tensor * 0.5**0.5 if "norm" in name or name.endswith("bda.down") else tensor
        parts = scaled.chunk(2, dim=1) if "linear_fc1.weight" in name else [scaled]
        tensors[name] = torch.cat([_after_zeros(name, part) for part in parts], dim=1 if len(parts) > 1 else 0)
    shapes = {name: (tuple(tensor.shape), tensor.dtype) for name, tensor in tensors.items()}
    assert {name: shape for name, (shape, _) in shapes.items()} == shapes_of(HALF_DEAD, 384)
    record = {"step": 0, "vocab_size": vocab_size}
    write_weights(folder, shapes, lambda name, layer: tensors[name] if layer is None else tensors[name][layer], record)


def _after_zeros(name: str, tensor: Tensor) -> Tensor:
    # Layers stay as many, and so do tokens, terms and the bottleneck's units.
    fixed = {
        "word_embeddings.weight": [0],
        "output_layer.weight": [0],
        "scale": [1],
        "offset": [1],
        "down": [1],
        "up": [2],
    }
    axes = next((axes for ending, axes in fixed.items() if name.endswith(ending)), [])
    for axis in range(1 if name.startswith("decoder.layers.") else 0, tensor.ndim):
        if axis not in axes:
            tensor = torch.cat([torch.zeros_like(tensor), tensor], dim=axis)
    return tensor


def _plain(checkpoint: Path, corpus: Corpus) -> dict[str, Tensor]:
    """Return the weights and the gradients of the mean loss of plain torch's model, as `name` and `name.grad`."""
    model = PlainModel(GROUPED, corpus.vocab_size)
    load_megatron_weights(model, read_checkpoint(checkpoint))
    batch = corpus.read(*draw_from(corpus, NUM_SAMPLES, 3, 0))
    tokens = torch.from_numpy(batch.tokens)
    losses = model(tokens[:, :-1], tokens[:, 1:])
    is_predicted = torch.arange(corpus.seq_length) < torch.from_numpy(batch.num_tokens)[:, None]
    (losses * is_predicted).sum().div(batch.num_tokens.sum()).backward()
    return {**dict(_with_gradients(model)), "tokens": torch.tensor(batch.num_tokens.sum())}


def _with_gradients(model: PlainModel) -> Iterator[tuple[str, Tensor]]:
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None
        yield name, parameter.detach()
        yield f"{name}.grad", parameter.grad


def _write_random(folder: Path, model: ModelConfig, vocab_size: int) -> None:
    """Write a checkpoint of weights far enough from their start for all to matter, which bfloat16 holds too."""
    generator = torch.Generator().manual_seed(11)
    tensors = {
        name: (torch.randn(shape, generator=generator) * 0.15 + (1.0 if "norm" in name else 0.0)).bfloat16().float()
        for name, shape in shapes_of(model, -(-vocab_size // 128) * 128).items()
    }
    write_weights(
        folder,
        {name: (tuple(tensor.shape), tensor.dtype) for name, tensor in tensors.items()},
        lambda name, layer: tensors[name] if layer is None else tensors[name][layer],
        {"step": 0, "vocab_size": vocab_size},
    )
