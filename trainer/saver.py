"""Saving checkpoints: Megatron's distributed format, written while the ranks wait or while they train on."""

import pickle
import queue
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import torch
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.mapping import ShardedStateDict
from megatron.core.dist_checkpointing.strategies import filesystem_async
from megatron.core.dist_checkpointing.strategies.async_utils import AsyncCallsQueue, AsyncRequest
from torch.distributed.checkpoint.api import CheckpointException

from data_scoring.files import disk_error
from trainer.checkpoint_folder import complete_checkpoint, measure_files


class Saved(Protocol):
    """What can be saved."""

    def sharded(self, is_loading: bool) -> ShardedStateDict:
        """Return Megatron's description of the parts that this rank holds."""


class CheckpointSaver:
    """Saves the checkpoints of a round into `folder`, of which the last `keep_last` are kept.

    A checkpoint bears its name, step-…, once it is complete and the disk has returned all that was written. Every
    rank has to call every method but `is_writing`.
    """

    def __init__(self, folder: Path, keep_last: int, is_asynchronous: bool) -> None:
        self._folder, self._keep_last, self._is_asynchronous = folder, keep_last, is_asynchronous
        self._calls = AsyncCallsQueue()
        filesystem_async._results_queue = _Results()

    def save(self, step: int, state: Saved, record: dict[str, Any], is_waiting: bool) -> None:
        """Save `state` as that of `step`, with `record` beside it; unless `is_waiting`, training may go on at once.

        What is written is the state at the time of the call: each rank's writers are forked from it.
        """
        with _writing_errors(self._folder):
            self._save(step, state, record, is_waiting)

    def _save(self, step: int, state: Saved, record: dict[str, Any], is_waiting: bool) -> None:
        self.finish()
        target = self._folder / f"step-{step:08d}"
        temporary = self._folder / f".{target.name}.tmp"
        if torch.distributed.get_rank() == 0:
            shutil.rmtree(temporary, ignore_errors=True)
            temporary.mkdir(parents=True)
        torch.distributed.barrier()
        request: AsyncRequest = dist_checkpointing.save(
            state.sharded(is_loading=False), str(temporary), validate_access_integrity=False, async_sharded_save=True
        )
        if request.async_fn is not None:
            request = request._replace(async_fn=partial(_write, temporary, request.async_fn))
        request.add_finalize_fn(partial(self._complete, temporary, target, {**record, "step": step}))
        if self._is_asynchronous and not is_waiting:
            self._calls.schedule_async_request(request)
        else:
            request.execute_sync()

    def is_pending(self) -> bool:
        """Return whether a checkpoint is not complete yet, alike on all ranks."""
        return bool(self._calls.get_num_unfinalized_calls())

    def is_writing(self) -> bool:
        """Return whether writers of this rank are at work."""
        return any(
            not call.async_caller.is_current_async_call_done(blocking=False, no_dist=True)
            for call in self._calls.async_calls
        )

    def finish(self) -> None:
        """Wait for the checkpoint that is being written, if any, and complete it."""
        with _writing_errors(self._folder):
            self._calls.maybe_finalize_async_calls(blocking=True)

    def _complete(self, temporary: Path, target: Path, record: dict[str, Any]) -> None:
        if torch.distributed.get_rank() == 0:
            complete_checkpoint(temporary, target, record, self._keep_last)
        torch.distributed.barrier()


@contextmanager
def _writing_errors(folder: Path) -> Iterator[None]:
    """Turn what Megatron raises for a full disk, on all ranks, into the OSError that everything else raises."""
    try:
        yield
    except CheckpointException as error:
        # Only the first rank has been told why.
        reason = [str(error)]
        torch.distributed.broadcast_object_list(reason)
        raise disk_error(reason[0], folder) or error from None


def _write(temporary: Path, write: Any, rank: int, buckets: list[Any], results: "_Results") -> None:
    write(rank, buckets, results)
    # Where a writer failed, Megatron says so when the checkpoint is completed.
    names = [name for _, name, _ in buckets if (temporary / name).exists()]
    measure_files(temporary, names, f"rank-{rank:05d}")


class _Results:
    """What a rank's writers report through, in place of Megatron's queue.

    Megatron's is served by a process of its own, which the SIGTERM that torchrun sends to a rank's process group
    ends in the middle of the last save, and which outlives a rank that is killed. This is a nameless file.
    """

    def __init__(self) -> None:
        self._file = tempfile.TemporaryFile(buffering=0)  # noqa: SIM115 -- as long as the round

    def put(self, results: Any) -> None:
        """Take what the writers report, once a save."""
        self._file.write(pickle.dumps(results))

    def get_nowait(self) -> Any:
        """Return what was put. Raises queue.Empty where nothing was."""
        self._file.seek(0)
        content = self._file.read()
        self._file.seek(0)
        self._file.truncate()
        if not content:
            raise queue.Empty
        return pickle.loads(content)  # noqa: S301 -- nobody else can open the file
