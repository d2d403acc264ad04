"""Facts of a scored round against the files that they are of, in NumPy, and draws against repeated ones."""

import shutil
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from numpy.typing import NDArray

from data_scoring.ledger import open_ledger
from flows.report.round_facts import RoundFacts, inclusion_probabilities, read_facts
from flows.run.folder import read_run
from tests.conftest import MakeOnce
from tests.flows.stages.test_verification import make_runs

# Returns random losses of a number of samples.
Draw = Callable[[np.random.Generator, int], NDArray[np.float64]]


def facts_of(folder: Path) -> RoundFacts | None:
    with open_ledger(folder) as ledger:
        return read_facts(read_run(folder), ledger)


@pytest.mark.parametrize("temperature", [0.3, 1.0, 4.0])
def test_probabilities_are_the_frequencies_of_the_draw(temperature: float) -> None:
    chance = np.random.default_rng(0)
    losses = np.sort(chance.normal(3, 0.8, 400))
    probabilities = inclusion_probabilities(losses, np.ones(400), 0.5, temperature)
    assert probabilities.sum() == pytest.approx(200, abs=1e-6)
    keys = losses / temperature + chance.gumbel(size=(4000, 400))
    kept = np.argsort(-keys, axis=1)[:, :200]
    frequencies = np.bincount(kept.ravel(), minlength=400) / 4000
    # Standard errors are at most 0.008; a fixed number of samples differs from a threshold by less.
    assert np.abs(frequencies - probabilities).max() < 0.035
    assert np.abs(frequencies - probabilities).mean() < 0.008


def test_temperature_0_keeps_the_highest_and_rate_1_everything() -> None:
    losses, counts = np.array([1.0, 2.0, 3.0]), np.array([4.0, 4.0, 2.0])
    assert inclusion_probabilities(losses, counts, 0.5, 0).tolist() == [0, 0.75, 1]
    assert inclusion_probabilities(losses, counts, 1.0, 1.0).tolist() == [1, 1, 1]


def about_3(chance: np.random.Generator, size: int) -> NDArray[np.float64]:
    return chance.normal(3, 0.5, size)


Losses = dict[tuple[int, int], float]


def with_losses(run: Path, folder: Path, end: Draw = about_3, steps: Draw = about_3) -> tuple[Path, Losses, Losses]:
    """Return a copy of a run with losses drawn by `end` and `steps` in round 1, those at its end, and in its steps."""
    shutil.copytree(run, folder)
    chance, losses, seen = np.random.default_rng(1), {}, []
    for shard, path in enumerate(sorted((folder / "rounds" / "1" / "losses").glob("shard=*.parquet"))):
        table = pq.read_table(path)
        drawn = end(chance, len(table)).astype(np.float32)
        pq.write_table(table.set_column(table.column_names.index("loss"), "loss", pa.array(drawn)), path)
        losses |= {
            (shard, sample): float(loss) for sample, loss in zip(table["sample"].to_pylist(), drawn, strict=True)
        }
    for place, row in enumerate(pq.read_table(folder / "rounds" / "1" / "mix.parquet").to_pylist()):
        seen.append({"step": place // 4 + 1, **row, "loss": np.float32(steps(chance, 1)[0])})
    (folder / "rounds" / "1" / "seen").mkdir(exist_ok=True)
    pq.write_table(pa.Table.from_pylist(seen), folder / "rounds" / "1" / "seen" / "step=00000001.parquet")
    copy = read_run(folder)
    copy.record(
        "score", 1, str(copy.recorded("score", 1)), time.time(), copy.recorded_files(copy.record_path("score", 1))
    )
    return folder, losses, {(row["shard"], row["sample"]): float(row["loss"]) for row in seen}


def test_facts_are_those_of_the_files(make_once: MakeOnce, tmp_path: Path) -> None:
    folder, losses, seen = with_losses(make_once("verified", make_runs) / "train 2", tmp_path / "run")
    facts = facts_of(folder)
    assert facts is not None and facts.forgotten is not None
    assert (facts.round_number, facts.num_rounds) == (1, 2)

    # The seen losses are in the order of training.
    forgotten = np.array([losses[place] - seen[place] for place in seen])
    parts = np.arange(len(seen)) * 8 // len(seen)
    assert facts.forgotten.num_samples == len(seen)
    assert 0.4 < facts.forgotten.share < 0.6
    assert facts.forgotten.share == pytest.approx(np.mean(forgotten > 0))
    assert facts.forgotten.nats == pytest.approx(np.mean(forgotten), abs=1e-6)
    assert len(facts.parts) == 8
    for number, part in enumerate(facts.parts):
        assert part.num_samples == np.sum(parts == number)
        assert part.share == pytest.approx(np.mean(forgotten[parts == number] > 0))
        assert part.nats == pytest.approx(np.mean(forgotten[parts == number]), abs=1e-6)

    shards = [
        np.array([loss for place, loss in losses.items() if place[0] == shard])
        for shard in sorted({place[0] for place in losses})
    ]
    assert facts.spread == pytest.approx(np.mean([np.std(shard) for shard in shards]), abs=1e-5)
    # Of what draws keep, the samples beyond those that chance alone keeps.
    chance = np.random.default_rng(2)
    frequencies = [drawn_by(chance, shard) for shard in shards]
    extra = sum(float(np.maximum(each - 0.5, 0).sum()) for each in frequencies)
    assert facts.distance == pytest.approx(extra / sum(each.sum() for each in frequencies), abs=0.01)

    total = pq.read_table(folder / "corpus" / "samples.parquet")["num_tokens"].to_numpy().sum()
    assert facts.cost.everything == total
    assert facts.cost.round == pytest.approx(total / 2, abs=1)
    assert facts.cost.scoring == pytest.approx(total / 3, abs=1)
    assert facts.cost.seconds_a_token == 0.01
    steps = pq.read_table(folder / "rounds" / "1" / "steps.parquet")["num_tokens"].to_numpy().sum()
    config = read_run(folder).config
    # Vocabulary of 280.
    assert facts.tokens_per_parameter == pytest.approx(steps / config.model.num_parameters(280))
    rounds = [pq.read_table(folder / "rounds" / str(number) / "validation.parquet").to_pylist() for number in (1, 2)]
    ends = [[row for row in rows if row["step"] == rows[-1]["step"]] for rows in rounds]
    first, second = (sum(row["loss"] * row["num_tokens"] for row in rows) / 400 for rows in ends)
    assert facts.gain == pytest.approx(second - first)


def test_losses_within_parts_and_limits_of_the_next_round(make_once: MakeOnce, tmp_path: Path) -> None:
    folder, losses, seen = with_losses(make_once("verified", make_runs) / "train 2", tmp_path / "run")
    run = read_run(folder)
    refine = run.config.refine.model_copy(update={"within": "part", "max_tokens": 1000})
    within = replace(run, config=run.config.model_copy(update={"refine": refine}))
    with open_ledger(folder) as ledger:
        facts = read_facts(within, ledger)
    assert facts is not None
    parts = np.arange(len(seen)) * 8 // len(seen)
    end = np.array([losses[place] for place in seen])
    assert facts.spread == pytest.approx(np.mean([np.std(end[parts == part]) for part in range(8)]), abs=1e-5)
    assert facts.cost.round == 1000
    # What is not complete has no result.
    run.forget("train", 2)
    shorter = facts_of(folder)
    assert shorter is not None and shorter.gain is None


def drawn_by(chance: np.random.Generator, losses: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return how often a draw by loss keeps each sample, of 4,000 draws of half of them."""
    keys = losses + chance.gumbel(size=(4000, len(losses)))
    kept = np.argsort(-keys, axis=1)[:, : int(len(losses) / 2 + 0.5)]
    return np.bincount(kept.ravel(), minlength=len(losses)) / 4000


def test_nothing_is_known_before_a_round_is_scored(make_once: MakeOnce) -> None:
    assert facts_of(make_once("verified", make_runs) / "prepare") is None
