"""Ranks under Slurm: a job is submitted as a script, followed, and cancelled with the run.

A launcher that is killed leaves its Slurm job running; the same command finds it again and goes on following it.
"""

import math
import re
import shlex
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

from data_scoring.base.files import fingerprint, read_json, write_json
from flows.launch.launcher import Launcher
from flows.launch.torchrun import rank_environment
from flows.run.config import LaunchConfig
from trainer.job import Job

_SECONDS_BETWEEN_LOOKS = 2.0
# Once a job is cancelled Slurm kills what is left of it, after half a minute unless it is set up otherwise.
_SECONDS_TO_CANCEL = 45.0
_KILL_WAIT_SECONDS = 30.0
_PATIENCE_SECONDS = 60.0
# A controller that does not answer is no reason to submit a job for the second time.
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
    """Return the script with which `job`, described in `job_path`, is submitted. Every value in it is quoted."""
    asked, ranks_per_node = launch.slurm, job.parallel.world_size // launch.nodes
    # One task a node starts all of the node's ranks.
    cpus = None if asked.names_cpus else asked.cpus_per_rank * ranks_per_node
    options = {
        # Of jobs with one name one runs at a time: what was submitted by a launcher that died is not joined by another.
        "job-name": f"reprise-{name}-{fingerprint(str(job.round_folder))[:8]}",
        "dependency": "singleton",
        "nodes": launch.nodes,
        "ntasks-per-node": 1,
        "cpus-per-task": cpus,
        "output": log_path,
        "open-mode": "append",
        "chdir": Path.cwd(),
        "partition": asked.partition,
        "account": asked.account,
        "qos": asked.qos,
        "gres": asked.gres,
        "time": asked.time_limit,
        # At its time limit Slurm tells a job to end, and kills it half a minute later.
        "signal": f"TERM@{math.ceil(job.seconds_to_stop)}" if job.seconds_to_stop > _KILL_WAIT_SECONDS else None,
    }
    for key, value in options.items():
        # A quote does not end with the line in a comment, and what follows a line break would be a command.
        if not str(value).isprintable():
            raise ValueError(f"{key}: {str(value)!r} holds a control character; choose another path")
    lines = [f"#SBATCH --{key}={shlex.quote(str(value))}" for key, value in options.items() if value is not None]
    torchrun = [
        *(sys.executable, "-W", "ignore", "-m", "trainer.agent"),
        *("--nnodes", launch.nodes, "--nproc-per-node", ranks_per_node),
        *("--rdzv-backend", "c10d", "--rdzv-conf", f"join_timeout={round(60 * launch.join_minutes)}"),
        *("--tee", "3", "--log-dir", job_path.with_name("ranks")),
    ]
    interface = launch.interface or ("lo" if launch.nodes == 1 else None)
    exports = {
        key: value
        for key, value in rank_environment(interface, job.seconds_to_stop).items()
        if key.startswith(("GLOO_", "NCCL_", "OMP_", "TORCHELASTIC_", "TORCH_ELASTIC_", "PYTHONWARNINGS"))
    }
    return "\n".join(
        [
            "#!/bin/bash",
            *lines,
            # Preempted, or on a node that failed, it is queued again and goes on from its last checkpoint.
            "#SBATCH --requeue",
            *(f"#SBATCH {option}" for option in asked.options),
            "set -euo pipefail",
            *(f"export {key}={shlex.quote(value)}" for key, value in exports.items()),
            # From 22.05 on srun does not take the number of CPUs from the job that it is in.
            'if [ -n "${SLURM_CPUS_PER_TASK:-}" ]; then export SRUN_CPUS_PER_TASK="$SLURM_CPUS_PER_TASK"; fi',
            'first=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)',
            f"exec srun --kill-on-bad-exit=1 {shlex.join(str(word) for word in torchrun)} \\",
            f'  --rdzv-endpoint "$first:{launch.rendezvous_port}" '
            '--rdzv-id "$SLURM_JOB_ID-${SLURM_RESTART_COUNT:-0}" \\',
            f"  -m trainer.worker {shlex.quote(str(job_path))}",
            "",
        ]
    )


class SlurmLauncher(Launcher):
    """A job in Slurm's hands: submitted, or found again where a launcher that was killed had submitted it."""

    tools = ("sbatch", "squeue", "scontrol", "scancel")

    def __init__(self, job: Job, name: str, run_folder: Path, config: LaunchConfig) -> None:
        super().__init__(job, name, run_folder, config)
        self.id, self.state = "", "PENDING"
        self._looked = 0.0

    def plan(self) -> str:
        """Return the script that would be submitted."""
        return script(self.job, self.job_path, self.name, self.log_path, self.config)

    def start(self) -> None:
        """Submit the job, or go on following it where it is submitted already.

        Raises ValueError where Slurm's commands are missing or it refuses the job.
        """
        self.check_tools(self.config.kind)
        record = self.job_path.with_name(f"{self.name}.slurm.json")
        known = read_json(record)
        content = fingerprint(self.job.model_dump(mode="json"), self.config.model_dump())
        if known is not None and _state(known["id"]) in _ACTIVE:
            self.id = str(known["id"])
            if known["job"] == content:
                return
            self.stop()
        # Not before: the old job might have been about to read it.
        self.write_job()
        path = self.job_path.with_name(f"{self.name}.sbatch")
        path.write_text(self.plan(), encoding="utf-8")
        self.id = _ask("sbatch", "--parsable", str(path)).split(";")[0].strip()
        write_json(record, {"id": self.id, "job": content})

    def describe(self) -> str:
        """Return how the job stands, in words."""
        return f"Slurm job {self.id}: {self.state.lower()}"

    def poll(self) -> int | None:
        """Return None while the job is queued or running, then 0 where it completed, else 1."""
        if time.monotonic() - self._looked > _SECONDS_BETWEEN_LOOKS:
            self._looked = time.monotonic()
            self.state = _state(self.id)
        if self.state in _ACTIVE:
            return None
        return 0 if self.state == "COMPLETED" else 1

    def stop(self) -> None:
        """Tell a running job's ranks to save and end, cancel what is still there then, and wait until it is gone.

        Raises ValueError where that cannot be told.
        """
        if not self.id or (state := _state(self.id)) not in _ACTIVE:
            return
        # A controller that does not answer just now is no reason to cut short what ranks save.
        if state in (_UNREACHABLE, "RUNNING"):
            _try("scancel", "--signal=TERM", self.id)
            saved_by = time.monotonic() + self.job.seconds_to_stop
            while _state(self.id) in (_UNREACHABLE, "RUNNING") and time.monotonic() < saved_by:
                time.sleep(0.5)
        # Whether it was still there is seen below.
        _try("scancel", self.id)
        deadline = time.monotonic() + _SECONDS_TO_CANCEL
        while _state(self.id) in _ACTIVE:
            if time.monotonic() > deadline:
                raise ValueError(
                    f"Slurm job {self.id} may still be running: {_state(self.id).lower()} after "
                    f"{_SECONDS_TO_CANCEL:.0f} s; look with `squeue`, and end it with `scancel {self.id}`"
                )
            time.sleep(0.5)


def _state(job_id: str) -> str:
    """Return Slurm's word for the job's state; UNKNOWN where it has forgotten it."""
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
    """Run a command whose effect is looked for afterwards."""
    with suppress(subprocess.TimeoutExpired):
        _run(*command)


def _ask(*command: str) -> str:
    try:
        done = _run(*command)
    except subprocess.TimeoutExpired:
        raise ValueError(
            f"{command[0]}: no answer in {_PATIENCE_SECONDS:.0f} s; see whether Slurm's controller is up (`sinfo`), "
            "then type the same command again"
        ) from None
    if done.returncode != 0:
        raise ValueError(
            f"{command[0]}: {' '.join(done.stderr.split())}; correct launch.slurm, whose cpus_per_rank asks for CPUs, "
            "or ask who runs Slurm"
        )
    return done.stdout
