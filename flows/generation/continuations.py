"""Continuations of prompts by a round's model, on the run's ranks, which are kept from one call to the next."""

import shutil
import tempfile
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, Self

import numpy as np

from data_scoring.base.files import checksum, fingerprint
from data_scoring.base.progress import Progress
from data_scoring.tokenizer.tokenizer import encode_each, open_tokenizer
from flows.generation.streamed_text import StreamedText
from flows.launch import launcher
from flows.launch.job_fields import final_checkpoint, job_fields
from flows.launch.launcher import KeptRanks
from flows.run.errors import RanksFailedError
from flows.run.folder import Run
from trainer.checkpoint_folder import RECORD
from trainer.continue_job import ContinueJob
from trainer.requests import Generation, read_answers, write_requests
from trainer.sampling import Sampling
from trainer.token_stream import TokenStreamReader

# Receives the number of a continuation, the text that was added to it, and whether it has ended.
Show = Callable[[int, str, bool], None]


@dataclass(frozen=True)
class Continuation:
    """What a model made of a prompt; sample: from 1; text: without the prompt.

    ended_by: the end-of-document token, the limit of new tokens, or the model's length.
    """

    prompt: str
    sample: int
    text: str
    num_tokens: int
    ended_by: Literal["end of text", "max tokens", "model length"]


class Continuer:
    """Continues prompts with the final model of a round; a context manager, which ends the ranks.

    The run may be at work meanwhile: the files of these ranks are in a folder of their own, logs/generate-….
    """

    def __init__(self, run: Run, round_number: int, progress: Progress, kept: KeptRanks | None = None) -> None:
        """Open the model's tokenizer; ranks are started by the first call. kept: keeps them for the next ones."""
        self._run, self._round_number, self._progress, self._kept = run, round_number, progress, kept
        corpus = run.corpus()
        self._seq_length = corpus.seq_length
        self._tokenizer = open_tokenizer(corpus.tokenizer_path, run.config.tokenizer.end_of_document)
        self._checkpoint = final_checkpoint(run, round_number)
        self._num_calls = 0
        self._stack = ExitStack()

    def __enter__(self) -> Self:
        logs = self._run.folder / "logs"
        logs.mkdir(exist_ok=True)
        self._folder = Path(tempfile.mkdtemp(dir=logs, prefix="generate-"))
        if self._kept is not None:
            self._stack.enter_context(self._kept)
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: object) -> None:
        try:
            self._stack.__exit__(kind, error, None)
        finally:
            # The error names the log.
            if not isinstance(error, RanksFailedError):
                shutil.rmtree(self._folder, ignore_errors=True)

    def encode(self, prompts: Sequence[str]) -> list[list[int]]:
        """Return the tokens of each prompt; of an empty one, the token that ends documents, after which one begins.

        Raises ValueError for a prompt that the tokenizer cannot encode, or that is longer than the model's length.
        """
        found: list[list[int]] = []
        for number, ids in enumerate(encode_each(self._tokenizer, [*prompts]), start=1):
            if not isinstance(ids, list):
                raise ValueError(f"prompt {number}: {ids}")
            if prompts[number - 1].strip() and not ids:
                raise ValueError(f"prompt {number}: the tokenizer makes nothing of it; give another one")
            if len(ids) > self._seq_length:
                raise ValueError(
                    f"prompt {number}: has {len(ids):,} tokens, but the model reads {self._seq_length:,} "
                    "(corpus.seq_length); shorten it"
                )
            found.append(ids or [self._tokenizer.end_of_document])
        return found

    def continue_prompts(
        self, prompts: Sequence[str], num_samples: int, max_new_tokens: int, sampling: Sampling, show: Show
    ) -> list[Continuation]:
        """Return `num_samples` continuations of each prompt, in their order, passing text to `show` as it comes.

        Raises ValueError as `encode`.
        """
        encoded = self.encode(prompts)
        keys = [(number, sample) for number in range(len(prompts)) for sample in range(num_samples)]
        texts = [StreamedText(self._tokenizer, encoded[number]) for number, _ in keys]
        self._num_calls += 1
        name = f"generate-{self._num_calls}"
        requests = [Generation(np.array(encoded[number], np.int32), max_new_tokens) for number, _ in keys]
        job = self._job(name, tuple(keys), sampling)
        write_requests(job.requests, requests)
        self._launch(job, name, texts, show)
        answers = read_answers(job.answers)
        found: list[Continuation] = []
        for (number, sample), text, tokens in zip(keys, texts, answers, strict=True):
            assert isinstance(tokens, list)
            if not text.is_over:
                # The stream holds the tokens of one replica.
                show(len(found), text.add(tokens[len(text.tokens) :], is_over=True), True)
            found.append(
                Continuation(
                    prompts[number],
                    sample + 1,
                    text.text,
                    len(tokens),
                    self._ended_by(len(encoded[number]), len(tokens), max_new_tokens),
                )
            )
        return found

    def _job(self, name: str, keys: tuple[tuple[int, int], ...], sampling: Sampling) -> ContinueJob:
        run, folder = self._run, self._folder
        fields = job_fields(run, self._round_number, fingerprint("generate", checksum(self._checkpoint / RECORD)))
        fields |= {
            "progress": folder / "progress.json",
            "errors": folder / "errors",
            "lock": folder / ".ranks.lock",
        }
        return ContinueJob(
            **fields,
            weights=self._checkpoint,
            requests=folder / f"{name}.prompts.parquet",
            answers=folder / f"{name}.parquet",
            stream=folder / f"{name}.tokens",
            keys=keys,
            sampling=sampling,
            end_of_document=run.config.tokenizer.end_of_document,
        )

    def _launch(self, job: ContinueJob, name: str, texts: Sequence[StreamedText], show: Show) -> None:
        """Run `job`, and pass what it generates to `show` as it comes."""
        stream = TokenStreamReader(job.stream)

        def follow(what: str, done: int, total: int | None) -> None:
            new: dict[int, list[int]] = {}
            ended = set()
            for number, token in stream.read():
                new.setdefault(number, [])
                if token is None:
                    ended.add(number)
                else:
                    new[number].append(token)
            for number, tokens in new.items():
                show(number, texts[number].add(tokens, number in ended), number in ended)
            if not any(text.tokens for text in texts):
                self._progress(what, done, total)

        config = self._run.config.launch.model_copy(update={"max_restarts": 0})
        # Hosts join a run by its folder.
        place = self._run.folder if config.nodes > 1 else self._folder
        launcher.launch(job, place, name, follow, config, self._kept)
        follow("", 0, None)

    def _ended_by(
        self, num_prompt_tokens: int, num_tokens: int, max_new_tokens: int
    ) -> Literal["end of text", "max tokens", "model length"]:
        if num_tokens == max_new_tokens:
            return "max tokens"
        # The last token that the model predicts follows as many as it reads.
        return "model length" if num_prompt_tokens + num_tokens == self._seq_length + 1 else "end of text"
