"""Preparing the inputs of the check: a corpus, a mix, requests, and reference results of a CPU; a few megabytes."""

import platform
import shutil
from pathlib import Path

import numpy as np
import torch

from benchmarks.device.settings import GLOBAL_BATCH, NUM_STEPS, SEED, SMALL, SMALL_SEQ_LENGTH, TOLERANCES, Place
from benchmarks.device.small_model import answer_here, load_model, score_here, train_here, training_job
from benchmarks.measure import single_rank
from data_scoring.base.files import write_json
from data_scoring.base.progress import silent
from data_scoring.config import CorpusConfig, SourceConfig, TokenizerConfig
from data_scoring.corpus.corpus import Corpus
from data_scoring.corpus.prepare_corpus import prepare_corpus
from data_scoring.refine.refine_shards import mix_all
from trainer.checkpoint_folder import list_checkpoints
from trainer.config import ModelConfig
from trainer.requests import Generation, Likelihood, requests_path, write_requests

# Enough for a mix of 20 steps; with this seed a short document is held out, so that validation is fast.
_NUM_DOCUMENTS, _CORPUS_SEED = 20, 2
_NUM_REQUESTS = {"likelihoods": 24, "generations": 6}


def prepare(folder: Path, model: ModelConfig = SMALL) -> None:
    """Write the inputs of the check to `folder`, replacing it; trains `model` on this machine's CPU for reference."""
    if folder.exists():
        shutil.rmtree(folder)
    folder.mkdir(parents=True)
    source = SourceConfig(name="topics", format="python", path="topics", max_documents=_NUM_DOCUMENTS)
    config = CorpusConfig(sources=(source,), seq_length=SMALL_SEQ_LENGTH, num_shards=1)
    prepare_corpus(config, TokenizerConfig(), _CORPUS_SEED, folder / "corpus", "device check", silent)
    corpus = Corpus(folder / "corpus")
    mix_all(folder / "mix.parquet", corpus.samples_path, SEED, max_tokens=NUM_STEPS * GLOBAL_BATCH * SMALL_SEQ_LENGTH)
    lengths = _write_requests(corpus, folder / "requests")
    output = folder / ".recording"
    _record(Place(folder, output, "cpu"), model, lengths)
    shutil.rmtree(output)


def _write_requests(corpus: Corpus, folder: Path) -> list[int]:
    """Write requests cut from samples, and return the length in tokens of each continuation."""
    generator = np.random.default_rng(SEED)
    samples = np.arange(sum(_NUM_REQUESTS.values()))
    texts = corpus.read(np.zeros_like(samples), samples).tokens.astype(np.int32)
    likelihoods = []
    for text in texts[: _NUM_REQUESTS["likelihoods"]]:
        start, length = int(generator.integers(8, 40)), int(generator.integers(1, 12))
        likelihoods.append(Likelihood(text[:start], text[start : start + length]))
    generations = [Generation(text[:12], 24, ()) for text in texts[_NUM_REQUESTS["likelihoods"] :]]
    write_requests(requests_path(folder, "likelihoods"), likelihoods)
    write_requests(requests_path(folder, "generations"), generations)
    return [len(request.continuation) for request in likelihoods]


def _record(place: Place, small: ModelConfig, continuation_lengths: list[int]) -> None:
    device = single_rank("cpu")
    recorded = {
        "model": small.model_dump(mode="json"),
        "continuation_lengths": continuation_lengths,
        "versions": {"python": platform.python_version(), "torch": torch.__version__},
    }
    write_json(place.prepared / "recorded.json", recorded)
    losses = {}
    for precision in TOLERANCES:
        losses[precision] = train_here(training_job(place, precision, precision), device)
    checkpoint = list_checkpoints(place.work / "float32" / "checkpoint")[-1]
    model = load_model(place, device, "float32", checkpoint, "reference")
    answer_here(place, model, place.prepared / "answers")
    write_json(place.prepared / "recorded.json", {**recorded, "losses": losses, "scores": score_here(place, model)})
