"""The training order of a round, its parts and its batches, in SQL.

The paper divides the data by training iteration into 8 parts, and draws within each (arXiv 2402.02791, on
multiple-round training). A part is an equal stretch of the order in which the previous round trained on its samples.
"""

from dataclasses import dataclass
from pathlib import Path

import pyarrow.parquet as pq

from data_scoring.base.sql import parquet_rows


@dataclass(frozen=True)
class TrainingOrder:
    """The order in which a round trained on its samples, divided into `num_parts` parts.

    mix: its file, of `num_samples` rows. Samples that the round did not train on make one more part, the last.
    """

    mix: Path
    num_samples: int
    num_parts: int

    @classmethod
    def open(cls, round_folder: Path, num_parts: int) -> "TrainingOrder":
        """Return the order of the round in `round_folder`. Raises ValueError if it has no mix."""
        mix = round_folder / "mix.parquet"
        if not mix.exists():
            raise ValueError(f"{mix}: no such mix, but refine.within: part needs its order; restore it")
        return cls(mix, int(pq.read_metadata(mix).num_rows), num_parts)

    def join(self, shard: int) -> str:
        """Return the SQL that joins `place`, the place in the order from 0 or null, to a shard's samples."""
        return (
            f"left join (select sample, file_row_number as place from {parquet_rows(self.mix)} where shard = {shard}) "
            "using (sample)"
        )

    def part(self, batch_size: int = 1) -> str:
        """Return the SQL expression of a sample's part, from 0; a batch belongs to the part of its first sample."""
        first = f"((place // {batch_size}) * {batch_size})"
        return f"coalesce(({first} * {self.num_parts}) // {self.num_samples}, {self.num_parts})::int"

    def batch(self, shard: int, batch_size: int) -> str:
        """Return the SQL expression of the number of a sample's batch, a bigint.

        Samples that the round did not train on are in batches of consecutive ones of `shard`, with negative numbers.
        """
        return f"coalesce(place // {batch_size}, -1 - ({shard}::bigint << 32) - sample // {batch_size})::bigint"
