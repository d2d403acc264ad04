"""Resuming with an optimizer that does not know our checkpoint format, like MindSpeed's."""

import pickle
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.conftest import TINY_MODEL
from tests.forked_ranks import run_ranks
from tests.trainer.training_states import make, train, values
from trainer.parallel_config import ParallelConfig

VOCAB_SIZE, SEQ_LENGTH = 256, 8
# What of the optimizer MindSpeed replaces it with.
MINDSPEED_KNOWS = {
    "dp_reshardable",
    "dp_zero_gather_scatter",
    "fully_sharded_bucket_space",
    "fully_sharded_model_space",
}


def work(_: int, folder: Path, bf16: bool) -> None:
    """Leave in `folder` the state of a model that was trained, of it resumed, and of each after a step more."""
    from trainer.devices import initialise

    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    device = initialise("cpu", 0)
    from megatron.core import parallel_state

    from trainer.checkpoint import load_checkpoint
    from trainer.saver import CheckpointSaver

    parallel_state.initialize_model_parallel()
    refused = refuse_unknown_formats()
    state = make(device, TINY_MODEL, VOCAB_SIZE, SEQ_LENGTH, ParallelConfig(), bf16, seed=1)
    train(state, seed=3)
    CheckpointSaver(folder, 1, False).save(1, state, {"fingerprint": "f"}, is_waiting=True)
    resumed = make(device, TINY_MODEL, VOCAB_SIZE, SEQ_LENGTH, ParallelConfig(), bf16, seed=2)
    found = {"fresh": values(resumed), "trained": values(state)}
    load_checkpoint(folder / "step-00000001", resumed)
    found["resumed"] = values(resumed)
    for name, each in (("trained, a step on", state), ("resumed, a step on", resumed)):
        train(each, seed=3)
        found[name] = values(each)
    found["refused"] = refused(state)
    (folder / "found.pickle").write_bytes(pickle.dumps(found))
    torch.distributed.destroy_process_group()


def refuse_unknown_formats() -> Any:
    """Replace what loads an optimizer's state as MindSpeed does; return what says whether it refuses Megatron's."""
    from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer

    from trainer.checkpoint import sharded_weights

    load = DistributedOptimizer.load_state_dict

    def load_state_dict(self: Any, state_dict: dict[str, Any]) -> None:
        if "param_state" in state_dict:
            sharding_type = state_dict["param_state_sharding_type"]
            if sharding_type not in MINDSPEED_KNOWS:
                raise NotImplementedError(f"Unknown sharding_type: {sharding_type}")
        load(self, state_dict)

    def is_refused(state: Any) -> bool:
        weights = sharded_weights(state.model)
        metadata = {"distrib_optim_sharding_type": "fully_reshardable"}
        described = state.optimizer.sharded_state_dict(weights, is_loading=False, metadata=metadata)
        try:
            state.optimizer.load_state_dict(described)
        except NotImplementedError:
            return True
        return False

    DistributedOptimizer.load_state_dict = load_state_dict
    return is_refused


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_training_goes_on_where_the_optimizer_knows_no_format_of_ours(precision: str, tmp_path: Path) -> None:
    run_ranks(work, tmp_path, precision == "bfloat16", num_ranks=1)
    found = pickle.loads((tmp_path / "found.pickle").read_bytes())
    # As it stands, it would not load what Megatron itself describes.
    assert found["refused"]
    assert sum(name.startswith("exp_avg_sq") for name in found["trained"]) > 10
    assert not torch.equal(found["fresh"]["main 0"], found["trained"]["main 0"])
    for after in ("", ", a step on"):
        resumed, trained = found[f"resumed{after}"], found[f"trained{after}"]
        assert resumed.keys() == trained.keys()
        for name, value in trained.items():
            assert torch.equal(resumed[name], value), (after, name)
    assert not torch.equal(found["trained, a step on"]["main 0"], found["trained"]["main 0"])
