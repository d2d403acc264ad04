"""How much every weight matters to first order, |weight · gradient|, saved as a checkpoint in place of the weights.

To first order that is by how much the loss changes where the weight is set to zero (Molchanov et al. 2019,
arXiv 1906.10771). What reads the checkpoint need not know under which layout it was measured.
"""

from typing import Any

import torch
from megatron.core.dist_checkpointing.mapping import ShardedStateDict

from data_scoring.corpus.corpus import Corpus
from data_scoring.losses.calibration import draw_from
from trainer.checkpoint import sharded_weights
from trainer.forward import read_microbatches, run_schedule
from trainer.jobs import TaylorJob
from trainer.saver import CheckpointSaver
from trainer.train import wrap


def measure_taylor(job: TaylorJob, corpus: Corpus, model: Any, bf16: bool) -> None:
    """Measure |weight · gradient| of all weights of `model`, which is overwritten by it, on random samples.

    The gradient is that of the mean loss over all their tokens. Leaves taylor/step-00000000 in the round's folder.
    Raises ValueError where a value is not finite.
    """
    shards, samples = draw_from(corpus, job.num_samples, job.seed, round_number=0)
    wrapped = wrap(model, bf16, is_sharded=False)
    wrapped.zero_grad_buffer()
    size, seq_length = job.micro_batch_size, corpus.seq_length
    microbatches = read_microbatches(corpus, shards, samples, size, seq_length)
    run_schedule(wrapped, microbatches, len(samples), size, seq_length, forward_only=False)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_((parameter.float() * parameter.main_grad).abs())
            if not parameter.isfinite().all():
                raise ValueError(
                    f"{job.weights}: the gradient of {name} is not finite; start from another checkpoint, or choose "
                    "neurons by their weights alone"
                )
    record = {"fingerprint": job.fingerprint, "vocab_size": corpus.vocab_size, "num_samples": len(samples)}
    saver = CheckpointSaver(job.round_folder / "taylor", keep_last=1, is_asynchronous=False)
    saver.save(0, _Values(model), record, is_waiting=True)


class _Values:
    def __init__(self, model: Any) -> None:
        self._model = model

    def sharded(self, is_loading: bool) -> ShardedStateDict:
        """Return Megatron's description of the values that this rank holds."""
        return {"model": sharded_weights(self._model)}
