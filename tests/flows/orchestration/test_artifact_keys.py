"""The keys of a run's artifacts in Prefect: what Prefect allows, distinct for distinct runs."""

import re

import pytest

from flows.orchestration.flow_progress import artifact_key


@pytest.mark.parametrize(("name", "key"), [("demo", "demo"), ("My_run.2", "my-run-2"), ("--", "run")])
def test_latin_names_keep_their_keys(name: str, key: str) -> None:
    assert artifact_key(name) == key


def test_names_in_other_letters_do_not_share_keys() -> None:
    names = ["北京", "上海", "новости", "run", "run-北京", "größe", "grosse", "gr-e"]
    keys = [artifact_key(name) for name in names]
    assert len(set(keys)) == len(names)
    assert all(re.fullmatch("[a-z0-9-]+", key) for key in keys)
