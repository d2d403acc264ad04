"""Runs that died are marked as crashed; runs that ended, or live, keep their states and reasons."""

import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from datetime import timedelta
from typing import Any
from uuid import UUID, uuid4

import pytest
from prefect.automations import AutomationCore
from prefect.client.orchestration import SyncPrefectClient, get_client
from prefect.client.schemas.objects import StateType
from prefect.events.actions import ChangeFlowRunState
from prefect.events.schemas.automations import EventTrigger, Posture
from prefect.events.schemas.events import Event
from prefect.states import Cancelling, Completed, Failed, Running, State, Suspended

from flows.orchestration.dead_runs import DeadRuns
from flows.orchestration.temporary_server import server
from flows.orchestration.work_pool import POOL, make_pool

WORKER = "reprise-here"
SILENCE = 3.0


@pytest.fixture(scope="module")
def client(tmp_path_factory: pytest.TempPathFactory) -> Iterator[SyncPrefectClient]:
    environment = {
        "PREFECT_API_URL": "",
        "PREFECT_HOME": str(tmp_path_factory.mktemp("prefect")),
        "PREFECT_SERVER_SERVICES_EVENT_PERSISTER_FLUSH_INTERVAL": "0.1",
    }
    with server(environment), get_client(sync_client=True) as client:
        make_pool(client)
        yield client


@pytest.fixture
def dead_runs(client: SyncPrefectClient) -> DeadRuns:
    return DeadRuns(POOL, WORKER, SILENCE)


MakeRun = Callable[..., UUID]


@pytest.fixture(scope="module")
def make_run(client: SyncPrefectClient) -> MakeRun:
    flow = client.create_flow_from_name("dead")

    def make(pid: int | None = None) -> UUID:
        """Return a running run: of another host, or of a process of this one."""
        if pid is None:
            return UUID(client.request("POST", "/flow_runs/", json={"flow_id": str(flow)}).json()["id"])
        deployment = client.create_deployment(flow, f"run-{uuid4()}", work_pool_name=POOL)
        run = client.create_flow_run_from_deployment(deployment).id
        client.update_flow_run(run, infrastructure_pid=str(pid))
        return run

    def make_running(pid: int | None = None) -> UUID:
        run = make(pid)
        client.set_flow_run_state(run, Running(), force=True)
        return run

    return make_running


def beat(client: SyncPrefectClient, *runs: UUID) -> None:
    """Send runs' heartbeats, and wait until the server has stored them."""
    events = [
        Event(event="prefect.flow-run.heartbeat", resource={"prefect.resource.id": f"prefect.flow-run.{run}"})
        for run in runs
    ]
    client.request("POST", "/events", json=[event.model_dump(mode="json") for event in events])
    wanted = {"filter": {"id": {"id": [str(event.id) for event in events]}}}
    deadline = time.monotonic() + 30
    while client.request("POST", "/events/filter", json=wanted).json()["total"] < len(events):
        assert time.monotonic() < deadline
        time.sleep(0.1)


def check_until(
    is_so: Callable[[], bool], dead_runs: DeadRuns, client: SyncPrefectClient, alive: tuple[UUID, ...] = ()
) -> None:
    """Check again and again, as `reprise serve` does, while the runs `alive` send heartbeats."""
    deadline = time.monotonic() + 60
    while not is_so():
        assert time.monotonic() < deadline
        if alive:
            beat(client, *alive)
        dead_runs.end(client)
        time.sleep(0.2)


def state(client: SyncPrefectClient, run: UUID) -> tuple[str, str | None]:
    found = client.read_flow_run(run).state
    assert found is not None
    return str(found.name), found.message


def test_runs_that_ended_keep_their_states_and_silent_ones_are_marked(
    client: SyncPrefectClient, dead_runs: DeadRuns, make_run: MakeRun
) -> None:
    ends: list[State[Any]] = [Completed(message="done"), Failed(message="killed"), Suspended(message="wait")]
    ended = [make_run() for _ in ends]
    for run, end in zip(ended, ends, strict=True):
        client.set_flow_run_state(run, end, force=True)
    silent, alive, mute = make_run(), make_run(), make_run()
    # The last heartbeats of runs arrive after the events of their ends.
    beat(client, silent, alive, *ended)
    started = time.monotonic()
    check_until(lambda: state(client, silent)[0] == "Crashed", dead_runs, client, (alive,))
    assert time.monotonic() - started >= SILENCE - 1
    assert state(client, silent) == ("Crashed", "No heartbeat for 3 seconds.")
    assert state(client, alive)[0] == "Running"
    assert [state(client, run) for run in ended] == [(end.name, end.message) for end in ends]
    check_until(lambda: state(client, alive)[0] == "Crashed", dead_runs, client)
    assert [state(client, run) for run in ended] == [(end.name, end.message) for end in ends]
    # A run that never sent a heartbeat is not known to send any.
    assert state(client, mute)[0] == "Running"


def test_a_run_that_ends_during_the_check_keeps_its_state(
    client: SyncPrefectClient, dead_runs: DeadRuns, make_run: MakeRun, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = make_run()
    beat(client, run)
    mark, marks = client.set_flow_run_state, []

    def mark_late(marked: UUID, found: State[Any], **options: Any) -> Any:
        mark(marked, Failed(message="killed"), force=True)
        marks.append((marked, found.name))
        return mark(marked, found, **options)

    monkeypatch.setattr(client, "set_flow_run_state", mark_late)
    check_until(lambda: bool(marks), dead_runs, client)
    assert marks == [(run, "Crashed")]
    assert state(client, run) == ("Failed", "killed")


def test_silence_of_a_server_is_not_that_of_runs(
    client: SyncPrefectClient, dead_runs: DeadRuns, make_run: MakeRun
) -> None:
    run = make_run()
    beat(client, run)
    dead_runs.end(client)
    # Nothing was checked meanwhile, since the server did not answer.
    time.sleep(SILENCE)
    dead_runs.end(client)
    assert state(client, run)[0] == "Running"
    check_until(lambda: state(client, run)[0] == "Crashed", dead_runs, client)


def test_a_process_is_gone_when_two_checks_do_not_find_it(
    client: SyncPrefectClient, dead_runs: DeadRuns, make_run: MakeRun
) -> None:
    # Process ids that no process has.
    crashed, cancelled, reported = (make_run(pid=2**22 + number) for number in range(1, 4))
    another = make_run(pid=os.getpid())
    alive = make_run(pid=0)
    client.set_flow_run_state(cancelled, Cancelling(), force=True)
    command = [sys.executable, "-c", "import time; time.sleep(60)"]
    with subprocess.Popen(command, env={**os.environ, "PREFECT__FLOW_RUN_ID": str(alive)}) as process:
        client.update_flow_run(alive, infrastructure_pid=str(process.pid))
        dead_runs.end(client)
        assert state(client, crashed)[0] == "Running"
        assert state(client, cancelled)[0] == "Cancelling"
        # Its worker comes to it.
        client.set_flow_run_state(reported, Failed(message="killed"))
        dead_runs.end(client)
        assert state(client, alive)[0] == "Running"
        process.kill()
    ended = "The process has ended."
    assert state(client, crashed) == state(client, another) == ("Crashed", ended)
    assert state(client, cancelled) == ("Cancelled", ended)
    assert state(client, reported) == ("Failed", "killed")


def test_the_first_check_marks_what_died_before_and_removes_the_automation_of_earlier_versions(
    client: SyncPrefectClient, dead_runs: DeadRuns, make_run: MakeRun
) -> None:
    name = "Mark flow runs that fell silent as crashed"
    trigger = EventTrigger(expect={"prefect.flow-run.*"}, posture=Posture.Proactive, within=timedelta(seconds=90))
    action = ChangeFlowRunState(state=StateType.CRASHED, force=True)
    client.create_automation(AutomationCore(name=name, trigger=trigger, actions=[action]))
    run = make_run(pid=2**22 + 9)
    dead_runs.clean_up(client)
    assert state(client, run) == ("Crashed", "The process has ended.")
    assert client.read_automations_by_name(name) == []
