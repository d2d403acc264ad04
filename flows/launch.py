"""Launching: a job's ranks under torchrun, followed until they end, and stopped with whoever launched them."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from data_scoring.files import read_json
from data_scoring.progress import Progress
from flows.run_folder import RanksFailedError, ranks_gone
from trainer.jobs import Job


def launch(job: Job, run_folder: Path, name: str, progress: Progress) -> None:
    """Run `job` on all its ranks and return when they are done; `name` names its log.

    Raises ValueError with a rank's own message where the user can mend what is wrong, else `RanksFailedError`;
    both name the log.
    """
    log_path = run_folder / "logs" / f"{name}.log"
    log_path.parent.mkdir(exist_ok=True)
    job.errors.mkdir(parents=True, exist_ok=True)
    for stale in [*job.errors.glob("rank-*.json"), job.progress]:
        stale.unlink(missing_ok=True)
    job_path = run_folder / "logs" / f"{name}.job.json"
    job_path.write_text(job.model_dump_json(indent=2), encoding="utf-8")
    with ranks_gone(job.lock), log_path.open("ab") as log:
        process = subprocess.Popen(
            _command(job, job_path), stdout=log, stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL, env=_environment()
        )
        try:
            while process.poll() is None:
                _follow(job, progress)
                time.sleep(0.2)
            _follow(job, progress)
        finally:
            _stop(process)
    if process.returncode != 0:
        _raise_failure(job, process.returncode, log_path)


def _command(job: Job, job_path: Path) -> list[str]:
    return [
        *(sys.executable, "-W", "ignore", "-m", "torch.distributed.run"),
        *("--nnodes", "1", "--nproc-per-node", str(job.parallel.world_size)),
        *("--rdzv-backend", "c10d", "--rdzv-endpoint", "127.0.0.1:0", "--local-addr", "127.0.0.1"),
        *("-m", "trainer.worker", str(job_path)),
    ]


def _environment() -> dict[str, str]:
    environment = dict(os.environ)
    # Ranks of one host meet over the loopback interface, whatever its host name resolves to.
    if sys.platform == "linux":
        environment.setdefault("GLOO_SOCKET_IFNAME", "lo")
    environment.setdefault("OMP_NUM_THREADS", "1")
    environment.setdefault("PYTHONWARNINGS", "ignore")
    return environment


def _follow(job: Job, progress: Progress) -> None:
    try:
        state = json.loads(job.progress.read_text(encoding="utf-8"))
    except FileNotFoundError:
        progress("starting ranks", 0, None)
        return
    details = [f"{name.replace('_', ' ')} {value:,.4g}" for name, value in state.items() if isinstance(value, float)]
    progress(" · ".join([state["what"], *details]), state["done"], state["total"])


def _stop(process: subprocess.Popen[bytes]) -> None:
    if process.poll() is None:
        process.terminate()
        try:
            process.wait(timeout=10)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def first_error(folder: Path) -> dict[str, Any] | None:
    """Return the error of the rank that failed first, of those that ranks left in `folder`, or None."""
    errors = [read_json(path) for path in folder.glob("rank-*.json")]
    return min(errors, key=lambda error: error["time"]) if errors else None


def _raise_failure(job: Job, code: int, log_path: Path) -> None:
    first = first_error(job.errors)
    if first is None:
        raise RanksFailedError(
            f"the ranks ended with exit code {code} and left no error (killed, or out of memory?); "
            f"the log is {log_path}; the same command goes on from the last checkpoint"
        )
    if first["is_users"]:
        raise ValueError(f"{first['message']} (log: {log_path})")
    raise RanksFailedError(f"rank {first['rank']}: {first['kind']}: {first['message']} (log: {log_path})")
