"""The job that continues prompts with a trained model."""

from pathlib import Path

from pydantic import Field

from data_scoring.tokenizer.tokenizer import open_tokenizer
from trainer.job import RankContext, TrainedModelJob
from trainer.sampling import Sampler, Sampling
from trainer.token_stream import TokenStreamWriter


class ContinueJob(TrainedModelJob):
    """Continue the prompts of `requests` with the model of `weights`."""

    requests: Path = Field(description="File of the prompts (`trainer.requests`): generations only.")
    answers: Path = Field(description="File that the continuations are written to, when all have ended.")
    stream: Path = Field(description="File that tokens are appended to as they come (`trainer.token_stream`).")
    keys: tuple[tuple[int, int], ...] = Field(description="The number of each request's prompt, and of its sample.")
    sampling: Sampling = Field(description="How tokens are chosen.")
    end_of_document: str | None = Field(
        default=None, description="Token that ends documents, if the tokenizer does not define one."
    )

    def use(self, context: RankContext) -> None:
        """Continue the prompts; see `trainer.evaluate.answer_requests`."""
        from trainer.evaluate import answer_requests
        from trainer.requests import check_requests, read_requests, write_answers

        model, tokenizer = context.model, open_tokenizer(context.corpus.tokenizer_path, self.end_of_document)
        requests = read_requests(self.requests)
        check_requests(self.requests, requests, model.max_sequence_length, tokenizer.vocab_size)
        is_greedy = self.sampling.temperature == 0
        samplers = [] if is_greedy else [Sampler(self.sampling, key) for key in self.keys]
        tell = TokenStreamWriter(self.stream).write if context.is_writer else None
        found = answer_requests(model, requests, tokenizer, context.progress, context.stop, samplers, tell)
        if found is not None:
            write_answers(self.answers, found, self.fingerprint)
