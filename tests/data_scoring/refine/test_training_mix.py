from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from data_scoring.refine.refine_shards import mix_all
from data_scoring.refine.training_mix import Mix, MixOptions, write_mix

QUERY = "select range % 3 as shard, range // 3 as sample from range(200000)"


def test_the_order_is_random_reproducible_and_complete(tmp_path: Path) -> None:
    assert write_mix(tmp_path / "one", QUERY, 1, 2) == 200_000
    write_mix(tmp_path / "two", f"select * from ({QUERY}) order by sample desc", 1, 2)
    write_mix(tmp_path / "three", QUERY, 1, 3)
    one, two, three = ((tmp_path / name).read_bytes() for name in ("one", "two", "three"))
    assert one == two
    assert one != three
    table = pq.read_table(tmp_path / "one")
    pairs = table["shard"].to_numpy() + 3 * table["sample"].to_numpy()
    assert sorted(pairs.tolist()) == list(range(200_000))
    assert abs(np.corrcoef(pairs, np.arange(len(pairs)))[0, 1]) < 0.01


def test_sources_follow_each_other_each_in_the_random_order_of_all(tmp_path: Path) -> None:
    rows = [(shard, sample, "abc"[(shard + sample) % 3], 9) for shard in range(4) for sample in range(500)]
    names = ("shard", "sample", "source", "num_tokens")
    columns = dict(zip(names, map(list, zip(*rows, strict=True)), strict=True))
    pq.write_table(pa.table(columns), tmp_path / "samples.parquet")
    mix_all(tmp_path / "random", tmp_path / "samples.parquet", 1)
    mix_all(tmp_path / "sources", tmp_path / "samples.parquet", 1, sources=["b", "c", "a"])
    tables = (pq.read_table(tmp_path / name).to_pydict() for name in ("random", "sources"))
    random, ordered = (list(zip(table["shard"], table["sample"], strict=True)) for table in tables)
    assert ordered == [row for source in "bca" for row in random if "abc"[sum(row) % 3] == source]
    assert ordered != random


def test_a_limit_of_tokens_cuts_the_order_before_the_sample_that_exceeds_it(tmp_path: Path) -> None:
    lengths = "select range % 3 as shard, range // 3 as sample, 1 + range % 7 as num_tokens from range(1000)"
    write_mix(tmp_path / "whole", lengths, 1, 2)
    whole = pq.read_table(tmp_path / "whole")
    totals = np.cumsum(1 + (whole["shard"].to_numpy() + 3 * whole["sample"].to_numpy()) % 7)
    for limit in (totals[0], totals[499], totals[500] - 1, totals[-1], totals[-1] + 1):
        count = write_mix(tmp_path / "cut", lengths, 1, 2, MixOptions(int(limit)))
        assert count == (totals <= limit).sum()
        assert pq.read_table(tmp_path / "cut").equals(whole.slice(0, count))
    with pytest.raises(
        ValueError, match=r"refine.max_tokens: 2 is less than the tokens of the mix's first sample; raise it"
    ):
        write_mix(tmp_path / "none", "select 0 as shard, 0 as sample, 3 as num_tokens", 1, 2, MixOptions(2))
    assert not list(tmp_path.glob("*none*"))


def test_reading_crosses_row_groups_and_goes_back(tmp_path: Path) -> None:
    expected = {"shard": np.arange(150_000) % 5, "sample": np.arange(150_000)}
    pq.write_table(pa.table(expected), tmp_path / "mix", row_group_size=1 << 16)
    mix = Mix(tmp_path / "mix")
    assert len(mix) == 150_000
    for start, stop in ((65_530, 65_545), (0, 3), (149_990, 150_000), (10, 140_000)):
        shards, samples = mix.read(start, stop)
        assert (shards == expected["shard"][start:stop]).all()
        assert (samples == expected["sample"][start:stop]).all()
