"""Refining: losses to the samples that are kept, drawn in DuckDB, shard by shard.

The paper's draw (arXiv 2402.02791, section 5): within each shard, N0 of N samples without replacement, with
p_i = exp(l_i) / sum_j exp(l_j). Keeping the N0 largest of l_i / T - ln(-ln U_i), U_i uniform, is exactly that draw
(Gumbel-top-k; Kool et al. 2019, arXiv 1903.06059). U_i is a hash of (seed, round, shard, sample), so the draw does
not depend on row order, threads or processes.
"""

from pathlib import Path

import duckdb

from data_scoring.config import RefineConfig
from data_scoring.files import remove_leftovers, writing
from data_scoring.mix import write_mix
from data_scoring.progress import Progress
from data_scoring.scoring import FINGERPRINT_KEY, losses_path, parquet_fingerprint
from data_scoring.sql import literal, random_bits, writing_errors

# 53 random bits, moved off 0 and 1 so that both logarithms are finite.
_UNIFORM = "(({bits} >> 11) + 0.5) / 9007199254740992.0"

# Each policy is the key by which the largest are kept, over the columns of a shard's losses.
_KEYS = {
    "loss": "loss / {temperature} - ln(-ln({uniform}))",
    "random": "{uniform}",
    "all": "0",
}
_REASONS = {"loss": "drawn by loss", "random": "drawn at random", "all": "everything is kept"}


def num_kept(num_samples: int, config: RefineConfig) -> int:
    """Return N0, how many of a shard's `num_samples` are kept: the nearest to the sampling rate, at least one."""
    if config.policy == "all":
        return num_samples
    return max(1, int(num_samples * config.sampling_rate + 0.5))


def selection_query(
    losses: str, num_samples: int, config: RefineConfig, seed: int, round_number: int, shard: int
) -> str:
    """Return the SQL whose rows (sample, loss, kept, reason) are the selection for `round_number` from one shard.

    `losses` is a SQL relation with the columns sample and loss, `num_samples` its number of rows.
    """
    uniform = _UNIFORM.format(bits=random_bits(seed, round_number, shard, "sample::int"))
    key = _KEYS[config.policy].format(temperature=config.temperature, uniform=uniform)
    kept = num_kept(num_samples, config)
    return f"""
        select sample, loss, place <= {kept} as kept,
            case when place <= {kept} then '{_REASONS[config.policy]}' else 'not drawn' end as reason
        from (select *, row_number() over (order by {key} desc, sample) as place from {losses})
        order by sample"""


def selection_path(round_folder: Path, shard: int) -> Path:
    """Return the path of what was selected from a shard for the round in `round_folder`."""
    return round_folder / "selection" / f"shard={shard:04d}.parquet"


def refine(
    scored: Path,
    target: Path,
    config: RefineConfig,
    seed: int,
    round_number: int,
    num_samples: list[int],
    fingerprint: str,
    progress: Progress,
) -> None:
    """Select the samples of `round_number`, whose folder is `target`, by the losses in the folder `scored`.

    `num_samples` gives each shard's size. Writes a selection file a shard, each committed as it is done and skipped
    by a rerun with the same `fingerprint`. Raises ValueError where a shard's losses are missing or incomplete.
    """
    (target / "selection").mkdir(parents=True, exist_ok=True)
    remove_leftovers(target / "selection")
    for shard, expected in enumerate(num_samples):
        path = selection_path(target, shard)
        if parquet_fingerprint(path) != fingerprint:
            _refine_shard(losses_path(scored, shard), path, expected, config, seed, round_number, shard, fingerprint)
        progress("refining (shards)", shard + 1, len(num_samples))


def checked_losses(connection: duckdb.DuckDBPyConnection, losses: Path, expected: int) -> str:
    """Return the SQL relation of a shard's `expected` losses in the file `losses`.

    Raises ValueError where they are missing or incomplete.
    """
    if not losses.exists():
        raise ValueError(f"{losses}: no such file; score the round first with `reprise score`")
    relation = f"read_parquet({literal(losses)})"
    try:
        [counted] = connection.sql(f"select count(*), count(loss) from {relation}").fetchall()
    except duckdb.Error as error:
        raise ValueError(f"{losses}: cannot be read ({error}); delete it and score the round again") from None
    if counted != (expected, expected):
        raise ValueError(
            f"{losses}: {counted} rows and losses where the shard has {expected} samples; "
            "delete it and score the round again"
        )
    return relation


def _refine_shard(
    losses: Path,
    path: Path,
    expected: int,
    config: RefineConfig,
    seed: int,
    round_number: int,
    shard: int,
    fingerprint: str,
) -> None:
    with duckdb.connect() as connection:
        relation = checked_losses(connection, losses, expected)
        query = selection_query(relation, expected, config, seed, round_number, shard)
        with writing(path) as temporary, writing_errors(path):
            connection.execute(
                f"copy ({query}) to {literal(temporary)} "
                f"(format parquet, kv_metadata {{ '{FINGERPRINT_KEY.decode()}': '{fingerprint}' }})"
            )


def mix_all(path: Path, samples_path: Path, seed: int, round_number: int) -> int:
    """Write the mix of every sample of the corpus to `path` and return their number."""
    return write_mix(path, f"select shard, sample from read_parquet({literal(samples_path)})", seed, round_number)


def mix_selection(
    path: Path, round_folder: Path, samples_path: Path, seed: int, round_number: int, max_tokens: int | None = None
) -> int:
    """Write the mix of the samples that the selection in `round_folder` keeps to `path` and return their number.

    With `max_tokens` it ends before the sample that would exceed it, by the tokens that `samples_path` lists.
    """
    files = round_folder / "selection" / "*.parquet"
    shard = r"regexp_extract(filename, 'shard=(\d+)', 1)::int"
    query = f"select {shard} as shard, sample from read_parquet({literal(files)}, filename = true) where kept"
    if max_tokens is not None:
        query = f"select * from ({query}) join read_parquet({literal(samples_path)}) using (shard, sample)"
    return write_mix(path, query, seed, round_number, max_tokens)
