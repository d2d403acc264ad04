"""One round of training: the mix in order, with periodic checkpoints and a record of every loss."""

import shutil
import time
from collections.abc import Iterator
from contextlib import closing
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from megatron.core import parallel_state
from megatron.core.optimizer import (
    OptimizerConfig,
    ParamGroupOverride,
    ParamKey,
    get_megatron_optimizer,
    get_standard_config_overrides,
)
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler
from numpy.typing import NDArray

from data_scoring.base.files import fingerprint
from data_scoring.base.progress import ProgressFile, silent
from data_scoring.base.read_ahead import read_ahead
from data_scoring.base.spent_time import SpentTime
from data_scoring.corpus.corpus import Batch, Corpus
from data_scoring.refine.training_mix import Mix
from data_scoring.tokenizer.tokenizer import open_tokenizer
from trainer.checkpoint import (
    TrainingState,
    find_usable_checkpoint,
    load_checkpoint,
    load_start,
    load_weights,
)
from trainer.checkpoint_folder import CheckpointRecord, list_checkpoints, read_checkpoint_record
from trainer.config import TrainConfig
from trainer.data_parallel import gather_weights, remove_hooks, wrap
from trainer.devices import send, widest_dtype
from trainer.evaluate import answer_tasks
from trainer.forward import read_microbatches, run_schedule
from trainer.gradients import set_adam_kernel, update_weights
from trainer.model_chunks import ModelChunks
from trainer.records import (
    STEPS,
    VALIDATION,
    RowLog,
    SeenLog,
    prepare_seen,
    training_seconds,
    validation_samples_path,
    write_validation_samples,
)
from trainer.requests import identify_answers, requests_path
from trainer.saver import CheckpointSaver
from trainer.score import ModelScorer, is_writer, loss_by_source, validation_losses
from trainer.stopping import StoppedError, StopRequest

if TYPE_CHECKING:
    from trainer.jobs import TrainJob


def train_round(job: "TrainJob", corpus: Corpus, model: ModelChunks, bf16: bool, stop: StopRequest) -> None:
    """Train `model` on the round's mix, resuming exactly from the round's last intact checkpoint.

    Writes to the round's folder: checkpoint/, steps.parquet, seen/, validation.parquet and validation-samples.parquet.
    Raises ValueError, keeping the last checkpoint usable, if a loss or gradient is not finite, and StoppedError, after
    saving a checkpoint of the last step, on a stop request.
    """
    if job.evaluate is not None:
        # Report missing requests now instead of at the first step that needs them.
        for task in job.evaluate.tasks:
            identify_answers("", requests_path(job.evaluate.requests, task))
    mix = Mix(job.round_folder / "mix.parquet")
    num_steps = -(-len(mix) // job.train.global_batch_size)
    checkpoints = job.round_folder / "checkpoint"
    resume_from = find_usable_checkpoint(checkpoints, job.fingerprint)
    start_from = job.start_from if resume_from is None else None
    if start_from is not None and not job.keeps_optimizer:
        load_weights(start_from, model)
    state = make_state(job.train, model, num_steps, bf16)
    if start_from is not None and job.keeps_optimizer:
        load_start(start_from, state)
    record: CheckpointRecord = {"step": 0, "is_validation_due": False}
    if resume_from is not None:
        load_checkpoint(resume_from, state)
        record = read_checkpoint_record(resume_from, "step", "is_validation_due")
    step = record["step"]
    is_asynchronous = {"always": True, "never": False, "auto": job.device != "cpu"}[job.checkpoint.asynchronous]
    saver = CheckpointSaver(checkpoints, job.checkpoint.keep_last, is_asynchronous)
    run = _Round(job, corpus, mix, state, _Logs(job, record), saver, stop, num_steps)
    if record["is_validation_due"]:
        run.validate(step)
    with stop.heeded():
        if not run.evaluate(step):
            raise StoppedError
        run.train_from(step)
    remove_hooks(state.model)
    if run.logs.time is not None:
        run.logs.time.forget()
    if torch.distributed.get_rank() == 0:
        # The round is complete: only its result is needed.
        for old in [*list_checkpoints(checkpoints)[:-1], *checkpoints.glob("damaged-*")]:
            shutil.rmtree(old)


def make_state(train: TrainConfig, model: ModelChunks, num_steps: int, bf16: bool) -> TrainingState:
    """Return `model`, wrapped for data parallelism, with a new optimizer and learning-rate schedule."""
    wrapped = wrap(model, bf16, is_sharded=True)
    config = OptimizerConfig(
        optimizer="adam",
        lr=train.lr,
        min_lr=train.min_lr,
        weight_decay=train.weight_decay,
        adam_beta1=train.adam_beta1,
        adam_beta2=train.adam_beta2,
        clip_grad=train.clip_grad,
        bf16=bf16,
        params_dtype=torch.bfloat16 if bf16 else torch.float32,
        use_distributed_optimizer=True,
    )
    # In addition to Megatron's exceptions, vectors such as norms' weights.
    undecayed = {ParamKey(attr="without_weight_decay"): ParamGroupOverride(wd_mult=0.0)}
    optimizer = get_megatron_optimizer(config, list(wrapped), {**get_standard_config_overrides(config), **undecayed})
    set_adam_kernel(optimizer)
    scheduler = OptimizerParamScheduler(
        optimizer,
        init_lr=0.0,
        max_lr=train.lr,
        min_lr=train.min_lr,
        lr_warmup_steps=min(round(train.warmup_fraction * num_steps), num_steps - 1),
        lr_decay_steps=num_steps,
        lr_decay_style="cosine",
        start_wd=train.weight_decay,
        end_wd=train.weight_decay,
        wd_incr_steps=0,
        wd_incr_style="constant",
    )
    return TrainingState(wrapped, optimizer, scheduler)


class _Logs:
    """The records of a round, each opened only on the ranks that write it.

    checkpoint: the record of the checkpoint that training resumes from. Raises ValueError if the records are not as
    they were when it was saved.
    """

    def __init__(self, job: "TrainJob", checkpoint: CheckpointRecord) -> None:
        folder, step = job.round_folder, checkpoint["step"]
        # Checkpoints of versions before 0.9 do not have it.
        known = checkpoint.get("logs", {})
        self._checksums: dict[str, str] = known.get("seen", {})
        if torch.distributed.get_rank() == 0:
            prepare_seen(folder, step, known.get("seen"))
        torch.distributed.barrier()
        self.steps = self.validation = self.seen = self.progress = self.time = None
        if is_writer():
            self.steps = RowLog(folder / "steps.parquet", STEPS, job.fingerprint, step, known.get("steps"))
            # A validation that is due after the checkpoint's step may have been recorded since.
            before = step - checkpoint["is_validation_due"]
            path = folder / "validation.parquet"
            self.validation = RowLog(path, VALIDATION, job.fingerprint, before, known.get("validation"))
            self.progress = ProgressFile(job.progress)
            path = folder / "training-time.json"
            self.time = SpentTime(path, job.fingerprint, training_seconds(self.steps.written))
        if parallel_state.is_pipeline_last_stage() and parallel_state.get_tensor_model_parallel_rank() == 0:
            self.seen = SeenLog(folder / "seen", parallel_state.get_data_parallel_rank(), job.fingerprint)

    def flush(self) -> dict[str, Any]:
        """Return digests of all records, the same on all ranks, after writing them to disk.

        Called before a checkpoint, so that it never precedes its records.
        """
        mine: dict[str, Any] = {}
        if self.steps is not None and self.validation is not None:
            mine = {"steps": self.steps.flush(), "validation": self.validation.flush()}
        if self.time is not None:
            # The checkpoint's own record of them is lost if it is damaged.
            self.time.note_now()
        seen = {} if self.seen is None else self.seen.flush()
        gathered: list[Any] = [None] * torch.distributed.get_world_size()
        torch.distributed.all_gather_object(gathered, (mine, seen))
        digests: dict[str, Any] = {}
        for theirs, files in gathered:
            digests |= theirs
            self._checksums |= files
        return {**digests, "seen": dict(sorted(self._checksums.items()))}


@dataclass(frozen=True)
class _Batch:
    """A step's samples, of all replicas, by shard and index, [n] int64 each, and this rank's microbatches of them."""

    shards: NDArray[np.int64]
    samples: NDArray[np.int64]
    microbatches: list[Batch]


@dataclass
class _Round:
    job: "TrainJob"
    corpus: Corpus
    mix: Mix
    state: TrainingState
    logs: _Logs
    saver: CheckpointSaver
    stop: StopRequest
    num_steps: int
    saved_at: float = field(default_factory=time.monotonic)
    # Set by every step, the same on all ranks: whether a save is due by time, whether any rank was asked to stop, and
    # whether any rank's writers are still writing the last checkpoint.
    is_time_up: bool = False
    is_stopping: bool = False
    is_writing: bool = False

    def train_from(self, step: int) -> None:
        """Run all steps after `step`, with periodic validation and checkpoints, until the end or a stop request."""
        with closing(read_ahead(self.read_batches(step), depth=1)) as batches:
            for batch in batches:
                step = self.train_step(step, batch)
                self.finish_step(step)

    def read_batches(self, step: int) -> Iterator[_Batch]:
        """Yield this rank's share of the batch of every step after `step`."""
        size, micro_batch_size = self.job.train.global_batch_size, self.job.train.micro_batch_size
        for start in range(step * size, len(self.mix), size):
            end = min(start + size, len(self.mix))
            (shards, samples), weights = self.mix.read(start, end), self.mix.read_weights(start, end)
            share = read_microbatches(self.corpus, shards, samples, micro_batch_size, self.corpus.seq_length, weights)
            yield _Batch(shards, samples, list(share))

    def finish_step(self, step: int) -> None:
        """Validate, evaluate and save after `step`, as far as each is due. Raises StoppedError on a stop request."""
        is_last = step == self.num_steps
        is_stopping = self.is_stopping and not is_last
        is_due = step % self.job.train.validate_every_steps == 0 or self.is_evaluation_due(step)
        is_validation_due = is_last or is_due
        # A stop must take no longer than saving: postpone validation until the round resumes.
        is_put_off = is_validation_due and is_stopping
        if is_validation_due and not is_stopping:
            self.validate(step)
        if not is_stopping:
            is_stopping = not self.evaluate(step)
        if is_last or is_stopping or self.is_checkpoint_due(step):
            self.save(step, is_last or is_stopping, is_put_off)
        elif self.saver.is_pending() and not self.is_writing:
            self.saver.finish()
        if is_stopping:
            raise StoppedError

    def save(self, step: int, is_waiting: bool, is_validation_due: bool) -> None:
        """Save the state after `step`, flushing all records first."""
        record = {
            "logs": self.logs.flush(),
            "fingerprint": self.job.fingerprint,
            "num_steps": self.num_steps,
            "vocab_size": self.corpus.vocab_size,
            "is_validation_due": is_validation_due,
        }
        self.saver.save(step, self.state, record, is_waiting)
        self.saved_at = time.monotonic()

    def train_step(self, step: int, batch: _Batch) -> int:
        """Run the step after `step` and return its number."""
        started = time.monotonic()
        model, optimizer = self.state.model, self.state.optimizer
        model.zero_grad_buffer()
        optimizer.zero_grad()
        rows, sums, num_tokens = run_schedule(
            model,
            batch.microbatches,
            len(batch.samples),
            self.job.train.micro_batch_size,
            self.corpus.seq_length,
            forward_only=False,
        )
        loss_sum, counts = self._reduce(sums, num_tokens)
        self.state.scheduler.step(1)
        norm = update_weights(optimizer, loss_sum.device)
        step += 1
        # The host has waited for nothing so far, so that the device always has work to do. What is not finite has been
        # put into the weights by now; they are never saved.
        loss_sum, grad_norm = torch.stack([loss_sum, norm.to(loss_sum.dtype)]).tolist()
        total_tokens, *agreed = counts.tolist()
        self.is_time_up, self.is_stopping, self.is_writing = map(bool, agreed)
        loss = loss_sum / total_tokens
        if not np.isfinite(loss):
            raise ValueError(self._diverged(step, "the loss", loss))
        if not np.isfinite(grad_norm):
            raise ValueError(self._diverged(step, "the gradient's norm", grad_norm))
        if self.logs.seen is not None:
            losses = (sums.cpu() / num_tokens).numpy()
            self.logs.seen.append(step, batch.shards[rows], batch.samples[rows], losses)
        if self.logs.steps is not None:
            self._record(step, loss, grad_norm, len(batch.samples), total_tokens, time.monotonic() - started)
        return step

    def _reduce(self, sums: torch.Tensor, num_tokens: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return sums over all ranks, on the device: that of losses, [] float32, and of counts, [4] int64.

        Counts are the number of tokens, and on how many ranks a checkpoint is due by time, a stop was requested, and
        the last checkpoint is still being written.
        """
        # Ascend's collectives support at most single precision; counts are reduced separately, to stay exact.
        loss_sum = torch.zeros((), device=sums.device)
        counts = torch.zeros(4, dtype=torch.int64)
        if parallel_state.get_tensor_model_parallel_rank() == 0:
            loss_sum = sums.sum(dtype=widest_dtype(sums.device.type)).float()
            counts[0] = num_tokens.sum()
        if torch.distributed.get_rank() == 0:
            # One rank's clock decides for all ranks.
            counts[1] = time.monotonic() - self.saved_at > 60 * self.job.checkpoint.every_minutes
        counts[2], counts[3] = self.stop.is_made, self.saver.is_writing()
        counts = send(counts, sums.device)
        torch.distributed.all_reduce(loss_sum)
        torch.distributed.all_reduce(counts)
        return loss_sum, counts

    def _record(
        self, step: int, loss: float, grad_norm: float, num_samples: int, num_tokens: int, seconds: float
    ) -> None:
        assert self.logs.steps is not None and self.logs.progress is not None and self.logs.time is not None
        speed = num_tokens / seconds
        lr = self.state.optimizer.param_groups[0]["lr"]
        self.logs.steps.append(
            {
                "step": step,
                "loss": loss,
                "lr": lr,
                "grad_norm": grad_norm,
                "num_samples": num_samples,
                "num_tokens": num_tokens,
                "tokens_per_second": speed,
                "seconds": self.logs.time.seconds,
                "ended_at": datetime.now(UTC).replace(tzinfo=None),
            }
        )
        self.logs.time.note()
        samples = min(step * self.job.train.global_batch_size, len(self.mix))
        self.logs.progress.details = {"samples": samples, "loss": loss, "tokens_per_second": speed}
        self.logs.progress("training (steps)", step, self.num_steps)

    def _diverged(self, step: int, what: str, value: float) -> str:
        self.saver.finish()
        kept = list_checkpoints(self.job.round_folder / "checkpoint")
        return (
            f"{self.job.round_folder}: {what} at step {step} is {value}; training stopped and "
            f"{kept[-1].name if kept else 'no checkpoint'} was kept; lower train.lr in a run with another "
            "name, or inspect the data of this step"
        )

    def validate(self, step: int) -> None:
        """Measure and record the validation loss of every source and, after the last step, of every sample."""
        gather_weights(self.state.model)
        self.state.model.eval()
        scorer = ModelScorer(self.state.model, self.corpus, self.job.score.micro_batch_size)
        losses = validation_losses(scorer, self.corpus)
        self.state.model.train()
        if losses is not None:
            assert self.logs.validation is not None
            for row in loss_by_source(self.corpus, losses):
                self.logs.validation.append({"step": step, **row})
            if step == self.num_steps:
                path = validation_samples_path(self.job.round_folder)
                write_validation_samples(path, self.corpus, losses, self.job.fingerprint)

    def evaluate(self, step: int) -> bool:
        """Run the in-training evaluation due at `step`, if any; return whether it was completed.

        A stop request interrupts it; the missing answers are computed when the round resumes.
        """
        evaluation = self.job.evaluate
        if evaluation is None or not self.is_evaluation_due(step):
            return True
        gather_weights(self.state.model)
        tokenizer = open_tokenizer(self.corpus.tokenizer_path, evaluation.end_of_document)
        identity = fingerprint(self.job.fingerprint, step)
        folder = evaluation.answers / f"step-{step:08d}"
        try:
            answer_tasks(
                self.state.model, evaluation, folder, identity, tokenizer, self.logs.progress or silent, self.stop
            )
        except StoppedError:
            return False
        return True

    def is_evaluation_due(self, step: int) -> bool:
        """Return whether in-training evaluation is due after `step`; the caller evaluates the last step."""
        evaluation = self.job.evaluate
        return evaluation is not None and 0 < step < self.num_steps and step % evaluation.every_steps == 0

    def is_checkpoint_due(self, step: int) -> bool:
        """Return whether a checkpoint is due after `step`, by time or by steps."""
        every = self.job.checkpoint.every_steps
        return self.is_time_up or (every is not None and step % every == 0)
