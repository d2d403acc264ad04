"""Learning which neurons to keep: trained masks over a model with frozen weights, on any layout."""

import math
from typing import TYPE_CHECKING

import numpy as np
import torch
from megatron.core import parallel_state
from torch import Tensor

from data_scoring.base.files import write_record
from data_scoring.base.progress import ProgressFile, silent
from data_scoring.corpus.corpus import Corpus
from data_scoring.losses.calibration import draw_from
from trainer.forward import read_microbatches, run_schedule
from trainer.masked_model import MaskedModel
from trainer.masks import Masks
from trainer.model_chunks import ModelChunks
from trainer.neuron_scores import Scores, keep_best, sum_bottlenecks
from trainer.pruning import PruningPlan
from trainer.score import is_writer
from trainer.weights import Weights

if TYPE_CHECKING:
    from trainer.jobs import MaskJob


def learn_masks(job: "MaskJob", corpus: Corpus, model: ModelChunks) -> None:
    """Learn which part of `model`, whose weights are frozen, gives the best student; write masks.json to the round.

    masks.json has the `part`, the `losses` of the steps, nats per token, and the `settings`. Every step draws a mask of
    exactly the student's size and uses the next samples. Raises ValueError if a loss is not finite.
    """
    masks = Masks(job.model, job.student)
    # Units of the shortcut's bottleneck have no mask; they are chosen by their weights beforehand.
    units = sum_bottlenecks(Weights(job.weights), job.model)
    masked = MaskedModel(model, job.model, job.student, _part(masks, units, job).bottleneck)
    optimizer = torch.optim.Adam(list(masks.logits.values()), lr=job.lr)
    generator = torch.Generator().manual_seed(job.seed)
    progress = ProgressFile(job.progress) if is_writer() else silent
    samples = _Samples(job, corpus)
    losses = []
    for step in range(job.steps):
        fraction = step / max(1, job.steps - 1)
        temperature = job.first_temperature * (job.last_temperature / job.first_temperature) ** fraction
        hard, soft = masks.draw(generator, temperature)
        masked.put_on(hard)
        loss = samples.run(model, step)
        if not math.isfinite(loss):
            raise ValueError(
                f"{job.weights}: the larger model's loss is {loss} with some neurons masked (step {step + 1}); set "
                "train.precision to float32 or model.inherit.method to l1, or use another model"
            )
        optimizer.zero_grad()
        gradients = masked.take_gradients()
        # Kinds that are kept entirely have nothing to learn.
        learned = [kind for kind in soft if soft[kind].requires_grad]
        torch.autograd.backward([soft[kind] for kind in learned], [gradients[kind] for kind in learned])
        optimizer.step()
        losses.append(loss)
        progress("learning masks (steps)", step + 1, job.steps)
    if is_writer():
        settings = {"num_samples", "batch_size", "steps", "lr", "first_temperature", "last_temperature", "seed"}
        content = {"part": _part(masks, units, job).model_dump(), "losses": losses}
        content |= {"fingerprint": job.fingerprint, "settings": job.model_dump(include=settings)}
        write_record(job.round_folder / "masks.json", content)


def _part(masks: Masks, units: Tensor, job: "MaskJob") -> PruningPlan:
    logits = {kind: each.detach() for kind, each in masks.logits.items()}
    scores = Scores(
        channels=logits["channels"][0],
        ffn=logits["ffn"],
        groups=logits["groups"],
        heads=logits["heads"].view(job.model.num_layers, -1),
        bottleneck=units,
    )
    return keep_best(scores, job.model, job.student)


class _Samples:
    """Random samples of the training shards, cycled through one batch per step."""

    def __init__(self, job: "MaskJob", corpus: Corpus) -> None:
        self._job, self._corpus = job, corpus
        self._shards, self._samples = draw_from(corpus, job.num_samples, job.seed, round_number=0)
        # They are ordered by shard.
        self._order = np.random.default_rng(job.seed).permutation(len(self._samples))

    def run(self, model: ModelChunks, step: int) -> float:
        """Run `model` forward and backward over the batch of `step`; return its mean loss, the same on all ranks."""
        job, seq_length = self._job, self._corpus.seq_length
        batch = min(job.batch_size, len(self._order))
        chosen = self._order[np.arange(step * batch, (step + 1) * batch) % len(self._order)]
        microbatches = read_microbatches(
            self._corpus, self._shards[chosen], self._samples[chosen], job.micro_batch_size, seq_length
        )
        _, sums, num_tokens = run_schedule(model, microbatches, batch, job.micro_batch_size, seq_length, False)
        totals = torch.zeros(2)
        if parallel_state.get_tensor_model_parallel_rank() == 0:
            totals = torch.stack([sums.cpu().sum(), num_tokens.sum().float()])
        totals = totals.to(model.device)
        torch.distributed.all_reduce(totals)
        return float(totals[0] / totals[1])
