"""A job that trains, and measures what stays in memory."""

import gc
from pathlib import Path

import torch

from data_scoring.base.files import write_record
from trainer.job import RankContext
from trainer.jobs import TrainJob


class MeasuredTrainJob(TrainJob):
    """Trains, and writes the bytes of all tensors before and after, and those of the weights; on one rank."""

    @property
    def result(self) -> Path:
        return self.round_folder / "memory.json"

    def run(self, context: RankContext) -> None:
        before = tensor_bytes()
        super().run(context)
        weights = sum(parameter.nbytes for parameter in context.model.parameters())
        write_record(self.result, {"before": before, "after": tensor_bytes(), "weights": weights})


def tensor_bytes() -> int:
    """Return the bytes of all tensors of this process, each storage counted once."""
    gc.collect()
    tensors = [each for each in gc.get_objects() if issubclass(type(each), torch.Tensor)]
    storages = {tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes() for tensor in tensors}
    return sum(storages.values())
