"""A round that keeps the last round's optimizer: its moments and steps are those of the checkpoint, on every layout."""

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from data_scoring.corpus.corpus import Corpus
from tests.conftest import TINY_MODEL, Ranks, read_rows
from tests.forked_ranks import forking, read_found, run_ranks, write_found
from tests.trainer.test_layouts import assert_same_training, short_mix
from trainer.checkpoint_folder import list_checkpoints
from trainer.config import CheckpointConfig, TrainConfig
from trainer.parallel_config import ParallelConfig

LAYOUTS = {
    "data": ParallelConfig(data=2),
    "tensor": ParallelConfig(tensor=2, sequence=True),
    "pipeline": ParallelConfig(pipeline=2),
}
CASES = [(layout, bf16) for layout in LAYOUTS for bf16 in (False, True)]
# Not those of the round that was trained.
TRAIN = TrainConfig(lr=3e-3, min_lr=2e-4, weight_decay=0.3, adam_beta1=0.8)
MOMENTS = ("exp_avg", "exp_avg_sq", "param")


def work(rank: int, folder: Path, checkpoint: Path, corpus: Path) -> None:
    """Leave in `folder` what a rank finds on every layout, and the checkpoints of the states that it starts with."""
    from trainer.devices import initialise

    torch.set_num_threads(1)
    store = torch.distributed.FileStore(str(folder / "store"), 2)
    torch.distributed.init_process_group("gloo", store=store, rank=rank, world_size=2)
    device = initialise("cpu", 0)
    from megatron.core import parallel_state

    found = {}
    for layout, parallel in LAYOUTS.items():
        parallel_state.initialize_model_parallel(parallel.tensor, parallel.pipeline)
        for bf16 in (False, True):
            place = folder / f"{layout}-{bf16}"
            found[layout, bf16] = start(device, parallel, bf16, checkpoint, Corpus(corpus), place)
        parallel_state.destroy_model_parallel()
    write_found(folder, rank, found)
    torch.distributed.destroy_process_group()


def start(
    device: Any, parallel: ParallelConfig, bf16: bool, checkpoint: Path, corpus: Corpus, place: Path
) -> dict[str, Any]:
    """Return the settings of a fresh state, and those after it has taken over an optimizer; save it to `place`."""
    from trainer.checkpoint import load_start
    from trainer.model import Kernels, build_model
    from trainer.saver import CheckpointSaver
    from trainer.train import make_state

    device.seed(9)
    built = build_model(
        TINY_MODEL, corpus.vocab_size, corpus.seq_length, parallel, torch.device("cpu"), bf16, Kernels()
    )
    state = make_state(TRAIN, built, 20, bf16)
    before = settings(state)
    load_start(checkpoint, state)
    after = settings(state)
    [inner] = state.optimizer.chained_optimizers
    steps = {float(each["step"]) for each in inner.optimizer.state.values()}
    # The counters are separate tensors, or else a step would advance one for each parameter.
    assert len({each["step"].data_ptr() for each in inner.optimizer.state.values()}) == len(inner.optimizer.state)
    CheckpointSaver(place, 1, False).save(1, state, {"fingerprint": "f"}, is_waiting=True)
    state.scheduler.step(1)
    return {"before": before, "after": after, "steps": steps, "lr": state.optimizer.param_groups[0]["lr"]}


def settings(state: Any) -> list[dict[str, Any]]:
    groups = [{**group} for group in state.optimizer.param_groups]
    for group in groups:
        group.pop("params")
        group.pop("step", None)
    return [*groups, {"schedule": state.scheduler.state_dict()}]


def optimizer_tensors(checkpoint: Path) -> dict[str, Tensor]:
    """Return the optimizer's tensors in a checkpoint, whole, read with torch only."""
    from torch.distributed.checkpoint import FileSystemReader
    from torch.distributed.checkpoint.state_dict_loader import load

    reader = FileSystemReader(checkpoint)
    tensors = {
        name: torch.empty(entry.size, dtype=entry.properties.dtype)
        for name, entry in reader.read_metadata().state_dict_metadata.items()
        if name.startswith(tuple(f"optimizer.state.{moment}." for moment in MOMENTS))
    }
    load(tensors, storage_reader=reader, no_dist=True)
    return tensors


@pytest.fixture(scope="module")
def found(
    trained: Path, tiny_corpus: Corpus, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, list[dict[Any, dict[str, Any]]]]:
    """The folder of what two ranks saved, and what each found."""
    folder = tmp_path_factory.mktemp("round-start")
    [checkpoint] = list_checkpoints(trained / "checkpoint")
    run_ranks(work, folder, checkpoint, tiny_corpus.folder, num_ranks=2)
    return folder, read_found(folder, 2)


@pytest.mark.parametrize(("layout", "bf16"), CASES)
def test_moments_are_those_of_the_checkpoint(
    layout: str, bf16: bool, found: tuple[Path, list[dict[Any, dict[str, Any]]]], trained: Path
) -> None:
    [checkpoint] = list_checkpoints(trained / "checkpoint")
    expected = optimizer_tensors(checkpoint)
    loaded = optimizer_tensors(found[0] / f"{layout}-{bf16}" / "step-00000001")
    assert len(expected) > 20
    assert loaded.keys() == expected.keys()
    for name, tensor in expected.items():
        assert torch.equal(loaded[name], tensor), name
        assert tensor.any(), name


@pytest.mark.parametrize(("layout", "bf16"), CASES)
def test_steps_go_on_and_the_schedule_starts_anew(
    layout: str, bf16: bool, found: tuple[Path, list[dict[Any, dict[str, Any]]]], trained: Path
) -> None:
    steps = len(read_rows(trained / "steps.parquet", "step"))
    for rank in found[1]:
        state = rank[layout, bf16]
        assert state["steps"] == {steps}
        # The settings are those of the configuration, not of the checkpoint.
        assert state["after"] == state["before"]
        assert {group["betas"][0] for group in state["after"][:-1]} == {0.8}
        # A twentieth of 20 steps warms up.
        assert state["lr"] == pytest.approx(3e-3)


def test_the_first_step_is_from_the_same_weights_and_goes_elsewhere(ranks: Ranks, trained: Path) -> None:
    [checkpoint] = list_checkpoints(trained / "checkpoint")
    losses = {}
    for keeps in (False, True):
        folder = ranks.train(
            f"keeps-{keeps}", (1, 1, 1), checkpoint, lambda path: short_mix(path, ranks.corpus.samples_path),
            keeps_optimizer=keeps,
        )  # fmt: skip
        losses[keeps] = [row[1:] for row in read_rows(folder / "steps.parquet", "step", "loss", "lr")]
    assert losses[True][0] == losses[False][0]
    assert [lr for _, lr in losses[True]] == [lr for _, lr in losses[False]]
    assert all(
        abs(kept - fresh) > 1e-4 for (kept, _), (fresh, _) in zip(losses[True][1:], losses[False][1:], strict=True)
    )


def test_a_round_that_stops_midway_goes_on_as_if_it_had_not(ranks: Ranks, trained: Path, tmp_path: Path) -> None:
    """A sample of step 5 is corrupt: 2x1x1 stops there; once it is restored, 1x1x1 goes on from the save at step 3."""
    [start_from] = list_checkpoints(trained / "checkpoint")
    broken = Ranks(Corpus(Path(shutil.copytree(ranks.corpus.folder, tmp_path / "corpus"))), tmp_path, forking)
    checkpoint = CheckpointConfig(every_steps=3)

    def make_mix(path: Path) -> int:
        return short_mix(path, ranks.corpus.samples_path)

    def train(where: Ranks, layout: tuple[int, int, int]) -> Path:
        return where.train("kept", layout, start_from, make_mix, checkpoint, keeps_optimizer=True)

    reference = train(ranks, (1, 1, 1))
    [(_, shard, sample), *_] = [row for row in read_rows(reference / "seen", "step", "shard", "sample") if row[0] == 5]
    tokens_path = tmp_path / "corpus" / f"shard-{shard:04d}.bin"
    whole = tokens_path.read_bytes()
    stride = 2 * (ranks.corpus.seq_length + 1)
    tokens_path.write_bytes(whole[: stride * sample] + b"\xff\xff" + whole[stride * sample + 2 :])
    with pytest.raises(ValueError, match="corrupt: sample"):
        train(broken, (2, 1, 1))
    assert [path.name for path in list_checkpoints(tmp_path / "kept" / "checkpoint")] == ["step-00000003"]
    tokens_path.write_bytes(whole)
    assert_same_training(train(broken, (1, 1, 1)), reference)
