"""Models drawn by an architecture search: they meet the budget (counted independently), are in range and distinct."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

from flows.experiments.search_space import SearchConfig, draw_models
from flows.run.config import RunConfig
from trainer.config import ModelConfig
from trainer.parallel_config import ParallelConfig

BASE = ModelConfig(num_layers=2, hidden_size=64, num_attention_heads=4)
ALONE = ParallelConfig()
VOCABULARY = 2048


def draw(base: ModelConfig = BASE, parallel: ParallelConfig = ALONE, **fields: Any) -> list[ModelConfig]:
    search = {"parameters": 1_500_000, "trials": 16, "min_depth": 4, "max_depth": 20, **fields}
    return draw_models(SearchConfig.model_validate(search), base, parallel, VOCABULARY)


def test_a_shortcut_divides_the_width_and_what_it_adds_is_counted() -> None:
    models = draw(ModelConfig(preset="pangu-pi-2m", num_attention_heads=8))
    for model in models:
        assert model.hidden_size % 32 == 0 and model.activation_terms == 2
        additions = model.num_layers * (4 * model.ffn_size + model.hidden_size**2 // 16)
        assert abs((count(model) + additions) / 1_500_000 - 1) <= 0.03


def count(model: ModelConfig) -> int:
    """Return the number of a model's weights, tensor by tensor."""
    width, heads, ffn = model.hidden_size, model.num_attention_heads, model.ffn_hidden_size
    groups = model.num_query_groups or heads
    assert ffn is not None
    layer = [(width,), (width,), (width, width), (width + 2 * groups * width // heads, width), (2 * ffn, width)]
    shapes = [(VOCABULARY, width), (VOCABULARY, width), (width,), *model.num_layers * [*layer, (width, ffn)]]
    return sum(int(np.prod(shape)) for shape in shapes)


@pytest.mark.parametrize(
    ("base", "parallel"),
    [
        (BASE, ALONE),
        (ModelConfig(hidden_size=64, num_attention_heads=4, num_query_groups=2), ALONE),
        (ModelConfig(hidden_size=64, num_attention_heads=8), ParallelConfig(tensor=2, pipeline=2)),
    ],
)
def test_models_meet_the_budget_and_are_in_range_and_distinct(base: ModelConfig, parallel: ParallelConfig) -> None:
    models = draw(base, parallel, tolerance=0.02)
    head_size = base.hidden_size // base.num_attention_heads
    for model in models:
        assert abs(count(model) / 1_500_000 - 1) <= 0.02
        assert 4 <= model.num_layers <= 20 and model.num_layers % parallel.pipeline == 0
        assert 1 <= model.ffn_size / model.hidden_size <= 4
        assert model.hidden_size == head_size * model.num_attention_heads
        assert model.num_attention_heads % parallel.tensor == 0 and model.ffn_size % (8 * parallel.tensor) == 0
        if base.num_query_groups:
            assert model.num_attention_heads == 2 * (model.num_query_groups or 0)
    assert len({(model.num_layers, model.hidden_size, model.ffn_size) for model in models}) == 16


def test_what_is_drawn_is_spread_out_and_the_seed_decides_it_alone() -> None:
    models = draw(trials=16)
    assert models == draw(trials=16) and models != draw(trials=16, seed=1)
    # A search goes on with more trials: those before stay.
    assert draw(trials=24)[:16] == models
    depths = [model.num_layers for model in models]
    expansions = [model.ffn_size / model.hidden_size for model in models]
    assert np.histogram(depths, bins=4, range=(4, 21))[0].min() >= 2
    assert np.histogram(expansions, bins=3, range=(1, 4))[0].min() >= 2
    assert abs(np.corrcoef(depths, expansions)[0, 1]) < 0.5


def test_the_papers_search_can_be_drawn() -> None:
    search = SearchConfig(parameters=1_000_000_000, trials=30)
    base = ModelConfig(hidden_size=1792, num_attention_heads=14)
    models = draw_models(search, base, ALONE, 48_000)
    counts = [model.num_parameters(48_000) for model in models]
    assert len(models) == 30 and min(counts) > 0.97e9 and max(counts) < 1.03e9
    assert {model.hidden_size % 128 for model in models} == {0}


def test_a_fixed_expansion_is_met_as_nearly_as_the_tolerance_lets() -> None:
    search = SearchConfig(parameters=1_000_000_000, trials=3, min_expansion=2.667, max_expansion=2.7, tolerance=0.05)
    for model in draw_models(search, ModelConfig(hidden_size=1792, num_attention_heads=14), ALONE, 48_000):
        assert 2.667 <= model.ffn_size / model.hidden_size <= 2.7
        assert abs(model.num_parameters(48_000) / 1e9 - 1) <= 0.05


def test_heads_smaller_than_any_width_are_no_error() -> None:
    assert all(model.hidden_size >= 8 for model in draw(ModelConfig(hidden_size=64, num_attention_heads=16)))


def test_the_deployed_search_can_be_drawn() -> None:
    deployments = yaml.safe_load(Path("prefect.yaml").read_text())["deployments"]
    [parameters] = [each["parameters"] for each in deployments if each["name"] == "sweep"]
    config, search = RunConfig.model_validate(parameters["config"]), SearchConfig.model_validate(parameters["search"])
    assert len(draw_models(search, config.model, config.parallel, config.tokenizer.vocab_size)) == search.trials


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        # 2 x 2048 x 16 for embedding and head, 16 for the last norm, 4 layers of 4 x 16^2 + 3 x 16 x 16 + 32.
        ({"parameters": 50_000}, r"--parameters: 50,000 is less than the smallest model of these ranges has, 72,848 "
         r"\(width 16, depth 4, FFN 16; embedding and head of 2,048 entries 65,536\); raise it"),
        ({"min_depth": 4, "max_depth": 4, "min_expansion": 2, "max_expansion": 2},
         r"--trials: \d distinct models of 1,500,000 parameters \(within 3%\) were found with heads of 16 channels"),
    ],
)  # fmt: skip
def test_what_cannot_be_met_is_one_line(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        draw(**fields)
    with pytest.raises(
        ValueError, match=r"--depth: 5-5 has no multiple of parallel.pipeline x virtual_pipeline, 2; widen it"
    ):
        draw(parallel=ParallelConfig(pipeline=2), min_depth=5, max_depth=5)
    with pytest.raises(ValueError, match=r"depth: 9-4 ends before it begins"):
        draw(min_depth=9, max_depth=4)
