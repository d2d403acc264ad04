"""A run's progress, logs, tables, pictures and events for Prefect's UI, and its cancellation from there.

Tables, pictures and events are sent from a separate thread, and queued until the server accepts them: a server that
does not answer delays nothing, and receives them later.
"""

import contextvars
import json
import os
import re
import threading
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any
from urllib.parse import quote
from uuid import UUID

import httpx
from prefect.client.orchestration import SyncPrefectClient, get_client
from prefect.client.schemas.actions import ArtifactCreate, ArtifactUpdate
from prefect.client.schemas.objects import StateType
from prefect.context import FlowRunContext, TaskRunContext
from prefect.events import emit_event
from prefect.exceptions import ObjectNotFound
from prefect.logging import get_run_logger
from prefect.settings import PREFECT_CLIENT_MAX_RETRIES, temporary_settings
from prefect.states import Cancelled, Running

from data_scoring.base.files import fingerprint
from flows.display.markdown import markdown_text
from flows.display.result_page import Page
from flows.display.terminal_progress import Pace, TerminalProgress
from flows.launch.log_lines import LogTail
from flows.orchestration.temporary_server import is_private
from flows.report import tables
from flows.report.run_report import write_report
from flows.run.folder import Run
from flows.stages.refine import selection_of
from flows.stages.stage_order import fingerprint_of

_SECONDS_BETWEEN_POLLS = 2.0
_SECONDS_BETWEEN_LINES = 30.0
_LINES_A_POLL = 20
# If the server does not answer for longer than this when the run ends, it receives nothing until the next run.
_PATIENCE_SECONDS = 900.0
_SECONDS_TO_STOP = 4.0
_AWAY = (httpx.HTTPError, OSError)
_CANCELLED = "cancelled in Prefect; the run in {} can be resumed"

# Sends one item to the server.
_Delivery = Callable[[SyncPrefectClient], None]


def has_deployment() -> bool:
    """Return whether the current flow run was submitted to a deployment, rather than called directly."""
    context = FlowRunContext.get()
    return context is not None and context.flow_run is not None and context.flow_run.deployment_id is not None


def allowed_folders() -> list[Path]:
    """Return the folders that a deployment's flows may use, since its users may not be the machine's owner.

    Without a deployment, there are no restrictions, and the list is empty.
    """
    if not has_deployment():
        return []
    return [Path.cwd(), *(Path(folder) for folder in os.environ.get("REPRISE_ALLOW", "").split(os.pathsep) if folder)]


def artifact_key(name: str) -> str:
    """Return what the keys of a run's artifacts begin with: small Latin letters, digits and dashes are allowed.

    Names in other letters get a fingerprint, so that no two share their keys.
    """
    key = re.sub("[^a-z0-9]+", "-", name.lower()).strip("-") or "run"
    return key if name.isascii() else f"{key}-{fingerprint(name)}"


class RunCancelledError(Exception):
    """The run was cancelled in Prefect."""


class FlowProgress:
    """Reports the current flow run to the terminal and to Prefect; a context manager and a progress callback.

    The callback raises RunCancelledError once the flow run is cancelled, since the worker that should stop this process
    may have ended.
    """

    def __init__(self, run_folder: Path) -> None:
        context = FlowRunContext.get()
        assert context is not None and context.flow_run is not None
        self._id: UUID = context.flow_run.id
        # A worker's flows have no terminal, and nobody can see a temporary server.
        self._terminal = None if has_deployment() else TerminalProgress()
        self._is_shown = not is_private()
        self._name = artifact_key(run_folder.name)
        self._folder = run_folder
        self._logger = get_run_logger()
        self._tail = LogTail(run_folder / "logs")
        self._deliveries: deque[_Delivery] = deque()
        self._progress = _ProgressArtifact()
        self._logged = 0.0
        self._is_cancelled = False
        self._is_stopped = False
        self._is_over = threading.Event()
        # The copied context makes the thread use this flow's server.
        self._thread = threading.Thread(target=contextvars.copy_context().run, args=(self._work,), daemon=True)

    def __enter__(self) -> "FlowProgress":
        if self._terminal is not None:
            self._terminal.__enter__()
        if self._is_shown:
            self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._terminal is not None:
            self._terminal.__exit__(kind, error, trace)
        self._is_stopped = error is not None and not isinstance(error, Exception)
        self._is_over.set()
        if self._is_shown:
            # Prefect sets the flow run's final state right after this, and does not wait for a server that does not
            # answer. After a signal, do not wait long.
            self._thread.join(timeout=_SECONDS_TO_STOP if self._is_stopped else _PATIENCE_SECONDS)

    def __call__(self, what: str, done: int, total: int | None) -> None:
        """Report that `done` of `total` units of `what` are done. Raises RunCancelledError after cancellation."""
        if self._is_cancelled:
            raise RunCancelledError(_CANCELLED.format(self._folder))
        if self._terminal is not None:
            self._terminal(what, done, total)
        if not self._is_shown:
            return
        task = TaskRunContext.get()
        if task is None:
            # Several tasks run concurrently; the UI shows the state of each.
            line = f"{what}: {done} of {total}"
        else:
            line = self._progress.note(f"{self._name}-{task.task_run.name}", task.task_run.id, what, done, total)
        if time.monotonic() - self._logged > _SECONDS_BETWEEN_LINES:
            self._logged = time.monotonic()
            self._logger.info(line)

    def completed(self, run: Run, stage: str, round_number: int) -> None:
        """Show the result of a stage, if it has something to show that was not shown before."""
        show = {
            "inherit": self._inherited,
            "score": self._scored,
            "refine": self._refined,
            "train": self._trained,
            "evaluate": self._evaluated,
        }.get(stage)
        if show is None or not self._is_shown:
            return
        marker = run.round_folder(round_number) / f".told-{stage}"
        identity = fingerprint_of(run, stage, round_number)
        if marker.exists() and marker.read_text() == identity:
            return
        self._announce(run, "round" if stage == "train" else stage, round_number, show(run, round_number))

        def mark_shown(client: SyncPrefectClient) -> None:
            # Written after everything was sent: if the process is killed before that, it is sent again.
            marker.write_text(identity)

        self._deliveries.append(mark_shown)

    def _inherited(self, run: Run, round_number: int) -> dict[str, Any]:
        rows = tables.inheritance(run)
        self._show("inheritance", "table", json.dumps(rows), "Layers, and what round 1 inherits of each.")
        return {"teacher": rows[0]["teacher"], "layers": len(rows)}

    def _scored(self, run: Run, round_number: int) -> dict[str, Any]:
        rows = tables.shard_losses(run, round_number)
        self._show(f"round-{round_number}-losses", "table", json.dumps(rows), "Losses by shard, nats per token.")
        rows = tables.budgets(run, round_number)
        self._show(
            f"round-{round_number}-budget", "table", json.dumps(rows), "Scoring budgets, costs in training tokens."
        )
        return {}

    def _refined(self, run: Run, round_number: int) -> dict[str, Any]:
        kept = selection_of(run, round_number)
        page = tables.selection_page(run, kept)
        self._show(
            f"round-{round_number}-selection", "markdown", page, "Samples that are kept, and samples that are dropped."
        )
        total = kept.total
        return {"num_kept": total.num_kept, "num_tokens_kept": total.num_tokens_kept, "share_kept": total.share}

    def _trained(self, run: Run, round_number: int) -> dict[str, Any]:
        address = _address(write_report(run))
        self._show(f"round-{round_number}-training", "markdown", tables.loss_page(run), "The curves so far.")
        rows = tables.rounds(run)
        self._show("rounds", "table", json.dumps(rows), "The rounds so far.")
        link = f"[Report of {markdown_text(run.folder.name)}]({address})\n\n{address}"
        self._show(f"round-{round_number}-report", "markdown", link, "Link to the report.")
        return rows[round_number - 1]

    def _evaluated(self, run: Run, round_number: int) -> dict[str, Any]:
        write_report(run)
        self._show("evaluation", "markdown", tables.evaluation_page(run), "Task scores of the models.")
        return tables.scores(run, round_number)

    def tried(self, rows: list[dict[str, Any]], page: Page | None = None) -> None:
        """Show the trials of a search so far and, when it exists, the page of results."""
        if not self._is_shown:
            return
        self._show("trials", "table", json.dumps(rows), "The trials so far, best first.")
        if page is not None:
            address = _address(page.page)
            content = f"[Report of {markdown_text(self._folder.name)}]({address})\n\n{address}\n\n{page.text}"
            self._show("report", "markdown", content, "Results of the search.")

    def _show(self, key: str, kind: str, data: str, description: str) -> None:
        artifact = ArtifactCreate(
            key=f"{self._name}-{key}", type=kind, data=data, description=description, flow_run_id=self._id
        )

        def send(client: SyncPrefectClient) -> None:
            client.create_artifact(artifact)

        self._deliveries.append(send)

    def _announce(self, run: Run, what: str, round_number: int, payload: dict[str, Any]) -> None:
        resource = {"prefect.resource.id": f"reprise.run.{self._name}", "prefect.resource.name": run.folder.name}
        content = {"run": run.folder.name, "folder": str(run.folder), "round": round_number, **payload}

        def send(client: SyncPrefectClient) -> None:
            # Sending an event returns no response, so first check that the server answers.
            client.read_flow_run(self._id)
            emit_event(event=f"reprise.{what}.completed", resource=resource, payload=content)

        self._deliveries.append(send)

    def _work(self) -> None:
        with temporary_settings({PREFECT_CLIENT_MAX_RETRIES: 0}), get_client(sync_client=True) as client:
            while not self._is_over.wait(_SECONDS_BETWEEN_POLLS):
                self._poll(client)
            # Send everything that is left, and make sure that the server answers when Prefect sets the final state.
            while not self._poll(client):
                time.sleep(_SECONDS_BETWEEN_POLLS)
            if self._is_stopped and self._is_cancelled:
                self._confirm_cancellation(client)

    def _confirm_cancellation(self, client: SyncPrefectClient) -> None:
        """Set the state after the ranks have stopped: a worker that cancels does so half a minute after the process."""
        try:
            client.set_flow_run_state(self._id, Cancelled(message=_CANCELLED.format(self._folder)))
        except (*_AWAY, ObjectNotFound) as error:
            self._logger.debug("Prefect's server did not answer: %s", error)

    def _poll(self, client: SyncPrefectClient) -> bool:
        """Send the queued items and check for cancellation; return False if the server does not answer."""
        try:
            for line in self._tail.lines(_LINES_A_POLL):
                self._logger.info(line)
            while self._deliveries:
                try:
                    self._deliveries[0](client)
                except httpx.HTTPStatusError as error:
                    if not error.response.is_client_error:
                        raise
                    self._logger.warning("Prefect's server rejected an item: %s", error)
                self._deliveries.popleft()
            self._progress.send(client, self._id)
            self._check_state(client)
        except ObjectNotFound:
            # A deleted flow run counts as cancelled.
            self._is_cancelled = True
        except _AWAY as error:
            self._logger.debug("Prefect's server did not answer: %s", error)
            return False
        return True

    def _check_state(self, client: SyncPrefectClient) -> None:
        state = client.read_flow_run(self._id).state
        if state is None:
            return
        if state.type in (StateType.CANCELLING, StateType.CANCELLED):
            self._is_cancelled = True
        elif state.type == StateType.CRASHED and not self._is_over.is_set():
            # The run was marked as crashed while its heartbeats did not reach the server.
            client.set_flow_run_state(self._id, Running(message="The run is still running."), force=True)


@dataclass
class _TaskProgress:
    """The progress of one task: percent and line, as noted and as last sent, and the artifact that shows it."""

    key: str
    task: UUID
    noted: tuple[float, str] = (0.0, "")
    sent: tuple[float, str] | None = None
    artifact: UUID | None = None


class _ProgressArtifact:
    """The progress of the running task, one artifact per task, sent when it has changed.

    The last progress of a task is sent, too, if the next one has begun meanwhile.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._pace = Pace()
        # The last one is of the running task.
        self._tasks: list[_TaskProgress] = []

    def note(self, key: str, task: UUID, what: str, done: int, total: int | None) -> str:
        """Record the task's progress and return it as a line of text."""
        with self._lock:
            if not self._tasks or self._tasks[-1].task != task:
                self._tasks.append(_TaskProgress(key, task))
            self._pace.note(what, done)
            line = self._pace.line(what, done, total)
            self._tasks[-1].noted = (round(100 * done / total, 1) if total else 0.0, line)
            return line

    def send(self, client: SyncPrefectClient, flow_run: UUID) -> None:
        """Send the progress that has changed since it was last sent."""
        with self._lock:
            waiting = [(each, each.noted) for each in self._tasks if each.noted != each.sent]
        for each, content in waiting:
            percent, line = content
            if each.artifact is None:
                created = client.create_artifact(
                    ArtifactCreate(
                        key=each.key,
                        type="progress",
                        description=line,
                        data=percent,
                        flow_run_id=flow_run,
                        task_run_id=each.task,
                    )
                )
                each.artifact = created.id
            else:
                client.update_artifact(each.artifact, ArtifactUpdate(description=line, data=percent))
            with self._lock:
                each.sent = content
                self._tasks = [other for other in self._tasks[:-1] if other.noted != other.sent] + self._tasks[-1:]


def _address(report: Path) -> str:
    """Return the report's URL: on the server of run folders if there is one, else of its file."""
    base, folder = os.environ.get("REPRISE_REPORTS_URL"), os.environ.get("REPRISE_REPORTS_FOLDER")
    if base and folder and report.is_relative_to(folder):
        return f"{base}/{quote(report.relative_to(folder).as_posix())}"
    return report.as_uri()
