"""Refining: selecting samples by their losses in DuckDB, shard by shard.

The draw is the paper's (`draw.py`). Its random numbers are a hash of (seed, round, shard, sample), so it does not
depend on row order, threads or processes. A policy replaces the loss by another score (`policies.py`).
"""

import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path

from typing_extensions import TypedDict

from data_scoring.base.engine import Count, Engine
from data_scoring.base.files import checksum, remove_leftovers, write_record, writing
from data_scoring.base.parquet import FINGERPRINT_KEY
from data_scoring.base.progress import Progress
from data_scoring.base.sql import bounded_worker, copy_to_parquet, literal, parquet_rows, writing_errors
from data_scoring.base.validation import read_record
from data_scoring.refine.candidates import Draw, Limits, batch_of, find_limits
from data_scoring.refine.part_bars import PartBars, find_part_bars
from data_scoring.refine.policies import keeping_policies
from data_scoring.refine.refine_config import RefineConfig
from data_scoring.refine.selection import Selection
from data_scoring.refine.training_mix import MixOptions, write_mix

_PLAIN = RefineConfig()


def selection_path(round_folder: Path, shard: int) -> Path:
    """Return the path of the selection from a shard for the round in `round_folder`."""
    return round_folder / "selection" / f"shard={shard:04d}.parquet"


class _ShardsRecord(TypedDict):
    fingerprint: str
    checksums: dict[str, str]


def refine(draw: Draw, fingerprint: str, engine: Engine, progress: Progress) -> None:
    """Select the samples of a round by the losses of the previous round, a task for each shard.

    Writes one selection file per shard; a rerun with the same `fingerprint` skips finished shards. The memory limit of
    the configuration is divided among the workers of a host. Raises ValueError if a shard's losses are missing or
    incomplete.
    """
    (draw.target / "selection").mkdir(parents=True, exist_ok=True)
    remove_leftovers(draw.target / "selection")
    paths = [selection_path(draw.target, shard) for shard in range(len(draw.num_samples))]
    record_path = draw.target / "selection" / "shards.json"
    record = read_record(record_path, _ShardsRecord)
    if record is None or record["fingerprint"] != fingerprint:
        record = {"fingerprint": fingerprint, "checksums": {}}
    checksums: dict[str, str] = record["checksums"]
    missing = [
        shard
        for shard, path in enumerate(paths)
        if path.name not in checksums or not path.exists() or checksum(path) != checksums[path.name]
    ]
    if not missing:
        return
    finished = len(paths) - len(missing)
    progress("refining (shards)", finished, len(paths))
    with _scratch(draw.target / ".spill") as scratch:
        limits = find_limits(draw, engine, scratch)
        bars = find_part_bars(draw, limits, engine, scratch)
        memory_gb = draw.memory_gb(engine, len(missing))
        work = keeping_policies(partial(_select, draw, limits, bars, fingerprint, scratch, memory_gb))

        def report(done: int) -> None:
            progress("refining (shards)", finished + done, len(paths))

        for shard, digest in zip(missing, engine.map(work, missing, report, draw.is_long), strict=True):
            checksums[paths[shard].name] = digest
            write_record(record_path, record)
    # Workers that were lost leave files, too.
    remove_leftovers(draw.target / "selection")


@contextmanager
def _scratch(folder: Path) -> Iterator[Path]:
    """Yield an empty folder, which is deleted at the end; a killed process may have left one."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    try:
        yield folder
    finally:
        # A task that is done twice may still be writing.
        shutil.rmtree(folder, ignore_errors=True)


def _select(
    draw: Draw,
    limits: Limits,
    bars: PartBars | None,
    fingerprint: str,
    scratch: Path,
    memory_gb: float,
    shard: int,
    count: Count,
) -> str:
    """Write the selection from a shard; return the file's checksum."""
    path = selection_path(draw.target, shard)
    metadata = f"kv_metadata {{ '{FINGERPRINT_KEY.decode()}': '{fingerprint}' }}"
    with bounded_worker(scratch, memory_gb) as connection:
        query = Selection(connection, draw, limits, bars).query(shard)
        with writing(path) as temporary, writing_errors(path):
            connection.execute(copy_to_parquet(query, temporary, f"parquet_version v2, compression zstd, {metadata}"))
            digest = checksum(temporary)
    count(1)
    return digest


def mix_all(
    path: Path,
    samples_path: Path,
    seed: int,
    config: RefineConfig = _PLAIN,
    max_tokens: int | None = None,
    contaminated: Path | None = None,
    sources: Sequence[str] = (),
) -> int:
    """Return the number of samples of round 1's mix, after writing it to `path`: all samples of joined sources.

    With `max_tokens`, the mix ends before the sample that would exceed it. Samples that the file `contaminated` lists
    are left out. Samples are in random order or, if `sources` are given, source after source in their order. Raises
    ValueError if no sample is left.
    """
    conditions = ["true"]
    if late := ", ".join(literal(rule.name) for rule in config.sources if rule.from_round > 1):
        conditions.append(f"source not in ({late})")
    if contaminated is not None:
        listed = f"select (shard, sample) from {parquet_rows(contaminated)}"
        conditions.append(f"(shard, sample) not in ({listed})")
    where = " and ".join(conditions)
    columns = "shard, sample, num_tokens"
    if sources:
        columns += f", list_position([{', '.join(map(literal, sources))}], source::varchar) as place"
    query = f"select {columns} from {parquet_rows(samples_path)} where {where}"
    return write_mix(path, query, seed, 1, MixOptions(max_tokens, config.memory_gb, is_by_source=bool(sources)))


def mix_selection(path: Path, draw: Draw, samples_path: Path) -> int:
    """Return the number of samples of a round's mix, after writing it to `path`: the samples that the selection keeps.

    With `refine.max_tokens`, the mix ends before the sample that would exceed it; `samples_path` lists tokens.
    """
    query = " union all ".join(f"select * from ({_kept(draw, shard)})" for shard in range(len(draw.num_samples)))
    config = draw.config
    if config.max_tokens is not None:
        query = f"select * from ({query}) join {parquet_rows(samples_path)} using (shard, sample)"
    options = MixOptions(
        config.max_tokens,
        config.memory_gb,
        config.batch_size if config.keep_batches else None,
        config.weights == "inverse",
        config.max_weight,
    )
    return write_mix(path, query, draw.seed, draw.round_number, options)


def _kept(draw: Draw, shard: int) -> str:
    """Return the SQL of the samples of a shard that are kept, for `write_mix`."""
    columns, rows = f"{shard} as shard, sample", parquet_rows(selection_path(draw.target, shard))
    if draw.config.keep_batches:
        batch = batch_of(draw, shard)
        columns += f", {batch if draw.is_within_parts else f'({shard}::bigint << 32) + {batch}'} as batch"
        rows += f" {draw.order.join(shard)}" if draw.is_within_parts else ""
    if draw.config.weights == "inverse":
        columns += ", 1 / probability::double as weight"
    return f"select {columns} from {rows} where kept"
