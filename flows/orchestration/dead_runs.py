"""Flow runs whose process ended without reporting it: after a reboot, or a killed worker."""

from uuid import UUID

import httpx
import psutil
from prefect.client.orchestration import SyncPrefectClient
from prefect.client.schemas.filters import (
    FlowRunFilter,
    FlowRunFilterState,
    FlowRunFilterStateType,
    WorkPoolFilter,
    WorkPoolFilterName,
)
from prefect.client.schemas.objects import FlowRun, StateType, WorkerStatus
from prefect.states import Cancelled, Crashed


def end_dead_runs(client: SyncPrefectClient, pool: str, worker: str) -> None:
    """Mark the runs of `pool` whose process has ended as crashed, or as cancelled if cancellation was requested.

    Process ids are known to be this host's only if `worker` is the only online worker. If other workers share the pool,
    this does nothing: the automation that `flows.orchestration.serve` creates marks runs without a heartbeat. A run
    that is marked in error corrects its state (`flows.orchestration.flow_progress`).
    """
    try:
        workers = client.read_workers_for_work_pool(pool)
        if any(found.name != worker and found.status == WorkerStatus.ONLINE for found in workers):
            return
        runs = client.read_flow_runs(
            work_pool_filter=WorkPoolFilter(name=WorkPoolFilterName(any_=[pool])),
            flow_run_filter=FlowRunFilter(
                state=FlowRunFilterState(
                    type=FlowRunFilterStateType(any_=[StateType.PENDING, StateType.RUNNING, StateType.CANCELLING])
                )
            ),
        )
        for run in (run for run in runs if run.infrastructure_pid and not _is_alive(run)):
            is_cancelled = run.state is not None and run.state.type == StateType.CANCELLING
            state = Cancelled if is_cancelled else Crashed
            client.set_flow_run_state(run.id, state(message="The process has ended."), force=True)
    except httpx.HTTPError:
        # The server does not answer; the next poll tries again.
        return


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
