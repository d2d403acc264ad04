"""A job that goes wrong in a way of its choice, on the last of its ranks; the others wait for it."""

import os
import signal
import time
from typing import Literal

import torch

from trainer.job import Job, RankContext


class FailingJob(Job):
    """Fails, or waits until it is stopped."""

    way: Literal["ValueError", "RuntimeError", "SIGKILL", "wait"]

    def run(self, context: RankContext) -> None:
        context.progress(self.way, 1, 1)
        if torch.distributed.get_rank() == torch.distributed.get_world_size() - 1:
            _go_wrong(self.way)
        torch.distributed.barrier()


def _go_wrong(way: str) -> None:
    if way == "ValueError":
        raise ValueError("train.lr: too high; lower it")
    if way == "RuntimeError":
        raise RuntimeError("no kernel")
    if way == "SIGKILL":
        os.kill(os.getpid(), signal.SIGKILL)
    time.sleep(600)
