"""Taylor importance of every weight, |weight · gradient|, saved as a checkpoint in place of the weights.

To first order, it is the change of the loss if the weight is set to zero (Molchanov et al. 2019, arXiv 1906.10771). The
checkpoint does not depend on the layout under which it was measured.
"""

from typing import TYPE_CHECKING, Any

import torch
from megatron.core.dist_checkpointing.mapping import ShardedStateDict

from data_scoring.corpus.corpus import Corpus
from data_scoring.losses.calibration import draw_from
from trainer.checkpoint import sharded_weights
from trainer.data_parallel import wrap
from trainer.forward import read_microbatches, run_schedule
from trainer.model_chunks import ModelChunks
from trainer.saver import CheckpointSaver

if TYPE_CHECKING:
    from trainer.jobs import TaylorJob


def measure_taylor(job: "TaylorJob", corpus: Corpus, model: ModelChunks, bf16: bool) -> None:
    """Overwrite all weights of `model` with |weight · gradient|, measured on random samples, and save them.

    The gradient is that of the mean loss over all their tokens. Writes taylor/step-00000000 to the round's folder.
    Raises ValueError if a value is not finite.
    """
    shards, samples = draw_from(corpus, job.num_samples, job.seed, round_number=0)
    wrapped = wrap(model, bf16, is_sharded=False)
    wrapped.zero_grad_buffer()
    size, seq_length = job.micro_batch_size, corpus.seq_length
    microbatches = read_microbatches(corpus, shards, samples, size, seq_length)
    run_schedule(wrapped, microbatches, len(samples), size, seq_length, forward_only=False)
    with torch.no_grad():
        parameter: Any
        for name, parameter in model.named_parameters():
            parameter.copy_((parameter.float() * parameter.main_grad).abs())
            if not parameter.isfinite().all():
                raise ValueError(
                    f"{job.weights}: the gradient of {name} is not finite; start from another checkpoint, or set "
                    "model.inherit.method to l1 or l2"
                )
    record = {"fingerprint": job.fingerprint, "vocab_size": corpus.vocab_size, "num_samples": len(samples)}
    saver = CheckpointSaver(job.round_folder / "taylor", keep_last=1, is_asynchronous=False)
    saver.save(0, _Values(model), record, is_waiting=True)


class _Values:
    def __init__(self, model: ModelChunks) -> None:
        self._model = model

    def sharded(self, is_loading: bool) -> ShardedStateDict:
        """Return the sharded state dict of the values that this rank holds."""
        return {"model": sharded_weights(self._model)}
