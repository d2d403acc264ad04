"""The temporary server of a run answers to its own process, and to nobody else."""

from base64 import b64encode
from pathlib import Path

from prefect import flow
from prefect.client.orchestration import get_client
from prefect.client.schemas.filters import FlowFilter, FlowFilterName
from prefect.settings import PREFECT_HOME, get_current_settings, temporary_settings

from flows.orchestration.temporary_server import answers, is_private, server
from tests.flows.orchestration.web import WEBSOCKET, ask


@flow
def add(first: int, second: int) -> int:
    return first + second


def test_only_its_own_process_may_use_it(tmp_path: Path) -> None:
    with temporary_settings({PREFECT_HOME: tmp_path}), server():
        assert is_private()
        assert add(1, 2) == 3
        settings = get_current_settings().api
        assert settings.url is not None and settings.auth_string is not None
        assert answers(settings.url)
        port = int(settings.url.split(":")[2].split("/")[0])
        with get_client(sync_client=True) as client:
            # The database may be that of a server which ran in this process before.
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
