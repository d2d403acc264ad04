"""Saving checkpoints: Megatron's distributed format, written while the ranks wait or while they train on."""

import os
import pickle
import queue
import re
import shutil
import signal
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from multiprocessing import get_context
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, Protocol

import torch
from megatron.core import dist_checkpointing, parallel_state
from megatron.core.dist_checkpointing.mapping import ShardedStateDict
from megatron.core.dist_checkpointing.strategies import filesystem_async
from megatron.core.dist_checkpointing.strategies.async_utils import AsyncCallsQueue, AsyncRequest
from megatron.core.dist_checkpointing.strategies.filesystem_async import FileSystemWriterAsync
from megatron.core.dist_checkpointing.strategies.fully_parallel import FullyParallelSaveStrategyWrapper
from megatron.core.dist_checkpointing.strategies.torch import TorchDistSaveShardedStrategy
from torch.distributed.checkpoint.api import CheckpointException

from data_scoring.base.files import disk_error
from trainer.checkpoint_folder import complete_checkpoint, writing_measured
from trainer.devices import num_cores

# More of them wait for the disk.
_MOST_WRITERS = 8


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
        # Of what data-parallel ranks have alike, each writes a part.
        strategy = TorchDistSaveShardedStrategy("torch_dist", 1, thread_count=_num_writers())
        group = parallel_state.get_data_parallel_group()
        self._strategy = FullyParallelSaveStrategyWrapper(strategy, group, do_cache_distribution=True)
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
            state.sharded(is_loading=False),
            str(temporary),
            self._strategy,
            validate_access_integrity=False,
            async_sharded_save=True,
        )
        names: list[str] = []
        if request.async_fn is not None:
            _, buckets, _ = request.async_fn_args
            names = [name for _, name, _ in buckets]
            request = request._replace(
                async_fn=partial(_write, request.async_fn.args[0]),
                # Copies in memory that is pinned would be shared with the processes that write, and be used anew.
                preload_fn=partial(FileSystemWriterAsync.preload_tensors, buckets, False),
            )
        request.add_finalize_fn(partial(self._complete, temporary, target, {**record, "step": step}, names))
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

    def _complete(self, temporary: Path, target: Path, record: dict[str, Any], names: list[str]) -> None:
        written: list[list[str]] = [[]] * torch.distributed.get_world_size()
        torch.distributed.all_gather_object(written, names)
        if torch.distributed.get_rank() == 0:
            complete_checkpoint(temporary, target, record, self._keep_last, [name for part in written for name in part])
        torch.distributed.barrier()


def _num_writers() -> int:
    """Return how many processes of a rank write at once, each a file: its share of the cores."""
    return min(_MOST_WRITERS, max(2, num_cores() // int(os.environ.get("LOCAL_WORLD_SIZE", "1"))))


@contextmanager
def _writing_errors(folder: Path) -> Iterator[None]:
    """Turn what Megatron raises for a full disk, on all ranks, into the OSError that everything else raises."""
    try:
        yield
    except CheckpointException as error:
        # Only the first rank has been told why.
        reason = [str(error)]
        torch.distributed.broadcast_object_list(reason)
        killed = re.search(r"Worker failure: (the process that wrote .*)", reason[0])
        raise disk_error(reason[0], folder) or (RuntimeError(f"{folder}: {killed[1]}") if killed else error) from None


# What is the device's is not for a forked process to free.
@filesystem_async._disable_gc()  # type: ignore[untyped-decorator]
def _write(transforms: Any, rank: int, buckets: list[Any], results: "_Results") -> None:
    """Write this rank's files, each by a process of its own, and report what they wrote, or the first one's error.

    In place of Megatron's, which waits forever for a process that was killed.
    """
    context = get_context("fork")
    writers = []
    for number, bucket in enumerate(buckets):
        receiver, sender = context.Pipe(duplex=False)
        process = context.Process(target=_write_file, args=(transforms, number, bucket, sender))
        process.start()
        sender.close()
        writers.append((process, receiver))
    outcomes: dict[int, Any] = {}
    for number, (process, receiver) in enumerate(writers):
        try:
            outcomes[number] = receiver.recv()
        except EOFError:
            process.join()
            code = process.exitcode or 0
            ended = f"by {signal.Signals(-code).name}" if code < 0 else "early"
            outcomes[number] = RuntimeError(f"the process that wrote {buckets[number][1]} was ended {ended} (memory?)")
        process.join()
    errors = (outcome for outcome in outcomes.values() if isinstance(outcome, Exception))
    results.put(next(errors, outcomes))


def _write_file(transforms: Any, number: int, bucket: Any, sender: Connection) -> None:
    """Write a file as Megatron does, take its checksum meanwhile, and send what was written, or the error."""
    # The one place where Megatron opens files; it is looked up in the module first.
    filesystem_async.open = writing_measured
    FileSystemWriterAsync.write_preloaded_data(transforms, number, bucket, _Outcome(sender), _Count(), use_fsync=True)


class _Outcome:
    """What Megatron's writing function puts its outcome into, beside its number."""

    def __init__(self, sender: Connection) -> None:
        self._sender = sender

    def put(self, outcome: tuple[int, Any]) -> None:
        """Send it."""
        self._sender.send(outcome[1])


class _Count:
    """What Megatron's writing function tells that it is done: nobody waits for it."""

    def get(self) -> None:
        """Do nothing."""

    def task_done(self) -> None:
        """Do nothing."""


class _Results:
    """What a rank's writers report through, in place of Megatron's queue.

    Megatron's is served by a process of its own, which the SIGTERM that torchrun sends to a rank's process group
    ends in the middle of the last save, and which outlives a rank that is killed. This is a nameless file.
    """

    def __init__(self) -> None:
        self._file = tempfile.TemporaryFile()  # noqa: SIM115 -- as long as the round

    def put(self, results: Any) -> None:
        """Take what the writers report, once a save."""
        self._file.write(pickle.dumps(results))
        self._file.flush()

    def get_nowait(self) -> Any:
        """Return what was put. Raises queue.Empty where nothing was."""
        self._file.seek(0)
        content = self._file.read()
        self._file.seek(0)
        self._file.truncate()
        if not content:
            raise queue.Empty
        return pickle.loads(content)  # noqa: S301 -- nobody else can open the file
