"""Running many cases, and what must hold for each: one line of error at most, in little time and memory."""

import os
import resource
import time
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis.strategies import SearchStrategy

MANY = int(os.environ.get("FUZZ_CASES", "10000"))
MOST_SECONDS, MOST_KILOBYTES, MOST_CHARACTERS = 5.0, 1_000_000, 2000


def numbers_of_cases(few: int) -> pytest.MarkDecorator:
    """Parametrises a test with `num_cases`: `few` in every test run, and many with -m fuzz."""
    return pytest.mark.parametrize("num_cases", [few, pytest.param(MANY, marks=pytest.mark.fuzz, id="many")])


def run_cases(strategy: SearchStrategy, check: Callable[[Any], None], num_cases: int) -> None:
    """Check `num_cases` examples of `strategy`: new ones if there are many, else always the same."""
    run = given(strategy)(lambda case: bounded(check, case))
    settings(
        max_examples=num_cases,
        derandomize=num_cases < MANY,
        database=None,
        deadline=None,
        print_blob=False,
        phases=(Phase.generate, Phase.shrink),
        suppress_health_check=list(HealthCheck),
    )(run)()


def bounded(check: Callable[[Any], None], case: Any) -> None:
    """Check a case, and that it takes less than 5 s and 1 GB."""
    started, before = time.process_time(), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    check(case)
    assert time.process_time() - started < MOST_SECONDS
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < MOST_KILOBYTES


def check_message(error: ValueError, *names: str) -> None:
    """Assert that an error is one printable line of bounded length that names one of `names`."""
    message = str(error)
    assert len(message.splitlines()) == 1, message
    assert message.isprintable(), message
    assert len(message) <= MOST_CHARACTERS, message
    assert any(name in message for name in names), message
