"""The temporary server of a run answers to its own process, and to nobody else."""

import os
import sqlite3
import subprocess
import sys
from base64 import b64encode
from pathlib import Path

import psutil
import pytest
from prefect import flow
from prefect.client.orchestration import get_client
from prefect.client.schemas.filters import FlowFilter, FlowFilterName
from prefect.settings import get_current_settings

from flows.orchestration.configured_server import answers
from flows.orchestration.temporary_server import is_private, server
from tests.flows.orchestration.web import WEBSOCKET, ask


@flow
def add(first: int, second: int) -> int:
    return first + second


def test_only_its_own_process_may_use_it(tmp_path: Path) -> None:
    with server({"PREFECT_HOME": str(tmp_path), "PREFECT_API_URL": ""}):
        assert is_private()
        assert add(1, 2) == 3
        settings = get_current_settings().api
        assert settings.url is not None and settings.auth_string is not None
        assert answers(settings.url)
        port = int(settings.url.split(":")[2].split("/")[0])
        with get_client(sync_client=True) as client:
            [run] = client.read_flow_runs(flow_filter=FlowFilter(name=FlowFilterName(any_=["add"])))
            assert run.state is not None and run.state.name == "Completed"
        password = {"Authorization": f"Basic {b64encode(settings.auth_string.get_secret_value().encode()).decode()}"}
        assert ask(port, "/api/version", password).status == 200
        for headers in ({}, {"Authorization": f"Basic {b64encode(b'reprise:guess').decode()}"}):
            assert ask(port, "/api/version", headers).status == 401
            assert ask(port, "/api/flows/", headers, "POST", '{"name": "foreign"}').status == 401
        for foreign in ({"Origin": "http://evil.example"}, {"Host": "evil.example"}):
            assert ask(port, "/api/version", {**password, **foreign}).status == 403
            assert ask(port, "/api/events/in", {**WEBSOCKET, **foreign}).status == 403
        # Without the protocol that sends a password.
        assert ask(port, "/api/events/in", WEBSOCKET).status == 403
    assert not answers(settings.url)


def test_the_server_ends_with_its_process_however_that_ends(tmp_path: Path) -> None:
    code = "from flows.orchestration.temporary_server import server\nwith server(): print('ready', flush=True); input()"
    environment = {**os.environ, "PREFECT_HOME": str(tmp_path), "PREFECT_API_URL": ""}
    command = subprocess.Popen(
        [sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=environment
    )
    assert command.stdout is not None
    assert command.stdout.readline() == b"ready\n"
    [served] = psutil.Process(command.pid).children()
    command.kill()
    command.communicate()
    served.wait(timeout=30)


def test_runs_at_the_same_time_share_a_home_but_no_database(tmp_path: Path) -> None:
    home, temporary = tmp_path / "home", tmp_path / "temporary"
    temporary.mkdir()
    environment = {"PREFECT_HOME": str(home), "PREFECT_API_URL": "", "TMPDIR": str(temporary)}
    with server(environment):
        assert add(1, 2) == 3
        with server(environment):
            assert add(3, 4) == 7
            assert len([*temporary.glob("*/prefect.db")]) == 1
    with sqlite3.connect(home / "prefect.db") as database:
        assert database.execute("select count(*) from flow_run").fetchone() == (1,)
    assert not [*temporary.iterdir()]


def test_a_server_that_cannot_start_is_an_error_that_says_why(tmp_path: Path) -> None:
    home = tmp_path / "file"
    home.touch()
    with (
        pytest.raises(ValueError, match=r"did not start \(.*unable to open database file\); check the disk"),
        server({"PREFECT_HOME": str(home), "PREFECT_API_URL": ""}),
    ):
        pass
