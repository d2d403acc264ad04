"""Ranks forked from a server that has imported torch and Megatron: to start one takes no time."""

import os
import pickle
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from typing import Any, BinaryIO

import pytest
import torch

from flows.launch import torchrun
from flows.launch.torchrun import Rendezvous

_CONTEXT = get_context("forkserver")
_CONTEXT.set_forkserver_preload(["tests.preloaded"])


def run_ranks(work: Callable[..., None], *arguments: Any, num_ranks: int) -> None:
    """Run `work(rank, *arguments)` as each of `num_ranks` processes; raise the error of one that fails."""
    torch.multiprocessing.start_processes(work, arguments, num_ranks, start_method="forkserver")


def write_found(folder: Path, rank: int, found: Any) -> None:
    """Leave what a rank has found in `folder`, for `read_found`."""
    (folder / f"{rank}.pickle").write_bytes(pickle.dumps(found))


def read_found(folder: Path, num_ranks: int) -> list[Any]:
    """Return what each of `num_ranks` ranks has found."""
    return [pickle.loads((folder / f"{rank}.pickle").read_bytes()) for rank in range(num_ranks)]


@contextmanager
def forking(launcher: int | None = None) -> Iterator[None]:
    """Have the launcher fork a job's ranks instead of starting torchrun, which would import everything for each.

    launcher: the process that ranks end with, by default this one.
    """
    with pytest.MonkeyPatch.context() as patch:
        start = partial(_start, launcher or os.getpid())
        patch.setattr(torchrun, "start", start)
        yield
        # What is patched meanwhile has to be undone before, or undoing it would leave this in place.
        assert torchrun.start is start


def _start(
    launcher: int, job_path: Path, rendezvous: Rendezvous, is_head: bool, interface: str | None, log: BinaryIO
) -> "ForkedRanks":
    assert is_head
    assert rendezvous.num_nodes == 1
    environment = torchrun.rank_environment(interface or "lo", rendezvous.seconds_to_stop)
    environment["REPRISE_LAUNCHER"] = str(launcher)
    return ForkedRanks(job_path, rendezvous.processes_per_node, environment, Path(log.name))


class ForkedRanks:
    """Ranks of one host, with what the launcher asks of torchrun's process: when one fails, all end."""

    def __init__(self, job_path: Path, num_ranks: int, environment: dict[str, str], log: Path) -> None:
        self._store = torch.distributed.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
        common = {
            **environment,
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(self._store.port),
            "TORCHELASTIC_USE_AGENT_STORE": "True",
            "WORLD_SIZE": str(num_ranks),
            "LOCAL_WORLD_SIZE": str(num_ranks),
        }
        self._ranks = [
            _CONTEXT.Process(target=_work, args=(job_path, {**common, "RANK": str(rank), "LOCAL_RANK": str(rank)}, log))
            for rank in range(num_ranks)
        ]
        for rank in self._ranks:
            rank.start()
        self.pids = [rank.pid for rank in self._ranks]

    def poll(self) -> int | None:
        codes = [rank.exitcode for rank in self._ranks]
        if any(codes):
            self.terminate()
            for rank in self._ranks:
                # As torchrun does.
                rank.join(30)
                rank.kill()
                rank.join()
            return 1
        return None if None in codes else 0

    def wait(self, timeout: float | None = None) -> int:
        for rank in self._ranks:
            rank.join(timeout)
        code = self.poll()
        if code is None:
            raise subprocess.TimeoutExpired("ranks", timeout or 0.0)
        return code

    def terminate(self) -> None:
        for rank in self._ranks:
            rank.terminate()

    def kill(self) -> None:
        for rank in self._ranks:
            rank.kill()


def _work(job_path: Path, environment: dict[str, str], log: Path) -> None:
    """Be a rank, all that it says going to `log`."""
    os.environ.clear()
    os.environ.update(environment)
    with log.open("ab") as file:
        for stream in (sys.stdout, sys.stderr):
            stream.flush()
            os.dup2(file.fileno(), stream.fileno())
    from trainer.rank import main

    main(job_path)
