"""Optimizer state sharded over data-parallel ranks: its checkpoint equals Megatron's own format."""

from pathlib import Path
from typing import Any

import pytest
import torch

from tests.conftest import TINY_MODEL
from tests.forked_ranks import read_found, run_ranks, write_found
from tests.trainer.training_states import make, train, values
from trainer.parallel_config import ParallelConfig

# Of three ranks, some parameters lie across two, and the embedding is more than a rank's share.
RANKS, VOCAB_SIZE, SEQ_LENGTH = 3, 1024, 8
MODELS = {"apart": TINY_MODEL, "tied": TINY_MODEL.model_copy(update={"tied_embeddings": True})}


def work(rank: int, folder: Path) -> None:
    """Leave in `folder` what a rank finds of both models, each in both precisions."""
    from trainer.devices import initialise

    torch.set_num_threads(1)
    store = torch.distributed.FileStore(str(folder / "store"), RANKS)
    torch.distributed.init_process_group("gloo", store=store, rank=rank, world_size=RANKS)
    device = initialise("cpu", 0)
    from megatron.core import parallel_state

    parallel_state.initialize_model_parallel()
    found = {
        f"{name} {'bfloat16' if bf16 else 'float32'}": compare(device, name, bf16, folder, rank)
        for name in MODELS
        for bf16 in (False, True)
    }
    write_found(folder, rank, found)
    torch.distributed.destroy_process_group()


def compare(device: Any, name: str, bf16: bool, folder: Path, rank: int) -> dict[str, Any]:
    """Save a state by ours and by Megatron's own way, load each by ours, and return what is in files and optimizers."""
    from megatron.core import dist_checkpointing

    from trainer.checkpoint import load_checkpoint, sharded_weights
    from trainer.checkpoint_folder import RECORD
    from trainer.saver import CheckpointSaver

    place, parallel = folder / f"{name}-{bf16}", ParallelConfig(data=RANKS)
    state = make(device, MODELS[name], VOCAB_SIZE, SEQ_LENGTH, parallel, bf16, seed=1)
    train(state, rank)
    CheckpointSaver(place, 1, False).save(1, state, {"fingerprint": "f"}, is_waiting=True)
    files = {path.name: path.stat().st_size for path in (place / "step-00000001").glob(f"__{rank}_*.distcp")}
    weights = sharded_weights(state.model)
    theirs = {
        "model": weights,
        "optimizer": state.optimizer.sharded_state_dict(
            weights, is_loading=False, metadata={"distrib_optim_sharding_type": "fully_reshardable"}
        ),
        "scheduler": state.scheduler.state_dict(),
    }
    megatron = place / "megatron"
    if rank == 0:
        megatron.mkdir()
    torch.distributed.barrier()
    dist_checkpointing.save(theirs, str(megatron), validate_access_integrity=False)
    found = {"files": files, "trained": values(state)}
    for way, checkpoint in (("ours", place / "step-00000001"), ("megatron", megatron)):
        fresh = make(device, MODELS[name], VOCAB_SIZE, SEQ_LENGTH, parallel, bf16, seed=2)
        load_checkpoint(checkpoint, fresh)
        found[way] = values(fresh)
        train(fresh, rank)
        found[f"{way}, a step on"] = values(fresh)
    train(state, rank)
    found["trained, a step on"] = values(state)
    # Into a state that has gone on, too.
    load_checkpoint(place / "step-00000001", state)
    found["again"] = values(state)
    train(state, rank)
    found["again, a step on"] = values(state)
    assert (place / "step-00000001" / RECORD).exists()
    return found


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[dict[str, Any]]]:
    """The folder of what three ranks saved, and what each found."""
    folder = tmp_path_factory.mktemp("optimizer-state")
    run_ranks(work, folder, num_ranks=RANKS)
    return folder, read_found(folder, RANKS)


CASES = [f"{name} {precision}" for name in MODELS for precision in ("float32", "bfloat16")]


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("way", ["ours", "megatron", "again"])
def test_a_state_comes_back_bit_for_bit_and_trains_on_alike(
    way: str, case: str, ranks: tuple[Path, list[dict[str, Any]]]
) -> None:
    """From our checkpoint, and from one in Megatron's own format, which earlier versions wrote."""
    assert sum("exp_avg_sq" in name for rank in ranks[1] for name in rank[case]["trained"]) > 10
    for rank in ranks[1]:
        found = rank[case]
        first, second = (found[f"trained{after}"]["exp_avg 0"] for after in ("", ", a step on"))
        assert not torch.equal(first, second)
        for after in ("", ", a step on"):
            loaded, expected = found[f"{way}{after}"], found[f"trained{after}"]
            assert loaded.keys() == expected.keys()
            for name, value in expected.items():
                assert torch.equal(loaded[name], value), name


@pytest.mark.parametrize("case", CASES)
def test_files_hold_what_megatron_s_own_format_holds(case: str, ranks: tuple[Path, list[dict[str, Any]]]) -> None:
    from torch.distributed.checkpoint.filesystem import FileSystemReader

    name, precision = case.split()
    place = ranks[0] / f"{name}-{precision == 'bfloat16'}"
    ours, theirs = (
        FileSystemReader(place / folder).read_metadata().state_dict_metadata for folder in ("step-00000001", "megatron")
    )
    assert ours.keys() == theirs.keys()
    for key, entry in theirs.items():
        if hasattr(entry, "size"):
            assert (ours[key].size, ours[key].properties.dtype) == (entry.size, entry.properties.dtype)
    moments = [key for key in ours if key.startswith("optimizer.state.exp_avg_sq.")]
    assert {key.removeprefix("optimizer.state.exp_avg_sq.") for key in moments} >= {
        "embedding.word_embeddings.weight", "decoder.layers.mlp.linear_fc1.weight", "decoder.final_layernorm.weight",
    }  # fmt: skip
    assert all(ours[key].properties.dtype == torch.float32 for key in moments)


@pytest.mark.parametrize("case", CASES)
def test_every_rank_writes_a_part(case: str, ranks: tuple[Path, list[dict[str, Any]]]) -> None:
    """As even as whole parameters allow: nobody writes more than its share and the largest parameter's states."""
    sizes = [sum(rank[case]["files"].values()) for rank in ranks[1]]
    largest = 3 * 4 * VOCAB_SIZE * TINY_MODEL.hidden_size
    assert min(sizes) > 0
    assert max(sizes) < sum(sizes) / RANKS + largest
