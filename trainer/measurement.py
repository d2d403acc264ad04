"""Measuring the speed of training and scoring on the run's own ranks, for a plan."""

import time
from collections.abc import Callable

import numpy as np
import torch
from pydantic import Field

from data_scoring.base.files import write_record
from data_scoring.losses.shard_scoring import Block
from trainer.job import RankContext
from trainer.jobs import ModelInTrainingJob

# Repetitions that are enough if they are quick.
_MOST = 50


class MeasureJob(ModelInTrainingJob):
    """Measure a few training steps and scored blocks, from random weights; writes the round's speed.json."""

    num_microbatches: int = Field(ge=1, description="Microbatches of a measured step, for each replica.")
    seconds: float = Field(gt=0, description="Seconds to train, and to score, at most about twice that.")

    def run(self, context: RankContext) -> None:
        """Measure, and write speed.json: seconds a step, seconds a scored token, seconds of the whole measurement."""
        from trainer.forward import read_microbatches, run_schedule
        from trainer.gradients import update_weights
        from trainer.score import ModelScorer
        from trainer.train import make_state

        started = time.monotonic()
        corpus, size = context.corpus, self.train.micro_batch_size
        device = context.model.device
        state = make_state(self.train, context.model, _MOST, context.bf16)
        count = self.num_microbatches * size * self.parallel.data
        samples = np.arange(count) % corpus.num_samples(0)
        shards = np.zeros(count, np.int64)

        def step() -> None:
            state.model.zero_grad_buffer()
            state.optimizer.zero_grad()
            microbatches = read_microbatches(corpus, shards, samples, size, corpus.seq_length)
            run_schedule(state.model, microbatches, count, size, corpus.seq_length, forward_only=False)
            state.scheduler.step(1)
            update_weights(state.optimizer, device)

        seconds_a_step = _measure(step, self.seconds)
        state.model.eval()
        scorer = ModelScorer(state.model, corpus, self.score.micro_batch_size)
        scored = np.arange(scorer.block_size) % corpus.num_samples(0)
        block = Block(np.zeros(len(scored), np.int64), scored, corpus.seq_length)
        seconds_a_block = _measure(lambda: scorer.score(block, scorer.read(block)), self.seconds)
        if context.is_writer:
            speed = {
                "seconds_a_step": seconds_a_step,
                "seconds_a_scored_token": seconds_a_block / (len(scored) * corpus.seq_length),
                "seconds": time.monotonic() - started,
            }
            write_record(self.round_folder / "speed.json", speed)


def _measure(work: Callable[[], object], seconds: float) -> float:
    """Return the seconds that `work` takes, the mean of as many repetitions as `seconds` allow, after the first.

    All ranks do as many. If the first takes longer than that, its time is returned.
    """
    first = _timed(work)
    repetitions = min(_MOST, int(seconds / first))
    return sum(_timed(work) for _ in range(repetitions)) / repetitions if repetitions else first


def _timed(work: Callable[[], object]) -> float:
    """Return the seconds that `work` takes on the slowest rank."""
    started = time.monotonic()
    work()
    elapsed = torch.tensor([time.monotonic() - started])
    torch.distributed.all_reduce(elapsed, op=torch.distributed.ReduceOp.MAX)
    return float(elapsed)
