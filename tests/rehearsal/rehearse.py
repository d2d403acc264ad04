"""Runs jobs as ranks on an absent CUDA device, each in a separate process, and records their use of the device.

usage: python tests/rehearsal/rehearse.py LIBRARY PLAN, where LIBRARY is compiled by `fake_device` and PLAN is a JSON
list of `Rehearsal`s. Each writes the JSON file that it names, with the parts of its job and its error.
"""

import functools
import gc
import json
import multiprocessing
import os
import sys
import traceback
from collections.abc import Callable, Iterable
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

# Beside this file: the package of the tests imports torch, which has to find the library loaded.
import fake_device

if TYPE_CHECKING:
    from tests.rehearsal.device_tensors import DeviceTensors
    from tests.rehearsal.measuring import Measurements
    from tests.rehearsal.plan import Rehearsal


def main(library: Path, plan: Path) -> None:
    """Do what the plan says, one rehearsal after the other: some need what others leave."""
    fake_device.load(library)
    from tests.rehearsal.device_torch import pretend
    from tests.rehearsal.plan import Rehearsal

    pretend()
    # What takes longest, once for all: the processes are forked.
    import torch

    import trainer.rank  # noqa: F401
    from trainer import mask_learning, taylor  # noqa: F401

    # What is imported is never garbage; processes that compute nothing need no threads.
    gc.freeze()
    torch.set_num_threads(1)
    for rehearsal in json.loads(plan.read_text(encoding="utf-8")):
        process = multiprocessing.get_context("fork").Process(target=_rehearse, args=(Rehearsal(**rehearsal),))
        process.start()
        process.join()


def _rehearse(rehearsal: "Rehearsal") -> None:
    from tests.rehearsal.device_tensors import DeviceTensors
    from tests.rehearsal.device_torch import DeviceFunctions, join
    from tests.rehearsal.measuring import Measurements
    from tests.rehearsal.triton_kernels import pretend_triton
    from trainer import rank

    os.environ["LOCAL_RANK"] = "0"
    tensors, measurements = DeviceTensors(), Measurements()
    join(rehearsal.rank, rehearsal.world_size, lambda: measurements.note_sync("all work is waited for"))
    parts: dict[str, list[dict[str, Any]]] = {}
    _watch(rehearsal, tensors, measurements, parts)
    error = None
    pretend_triton(measurements.note_kernel)
    # The other ranks, which would have to agree on a next job, are not there.
    rank._next_job = lambda *_: None
    with tensors, measurements, DeviceFunctions(measurements.note_attention):
        try:
            rank.main(Path(rehearsal.job))
        except SystemExit:
            # So ranks end that were asked to stop.
            error = None if rehearsal.stop_after is not None else traceback.format_exc()
        except BaseException:  # noqa: BLE001 -- whatever it is, the test tells
            error = traceback.format_exc()
    Path(rehearsal.result).write_text(json.dumps({"parts": parts, "error": error}), encoding="utf-8")


def _watch(
    rehearsal: "Rehearsal",
    tensors: "DeviceTensors",
    measurements: "Measurements",
    parts: dict[str, list[dict[str, Any]]],
) -> None:
    """Have parts of the job measured, each call by itself, into `parts`."""
    from tests.rehearsal.flaws import FLAWS
    from trainer import checkpoint, evaluate, forward, generate, model, saver, score, train

    def watch(owner: Any, name: str, describe: Callable[..., dict[str, Any]] | None = None) -> None:
        function = getattr(owner, name)
        is_large = not rehearsal.has_host_data and name in ("build_model", "sharded")

        @functools.wraps(function)
        def measured(*args: Any, **kwargs: Any) -> Any:
            with measurements.measuring() as part, tensors.without_host_data() if is_large else nullcontext():
                result = function(*args, **kwargs)
            described = {} if describe is None else describe(result, *args)
            parts.setdefault(name, []).append({**vars(part), **described})
            return result

        setattr(owner, name, measured)

    watch(model, "build_model", lambda model, *_: _describe_model(model))
    watch(train, "make_state")
    watch(train, "load_checkpoint", lambda _, folder, state: _describe_state(state))
    watch(train._Round, "train_step", lambda _, this, step, batch: _agree(this, rehearsal.stop_after == step + 1))
    watch(score.ModelScorer, "score")
    watch(checkpoint.TrainingState, "sharded", lambda sharded, *_: _describe_sharded(sharded))
    watch(evaluate, "_answer_likelihoods")
    watch(evaluate, "_answer_generations")
    watch(generate, "generate")
    if rehearsal.checkpoint != "saved":
        saver.CheckpointSaver.save = _plan_checkpoint if rehearsal.checkpoint == "planned" else _save_nothing  # type: ignore[method-assign]
    if rehearsal.flaw is not None:
        forward.sum_per_sample = FLAWS[rehearsal.flaw]


def _plan_checkpoint(_: Any, step: int, state: Any, record: dict[str, Any], is_waiting: bool) -> None:
    state.sharded(is_loading=False)


def _save_nothing(_: Any, step: int, state: Any, record: dict[str, Any], is_waiting: bool) -> None:
    pass


def _describe_model(model: Any) -> dict[str, Any]:
    sizes = [each.numel() for each in model.parameters()]
    return {"num_parameters": sum(sizes), "largest": max(sizes), "weights": _kinds(model.parameters())}


def _agree(this: Any, is_stopping: bool) -> dict[str, Any]:
    """Have all ranks, most of which are not there, agree on whether to stop, and that nothing is to be saved else."""
    this.is_stopping, this.is_time_up, this.is_writing = is_stopping, False, False
    return _describe_state(this.state)


def _describe_state(state: Any) -> dict[str, Any]:
    """Return what kinds of tensors a training state consists of, and how many numbers the optimizer has here."""
    inner = [each.optimizer for each in state.optimizer.chained_optimizers]
    masters = [parameter for each in inner for group in each.param_groups for parameter in group["params"]]
    # Step counters are numbers.
    moments = [tensor for each in inner for state in each.state.values() for tensor in state.values() if tensor.ndim]
    return {
        "weights": _kinds(state.model.parameters()),
        "gradients": _kinds(buffer.grad_data for chunk in state.model for buffer in chunk.buffers),
        "masters": _kinds(masters),
        "moments": _kinds(moments),
        "num_masters": sum(each.numel() for each in masters),
        "num_moments": sum(each.numel() for each in moments),
    }


def _describe_sharded(sharded: Any) -> dict[str, Any]:
    """Return how many numbers a rank's part of a checkpoint has, of weights and of the optimizer."""
    from megatron.core.dist_checkpointing.mapping import ShardedTensor, ShardedTensorFactory
    from torch.utils._pytree import tree_leaves

    def count(value: Any) -> int:
        parts = [leaf for leaf in tree_leaves(value) if isinstance(leaf, ShardedTensor | ShardedTensorFactory)]
        return sum(part.data.numel() for part in parts if part.data is not None)

    return {"num_weights": count(sharded["model"]), "num_of_optimizer": count(sharded["optimizer"])}


def _kinds(tensors: Iterable[Any]) -> list[str]:
    return sorted({f"{str(each.dtype).removeprefix('torch.')} {each.device.type}" for each in tensors})


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
