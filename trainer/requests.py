"""Evaluation requests and answers, each in one Parquet file per task.

Requests consist of token ids. An answers file has a fingerprint of its requests and of the model, so that answers to
other requests, or of another checkpoint, are never reused.
"""

import hashlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from data_scoring.base.files import fingerprint
from data_scoring.base.parquet import is_intact, parquet_fingerprint, read_parquet, write_parquet

Tokens = NDArray[np.int32]

# A request with a continuation is a `Likelihood`, one without a `Generation`.
_REQUESTS = pa.schema(
    [
        ("context", pa.list_(pa.int32())),
        ("continuation", pa.list_(pa.int32())),
        ("max_new_tokens", pa.int32()),
        ("stop", pa.list_(pa.string())),
    ]
)
_ANSWERS = pa.schema([("log_likelihood", pa.float64()), ("is_greedy", pa.bool_()), ("tokens", pa.list_(pa.int32()))])


@dataclass(frozen=True, eq=False)
class Likelihood:
    """A request for the log-likelihood of `continuation` after `context`; both are at least one token id."""

    context: Tokens
    continuation: Tokens

    @property
    def path(self) -> Tokens:
        """Return the input tokens of the model: all except the last, which is only predicted."""
        return np.concatenate([self.context, self.continuation[:-1]])


@dataclass(frozen=True, eq=False)
class Generation:
    """A request for the greedy continuation of `prompt`, at least one token id.

    The continuation ends before the end-of-document token, with the token that completes one of the strings in `stop`,
    after `max_new_tokens`, or with the last token that the model's context allows.
    """

    prompt: Tokens
    max_new_tokens: int
    stop: tuple[str, ...] = ()


class LogLikelihood(NamedTuple):
    """The answer to a `Likelihood`: the sum over its tokens, nats, and whether each is the most probable one."""

    log_likelihood: float
    is_greedy: bool


Request = Likelihood | Generation
# The answer to a `Generation` is its tokens.
Answer = LogLikelihood | list[int]


def _parts(request: Request) -> tuple[Tokens, ...]:
    return (request.context, request.continuation) if isinstance(request, Likelihood) else (request.prompt,)


def count_inputs(request: Request) -> int:
    """Return how many tokens the model reads to answer a request; a generation reads more as it goes on."""
    if isinstance(request, Likelihood):
        return len(request.context) + len(request.continuation) - 1
    return len(request.prompt)


def requests_path(folder: Path, task: str) -> Path:
    """Return the path of a task's requests, or of its answers, in `folder`."""
    return folder / f"{task}.parquet"


def fingerprint_requests(requests: Iterable[Request]) -> str:
    """Return a fingerprint of requests and their order, 16 hex digits."""
    digest = hashlib.blake2b(digest_size=8)
    for request in requests:
        parts = _parts(request)
        if isinstance(request, Likelihood):
            header = f"likelihood {len(parts[0])} {len(parts[1])}\n"
        else:
            header = f"generation {len(parts[0])} {request.max_new_tokens} {request.stop!r}\n"
        digest.update(header.encode())
        for part in parts:
            digest.update(np.ascontiguousarray(part, "<i4").tobytes())
    return digest.hexdigest()


def write_requests(path: Path, requests: Sequence[Request]) -> None:
    """Write requests to `path`, unless it already holds them."""
    identity = fingerprint_requests(requests)
    if is_intact(path, identity):
        return
    rows: list[dict[str, Any]] = [
        {"context": request.context, "continuation": request.continuation}
        if isinstance(request, Likelihood)
        else {"context": request.prompt, "max_new_tokens": request.max_new_tokens, "stop": request.stop}
        for request in requests
    ]
    columns = [pa.array([row.get(field.name) for row in rows], field.type) for field in _REQUESTS]
    write_parquet(path, pa.table(columns, schema=_REQUESTS), identity)


def read_requests(path: Path) -> list[Request]:
    """Return the requests in `path`. Raises ValueError if there is no such file."""
    if not path.is_file():
        raise ValueError(f"{path}: no such file; write the task's requests there before a model is asked")
    table = read_parquet(path)
    contexts, continuations = _lists(table["context"]), _lists(table["continuation"])
    is_likelihood = table["continuation"].is_valid().to_pylist()
    requests: list[Request] = []
    for row, context in enumerate(contexts):
        if is_likelihood[row]:
            requests.append(Likelihood(context, continuations[row]))
        else:
            stop = tuple(table["stop"][row].as_py())
            requests.append(Generation(context, table["max_new_tokens"][row].as_py(), stop))
    return requests


def _lists(column: pa.ChunkedArray) -> list[Tokens]:
    """Return the lists of a column as views of its memory; null lists are empty."""
    array = column.combine_chunks()
    values, offsets = array.values.to_numpy(), array.offsets.to_numpy()
    return [values[start:end] for start, end in pairwise(offsets)]


def check_requests(name: object, requests: Sequence[Request], seq_length: int, vocab_size: int) -> None:
    """Raise ValueError, naming `name` and the request's index, if the model cannot answer a request.

    seq_length: the model's context length; vocab_size: the number of valid token ids.
    """
    for number, request in enumerate(requests):
        num_inputs, parts = count_inputs(request), _parts(request)
        if any(len(part) == 0 for part in parts):
            raise ValueError(f"{name}: request {number} has an empty part; leave its item out")
        if num_inputs > seq_length:
            raise ValueError(
                f"{name}: request {number} has {num_inputs} tokens, but the model's context is {seq_length} "
                "(corpus.seq_length); leave its item out, or give it fewer examples"
            )
        if any(part.min() < 0 or part.max() >= vocab_size for part in parts):
            raise ValueError(
                f"{name}: request {number} has a token outside the vocabulary of {vocab_size}; make the requests with "
                "the model's own tokenizer"
            )


def identify_answers(model: str, requests: Path) -> str:
    """Return the fingerprint of the answers to a file of requests by the model with the fingerprint `model`.

    Raises ValueError if there is no such file.
    """
    identity = parquet_fingerprint(requests)
    if identity is None:
        raise ValueError(f"{requests}: no such file; write the task's requests there before a model is asked")
    return fingerprint("answers", model, identity)


def has_answers(path: Path, identity: str) -> bool:
    """Return whether `path` holds the answers with the fingerprint `identity`."""
    return is_intact(path, identity)


def write_answers(path: Path, answers: Sequence[Answer], identity: str) -> None:
    """Write answers, in the order of their requests, to `path`."""
    rows = [answer._asdict() if isinstance(answer, LogLikelihood) else {"tokens": answer} for answer in answers]
    write_parquet(path, pa.Table.from_pylist(rows, _ANSWERS), identity)


def read_answers(path: Path) -> list[Answer]:
    """Return the answers in `path`, in the order of their requests."""
    rows = read_parquet(path).to_pylist()
    return [
        LogLikelihood(row["log_likelihood"], row["is_greedy"]) if row["tokens"] is None else row["tokens"]
        for row in rows
    ]
