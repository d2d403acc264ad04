"""Answers of two ranks to requests, under every layout of two ranks, and those of plain torch."""

import pickle
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import torch
from lm_eval.api.instance import Instance

from benchmarks.plain_model import PlainModel, load_megatron_weights, stacked_weights
from data_scoring.config import ScoreConfig
from data_scoring.corpus.corpus import Corpus
from data_scoring.refine.training_mix import write_mix
from data_scoring.tokenizer.tokenizer import open_tokenizer
from flows.evaluation.harness_requests import Reader, Response
from flows.run.stored_model import find_model
from tests.trainer.two_ranks_layers import DEEP_LAYOUTS, MODEL, random_model, share, shared_model
from trainer.checkpoint_folder import list_checkpoints
from trainer.config import CheckpointConfig, TrainConfig
from trainer.devices import Device
from trainer.jobs import RepeatedEvaluation, TrainJob
from trainer.parallel_config import ParallelConfig
from trainer.requests import (
    Answer,
    Generation,
    Likelihood,
    LogLikelihood,
    Request,
    check_requests,
    read_answers,
    requests_path,
    write_requests,
)
from trainer.stopping import StoppedError, StopRequest

# Tokens that the models which lm-eval asks read: shorter than some texts.
HARNESS_LENGTH = 64
# Whatever evaluation has to undo is undone here.
TRAINED = ("sequence", "interleaved")


def make_requests(seed: int, vocab_size: int, seq_length: int) -> list[Request]:
    """Return requests that share much, little and nothing, generations in between; some are as long as can be."""
    generator = np.random.default_rng(seed)

    def draw(count: int) -> np.ndarray:
        return generator.integers(1, vocab_size, count).astype(np.int32)

    shots = draw(9)
    requests: list[Request] = []
    for _ in range(6):
        question = np.concatenate([shots, draw(int(generator.integers(1, 8)))])
        requests += [Likelihood(question, draw(int(generator.integers(1, 6)))) for _ in range(4)]
        requests.append(Generation(question[: int(generator.integers(1, 12))], int(generator.integers(1, 9))))
    return [*requests, Likelihood(draw(1), draw(1)), Likelihood(draw(seq_length - 3), draw(4)), Generation(draw(5), 99)]


def make_instances() -> list[Instance]:
    """Return what lm-eval may ask, in text: choices, with and without context or space, whole texts, generations."""
    question = "Question: what does the model learn?\nAnswer:"
    likelihoods = [
        (context, continuation)
        for context in (f"{question} text\n\n{question}", question, "where it goes ", "", "  ")
        for continuation in (" the text", " a", "falls on until", "text")
    ]
    rolling = ["where the loss falls and it goes on, " * 20, "a", ""]
    generated = [
        (prompt, {"until": until, "max_gen_toks": count, "do_sample": False})
        for prompt in (question, "the", "a model learns what the text says")
        for until, count in ((["\n", "e"], 24), ([], 9))
    ]
    kinds = {"loglikelihood": likelihoods, "loglikelihood_rolling": [(text,) for text in rolling]}
    return [
        Instance(kind, {}, arguments, 0, metadata=("some", number, 1))  # type: ignore[arg-type]
        for kind, asked in {**kinds, "generate_until": generated}.items()
        for number, arguments in enumerate(asked)
    ]


def respond(folder: Path, name: str) -> list[Response] | None:
    """Return what an imported model responds to lm-eval, on the writer."""
    from trainer.checkpoint import load_weights
    from trainer.evaluate import answer_requests
    from trainer.model import Kernels, build_model

    stored = find_model(folder / f"{name}-imported")
    assert stored.config.vocab_size is not None
    share(ParallelConfig())
    place, rows = torch.get_default_device(), stored.config.vocab_size
    gpt = build_model(stored.config, rows, HARNESS_LENGTH, ParallelConfig(), place, False, Kernels())
    load_weights(stored.checkpoint, gpt)
    reader = Reader(open_tokenizer(stored.tokenizer, stored.end_of_document), HARNESS_LENGTH)
    instances = make_instances()
    asked = reader.read(instances)
    check_requests(name, asked.requests, HARNESS_LENGTH, stored.vocab_size)
    answers = answer_requests(gpt, asked.requests, reader.tokenizer)
    return None if answers is None else asked.respond(instances, answers)


def find(device: Device, corpus: Corpus, folder: Path, rank: int) -> dict[str, Any]:
    """Return what each layout answers, on its writer, what plain torch does, and what training with and without is."""
    from trainer.evaluate import answer_requests

    requests = make_requests(0, corpus.vocab_size, corpus.seq_length)
    tokenizer = open_tokenizer(corpus.tokenizer_path, None)
    whole = random_model(device, corpus)
    # The most probable token is asked for too.
    first = requests[0]
    assert isinstance(first, Likelihood)
    [greedy] = _answer_plainly(whole, [Generation(first.context, 3)], corpus)
    requests.append(Likelihood(first.context, np.array(greedy, np.int32)))
    plain = _answer_plainly(whole, requests, corpus)
    found: dict[str, Any] = {"plain": plain}
    for name, parallel in DEEP_LAYOUTS.items():
        model = shared_model(device, corpus, parallel, whole, rank)
        before = _state(model)
        found[name] = answer_requests(model.train(), requests, tokenizer)
        assert _state(model) == before and model.training
        if name in TRAINED:

            def train(way: str, name: str = name, parallel: ParallelConfig = parallel) -> dict[str, Any]:
                fresh = shared_model(device, corpus, parallel, whole, rank).train()
                return _train(corpus, fresh, parallel, folder / name, way, requests)

            ways = {"without": "without", "with": "with", "stopped": "stopped", "resumed": "stopped"}
            found[f"trained {name}"] = {key: train(way) for key, way in ways.items()}
    return found


def _state(model: torch.nn.Module) -> bytes:
    """Return what evaluation is to leave as it was: weights, random numbers, what modules say of themselves."""
    attributes = {
        (name, key): value
        for name, module in model.named_modules()
        for key, value in vars(module).items()
        if isinstance(value, bool | int | float | str) and key != "training"
    }
    config = {key: value for key, value in vars(model.config).items() if isinstance(value, bool | int | float | str)}
    kinds = {name: type(module).__name__ for name, module in model.named_modules()}
    weights = {name: parameter.detach().numpy() for name, parameter in model.named_parameters()}
    return pickle.dumps((attributes, config, kinds, weights, torch.get_rng_state().numpy()))


def _answer_plainly(whole: Any, requests: Sequence[Request], corpus: Corpus) -> list[Answer]:
    """Return the answers of plain torch, a request and a token at a time."""
    plain = PlainModel(MODEL, corpus.vocab_size)
    load_megatron_weights(plain, stacked_weights(whole.decoders[0], MODEL.num_layers))
    end = open_tokenizer(corpus.tokenizer_path, None).end_of_document
    answers: list[Answer] = []
    for request in requests:
        if isinstance(request, Likelihood):
            answers.append(_judge_plainly(plain, request))
            continue
        tokens = [int(token) for token in request.prompt]
        while len(tokens) < min(corpus.seq_length + 1, len(request.prompt) + request.max_new_tokens):
            token = int(_logits(plain, tokens)[-1].argmax())
            if token == end:
                break
            tokens.append(token)
        answers.append(tokens[len(request.prompt) :])
    return answers


def _judge_plainly(plain: PlainModel, request: Likelihood) -> LogLikelihood:
    logits = _logits(plain, [*request.context, *request.continuation])[len(request.context) - 1 : -1]
    targets = torch.from_numpy(request.continuation).long()
    chosen = logits.log_softmax(dim=-1).gather(1, targets[:, None])
    return LogLikelihood(float(chosen.sum()), bool((logits.argmax(dim=-1) == targets).all()))


def _logits(plain: PlainModel, tokens: Sequence[int]) -> torch.Tensor:
    with torch.no_grad():
        return plain.logits(torch.tensor([list(map(int, tokens))]))[0].double()


def _train(
    corpus: Corpus, model: Any, parallel: ParallelConfig, folder: Path, way: str, requests: Sequence[Request]
) -> dict[str, Any]:
    """Return the losses and weights of five steps, and the files of answers that were given on the way.

    way: without and with evaluation; stopped: in its first one, if it begins, by a wish that reaches one rank.
    """
    from trainer import train

    place, stop = folder / way, StopRequest()
    if torch.distributed.get_rank() == 0 and not place.exists():
        write_mix(place / "mix.parquet", f"select shard, sample from '{corpus.samples_path}' limit 20", 0, 1)
        write_requests(requests_path(folder / "requests", "some"), requests)
    torch.distributed.barrier()
    evaluate = RepeatedEvaluation(
        requests=folder / "requests", tasks=("some",), answers=place / "answers", every_steps=2
    )
    job = TrainJob(
        corpus=corpus.folder, round_folder=place, model=MODEL, parallel=parallel, device="cpu", fingerprint="f",
        precision="float32", activation_kernel="reference", seed=0, progress=place / "progress.json", errors=place,
        lock=place, train=TrainConfig(global_batch_size=4, micro_batch_size=2, lr=1e-2, min_lr=1e-3),
        checkpoint=CheckpointConfig(), score=ScoreConfig(), start_from=None,
        evaluate=None if way == "without" else evaluate,
    )  # fmt: skip
    is_first_time = not list_checkpoints(place / "checkpoint")
    answer_tasks = train.answer_tasks

    def answer(*arguments: Any) -> None:
        stop.is_made = way == "stopped" and is_first_time and torch.distributed.get_rank() == 1
        answer_tasks(*arguments)

    train.answer_tasks = answer
    with suppress(StoppedError):
        train.train_round(job, corpus, model, False, stop)
    train.answer_tasks = answer_tasks
    torch.distributed.barrier()
    return {
        "checkpoints": [path.name for path in list_checkpoints(place / "checkpoint")],
        "losses": pq.read_table(place / "steps.parquet")["loss"].to_pylist(),
        "weights": {name: parameter.detach().numpy() for name, parameter in model.named_parameters()},
        "answers": {
            str(path.relative_to(place)): (path.stat().st_mtime_ns, read_answers(path))
            for path in sorted(place.glob("answers/*/*.parquet"))
        },
    }
