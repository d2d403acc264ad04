"""Results of two ranks for models that they build, from one launch; `tests.trainer.conftest.found` provides them."""

import itertools
import os
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from benchmarks.plain_model import PlainModel, load_megatron_weights, stacked_weights
from data_scoring.corpus.corpus import Corpus
from data_scoring.losses.shard_scoring import Block
from kernels.series_activation import initial_offsets
from tests.forked_ranks import write_found
from tests.trainer import two_ranks_bfloat16, two_ranks_evaluation, two_ranks_masks
from tests.trainer.rendezvous import meet
from tests.trainer.two_ranks_hugging_face import LAYOUTS, agree
from tests.trainer.two_ranks_layers import skip_layers
from trainer.config import ModelConfig, TrainConfig
from trainer.devices import Device, initialise
from trainer.parallel_config import ParallelConfig
from trainer.presets import PRESETS

VOCAB_SIZE, SEQ_LENGTH = 256, 32
SMALL = ModelConfig(num_layers=3, hidden_size=64, num_attention_heads=4, ffn_hidden_size=128)
INITS = ("constant", "gpt2", "internlm")
ADDITIONS: tuple[dict[str, Any], ...] = (
    {"activation_terms": 2, "shortcut_reduction": 8},
    {"activation_terms": 4, "activation_scales": "layer", "shortcut_reduction": 8, "shortcut_input": "residual"},
)


def with_fields(**fields: Any) -> ModelConfig:
    return SMALL.model_copy(update=fields)


def work(rank: int, folder: Path, corpus: Path, hugging_face: Path, trained: Path) -> None:
    """Leave in `folder` what this rank found."""
    os.environ |= {"LOCAL_WORLD_SIZE": "2", "RANK": str(rank), "RENDEZVOUS": str(folder / "rendezvous")}
    torch.set_num_threads(1)
    device = initialise("cpu", 0)
    meet()
    found = alone(device, Corpus(corpus)) | together(device, Corpus(corpus), rank)
    found |= {f"hugging face {layout}": agree(layout, hugging_face) for layout in LAYOUTS}
    found |= {f"hugging face {layout} in bfloat16": agree(layout, hugging_face, True) for layout in LAYOUTS}
    found["evaluation"] = two_ranks_evaluation.find(device, Corpus(corpus), folder / "evaluation", rank)
    found["harness"] = {name: two_ranks_evaluation.respond(hugging_face, name) for name in ("llama", "pangu")}
    found["masks"] = two_ranks_masks.find(device, Corpus(corpus), trained, folder / "masks", rank)
    found["bfloat16"] = _do_in_bfloat16(device, Corpus(corpus), trained, folder / "bfloat16", rank)
    write_found(folder, rank, found)
    torch.distributed.destroy_process_group()


def _do_in_bfloat16(device: Device, corpus: Corpus, trained: Path, folder: Path, rank: int) -> Path:
    """Return the folder of what jobs in bfloat16 left, the last of which each rank did by itself."""
    if rank == 0:
        folder.mkdir()
        two_ranks_bfloat16.prepare(corpus, trained, folder)
    torch.distributed.barrier()
    two_ranks_bfloat16.do_together(device, corpus, trained, folder)
    two_ranks_bfloat16.do_alone(device, corpus, trained, folder, rank)
    return folder


def alone(device: Device, corpus: Corpus) -> dict[str, Any]:
    """Return what a rank finds that has a model of its own."""
    models = _Models(device, tensor=1)

    models.check_gradients()
    return {
        "sizes": models.sizes(),
        "offsets": {terms: initial_offsets(terms) for terms in range(1, 9)},
        "weights": {init: models.weights(with_fields(init=init, **ADDITIONS[0])) for init in INITS},
        "starts": [models.logits(with_fields(**fields)) for fields in ({}, *ADDITIONS)],
        "plain": [models.with_plain(with_fields(**fields)) for fields in ADDITIONS],
        "decayed": models.decayed(with_fields(**ADDITIONS[0])),
        "cut alone": models.cut(corpus, sequence=False),
    }


def together(device: Device, corpus: Corpus, rank: int) -> dict[str, Any]:
    """Return what a rank finds that shares a model with the other one."""
    expected = [_Models(device, tensor=1).passed(with_fields(**fields)) for fields in ADDITIONS]
    whole = {init: _Models(device, tensor=1).weights(with_fields(init=init, **ADDITIONS[0])) for init in INITS}
    models = _Models(device, tensor=2)
    for init, weights in whole.items():
        for name, parameter in models.build(with_fields(init=init, **ADDITIONS[0])).named_parameters():
            assert torch.equal(parameter, _part(weights[name], parameter, name, rank)), name
    return {
        "agreement": [
            models.agreement(with_fields(**fields), sequence, passed, rank)
            for (fields, passed), sequence in itertools.product(zip(ADDITIONS, expected, strict=True), (False, True))
        ],
        "cut together": models.cut(corpus, sequence=True),
        "skips": skip_layers(device, corpus, rank),
    }


class _Models:
    """Models that `tensor` ranks share."""

    def __init__(self, device: Device, tensor: int) -> None:
        from megatron.core import parallel_state

        self.device, self.tensor = device, tensor
        if parallel_state.model_parallel_is_initialized():
            if parallel_state.get_tensor_model_parallel_world_size() == tensor:
                return
            meet()
        parallel_state.initialize_model_parallel(tensor_model_parallel_size=tensor)

    def build(self, model: ModelConfig, sequence: bool = False, vocab_size: int = VOCAB_SIZE) -> Any:
        from trainer.model import Kernels, build_model

        self.device.seed(5)
        parallel = ParallelConfig(tensor=self.tensor, sequence=sequence)
        place = torch.get_default_device()
        [gpt] = build_model(model, vocab_size, SEQ_LENGTH, parallel, place, False, Kernels())
        return gpt

    def sizes(self) -> dict[str, tuple[int, int]]:
        """Return the parameters of every preset, in closed form and of the model without its memory."""
        sizes = {}
        for name in PRESETS:
            model = ModelConfig(preset=name)
            with torch.device("meta"):
                # A multiple of 128, so that there is no padding.
                gpt = self.build(model, vocab_size=32_000)
            sizes[name] = (model.num_parameters(32_000), sum(each.numel() for each in gpt.parameters()))
        return sizes

    def weights(self, model: ModelConfig) -> dict[str, Tensor]:
        """Return the weights that a model starts with."""
        return {name: parameter.detach() for name, parameter in self.build(model).named_parameters()}

    def logits(self, model: ModelConfig) -> Tensor:
        """Return what a model gives before it has learned anything, having checked that it keeps nothing for later."""
        tokens, gpt = _tokens()[:, :-1], self.build(model)
        keeps_graph: list[bool] = []
        for layer in gpt.decoder.layers:
            layer.register_forward_hook(lambda _layer, _inputs, output: keeps_graph.append(output[0].requires_grad))
        with torch.no_grad():
            logits = gpt(input_ids=tokens, position_ids=_positions(tokens), attention_mask=None)
        assert keeps_graph == [False] * model.num_layers
        return logits

    def passed(self, model: ModelConfig) -> tuple[Any, Tensor]:
        """Return a model of its own for each rank, its gradients computed, and its losses.

        It is far enough from its start for all its parts to matter.
        """
        gpt = self.build(model)
        generator = torch.Generator().manual_seed(2)
        with torch.no_grad():
            for parameter in gpt.parameters():
                parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.1)
        losses = _losses(gpt)
        losses.sum().backward()
        return gpt, losses

    def agreement(
        self, model: ModelConfig, sequence: bool, expected: tuple[Any, Tensor], rank: int
    ) -> dict[str, float]:
        """Return how far losses and gradients of a shared model are from those of the same model on one rank."""
        whole = dict(expected[0].named_parameters())
        shared = self.build(model, sequence)
        with torch.no_grad():
            for name, parameter in shared.named_parameters():
                parameter.copy_(_part(whole[name], parameter, name, rank))
        losses = _losses(shared)
        losses.sum().backward()
        differences = {"loss": _difference(losses, expected[1])}
        for name, parameter in shared.named_parameters():
            if sequence and getattr(parameter, "sequence_parallel", False):
                # What Megatron's finalize_model_grads does.
                torch.distributed.all_reduce(parameter.grad)
            differences[name] = _difference(parameter.grad, _part(whole[name].grad, parameter, name, rank))
        return differences

    def with_plain(self, model: ModelConfig) -> dict[str, float]:
        """Return how far losses and gradients of a model are from those of plain torch's autograd."""
        gpt, losses = self.passed(model)
        plain = PlainModel(model, VOCAB_SIZE)
        load_megatron_weights(plain, stacked_weights(gpt, model.num_layers))
        tokens = _tokens()
        expected = plain(tokens[:, :-1], tokens[:, 1:])
        expected.sum().backward()
        differences = {"loss": _difference(losses, expected)}
        # The gradients go the way of the weights.
        gradients = PlainModel(model, VOCAB_SIZE)
        with torch.no_grad():
            for parameter in gpt.parameters():
                parameter.copy_(parameter.grad)
        load_megatron_weights(gradients, stacked_weights(gpt, model.num_layers))
        for (name, gradient), parameter in zip(gradients.named_parameters(), plain.parameters(), strict=True):
            assert parameter.grad is not None
            assert parameter.grad.abs().max() > 1e-3, name
            differences[name] = _difference(gradient, parameter.grad)
        return differences

    def decayed(self, model: ModelConfig) -> dict[str, float]:
        """Return by what factor a step of the optimizer whose gradients are zero changes each parameter."""
        from trainer.model_chunks import ModelChunks
        from trainer.train import make_state

        train = TrainConfig(lr=0.5, min_lr=0.5, warmup_fraction=0, weight_decay=0.2)
        state = make_state(train, ModelChunks([self.build(model)]), num_steps=9, bf16=False)
        with torch.no_grad():
            for parameter in state.model.parameters():
                parameter.fill_(2.0)
        state.optimizer.reload_model_params()
        state.model.zero_grad_buffer()
        state.scheduler.step(1)
        state.optimizer.step()
        return {name: float(parameter.mean() / 2) for name, parameter in state.model.decoders[0].named_parameters()}

    def cut(self, corpus: Corpus, sequence: bool) -> Any:
        """Return losses of samples cut to an odd number of tokens."""
        from trainer.model_chunks import ModelChunks
        from trainer.score import ModelScorer

        model = ModelChunks([self.build(SMALL, sequence, corpus.vocab_size)]).eval()
        scorer = ModelScorer(model, corpus, 2, (5,))
        block = Block(np.zeros(7, int), np.arange(7), 5)
        return scorer.score(block, scorer.read(block))

    def check_gradients(self) -> None:
        """Raise where the gradients of an addition are not those of its function, in double precision."""
        from trainer.model import transformer_config
        from trainer.pangu import AugmentedShortcut, SeriesActivation

        config = transformer_config(with_fields(hidden_size=8, ffn_hidden_size=6), ParallelConfig(), torch.float64)
        for scales in ("channel", "layer"):
            _check_gradients(SeriesActivation(config, 3, scales, "reference"), (2, 1, 12))
        for reads in ("normalised", "residual"):
            _check_gradients(_Added(AugmentedShortcut(config, 4, reads)), (2, 1, 8), (2, 1, 8))


class _Added(torch.nn.Module):
    """A shortcut together with the two steps in which Megatron's layer uses it."""

    def __init__(self, shortcut: Any) -> None:
        super().__init__()
        self.shortcut = shortcut

    def forward(self, attention: Tensor, stream: Tensor) -> Tensor:
        return self.shortcut(True, False)((attention, None), stream, 0.0)


def _check_gradients(module: torch.nn.Module, *shapes: tuple[int, ...]) -> None:
    generator = torch.Generator().manual_seed(3)
    names = [name for name, _ in module.named_parameters()]
    shapes = (*shapes, *(tuple(parameter.shape) for parameter in module.parameters()))
    values = [torch.randn(shape, generator=generator, dtype=torch.float64).requires_grad_() for shape in shapes]

    def call(*values: Tensor) -> Tensor:
        inputs, parameters = values[: -len(names)], values[-len(names) :]
        return torch.func.functional_call(module, dict(zip(names, parameters, strict=True)), inputs)

    assert torch.autograd.gradcheck(call, values)


def _part(whole: Tensor, shared: Tensor, name: str, rank: int) -> Tensor:
    """Return a rank's part of what is `whole` on one rank, for a parameter `shared` by two."""
    if not getattr(shared, "tensor_model_parallel", False):
        return whole
    if "linear_fc1" in name:
        return torch.cat([half.chunk(2)[rank] for half in whole.chunk(2)])
    return whole.chunk(2, dim=shared.partition_dim)[rank]


def _tokens() -> Tensor:
    return torch.randint(0, VOCAB_SIZE, (2, SEQ_LENGTH + 1), generator=torch.Generator().manual_seed(1))


def _positions(tokens: Tensor) -> Tensor:
    return torch.arange(tokens.shape[1]).expand(len(tokens), -1)


def _losses(gpt: Any) -> Tensor:
    tokens = _tokens()
    inputs, labels = tokens[:, :-1], tokens[:, 1:].contiguous()
    return gpt(input_ids=inputs, position_ids=_positions(inputs), attention_mask=None, labels=labels)


def _difference(found: Tensor, expected: Tensor) -> float:
    """Return the largest difference, relative to the largest value."""
    return float((found - expected).abs().max() / expected.abs().max())
