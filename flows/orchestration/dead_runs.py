"""Flow runs whose process ended without reporting it: after a reboot, or a killed worker.

They are marked without `force`: Prefect refuses to mark a run that has ended in the meantime. An automation on the
server cannot do this: it acts on events, and a run's last heartbeat may arrive after the event of its end.
"""

from datetime import UTC, datetime, timedelta
from uuid import UUID

import httpx
import psutil
from prefect.client.orchestration import SyncPrefectClient
from prefect.client.schemas.filters import FlowRunFilter, FlowRunFilterState, FlowRunFilterStateType
from prefect.client.schemas.objects import FlowRun, StateType, WorkerStatus
from prefect.events.filters import EventFilter, EventNameFilter, EventResourceFilter
from prefect.states import Cancelled, Crashed

_ACTIVE = [StateType.PENDING, StateType.RUNNING, StateType.CANCELLING]
# Earlier versions made the server force the state of runs.
_OLD_AUTOMATION = "Mark flow runs that fell silent as crashed"
# Flows send a heartbeat every 30 seconds.
_SECONDS_OF_SILENCE = 90.0


class DeadRuns:
    """Finds the flow runs that died, at one check after another.

    Runs of `pool` are looked up among this host's processes if `worker` is the pool's only online worker. Other runs,
    which may be on other hosts, count as dead when they have sent no heartbeat for `seconds`. A run that is marked in
    error corrects its state (`flows.orchestration.flow_progress`).
    """

    def __init__(self, pool: str, worker: str, seconds: float = _SECONDS_OF_SILENCE) -> None:
        self._pool = pool
        self._worker = worker
        self._silence = timedelta(seconds=seconds)
        self._checked = self._answering = datetime.min.replace(tzinfo=UTC)
        self._suspects: set[UUID] = set()

    def clean_up(self, client: SyncPrefectClient) -> None:
        """Mark the runs of this host that died before the worker started, and remove what earlier versions made."""
        for automation in client.read_automations_by_name(_OLD_AUTOMATION):
            client.delete_automation(automation.id)
        # Nobody else will report their end.
        self._suspects = {run.id for run in self._active(client)}
        self.end(client)

    def end(self, client: SyncPrefectClient) -> None:
        """Mark the runs that died as crashed, or as cancelled if cancellation was requested.

        A process must be gone at two checks in a row, since its worker reports its end, with the reason, shortly
        after it. Does nothing if the server does not answer.
        """
        try:
            self._end(client)
        except httpx.HTTPError:
            # The next check tries again.
            return

    def _end(self, client: SyncPrefectClient) -> None:
        now = datetime.now(UTC)
        runs, is_alone = self._active(client), self._is_alone(client)
        if now - self._checked > self._silence / 2:
            # Heartbeats of the time without a server are lost.
            self._answering = now
        self._checked = now
        here = [run for run in runs if is_alone and run.work_pool_name == self._pool]
        gone = {run.id for run in here if run.infrastructure_pid and not _is_alive(run)}
        for run in runs:
            if run.id in gone & self._suspects:
                _mark(client, run, "The process has ended.")
            elif run not in here and self._is_silent(client, run, now):
                _mark(client, run, f"No heartbeat for {self._silence.total_seconds():.0f} seconds.")
        self._suspects = gone

    def _active(self, client: SyncPrefectClient) -> list[FlowRun]:
        state = FlowRunFilterState(type=FlowRunFilterStateType(any_=_ACTIVE))
        return client.read_flow_runs(flow_run_filter=FlowRunFilter(state=state))

    def _is_alone(self, client: SyncPrefectClient) -> bool:
        workers = client.read_workers_for_work_pool(self._pool)
        return not any(found.name != self._worker and found.status == WorkerStatus.ONLINE for found in workers)

    def _is_silent(self, client: SyncPrefectClient, run: FlowRun, now: datetime) -> bool:
        """Return whether a run sent a heartbeat once, but not since `_silence` ago."""
        found = client.read_events(
            EventFilter(
                event=EventNameFilter(name=["prefect.flow-run.heartbeat"]),
                resource=EventResourceFilter(id=[f"prefect.flow-run.{run.id}"]),
            ),
            limit=1,
        )
        # The time of the server is this host's, which the times of other hosts may differ from.
        return bool(found.events) and now - max(found.events[0].received, self._answering) > self._silence


def _mark(client: SyncPrefectClient, run: FlowRun, message: str) -> None:
    is_cancelled = run.state is not None and run.state.type == StateType.CANCELLING
    client.set_flow_run_state(run.id, (Cancelled if is_cancelled else Crashed)(message=message))


def _is_alive(run: FlowRun) -> bool:
    assert run.infrastructure_pid is not None
    try:
        process = psutil.Process(int(run.infrastructure_pid.split(":")[-1]))
        # The process id may have been reused.
        return process.status() != psutil.STATUS_ZOMBIE and _flow_run(process) == run.id
    except (psutil.NoSuchProcess, psutil.AccessDenied):
        # A process that cannot be inspected belongs to another user, so it is not this flow run.
        return False


def _flow_run(process: psutil.Process) -> UUID | None:
    found = process.environ().get("PREFECT__FLOW_RUN_ID")
    return UUID(found) if found else None
