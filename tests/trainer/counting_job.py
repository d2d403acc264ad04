"""A job that is no part of the package: the ranks count the model's parameters and share out a shard's tokens."""

from typing import Any

import torch

from data_scoring.base.files import read_json, write_json
from tests.conftest import Ranks
from trainer.job import Job, RankContext


class CountingJob(Job):
    """Count the parameters of the model and the tokens of a shard, into the round's counts.json."""

    shard: int

    def run(self, context: RankContext) -> None:
        rank, size = torch.distributed.get_rank(), torch.distributed.get_world_size()
        tokens = torch.tensor(context.corpus.lengths(self.shard)[rank::size].sum(), dtype=torch.int64)
        torch.distributed.all_reduce(tokens)
        if context.is_writer:
            num_parameters = sum(parameter.numel() for parameter in context.model.parameters())
            write_json(self.round_folder / "counts.json", {"num_parameters": num_parameters, "num_tokens": int(tokens)})


def counting(ranks: Ranks, name: str) -> CountingJob:
    """Return the job for two ranks that each have the whole model."""
    job = ranks.job(name, (1, 1, 2))
    return CountingJob(**{field: getattr(job, field) for field in Job.model_fields}, shard=0)


def read_counts(job: CountingJob) -> Any:
    return read_json(job.round_folder / "counts.json")
