"""Ranks under Slurm: a job is submitted as a script, monitored, and cancelled with the run.

If the launcher is killed, its Slurm job keeps running; the same command finds the job and monitors it again.
"""

import math
import re
import shlex
import subprocess
import sys
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import NotRequired

from typing_extensions import TypedDict

from data_scoring.base.files import fingerprint, write_record
from data_scoring.base.validation import read_record
from flows.launch.launcher import Launcher
from flows.launch.torchrun import exported_environment
from flows.run.config import LaunchConfig
from trainer.job import Job
from trainer.job_queue import JobQueue

_SECONDS_BETWEEN_POLLS = 2.0
# After cancelling a job, Slurm kills its remaining processes, by default after 30 s (KillWait).
_SECONDS_TO_CANCEL = 45.0
_KILL_WAIT_SECONDS = 30.0
_PATIENCE_SECONDS = 60.0
# If the controller does not answer, the job counts as active, so that it is not submitted twice.
_UNREACHABLE = "UNREACHABLE"
_ACTIVE = (
    _UNREACHABLE,
    "PENDING",
    "CONFIGURING",
    "RUNNING",
    "SUSPENDED",
    "COMPLETING",
    "REQUEUED",
    "REQUEUE_HOLD",
    "STOPPED",
)


def script(job: Job, job_path: Path, name: str, log_path: Path, launch: LaunchConfig) -> str:
    """Return the batch script that submits `job`, described in `job_path`. Every value in it is quoted."""
    slurm, ranks_per_node = launch.slurm, job.parallel.world_size // launch.nodes
    # One task per node starts all ranks of the node.
    cpus = None if slurm.names_cpus else slurm.cpus_per_rank * ranks_per_node
    options = {
        # With `singleton`, only one job of this name runs at a time: none runs beside a job of a killed launcher.
        "job-name": f"reprise-{name}-{fingerprint(str(job.round_folder))[:8]}",
        "dependency": "singleton",
        "nodes": launch.nodes,
        "ntasks-per-node": 1,
        "cpus-per-task": cpus,
        # In this option alone, % begins a replacement such as %j.
        "output": str(log_path).replace("%", "%%"),
        "open-mode": "append",
        "chdir": Path.cwd(),
        "partition": slurm.partition,
        "account": slurm.account,
        "qos": slurm.qos,
        "gres": slurm.gres,
        "time": slurm.time_limit,
        # At the time limit, Slurm sends SIGTERM and kills the job 30 s later; ranks that need longer are told earlier.
        "signal": f"TERM@{math.ceil(job.seconds_to_stop)}" if job.seconds_to_stop > _KILL_WAIT_SECONDS else None,
    }
    for key, value in options.items():
        # Quoting has no effect in comment lines: text after a line break would be run as a command.
        if not str(value).isprintable():
            raise ValueError(f"{key}: {str(value)!r} contains a control character; choose another path")
    lines = [f"#SBATCH --{key}={shlex.quote(str(value))}" for key, value in options.items() if value is not None]
    torchrun = [
        *(sys.executable, "-W", "ignore", "-m", "trainer.agent"),
        *("--nnodes", launch.nodes, "--nproc-per-node", ranks_per_node),
        *("--rdzv-backend", "c10d", "--rdzv-conf", f"join_timeout={round(60 * launch.join_minutes)}"),
        *("--tee", "3", "--log-dir", job_path.with_name("ranks")),
    ]
    interface = launch.interface or ("lo" if launch.nodes == 1 else None)
    exports = exported_environment(interface, job.seconds_to_stop)
    return "\n".join(
        [
            "#!/bin/bash",
            *lines,
            # After preemption or a node failure, the job is queued again and resumes from its last checkpoint.
            "#SBATCH --requeue",
            *(f"#SBATCH {option}" for option in slurm.options),
            "set -euo pipefail",
            *(f"export {key}={shlex.quote(value)}" for key, value in exports.items()),
            # Since Slurm 22.05, srun does not inherit the number of CPUs from its job.
            'if [ -n "${SLURM_CPUS_PER_TASK:-}" ]; then export SRUN_CPUS_PER_TASK="$SLURM_CPUS_PER_TASK"; fi',
            'first=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)',
            f"exec srun --kill-on-bad-exit=1 {shlex.join(str(word) for word in torchrun)} \\",
            f'  --rdzv-endpoint "$first:{launch.rendezvous_port}" '
            '--rdzv-id "$SLURM_JOB_ID-${SLURM_RESTART_COUNT:-0}" \\',
            f"  -m trainer.worker {shlex.quote(str(job_path))}",
            "",
        ]
    )


class _Submitted(TypedDict):
    id: str
    job: str
    # The job that the ranks were started for, if it is another.
    started_for: NotRequired[str]


class SlurmLauncher(Launcher):
    """Submits a Slurm job, or finds the one that a killed launcher submitted."""

    tools = ("sbatch", "squeue", "scontrol", "scancel")

    def __init__(self, job: Job, name: str, run_folder: Path, config: LaunchConfig) -> None:
        super().__init__(job, name, run_folder, config)
        self.id, self.state = "", "PENDING"
        self._last_poll = 0.0

    def plan(self, command: Sequence[str]) -> str:
        """Return the script that would be submitted."""
        return script(self.job, self.job_path, self.name, self.log_path, self.config)

    def start(self) -> None:
        """Submit the job, or monitor it again if it is already submitted.

        Raises ValueError if Slurm's commands are missing or Slurm rejects the job.
        """
        self.check_tools(self.config.kind)
        known = read_record(self._record, _Submitted)
        if known is not None and _state(known["id"]) in _ACTIVE:
            self.id = known["id"]
            if known["job"] == self._content:
                self._find(known.get("started_for", self.name))
                return
            self.stop()
        # Only now, since the old job might still have read it.
        self.write_job()
        path = self.job_path.with_name(f"{self.name}.sbatch")
        path.write_text(script(self.job, self.job_path, self.name, self.log_path, self.config), encoding="utf-8")
        self.id = _ask("sbatch", "--parsable", str(path)).split(";")[0].strip()
        write_record(self._record, {"id": self.id, "job": self._content})

    def hand_over(self, job: Job, name: str) -> None:
        """Have the ranks, which wait, do `job`, recorded so that it can be found again."""
        self.job, self.name = job, name
        record = {"id": self.id, "job": self._content, "started_for": self.log_path.stem}
        # First, so that no second Slurm job is submitted for it.
        write_record(self._record, record)
        super().hand_over(job, name)

    def _find(self, started_for: str) -> None:
        """Monitor the ranks of a killed launcher, which were started for the job `started_for`."""
        first = self.job_path.with_name(f"{started_for}.job.json")
        self.queue, self.log_path = JobQueue(first), self.log_path.with_name(f"{started_for}.log")
        if started_for != self.name:
            # The launcher may have been killed before it handed the job over.
            super().hand_over(self.job, self.name)
        if self.keeps:
            self.queue.put(self.job_path)
        else:
            self.queue.end()

    @property
    def _record(self) -> Path:
        return self.run_folder / "logs" / f"{self.name}.slurm.json"

    @property
    def _content(self) -> str:
        return fingerprint(self.job.model_dump(mode="json"), self.config.model_dump())

    def describe(self) -> str:
        """Return the job's id and state."""
        return f"Slurm job {self.id}: {self.state.lower()}"

    def poll(self) -> int | None:
        """Return None while the job is queued or running, then 0 if it completed, else 1."""
        if time.monotonic() - self._last_poll > _SECONDS_BETWEEN_POLLS:
            self._last_poll = time.monotonic()
            self.state = _state(self.id)
        if self.state in _ACTIVE:
            return None
        return 0 if self.state == "COMPLETED" else 1

    def stop(self) -> None:
        """Make a running job's ranks save and end, then cancel the job, and wait until it has ended.

        Raises ValueError if it may still be running.
        """
        if not self.id or (state := _state(self.id)) not in _ACTIVE:
            return
        # If the controller does not answer, the ranks may be running, and still get their time to save.
        if state in (_UNREACHABLE, "RUNNING"):
            _try("scancel", "--signal=TERM", self.id)
            saved_by = time.monotonic() + self.job.seconds_to_stop
            while _state(self.id) in (_UNREACHABLE, "RUNNING") and time.monotonic() < saved_by:
                time.sleep(0.5)
        # Errors are ignored: the loop below checks whether the job is still active.
        _try("scancel", self.id)
        deadline = time.monotonic() + _SECONDS_TO_CANCEL
        while _state(self.id) in _ACTIVE:
            if time.monotonic() > deadline:
                raise ValueError(
                    f"Slurm job {self.id} may still be running: {_state(self.id).lower()} after "
                    f"{_SECONDS_TO_CANCEL:.0f} s; check with `squeue`, and end it with `scancel {self.id}`"
                )
            time.sleep(0.5)


def _state(job_id: str) -> str:
    """Return the job's state in Slurm; UNKNOWN if Slurm no longer lists the job."""
    for command in (
        ("squeue", "--noheader", "--format=JobState=%T", "--jobs", job_id),
        ("scontrol", "--oneliner", "show", "job", job_id),
    ):
        try:
            done = _run(*command)
        except subprocess.TimeoutExpired:
            return _UNREACHABLE
        if done.returncode != 0 and "Invalid job id" not in done.stderr:
            return _UNREACHABLE
        if found := re.search(r"JobState=(\w+)", done.stdout):
            return found[1]
    return "UNKNOWN"


def _run(*command: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command, capture_output=True, text=True, timeout=_PATIENCE_SECONDS, check=False)


def _try(*command: str) -> None:
    """Run a command, ignoring a timeout; the caller checks its effect."""
    with suppress(subprocess.TimeoutExpired):
        _run(*command)


def _ask(*command: str) -> str:
    try:
        done = _run(*command)
    except subprocess.TimeoutExpired:
        raise ValueError(
            f"{command[0]}: no answer within {_PATIENCE_SECONDS:.0f} s; check whether Slurm's controller is up "
            "(`sinfo`), then run the same command again"
        ) from None
    if done.returncode != 0:
        raise ValueError(
            f"{command[0]}: {' '.join(done.stderr.split())}; correct launch.slurm (cpus_per_rank sets the CPUs) or ask "
            "Slurm's administrator"
        )
    return done.stdout
