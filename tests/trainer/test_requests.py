"""Files of requests and answers: round trips, and requests that a model cannot answer."""

from pathlib import Path

import numpy as np
import pytest

from trainer.requests import (
    Generation,
    Likelihood,
    LogLikelihood,
    Request,
    check_requests,
    fingerprint_requests,
    has_answers,
    identify_answers,
    read_answers,
    read_requests,
    requests_path,
    write_answers,
    write_requests,
)


def ids(*tokens: int) -> np.ndarray:
    return np.array(tokens, np.int32)


REQUESTS: list[Request] = [
    Likelihood(ids(1, 2, 3), ids(4)),
    Generation(ids(7), 5, ("\n", "Q:")),
    Likelihood(ids(1), ids(4, 5)),
    Generation(ids(8, 9), 2),
]


def plain(requests: list[Request]) -> list[tuple[object, ...]]:
    return [
        (request.context.tolist(), request.continuation.tolist())
        if isinstance(request, Likelihood)
        else (request.prompt.tolist(), request.max_new_tokens, request.stop)
        for request in requests
    ]


def test_requests_and_answers_come_back(tmp_path: Path) -> None:
    path = requests_path(tmp_path, "boolq")
    write_requests(path, REQUESTS)
    assert plain(read_requests(path)) == plain(REQUESTS)
    answers = [LogLikelihood(-1.25, True), [3, 4], LogLikelihood(-1e-30, False), []]
    target, identity = tmp_path / "answers.parquet", identify_answers("model", path)
    assert not has_answers(target, identity)
    write_answers(target, answers, identity)
    assert read_answers(target) == answers
    assert has_answers(target, identity)
    # Another model's, or to other requests, or in another order, they would be others.
    assert not has_answers(target, identify_answers("other", path))
    write_requests(path, [REQUESTS[1], REQUESTS[0], *REQUESTS[2:]])
    assert not has_answers(target, identify_answers("model", path))


def test_requests_are_told_apart() -> None:
    variants: list[list[Request]] = [
        [Likelihood(ids(1, 2), ids(3))],
        [Likelihood(ids(1), ids(2, 3))],
        [Generation(ids(1, 2), 3)],
        [Generation(ids(1, 2), 4)],
        [Generation(ids(1, 2), 3, ("a",))],
        [Generation(ids(1, 2), 3, ("a", "b"))],
        [],
    ]
    assert len({fingerprint_requests(each) for each in variants}) == len(variants)
    # Not by what integers they are held as.
    assert fingerprint_requests(variants[0]) == fingerprint_requests(
        [Likelihood(np.array([1, 2]), np.array([3]))]  # type: ignore[arg-type]
    )


def test_what_is_there_is_not_written_again(tmp_path: Path) -> None:
    path = requests_path(tmp_path, "boolq")
    write_requests(path, REQUESTS)
    written = path.stat().st_mtime_ns
    write_requests(path, REQUESTS)
    assert path.stat().st_mtime_ns == written


def test_a_request_as_long_as_the_model_reads_is_the_longest() -> None:
    # The last token of a continuation is predicted, never read.
    check_requests("boolq", [Likelihood(ids(*range(7)), ids(1, 2)), Generation(ids(*range(8)), 99)], 8, 10)
    for longer in (Likelihood(ids(*range(8)), ids(1, 2)), Generation(ids(*range(9)), 1)):
        with pytest.raises(ValueError, match=r"^boolq: request 1 has 9 tokens, but the model's context is 8 \(c"):
            check_requests("boolq", [REQUESTS[0], longer], 8, 10)


@pytest.mark.parametrize(
    ("request_", "message"),
    [
        (Likelihood(ids(1, 300), ids(1)), "has a token outside the vocabulary of 300"),
        (Likelihood(ids(1), ids(-1)), "has a token outside the vocabulary of 300"),
        (Likelihood(ids(1), ids()), "has an empty part"),
        (Generation(ids(), 4), "has an empty part"),
    ],
)
def test_requests_that_no_model_answers_are_named(request_: Request, message: str) -> None:
    with pytest.raises(ValueError, match=f"boolq: request 0 {message}"):
        check_requests("boolq", [request_], 8, 300)


def test_missing_requests_are_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"boolq.parquet: no such file"):
        read_requests(requests_path(tmp_path, "boolq"))
