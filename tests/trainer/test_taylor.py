"""|weight · gradient| compared with plain torch's autograd, under every layout."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from benchmarks.plain_model import PlainModel, load_megatron_weights, read_checkpoint
from data_scoring.base.files import read_json
from tests.conftest import TINY_MODEL, Ranks, read_rows
from tests.trainer.test_masks import JOB_LAYOUTS
from tests.trainer.two_ranks_masks import GROUPED
from trainer.checkpoint_folder import list_checkpoints
from trainer.checkpoint_shapes import shapes_of
from trainer.jobs import MaskJob, TaylorJob
from trainer.neuron_scores import choose
from trainer.pruning import PruningPlan, slice_checkpoint
from trainer.weights import Weights

Found = list[dict[str, Any]]
STUDENT = TINY_MODEL.model_copy(
    update={"hidden_size": 16, "num_attention_heads": 2, "num_query_groups": 1, "head_size": 8, "ffn_hidden_size": 32}
)


@pytest.mark.parametrize("layout", JOB_LAYOUTS)
def test_values_are_weights_times_gradients_of_plain_torch(layout: str, found: Found) -> None:
    plain, values = found[0]["masks"]["plain"], found[0]["masks"][f"grouped {layout}"]["taylor"]
    model = PlainModel(GROUPED, len(plain["head.weight"]))
    # The values go the way of the weights.
    load_megatron_weights(model, values)
    for name, parameter in model.named_parameters():
        expected = (plain[name] * plain[f"{name}.grad"]).abs()
        assert expected.max() > 1e-6, name
        torch.testing.assert_close(parameter.detach(), expected, atol=1e-4 * float(expected.max()), rtol=0)


@pytest.mark.parametrize("layout", JOB_LAYOUTS)
def test_no_layout_changes_the_values(layout: str, found: Found) -> None:
    """Of a model whose embedding is the head too, on two stages each with a copy, and of biases."""
    values, expected = (found[0]["masks"][f"biased {each}"]["taylor"] for each in (layout, "data"))
    assert "output_layer.weight" not in values
    assert values.keys() == expected.keys()
    for name, value in values.items():
        assert expected[name].max() > 0
        torch.testing.assert_close(value, expected[name], atol=1e-4 * float(expected[name].max()), rtol=0, msg=name)


@pytest.mark.slow
def test_workers_measure_and_learn_what_a_student_starts_from(ranks: Ranks, trained: Path) -> None:
    """On four ranks; the student is cut out and scored, and its losses are those that its masks had."""
    folder = ranks.folder / "inherit"
    weights = list_checkpoints(trained / "checkpoint")[-1]
    common = ranks._common(folder, (2, 2, 1), TINY_MODEL)
    ranks.launch(TaylorJob(**common, weights=weights, num_samples=64, micro_batch_size=4), "taylor")
    values = read_checkpoint(folder / "taylor" / "step-00000000")
    assert {name: tuple(value.shape) for name, value in values.items()} == shapes_of(TINY_MODEL, 384)
    assert all(value.min() >= 0 and value.max() > 0 for value in values.values())
    job = MaskJob(**common, weights=weights, student=STUDENT, num_samples=10_000, micro_batch_size=4, steps=60)
    ranks.launch(job, "masks")
    learned = PruningPlan(**read_json(folder / "masks.json")["part"])
    by_taylor = choose(Weights(folder / "taylor" / "step-00000000"), TINY_MODEL, STUDENT)
    losses = {}
    for name, part in (("learned", learned), ("taylor", by_taylor)):
        target = folder / "students" / name / "step-00000000"
        slice_checkpoint(weights, TINY_MODEL, STUDENT, part, target)
        scored = ranks.score(f"score-{name}", target, model=STUDENT)
        losses[name] = np.mean([row[0] for row in read_rows(scored / "losses", "loss")])
    # No worse than all its neighbours: masks of the last steps, which have noise.
    assert losses["learned"] < np.mean(read_json(folder / "masks.json")["losses"][-10:]) + 0.05
    assert losses["learned"] < losses["taylor"] + 0.1
