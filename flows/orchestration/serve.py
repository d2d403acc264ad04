"""`reprise serve`: Prefect's server, work pool, deployments and a worker, and a web server for the reports.

Services that end are restarted; all services end with this process, however it ends.
"""

import ctypes
import signal
import socket
import subprocess
import sys
import time
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

import psutil
from prefect.client.orchestration import get_client
from prefect.settings import (
    PREFECT_API_AUTH_STRING,
    PREFECT_API_URL,
    PREFECT_CLIENT_MAX_RETRIES,
    temporary_settings,
)

from flows.orchestration.configured_server import answers
from flows.orchestration.dead_runs import DeadRuns
from flows.orchestration.environment import served_environment
from flows.orchestration.work_pool import POOL, make_pool

_SECONDS_TO_START = 120.0
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
    """Serve until interrupted: Prefect on `port` of `host`, the reports in runs/ on the next port of this machine.

    allowed: folders that flows may use besides the working directory. Call `check_place` before. Raises ValueError if a
    service does not start.
    """
    environment = served_environment(host, port, allowed)
    services = _services(host, port, environment)
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(0))
    # For this process's own requests, which also stop retrying after an answer is missing.
    settings = {PREFECT_API_URL: environment["PREFECT_API_URL"], PREFECT_CLIENT_MAX_RETRIES: 0}
    if "PREFECT_API_AUTH_STRING" in environment:
        settings[PREFECT_API_AUTH_STRING] = environment["PREFECT_API_AUTH_STRING"]
    try:
        for service in services[:2]:
            service.start()
        with temporary_settings(settings):
            _wait_for_server(services[0], environment["PREFECT_API_URL"])
            print("Prefect's server answers; deploying the flows of prefect.yaml", flush=True)
            dead_runs = DeadRuns(POOL, _worker_name())
            with get_client(sync_client=True) as client:
                make_pool(client)
                dead_runs.clean_up(client)
            _deploy(environment)
            services[2].start()
            print(_greeting(environment, port), flush=True)
            _watch(services, dead_runs)
    except KeyboardInterrupt:
        pass
    finally:
        print("stopping", flush=True)
        _stop_flows(services[2])
        # The worker before the server: it reports its end to the server.
        for service in reversed(services):
            service.stop()


def _greeting(environment: dict[str, str], port: int) -> str:
    url, home = environment["PREFECT_API_URL"], environment["PREFECT_HOME"]
    exports = [f"PREFECT_API_URL={url}"] if port != 4200 or "127.0.0.1" not in url else []
    lines = [
        f"Prefect: {url.removesuffix('/api')} (its home: {home})",
        f"Reports: {environment['REPRISE_REPORTS_URL']}/NAME/report.html, of runs/NAME",
    ]
    if "PREFECT_API_AUTH_STRING" in environment:
        exports.append("PREFECT_API_AUTH_STRING=PASSWORD")
        lines.append(f"Its pages ask for the password, which you have set, or else is in {home}/password")
    if exports:
        lines.append(f"In other terminals: export {' '.join(exports)}")
    lines.append("Start a run there, or with: prefect deployment run 'multi-round/demo' --watch")
    return "\n".join(lines)


def _watch(services: list[_Service], dead_runs: DeadRuns) -> None:
    """Keep the services running, and the states of runs up to date, until interrupted."""
    last_poll = time.monotonic()
    while True:
        time.sleep(1)
        for service in services:
            service.keep_running()
        if time.monotonic() - last_poll > _SECONDS_BETWEEN_POLLS:
            with get_client(sync_client=True) as client:
                dead_runs.end(client)
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


def _services(host: str, port: int, environment: dict[str, str]) -> list[_Service]:
    logs = Path(environment["PREFECT_HOME"]) / "logs"
    logs.mkdir(exist_ok=True)
    Path("runs").mkdir(exist_ok=True)
    python = [sys.executable, "-m"]
    commands = {
        "server": [*python, "flows.orchestration.prefect_server", "--host", host, "--port", str(port)],
        "reports": [*python, "flows.orchestration.report_server", "runs", str(port + 1)],
        "worker": [*python, "prefect", "worker", "start", "--pool", POOL, "--name", _worker_name()],
    }
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


def _deploy(environment: dict[str, str]) -> None:
    command = [sys.executable, "-m", "prefect", "--no-prompt", "deploy", "--all"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise ValueError(f"prefect.yaml could not be deployed: {done.stdout[-2000:]}{done.stderr[-2000:]}")
