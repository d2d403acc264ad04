"""A rank: one process of a job, from reading what to do to leaving its results or its error."""

import json
import os
import signal
import sys
import time
import traceback
from datetime import timedelta
from pathlib import Path

import torch
from pydantic import TypeAdapter

from data_scoring.base.files import explain, write_json
from data_scoring.base.progress import ProgressFile, silent
from data_scoring.corpus.corpus import Corpus
from data_scoring.losses.calibration import calibrate, candidate_prefixes, draw_from
from data_scoring.losses.shard_scoring import LossFiles, score_shards
from data_scoring.tokenizer.tokenizer import open_tokenizer
from trainer.devices import Device, initialise, resolve_precision
from trainer.jobs import (
    AblationJob,
    AnyJob,
    CalibrateJob,
    EvaluateJob,
    GenerateJob,
    Job,
    MaskJob,
    ScoreJob,
    TaylorJob,
    TrainJob,
)
from trainer.pickles import allow_plain_pickles_only
from trainer.stopping import StoppedError, StopRequest, end_with_launcher


def main(job_path: Path) -> None:
    """Do the job that `job_path` describes, as one of its ranks."""
    job: AnyJob = TypeAdapter(AnyJob).validate_json(job_path.read_text(encoding="utf-8"))
    allow_plain_pickles_only()
    stop = StopRequest()
    end_with_launcher(job, stop)
    try:
        _run(job, stop)
    except StoppedError:
        sys.exit(128 + signal.SIGTERM)
    except BaseException as error:  # torch's CheckpointException is no Exception
        # Of ranks that are asked to end, some end before others: that is no failure.
        if not stop.is_made:
            _report(job, error)
        raise


def _run(job: AnyJob, stop: StopRequest) -> None:
    device = initialise(job.device, int(os.environ["LOCAL_RANK"]))
    torch.distributed.init_process_group(device.backend, timeout=timedelta(minutes=30))
    do(job, device, stop)
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()


def do(job: AnyJob, device: Device, stop: StopRequest) -> None:
    """Do `job` on `device` as one of the ranks of the process group that there is.

    Raises StoppedError where training heeds `stop`.
    """
    # Nothing of Megatron may be imported before the device is initialised.
    from trainer.checkpoint import load_weights
    from trainer.model import Kernels, build_model
    from trainer.train import train_round

    _initialise_parallel(job, device)
    corpus = Corpus(job.corpus)
    bf16 = resolve_precision(job.precision, device.kind) == "bfloat16"
    vocab_size = job.model.vocab_size or corpus.vocab_size
    kernels, parallel = Kernels(activation=job.activation_kernel), job.parallel
    if isinstance(job, GenerateJob):
        # A token at a time is no sequence that ranks could share.
        parallel = parallel.model_copy(update={"sequence": False})
    elif isinstance(job, EvaluateJob):
        kernels = Kernels(scoring=job.loss_kernel, activation=job.activation_kernel)
    elif isinstance(job, TrainJob | ScoreJob | CalibrateJob):
        training = (job.train if isinstance(job, TrainJob) else job.score).loss_kernel
        kernels = Kernels(training, job.score.loss_kernel, job.activation_kernel)
    model = build_model(job.model, vocab_size, corpus.seq_length, parallel, device.torch_device, bf16, kernels)
    if isinstance(job, TrainJob):
        train_round(job, corpus, model, bf16, stop)
    else:
        load_weights(job.weights, model)
        model.eval()
        _use(job, corpus, model, bf16)


def _use(job: AnyJob, corpus: Corpus, model: torch.nn.Module, bf16: bool) -> None:
    """Do a job with a model that is trained."""
    from trainer.mask_learning import learn_masks
    from trainer.taylor import measure_taylor

    if isinstance(job, GenerateJob):
        _generate(job, corpus, model)
    elif isinstance(job, EvaluateJob):
        _evaluate(job, corpus, model)
    elif isinstance(job, AblationJob):
        _skip(job, corpus, model)
    elif isinstance(job, TaylorJob):
        measure_taylor(job, corpus, model, bf16)
    elif isinstance(job, MaskJob):
        learn_masks(job, corpus, model)
    else:
        assert isinstance(job, ScoreJob | CalibrateJob)
        _score(job, corpus, model)


def _score(job: ScoreJob | CalibrateJob, corpus: Corpus, model: torch.nn.Module) -> None:
    from trainer.score import ModelScorer, is_writer

    progress = ProgressFile(job.progress) if is_writer() else silent
    size = job.score.micro_batch_size
    if isinstance(job, CalibrateJob):
        drawn = draw_from(corpus, job.score.calibration_samples, job.seed, job.round_number)
        scorer = ModelScorer(model, corpus, size, (*candidate_prefixes(corpus.seq_length), corpus.seq_length))
        calibrate(corpus, job.round_folder, drawn, scorer, job.fingerprint, job.origin, progress)
        return
    longest = job.prefix or corpus.seq_length
    files = LossFiles(job.round_folder, corpus, longest, job.fingerprint, job.origin)
    score_shards(corpus, ModelScorer(model, corpus, size, (longest,)), files, progress)


def _skip(job: AblationJob, corpus: Corpus, model: torch.nn.Module) -> None:
    from trainer.layer_ablation import measure_ablation
    from trainer.score import is_writer

    measure_ablation(job, corpus, model, ProgressFile(job.progress) if is_writer() else silent)


def _evaluate(job: EvaluateJob, corpus: Corpus, model: torch.nn.Module) -> None:
    from trainer.evaluate import answer_tasks
    from trainer.layer_ablation import LayerBlock, skipping
    from trainer.score import is_writer

    tokenizer = open_tokenizer(corpus.tokenizer_path, job.evaluation.end_of_document)
    progress = ProgressFile(job.progress) if is_writer() else silent
    if job.longest_block is None:
        answer_tasks(model, job.evaluation, job.answers, job.fingerprint, tokenizer, progress)
        return
    for start, length in job.blocks:
        with skipping(model, LayerBlock(start, length)):
            answer_tasks(model, job.evaluation, *job.part(start, length), tokenizer, progress)


def _generate(job: GenerateJob, corpus: Corpus, model: torch.nn.Module) -> None:
    from trainer.generate import measure_generation
    from trainer.score import is_writer

    measured = measure_generation(
        model, job.batch_size, job.num_prompt_tokens, job.num_new_tokens, corpus.vocab_size, job.seed
    )
    if is_writer():
        numbers = job.model_dump(include={"fingerprint", "batch_size", "num_prompt_tokens", "num_new_tokens", "device"})
        layout = {"parallel": job.parallel.model_dump()}
        write_json(job.round_folder / "generation.json", {**numbers, **layout, **measured})


def _initialise_parallel(job: Job, device: Device) -> None:
    from megatron.core import parallel_state

    parallel_state.initialize_model_parallel(
        tensor_model_parallel_size=job.parallel.tensor,
        pipeline_model_parallel_size=job.parallel.pipeline,
    )
    # Weights are drawn whole on every tensor-parallel rank and then cut, so those must agree, and stages must not.
    device.seed(job.seed + 100 * parallel_state.get_pipeline_model_parallel_rank())


def _report(job: Job, error: BaseException) -> None:
    """Leave the error where the launcher finds it, in a file of this rank's own."""
    rank = os.environ.get("RANK", "0")
    explanation = explain(error) if isinstance(error, OSError) else None
    content = {
        "rank": int(rank),
        "time": time.time(),
        "kind": type(error).__name__,
        "is_user_error": isinstance(error, ValueError) or explanation is not None,
        "message": explanation or str(error),
        "traceback": traceback.format_exc(),
    }
    (job.errors / f"rank-{int(rank):05d}.json").write_text(json.dumps(content), encoding="utf-8")
