"""`reprise serve`: Prefect's server, work pool, deployments and a worker, and a web server for the reports.

Services that end are restarted; all services end with this process, however it ends.
"""

import ctypes
import os
import signal
import socket
import subprocess
import sys
import time
from contextlib import suppress
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path

import psutil
from prefect.automations import AutomationCore
from prefect.client.orchestration import SyncPrefectClient, get_client
from prefect.client.schemas.actions import WorkPoolCreate
from prefect.client.schemas.objects import StateType
from prefect.events.actions import ChangeFlowRunState
from prefect.events.schemas.automations import EventTrigger, Posture
from prefect.exceptions import ObjectNotFound
from prefect.settings import PREFECT_API_URL, PREFECT_CLIENT_MAX_RETRIES, get_current_settings, temporary_settings

from flows.orchestration.dead_runs import end_dead_runs
from flows.orchestration.temporary_server import answers

POOL = "reprise"
# The queue of the deployments that are limited to one run at a time.
_ONE_AT_A_TIME = "production"
_AUTOMATION = "Mark flow runs that fell silent as crashed"
_SECONDS_TO_START = 120.0
_HEARTBEAT_TIMEOUT_SECONDS = 90
_SECONDS_BETWEEN_POLLS = 20.0
# Most ranks save within 20 seconds, and a flow needs some more to report it; ranks of large models finish saving on
# their own.
_SECONDS_TO_STOP = 45.0


@dataclass
class _Service:
    """A process that is restarted when it ends, and its log."""

    name: str
    command: list[str]
    log: Path
    environment: dict[str, str]
    process: subprocess.Popen[bytes] | None = None
    started: list[float] = field(default_factory=list)

    def start(self) -> None:
        self.started.append(time.monotonic())
        with self.log.open("ab") as log:
            # A separate session: Ctrl-C only reaches this process, which then stops the others in order.
            self.process = subprocess.Popen(
                self.command,
                env=self.environment,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
                preexec_fn=_end_with_parent,  # noqa: PLW1509 - there is one thread, and the function takes no locks
            )

    def keep_running(self) -> None:
        if self.process is not None and self.process.poll() is None:
            return
        if len([moment for moment in self.started if time.monotonic() - moment < 60]) >= 5:
            raise ValueError(f"{self.name} ended 5 times within a minute; see its log {self.log}")
        print(f"{self.name} ended; restarting it (log: {self.log})", flush=True)
        self.start()

    def stop(self) -> None:
        if self.process is None or self.process.poll() is not None:
            return
        self.process.terminate()
        try:
            self.process.wait(_SECONDS_TO_STOP)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()


def _end_with_parent() -> None:
    # A shell that starts this in the background ignores SIGINT, and a worker that inherits that would never end.
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(1, signal.SIGTERM)  # PR_SET_PDEATHSIG


def serve(host: str, port: int, allowed: list[Path]) -> None:
    """Serve until interrupted: Prefect on `port` of `host`, the reports in runs/ on the next port.

    allowed: folders that flows may use besides the working directory. Raises ValueError if a port is taken or a service
    does not start.
    """
    if not Path("prefect.yaml").is_file():
        raise ValueError(f"{Path.cwd()}: has no prefect.yaml; run this command in Reprise's folder")
    _check_free(host, port)
    _check_free("127.0.0.1", port + 1)
    environment = _environment(host, port, allowed)
    services = _services(host, port, environment)
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(0))
    try:
        for service in services[:2]:
            service.start()
        with temporary_settings({PREFECT_API_URL: environment["PREFECT_API_URL"]}):
            _wait_for_server(services[0], environment["PREFECT_API_URL"])
            with get_client(sync_client=True) as client:
                _make_pool(client)
                _make_automation(client)
                end_dead_runs(client, POOL, _worker_name())
            _deploy(environment)
        services[2].start()
        print(f"Prefect: http://{host}:{port}\nReports: http://127.0.0.1:{port + 1}", flush=True)
        if port != 4200:
            print(f"In other terminals: export PREFECT_API_URL={environment['PREFECT_API_URL']}", flush=True)
        print("Start a run there, or with: prefect deployment run 'multi-round/demo' --watch", flush=True)
        _watch(services, environment["PREFECT_API_URL"])
    except KeyboardInterrupt:
        pass
    finally:
        print("stopping", flush=True)
        _stop_flows(services[2])
        # The worker before the server: it reports its end to the server.
        for service in reversed(services):
            service.stop()


def _watch(services: list[_Service], url: str) -> None:
    """Keep the services running, and the states of runs up to date, until interrupted."""
    with temporary_settings({PREFECT_API_URL: url, PREFECT_CLIENT_MAX_RETRIES: 0}):
        last_poll = time.monotonic()
        while True:
            time.sleep(1)
            for service in services:
                service.keep_running()
            if time.monotonic() - last_poll > _SECONDS_BETWEEN_POLLS:
                with get_client(sync_client=True) as client:
                    end_dead_runs(client, POOL, _worker_name())
                last_poll = time.monotonic()


def _worker_name() -> str:
    return f"reprise-{socket.gethostname()}"


def _stop_flows(worker: _Service) -> None:
    """Make the running flows save and end, since stopping the worker would kill them."""
    if worker.process is None or worker.process.poll() is not None:
        return
    flows = []
    with suppress(psutil.NoSuchProcess):
        for process in psutil.Process(worker.process.pid).children(recursive=True):
            # The process may end at any moment.
            with suppress(psutil.NoSuchProcess):
                if "prefect.engine" in process.cmdline():
                    process.terminate()
                    flows.append(process)
    psutil.wait_procs(flows, timeout=_SECONDS_TO_STOP)


def _check_free(host: str, port: int) -> None:
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError as error:
            raise ValueError(
                f"--port: {host}:{port} cannot be used ({error.strerror}); stop what uses it, or choose another port"
            ) from None


def _environment(host: str, port: int, allowed: list[Path]) -> dict[str, str]:
    is_everywhere = host == "0.0.0.0"  # noqa: S104 - the user asked for it
    reachable = "127.0.0.1" if is_everywhere else host
    # A remote browser has to call the API on the host that served the page.
    pages = {"PREFECT_SERVER_UI_API_URL": "/api"} if is_everywhere else {}
    return {
        **os.environ,
        **pages,
        "PWD": str(Path.cwd()),
        "PREFECT_API_URL": f"http://{reachable}:{port}/api",
        "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
        "DO_NOT_TRACK": "1",
        "PREFECT_FLOWS_HEARTBEAT_FREQUENCY": "30",
        "REPRISE_ALLOW": os.pathsep.join(str(folder.resolve()) for folder in allowed),
        "REPRISE_REPORTS_URL": f"http://127.0.0.1:{port + 1}",
        "REPRISE_REPORTS_FOLDER": str(Path("runs").resolve()),
    }


def _services(host: str, port: int, environment: dict[str, str]) -> list[_Service]:
    logs = get_current_settings().home / "logs"
    logs.mkdir(parents=True, exist_ok=True)
    Path("runs").mkdir(exist_ok=True)
    prefect = [sys.executable, "-m", "prefect"]
    commands = {
        "server": [*prefect, "server", "start", "--host", host, "--port", str(port)],
        "reports": [
            *(sys.executable, "-m", "http.server", str(port + 1)), *("--bind", "127.0.0.1", "--directory", "runs")
        ],
        "worker": [*prefect, "worker", "start", "--pool", POOL, "--name", _worker_name()],
    }  # fmt: skip
    return [_Service(name, command, logs / f"{name}.log", environment) for name, command in commands.items()]


def _wait_for_server(server: _Service, url: str) -> None:
    deadline = time.monotonic() + _SECONDS_TO_START
    while time.monotonic() < deadline:
        assert server.process is not None
        if server.process.poll() is not None:
            raise ValueError(f"Prefect's server ended during startup; see its log {server.log}")
        if answers(url):
            return
        time.sleep(0.2)
    raise ValueError(f"Prefect's server did not start within {_SECONDS_TO_START:.0f} s; see its log {server.log}")


def _make_pool(client: SyncPrefectClient) -> None:
    try:
        client.read_work_pool(POOL)
    except ObjectNotFound:
        client.create_work_pool(WorkPoolCreate(name=POOL, type="process"))
    try:
        client.read_work_queue_by_name(_ONE_AT_A_TIME, work_pool_name=POOL)
    except ObjectNotFound:
        client.create_work_queue(_ONE_AT_A_TIME, concurrency_limit=1, work_pool_name=POOL)


def _make_automation(client: SyncPrefectClient) -> None:
    """Make the server mark flow runs without a heartbeat as crashed: killed with their worker, or by a reboot."""
    ends = [f"prefect.flow-run.{state}" for state in ("Completed", "Failed", "Cancelled", "Crashed", "Suspended")]
    automation = AutomationCore(
        name=_AUTOMATION,
        trigger=EventTrigger(
            after={"prefect.flow-run.heartbeat"},
            expect={"prefect.flow-run.heartbeat", *ends},
            match={"prefect.resource.id": ["prefect.flow-run.*"]},
            for_each={"prefect.resource.id"},
            posture=Posture.Proactive,
            threshold=1,
            within=timedelta(seconds=_HEARTBEAT_TIMEOUT_SECONDS),
        ),
        actions=[
            ChangeFlowRunState(
                state=StateType.CRASHED,
                name="Crashed",
                message=f"No heartbeat for {_HEARTBEAT_TIMEOUT_SECONDS} seconds.",
                force=True,
            )
        ],
    )
    if not client.read_automations_by_name(_AUTOMATION):
        client.create_automation(automation)


def _deploy(environment: dict[str, str]) -> None:
    command = [sys.executable, "-m", "prefect", "--no-prompt", "deploy", "--all"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise ValueError(f"prefect.yaml could not be deployed: {done.stdout[-2000:]}{done.stderr[-2000:]}")
