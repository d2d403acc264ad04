"""CUDA jobs without CUDA: on tensors without data, with simulated ranks."""

from typing import Any

import pytest

from benchmarks.memory_budgets import BUDGETS
from tests.conftest import TINY_MODEL
from tests.rehearsal import fake_device
from tests.rehearsal.budgets import rehearse
from tests.rehearsal.cuda_jobs import DEEP_MODEL, LARGE, PRESET, SEQ_LENGTH, STEPS, TRAIN, TRAINED

Found = dict[str, dict[str, Any]]

# How often the host waits for the device in a step: for the figures, the counts, and on the last stage for the losses.
MOST_SYNCS = 3
# Kernels of a step, and the GB that they read and write, at most.
MOST_WORK = {
    "one": (515, 0.01225),
    "tensor 0": (579, 0.0071),
    "tensor 1": (581, 0.00711),
    "pipeline 0": (254, 0.00487),
    "pipeline 1": (302, 0.00739),
    "all 0": (154, 0.00141),
    "all 7": (191, 0.00238),
    "interleaved 0": (476, 0.00859),
    "interleaved 1": (522, 0.01111),
    "large 2": (1977, 191.0),
    "large 8": (1977, 530.8),
    "large 8 portable": (2999, 509.5),
    "large 8 triton": (1435, 237.1),
}
USES = ["score", "calibrate", "evaluate", "generate", "skip", "taylor", "masks", "resumed"]
GIB = 1 << 30


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> Found:
    """What every rehearsal found."""
    compiler = fake_device.find_compiler()
    if compiler is None:
        pytest.skip("what torch's CPU build lacks for tensors on CUDA is compiled here, and there is no C++ compiler")
    return rehearse(tmp_path_factory.mktemp("rehearsal"), compiler)


def parts_of(found: Found, name: str, part: str) -> list[dict[str, Any]]:
    rehearsal = found[name]
    assert rehearsal["error"] is None, rehearsal["error"]
    return rehearsal["parts"][part]  # type: ignore[no-any-return]


def last_step(found: Found, name: str) -> dict[str, Any]:
    """A step's first time makes what stays: moments, and tables of positions."""
    steps = parts_of(found, name, "train_step")
    assert len(steps) == STEPS
    return steps[-1]


def describe_syncs(step: dict[str, Any]) -> str:
    return "\n".join(
        f"{count} times {site}" for site, count in sorted(step["syncs"].items(), key=lambda item: -item[1])
    )


@pytest.mark.parametrize("name", TRAINED)
def test_a_step_keeps_to_the_device_and_to_its_precision(found: Found, name: str) -> None:
    step = last_step(found, name)
    assert step["weights"] == ["bfloat16 cuda"]
    assert step["gradients"] == step["masters"] == step["moments"] == ["float32 cuda"]
    assert step["num_moments"] == 2 * step["num_masters"]
    replicas = 2 if name.startswith("all") else 1
    (model,) = parts_of(found, name, "build_model")
    # A replica's share, of a buffer that is padded.
    assert step["num_masters"] == pytest.approx(model["num_parameters"] / replicas, rel=0.02)


@pytest.mark.parametrize("name", TRAINED)
def test_a_step_waits_no_more_often_than_known(found: Found, name: str) -> None:
    step = last_step(found, name)
    assert sum(step["syncs"].values()) <= MOST_SYNCS, describe_syncs(step)


@pytest.mark.parametrize("name", TRAINED)
def test_a_step_launches_and_moves_no_more_than_known(found: Found, name: str) -> None:
    step = last_step(found, name)
    most_kernels, most_gb = MOST_WORK[name]
    assert sum(step["kernels"].values()) <= most_kernels
    assert sum(step["moved"].values()) / 1e9 <= most_gb


@pytest.mark.parametrize("name", TRAINED)
def test_training_and_validation_take_flash_attention(found: Found, name: str) -> None:
    layers = TINY_MODEL.num_layers // (2 if name.startswith(("pipe", "all")) else 1)
    if name.startswith("large"):
        layers = 21
    elif name.startswith("interleaved"):
        layers = DEEP_MODEL.num_layers // 2
    assert last_step(found, name)["attention"] == {"FLASH_ATTENTION": layers * num_microbatches(name)}
    # Rounds that are asked to stop validate nothing.
    for scored in parts_of(found, "resumed", "score") if is_stopped(name) else parts_of(found, name, "score"):
        assert set(scored["attention"]) == {"FLASH_ATTENTION"}


def is_stopped(name: str) -> bool:
    return name == "one" or name.startswith("large 8")


def num_microbatches(name: str) -> int:
    if name.startswith("large"):
        return 1
    return TRAIN.global_batch_size // TRAIN.micro_batch_size // (2 if name.startswith("all") else 1)


@pytest.mark.parametrize("name", TRAINED)
def test_replicas_exchange_gradients_and_weights_once_a_step(found: Found, name: str) -> None:
    step = last_step(found, name)
    (model,) = parts_of(found, name, "build_model")
    replicas = 2 if name.startswith("all") else 1
    for collective, bytes_a_number in (
        ("reduce_scatter_tensor_coalesced_", 4),
        ("allgather_into_tensor_coalesced_", 2),
    ):
        # One for each chunk of the layers.
        assert step["collectives"][collective] == (2 if name.startswith("interleaved") else 1)
        # The whole and a replica's share of it.
        expected = bytes_a_number * model["num_parameters"] * (1 + 1 / replicas)
        assert step["collective_bytes"][collective] == pytest.approx(expected, rel=0.02)


@pytest.mark.parametrize("name", ["pipeline 0", "pipeline 1", "all 0", "all 7", "interleaved 0", "interleaved 1"])
def test_stages_exchange_hidden_states_and_their_gradients(found: Found, name: str) -> None:
    step = last_step(found, name)
    state = TRAIN.micro_batch_size * 32 * TINY_MODEL.hidden_size * 2
    # A microbatch passes a border between two stages, or, of four chunks, three.
    borders = 3 if name.startswith("interleaved") else 1
    for direction in ("send", "recv_"):
        assert step["collectives"][direction] == num_microbatches(name) * borders
        assert step["collective_bytes"][direction] == num_microbatches(name) * borders * state


@pytest.mark.parametrize("name", ["tensor 0", "tensor 1"])
def test_tensor_ranks_gather_and_scatter_the_sequence(found: Found, name: str) -> None:
    collectives = last_step(found, name)["collectives"]
    microbatches, layers = num_microbatches(name), TINY_MODEL.num_layers
    # Forward: attention and the feed-forward layer gather and scatter, and so do embedding (scatter) and head (gather).
    # Backward: each gathers what it scattered, scatters what it gathered, and gathers its inputs again.
    assert collectives["_reduce_scatter_base_"] == microbatches * (2 * layers + 1 + 2 * layers)
    assert collectives["_allgather_base_"] == microbatches * (2 * layers + 1 + 2 * layers + 1 + 2 * layers)


@pytest.mark.parametrize("budget", BUDGETS, ids=str)
def test_a_large_model_stays_within_its_memory(found: Found, budget: Any) -> None:
    assert (budget.preset, budget.seq_length) == (PRESET, SEQ_LENGTH)
    kernels = {"loss_kernel": budget.loss_kernel, "activation_kernel": budget.activation_kernel}
    [name] = [name for name, rehearsed in LARGE.items() if rehearsed == (budget.micro_batch_size, kernels)]
    step = last_step(found, name)
    assert step["peak"] / GIB == pytest.approx(budget.peak_gib, abs=0.1)
    # Weights in bfloat16, gradients, masters and two moments in float32: 18 bytes a parameter.
    (model,) = parts_of(found, name, "build_model")
    assert step["end"] == pytest.approx(18 * model["num_parameters"], rel=0.01)


@pytest.mark.parametrize("name", [name for name in TRAINED if not name.startswith("large 8")])
def test_a_checkpoint_has_weights_masters_and_moments(found: Found, name: str) -> None:
    (part,) = parts_of(found, name, "sharded")
    (model,) = parts_of(found, name, "build_model")
    assert part["num_weights"] == model["num_parameters"]
    # Of masters and two moments a rank has its share, whole parameters, and none that another tensor rank has as well.
    share = last_step(found, name)["num_masters"]
    assert 0 < part["num_of_optimizer"] <= 3 * (share + model["largest"])
    if name in ("one", "tensor 0", "pipeline 0", "pipeline 1", "interleaved 0", "interleaved 1"):
        assert part["num_of_optimizer"] == 3 * model["num_parameters"]
    # Nothing is gathered on the device but a state of one parameter at a time.
    assert part["peak"] - part["begin"] <= 2 * 4 * model["largest"]


@pytest.mark.parametrize("name", USES)
def test_whatever_is_done_with_weights_keeps_to_the_device(found: Found, name: str) -> None:
    assert found[name]["error"] is None, found[name]["error"]


def test_a_round_goes_on_with_its_state_on_the_device(found: Found) -> None:
    (loaded,) = parts_of(found, "resumed", "load_checkpoint")
    before, after = last_step(found, "one"), last_step(found, "resumed")
    for kind in ("weights", "gradients", "masters", "moments", "num_masters", "num_moments"):
        assert loaded[kind] == before[kind] == after[kind]
    assert after["syncs"].keys() == before["syncs"].keys()


def test_scoring_waits_twice_a_block(found: Found) -> None:
    blocks = parts_of(found, "score", "score")
    for block in blocks[1:]:
        assert sum(block["syncs"].values()) <= 2, describe_syncs(block)
    assert all(set(block["attention"]) == {"FLASH_ATTENTION"} for block in blocks)


def test_generation_by_itself_never_waits(found: Found) -> None:
    # A short one that warms up, then the one that is measured.
    _, measured = parts_of(found, "generate", "generate")
    assert not measured["syncs"], describe_syncs(measured)
    assert measured["attention"] == {"FLASH_ATTENTION": 4 * TINY_MODEL.num_layers}


def test_evaluation_with_masks_takes_a_kernel_that_never_holds_the_scores(found: Found) -> None:
    (likelihoods,) = parts_of(found, "evaluate", "_answer_likelihoods")
    (generations,) = parts_of(found, "evaluate", "_answer_generations")
    for part in (likelihoods, generations):
        assert set(part["attention"]) == {"EFFICIENT_ATTENTION"}


def test_devices_that_are_mixed_are_found(found: Found) -> None:
    assert "found at least two devices, cuda:0 and cpu" in found["mix_devices"]["error"]


def test_tensors_on_the_host_for_nccl_are_found(found: Found) -> None:
    assert "over NCCL was given tensors on cpu" in found["reduce_on_host"]["error"]


def test_a_number_that_is_read_is_counted_and_named(found: Found) -> None:
    step, plain = last_step(found, "read_a_number"), last_step(found, "one")
    assert [count for site, count in step["syncs"].items() if "flaws.py" in site] == [num_microbatches("one")]
    assert sum(step["syncs"].values()) == sum(plain["syncs"].values()) + num_microbatches("one")


def test_memory_that_is_held_is_counted(found: Found) -> None:
    first, second = parts_of(found, "hold_the_losses", "train_step")
    # 2 x 32 numbers in float32 are 256 bytes, and the allocator's least block has 512.
    assert second["end"] - first["end"] == num_microbatches("one") * 512
