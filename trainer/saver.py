"""Saving checkpoints in Megatron's distributed format, synchronously or while training continues."""

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

# With more writers, the disk is the bottleneck.
_MOST_WRITERS = 8


class Saved(Protocol):
    """A state that can be saved."""

    def sharded(self, is_loading: bool) -> ShardedStateDict:
        """Return the sharded state dict of the parts that this rank holds."""


class CheckpointSaver:
    """Saves the checkpoints of a round to `folder`, keeping the last `keep_last`.

    A checkpoint gets its name, step-…, once it is complete and has been read back from the disk. Every rank must call
    every method except `is_writing`.
    """

    def __init__(self, folder: Path, keep_last: int, is_asynchronous: bool) -> None:
        self._folder, self._keep_last, self._is_asynchronous = folder, keep_last, is_asynchronous
        self._calls = AsyncCallsQueue()
        # Replicated data is divided among the data-parallel ranks for writing.
        strategy = TorchDistSaveShardedStrategy("torch_dist", 1, thread_count=_num_writers())
        group = parallel_state.get_data_parallel_group()
        self._strategy = FullyParallelSaveStrategyWrapper(strategy, group, do_cache_distribution=True)
        filesystem_async._results_queue = _Results()

    def save(self, step: int, state: Saved, record: dict[str, Any], is_waiting: bool) -> None:
        """Save `state` as that of `step`, with `record`; if asynchronous, return early unless `is_waiting`.

        The state at the time of the call is written, since each rank's writers are forked from it.
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
                # Copies in pinned memory would be shared with the writer processes and reused.
                preload_fn=partial(FileSystemWriterAsync.preload_tensors, buckets, False),
            )
        request.add_finalize_fn(partial(self._complete, temporary, target, {**record, "step": step}, names))
        if self._is_asynchronous and not is_waiting:
            self._calls.schedule_async_request(request)
        else:
            request.execute_sync()

    def is_pending(self) -> bool:
        """Return whether a checkpoint is incomplete, the same on all ranks."""
        return bool(self._calls.get_num_unfinalized_calls())

    def is_writing(self) -> bool:
        """Return whether writers of this rank are still running."""
        return any(
            not call.async_caller.is_current_async_call_done(blocking=False, no_dist=True)
            for call in self._calls.async_calls
        )

    def finish(self) -> None:
        """Wait for the checkpoint in progress, if any, and complete it."""
        with _writing_errors(self._folder):
            self._calls.maybe_finalize_async_calls(blocking=True)

    def _complete(self, temporary: Path, target: Path, record: dict[str, Any], names: list[str]) -> None:
        written: list[list[str]] = [[]] * torch.distributed.get_world_size()
        torch.distributed.all_gather_object(written, names)
        if torch.distributed.get_rank() == 0:
            complete_checkpoint(temporary, target, record, self._keep_last, [name for part in written for name in part])
        torch.distributed.barrier()


def _num_writers() -> int:
    """Return the number of writer processes per rank, one per file: its share of the cores."""
    return min(_MOST_WRITERS, max(2, num_cores() // int(os.environ.get("LOCAL_WORLD_SIZE", "1"))))


@contextmanager
def _writing_errors(folder: Path) -> Iterator[None]:
    """Convert Megatron's exception for a full disk, on all ranks, to an OSError as elsewhere."""
    try:
        yield
    except CheckpointException as error:
        # Only the first rank knows the reason.
        reason = [str(error)]
        torch.distributed.broadcast_object_list(reason)
        killed = re.search(r"Worker failure: (the process that wrote .*)", reason[0])
        raise disk_error(reason[0], folder) or (RuntimeError(f"{folder}: {killed[1]}") if killed else error) from None


# A forked process must not free device memory.
@filesystem_async._disable_gc()  # type: ignore[untyped-decorator]
def _write(transforms: Any, rank: int, buckets: list[Any], results: "_Results") -> None:
    """Write this rank's files, each in its own process, and report what they wrote, or the first error.

    Replaces Megatron's function, which waits forever for a process that was killed.
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
    """Write a file as Megatron does, computing its checksum, and send what was written, or the error."""
    # Megatron's module calls `open` only to write checkpoint files; a module attribute shadows the builtin.
    filesystem_async.open = writing_measured
    FileSystemWriterAsync.write_preloaded_data(transforms, number, bucket, _Outcome(sender), _Count(), use_fsync=True)


class _Outcome:
    """Stands in for the queue into which Megatron's writing function puts its index and outcome."""

    def __init__(self, sender: Connection) -> None:
        self._sender = sender

    def put(self, outcome: tuple[int, Any]) -> None:
        """Send the outcome."""
        self._sender.send(outcome[1])


class _Count:
    """Stands in for the queue by which Megatron's writing function signals completion; unused."""

    def get(self) -> None:
        """Do nothing."""

    def task_done(self) -> None:
        """Do nothing."""


class _Results:
    """The channel for the results of a rank's writers, in place of Megatron's queue; an unnamed temporary file.

    Megatron's queue needs a server process, which torchrun's SIGTERM to a rank's process group ends in the middle of
    the last save, and which outlives a rank that is killed.
    """

    def __init__(self) -> None:
        self._file = tempfile.TemporaryFile()  # noqa: SIM115 -- open as long as the round

    def put(self, results: Any) -> None:
        """Store the writers' results, once per save."""
        self._file.write(pickle.dumps(results))
        self._file.flush()

    def get_nowait(self) -> Any:
        """Return the stored results. Raises queue.Empty if there are none."""
        self._file.seek(0)
        content = self._file.read()
        self._file.seek(0)
        self._file.truncate()
        if not content:
            raise queue.Empty
        return pickle.loads(content)  # noqa: S301 -- no other process can open the file
