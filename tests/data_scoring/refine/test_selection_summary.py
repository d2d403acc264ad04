"""A dry run says what refining then does, counted again from the files it would have written."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from data_scoring.base.engine import LocalEngine
from data_scoring.base.parquet import write_parquet
from data_scoring.base.progress import silent
from data_scoring.losses.shard_scoring import losses_path
from data_scoring.refine import selection_summary
from data_scoring.refine.candidates import Draw
from data_scoring.refine.policies import POLICIES
from data_scoring.refine.refine_config import RefineConfig
from data_scoring.refine.refine_shards import mix_selection, refine
from data_scoring.refine.selection_summary import dry_run, summarise_selection
from tests.conftest import read_rows

SIZES = (701, 700)


@pytest.fixture
def scored(tmp_path: Path) -> Path:
    generator = np.random.default_rng(3)
    rows = []
    for shard, size in enumerate(SIZES):
        samples, tokens = np.arange(size, dtype=np.int32), generator.integers(10, 33, size, dtype=np.int32)
        losses = generator.normal(3, 0.6, size).astype(np.float32)
        sources = np.where(samples % 2, "b", "a")
        table = pa.table({"sample": samples, "num_tokens": tokens, "source": sources, "loss": losses})
        write_parquet(losses_path(tmp_path / "1", shard), table, "scored")
        rows += [(shard, number, "ab"[number % 2], int(tokens[number])) for number in range(size)]
    columns = dict(zip(("shard", "sample", "source", "num_tokens"), map(list, zip(*rows, strict=True)), strict=True))
    write_parquet(tmp_path / "samples.parquet", pa.table(columns), "samples")
    # The round before trained on the first quarter of each shard.
    mix = [row[:2] for row in rows if row[1] < SIZES[row[0]] // 4]
    write_parquet(
        tmp_path / "1" / "mix.parquet", pa.table({"shard": [r[0] for r in mix], "sample": [r[1] for r in mix]}), "m"
    )
    return tmp_path


def kept_by(folder: Path, config: RefineConfig) -> dict[tuple[int, int], float]:
    refine(Draw(folder, 2, config, 5, list(SIZES)), config.model_dump_json(), LocalEngine(1), silent)
    return {
        (shard, sample): loss
        for shard in range(len(SIZES))
        for sample, loss, kept in read_rows(
            folder / "2" / "selection" / f"shard={shard:04d}.parquet", "sample", "loss", "kept"
        )
        if kept
    }


@pytest.mark.parametrize(("policy", "rate"), [("loss", 0.3), ("random", 0.5), ("all", 0.5)])
def test_it_counts_what_refining_keeps(scored: Path, policy: str, rate: float) -> None:
    config = RefineConfig(policy=policy, sampling_rate=rate)
    before = sorted(scored.rglob("*"))
    dry = dry_run(Draw(scored, 2, config, 5, list(SIZES)), scored / "samples.parquet")
    assert sorted(scored.rglob("*")) == before
    kept = kept_by(scored, config)
    sources = {
        row[:2]: row[2:] for row in read_rows(scored / "samples.parquet", "shard", "sample", "source", "num_tokens")
    }
    assert (dry.total.num_samples, dry.total.num_kept) == (sum(SIZES), len(kept))
    assert {(reason, kept) for reason, kept, _ in dry.reasons} >= {(POLICIES[policy].reason, True)}
    assert sum(count for _, kept, count in dry.reasons if kept) == len(kept)
    assert dry.total.num_tokens_kept == sum(sources[sample][1] for sample in kept)
    assert dry.total.mean_loss_kept == pytest.approx(np.mean(list(kept.values())), rel=1e-6)
    for part in dry.sources:
        assert part.num_kept == sum(sources[sample][0] == part.name for sample in kept)
    assert [part.num_kept for part in dry.shards] == [sum(s == shard for s, _ in kept) for shard in range(len(SIZES))]
    by_chance = kept_by(scored, config.model_copy(update={"policy": "all" if policy == "all" else "random"}))
    assert dry.random_overlap == pytest.approx(len(kept.keys() & by_chance.keys()) / len(kept))
    assert dry.random_overlap == 1 if policy != "loss" else dry.random_overlap < 1
    mixed = set(read_rows(scored / "1" / "mix.parquet", "shard", "sample"))
    assert dry.last_mix_overlap == pytest.approx(len(kept.keys() & mixed) / len(kept))


def test_a_written_selection_is_read_and_not_drawn_again(scored: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    draw = Draw(scored, 2, RefineConfig(sampling_rate=0.3), 5, list(SIZES))
    expected = dry_run(draw, scored / "samples.parquet")
    refine(draw, "f", LocalEngine(1), silent)
    for drawing in ("Selection", "find_limits"):
        monkeypatch.delattr(selection_summary, drawing)
    found = summarise_selection(draw, scored / "samples.parquet")
    assert found == replace(expected, random_overlap=None)


def test_batches_are_compared_with_batches_drawn_by_chance(scored: Path) -> None:
    config = RefineConfig(policy="loss_batch", temperature=1e6, batch_size=16)
    assert dry_run(Draw(scored, 2, config, 5, list(SIZES)), scored / "samples.parquet").random_overlap == 1


def test_guards_that_leave_nothing_are_no_division_by_zero(scored: Path) -> None:
    config = RefineConfig(min_tokens=100)
    dry = dry_run(Draw(scored, 2, config, 5, list(SIZES)), scored / "samples.parquet")
    assert (dry.total.num_kept, dry.reasons) == (0, [("too few tokens", False, sum(SIZES))])
    kept_by(scored, config)
    with pytest.raises(ValueError, match="no sample is left to train round 2 on"):
        mix_selection(scored / "2" / "mix.parquet", Draw(scored, 2, config, 5, list(SIZES)), scored / "samples.parquet")
