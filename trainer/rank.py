"""A rank: one process of a job. It reads the job, runs it, and writes its results or its error."""

import os
import signal
import sys
import time
import traceback
from dataclasses import replace
from datetime import timedelta
from pathlib import Path

import torch

from data_scoring.base.files import explain
from data_scoring.base.progress import ProgressFile, silent
from data_scoring.corpus.corpus import Corpus
from trainer.devices import Device, initialise, resolve_precision
from trainer.job import Job, RankContext, read_job
from trainer.job_queue import JobQueue
from trainer.pickles import allow_plain_pickles_only
from trainer.rank_errors import RankError, errors_beside, leave_error, release_space, reserve_space
from trainer.stopping import StoppedError, StopRequest, end_with_launcher


def main(job_path: Path) -> None:
    """Run the job that `job_path` describes, as one of its ranks."""
    try:
        job = read_job(job_path)
    except ValueError as error:
        _report(errors_beside(job_path), error)
        raise
    rank = int(os.environ.get("RANK", "0"))
    reserve_space(job.errors, rank)
    allow_plain_pickles_only()
    stop = StopRequest()
    end_with_launcher(job, stop)
    try:
        _run(job, JobQueue(job_path), job_path, stop)
    except StoppedError:
        sys.exit(128 + signal.SIGTERM)
    except BaseException as error:  # torch's CheckpointException is no Exception
        # After a stop request, some ranks end before others; their lost connections are not failures.
        if not stop.is_made:
            _report(job.errors, error)
        raise
    finally:
        release_space(job.errors, rank)


def _run(job: Job, queue: JobQueue, job_path: Path, stop: StopRequest) -> None:
    device = initialise(job.device, int(os.environ["LOCAL_RANK"]))
    torch.distributed.init_process_group(device.backend, timeout=timedelta(minutes=30))
    context = do(job, device, stop)
    # Waiting in a collective of the device would keep it busy.
    waiting = None if device.backend == "gloo" else torch.distributed.new_group(backend="gloo")
    while (following := _next_job(job, job_path, queue, stop, waiting)) is not None:
        job, job_path, weights = following
        progress = ProgressFile(job.progress) if context.is_writer else silent
        job.run(replace(context, progress=progress, weights=weights))
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()


def _next_job(
    job: Job, job_path: Path, queue: JobQueue, stop: StopRequest, group: torch.distributed.ProcessGroup | None
) -> tuple[Job, Path, Path | None] | None:
    """Return the next job on all ranks when all have done `job`: it, its file, and the weights that the model has.

    Returns None if the ranks have to end.
    """
    is_stopping = torch.tensor(int(stop.is_made))
    torch.distributed.all_reduce(is_stopping, group=group)
    following: list[tuple[Job, Path, Path | None] | None] = [None]
    rank = torch.distributed.get_rank()
    if rank == 0:
        # Once the job is done, its files are the launcher's.
        weights = job.final_weights()
        queue.mark_done(job_path)
    if is_stopping.item():
        return None
    # The space for an error is only reserved while a job runs: waiting ranks may be killed.
    release_space(job.errors, rank)
    if rank == 0:
        found = queue.wait()
        # Files reach other hosts late; the first rank reads them for all ranks.
        following = [None if found is None else (read_job(found), found, weights)]
    torch.distributed.broadcast_object_list(following, src=0, group=group)
    if following[0] is not None:
        reserve_space(job.errors, rank)
    return following[0]


def do(job: Job, device: Device, stop: StopRequest) -> RankContext:
    """Run `job` on `device` as one of the ranks of the initialised process group; return what it was given.

    Raises StoppedError if training ended because of `stop`.
    """
    # Megatron must not be imported before the device is initialised.
    from trainer.model import build_model
    from trainer.score import is_writer

    _initialise_parallel(job, device)
    corpus = Corpus(job.corpus)
    bf16 = resolve_precision(job.precision, device.kind) == "bfloat16"
    vocab_size = job.model.vocab_size or corpus.vocab_size
    model = build_model(job.model, vocab_size, corpus.seq_length, job.layout, device.torch_device, bf16, job.kernels())
    progress = ProgressFile(job.progress) if is_writer() else silent
    context = RankContext(corpus, model, bf16, stop, is_writer(), progress)
    job.run(context)
    return context


def _initialise_parallel(job: Job, device: Device) -> None:
    from megatron.core import parallel_state

    parallel_state.initialize_model_parallel(
        tensor_model_parallel_size=job.parallel.tensor,
        pipeline_model_parallel_size=job.parallel.pipeline,
        virtual_pipeline_model_parallel_size=job.parallel.virtual_pipeline
        if job.parallel.virtual_pipeline > 1
        else None,
    )
    # Each tensor-parallel rank draws whole weights and keeps its slice, so these ranks need equal seeds; pipeline
    # stages need different ones.
    device.seed(job.seed + 100 * parallel_state.get_pipeline_model_parallel_rank())


def _report(errors: Path, error: BaseException) -> None:
    """Write the error into the folder `errors`, for the launcher."""
    explanation = explain(error) if isinstance(error, OSError) else None
    reported = RankError(
        rank=int(os.environ.get("RANK", "0")),
        time=time.time(),
        kind=type(error).__name__,
        is_user_error=isinstance(error, ValueError) or explanation is not None,
        message=explanation or str(error),
        traceback=traceback.format_exc(),
    )
    leave_error(errors, reported)
