"""The search space of an architecture search: depth and FFN expansion at a fixed number of parameters.

The width follows from these: it is the multiple of the head size that meets the budget, and the feed-forward width is
adjusted to use up the remainder.
"""

import math
from bisect import bisect_right
from collections.abc import Iterator
from typing import Annotated

from pydantic import Field, model_validator

from data_scoring.base.field_effects import FREE
from data_scoring.base.field_types import Integer, Number
from data_scoring.config import Config
from trainer.config import ModelConfig
from trainer.parallel_config import ParallelConfig

_MOST_HEADS, _LEAST_WIDTH, _MOST_WIDTH = 1024, 8, 65_536
# Feed-forward widths are multiples of this on every rank, which suits matrix units.
_FFN_STEP = 8
# Points tried per trial before the ranges count as exhausted.
_POINTS_A_TRIAL = 200


class SearchConfig(Config):
    """An architecture search: models of about `parameters` parameters that differ in shape."""

    parameters: Integer = Field(
        default=1_000_000_000, ge=1, le=10**14, description="Parameters of every model, embedding and head included."
    )
    tolerance: Number = Field(
        default=0.03, gt=0, le=0.5, description="Largest deviation from `parameters`, as a share of it."
    )
    # More of them are the same ones, and some more.
    trials: Annotated[Integer, FREE] = Field(
        default=30, ge=1, le=10_000, description="Models that are trained (paper: 30)."
    )
    min_depth: Integer = Field(default=9, ge=1, le=1024, description="Fewest layers (paper: 9).")
    max_depth: Integer = Field(default=40, ge=1, le=1024, description="Most layers (paper: 40).")
    min_expansion: Number = Field(default=1.0, gt=0, le=64, description="Least ratio of FFN to width (paper: 1).")
    max_expansion: Number = Field(default=4.0, gt=0, le=64, description="Greatest ratio of FFN to width (paper: 4).")
    seed: Integer = Field(default=0, ge=0, lt=2**31, description="Seed of the draw.")
    jobs: Annotated[Integer, FREE] = Field(default=1, ge=1, le=1024, description="Trials that train at the same time.")
    generation: Annotated[bool, FREE] = Field(default=True, description="Whether generation speed is measured.")

    @model_validator(mode="after")
    def _check_ranges(self) -> "SearchConfig":
        for name in ("depth", "expansion"):
            least, most = getattr(self, f"min_{name}"), getattr(self, f"max_{name}")
            if least > most:
                raise ValueError(f"{name}: {least:g}-{most:g} ends before it begins; swap the two")
        return self


def draw_models(
    search: SearchConfig, base: ModelConfig, parallel: ParallelConfig, vocab_size: int
) -> list[ModelConfig]:
    """Return `search.trials` distinct models; settings that are not searched, such as the head size, come from `base`.

    Points come from a scrambled Halton sequence, which covers depth and expansion evenly for any number of points. More
    trials with the same seed extend the same list. Points without a model inside the ranges and within
    `search.tolerance` of the budget are skipped. Raises ValueError if the budget or the ranges cannot be met.
    """
    fitter = _Fitter(search, base, parallel, vocab_size)
    depths = [depth for depth in range(search.min_depth, search.max_depth + 1) if depth % parallel.num_chunks == 0]
    if not depths:
        raise ValueError(
            f"--depth: {search.min_depth}-{search.max_depth} has no multiple of parallel.pipeline x "
            f"virtual_pipeline, {parallel.num_chunks}; widen it"
        )
    fitter.check_budget(depths[0])
    found: dict[tuple[int, int, int], ModelConfig] = {}
    for u, v in _points(search):
        depth = depths[int(u * len(depths))]
        expansion = search.min_expansion + v * (search.max_expansion - search.min_expansion)
        model = fitter.fit(depth, expansion)
        if model is not None:
            found.setdefault((model.num_layers, model.hidden_size, model.ffn_size), model)
        if len(found) == search.trials:
            return list(found.values())
    raise ValueError(
        f"--trials: {len(found)} distinct models of {search.parameters:,} parameters (within {search.tolerance:.0%}) "
        f"were found with heads of {fitter.head_size} channels, not {search.trials}; ask for fewer, widen --depth, "
        "--expansion or --tolerance, or make heads smaller (more model.num_attention_heads)"
    )


def _points(search: SearchConfig) -> Iterator[tuple[float, float]]:
    # Takes a second to import.
    from scipy.stats import qmc

    sequence = qmc.Halton(d=2, rng=search.seed)
    for _ in range(_POINTS_A_TRIAL):
        for u, v in sequence.random(search.trials):
            yield float(u), float(v)


class _Fitter:
    """Finds the width and the feed-forward width that meet the budget at a given depth."""

    def __init__(self, search: SearchConfig, base: ModelConfig, parallel: ParallelConfig, vocab_size: int) -> None:
        self._search, self._base, self._vocab_size = search, base, vocab_size
        self.head_size = base.channels
        self._heads_a_group = base.num_attention_heads // base.num_groups
        # Heads form whole groups, the ranks share the groups equally, and the shortcut's reduction divides the width.
        heads_step = self._heads_a_group * parallel.tensor
        reduction = base.shortcut_reduction or 1
        self._heads_step = heads_step * (reduction // math.gcd(reduction, heads_step * self.head_size))
        self._ffn_step = _FFN_STEP * parallel.tensor
        self._least_step = math.ceil(_LEAST_WIDTH / self._width(1))

    def check_budget(self, depth: int) -> None:
        """Raise ValueError if the smallest model in the ranges, which has this depth, has too many parameters."""
        least = self._model(depth, self._least_step, self._ffn_sizes(self._width(self._least_step)).start)
        count, budget = least.num_parameters(self._vocab_size), self._search.parameters
        if count > budget * (1 + self._search.tolerance):
            embeddings = 2 * self._vocab_size * least.hidden_size
            raise ValueError(
                f"--parameters: {budget:,} is less than the smallest model of these ranges has, {count:,} (width "
                f"{least.hidden_size}, depth {depth}, FFN {least.ffn_size}; embedding and head of {self._vocab_size:,} "
                f"entries {embeddings:,}); raise it, or make heads or the vocabulary smaller"
            )

    def fit(self, depth: int, expansion: float) -> ModelConfig | None:
        """Return the model of this depth nearest to `expansion` that meets the budget, or None if none does."""
        search = self._search

        def count(step: int) -> int:
            ffn_size = self._ffn_step * max(1, round(expansion * self._width(step) / self._ffn_step))
            return self._model(depth, step, ffn_size).num_parameters(self._vocab_size)

        most = min(_MOST_HEADS // self._heads_step, _MOST_WIDTH // self._width(1))
        steps = range(self._least_step, most + 1)
        above = self._least_step + bisect_right(steps, search.parameters, key=count)
        models = [self._spend(depth, step) for step in (above - 1, above) if step in steps]
        return min(
            (model for model in models if model is not None),
            key=lambda model: abs(model.ffn_size / model.hidden_size - expansion),
            default=None,
        )

    def _spend(self, depth: int, step: int) -> ModelConfig | None:
        """Return the model of this depth and width that meets the budget, or None if no FFN width in range does."""
        sizes = self._ffn_sizes(self._width(step))
        if not sizes:
            return None
        least = self._model(depth, step, sizes[0]).num_parameters(self._vocab_size)
        a_step = self._model(depth, step, sizes[0] + self._ffn_step).num_parameters(self._vocab_size) - least
        place = round((self._search.parameters - least) / a_step)
        model = self._model(depth, step, sizes[min(max(place, 0), len(sizes) - 1)])
        off = abs(model.num_parameters(self._vocab_size) - self._search.parameters)
        return model if off <= self._search.tolerance * self._search.parameters else None

    def _width(self, step: int) -> int:
        return step * self._heads_step * self.head_size

    def _ffn_sizes(self, width: int) -> range:
        """Return the allowed feed-forward widths for a width."""
        least = math.ceil(self._search.min_expansion * width / self._ffn_step)
        most = math.floor(self._search.max_expansion * width / self._ffn_step)
        return range(self._ffn_step * max(1, least), self._ffn_step * most + 1, self._ffn_step)

    def _model(self, depth: int, step: int, ffn_size: int) -> ModelConfig:
        heads = step * self._heads_step
        shape = {
            "num_layers": depth,
            "hidden_size": self._width(step),
            "num_attention_heads": heads,
            "num_query_groups": heads // self._heads_a_group if self._base.num_query_groups else None,
            "ffn_hidden_size": ffn_size,
        }
        return ModelConfig.model_validate({**self._base.model_dump(), **shape})
