"""Sample selection at scale: speed, memory and growth with the number of losses, against simpler methods."""

import json
import math
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import duckdb

NUM_SHARDS = 8
SIZES = (20_000_000, 200_000_000)
MULTINOMIAL_SIZE = 1 << 24  # the most that torch.multinomial takes
MIX_SIZE = 100_000_000
TURNS = 3
_NORMAL = (
    "sqrt(-2 * ln(((hash({0}) >> 12)::double + 0.5) * 2.220446049250313e-16))"
    " * cos(2 * pi() * (hash({0} + 0.5) >> 12)::double * 2.220446049250313e-16)"
)


def scale(folder: Path) -> list[dict[str, Any]]:
    """Return the cost of selection at each size, and of opening a large mix."""
    rows, seconds = [], {}
    for size in SIZES:
        rounds = folder / str(size)
        _write_losses(rounds / "1", size)
        turns = [_turn(rounds, size) for _ in range(TURNS)]
        seconds[size] = statistics.median(turn["select and write"]["seconds"] for turn in turns)
        rows += _ratios(size, turns)
        for path in rounds.rglob("*.parquet"):
            path.unlink()
    small, large = SIZES
    exponent = math.log(seconds[large] / seconds[small]) / math.log(large / small)
    rows.append({"claim": f"growth exponent, {small:,} to {large:,} rows", "median": round(exponent, 3)})
    return [*rows, *_draws(folder), *_mix(folder)]


def _ratios(size: int, turns: list[dict[str, dict[str, float]]]) -> list[dict[str, Any]]:
    rows = []
    for name in ("decide", "select and write", "select and write, outliers put aside", "window sort"):
        if name not in turns[0]:
            continue
        ratios = [turn[name]["seconds"] / turn["plain avg(loss) scan"]["seconds"] for turn in turns]
        rows.append(
            {
                "claim": f"{name}, {size:,} rows / plain avg(loss) scan",
                "median": round(statistics.median(ratios), 2),
                "min": round(min(ratios), 2),
                "max": round(max(ratios), 2),
                "rows_per_second": round(size / statistics.median(turn[name]["seconds"] for turn in turns)),
                "peak_mb": round(max(turn[name]["peak_mb"] for turn in turns)),
            }
        )
    return rows


def _turn(rounds: Path, size: int) -> dict[str, dict[str, float]]:
    names = ["plain avg(loss) scan", "decide", "select and write", "select and write, outliers put aside"]
    if size == SIZES[0]:
        names.append("window sort")
    return {name: _measure(name, rounds, size) for name in names}


def _measure(name: str, rounds: Path, size: int) -> dict[str, float]:
    """Return the seconds and the peak memory (MB) of one task, run in a separate process."""
    command = [sys.executable, "-m", "benchmarks.scale", name, str(rounds), str(size)]
    result: dict[str, float] = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
    return result


def _write_losses(folder: Path, size: int) -> None:
    """Write normal losses, mean 3 and deviation 0.6, of four sources, in the scoring stage's format."""
    (folder / "losses").mkdir(parents=True)
    with duckdb.connect() as connection:
        for shard in range(NUM_SHARDS):
            count = size // NUM_SHARDS
            connection.execute(
                f"""copy (select range::int as sample, 256::int as num_tokens, 's' || (range % 4) as source,
                    (3 + 0.6 * {_NORMAL.format(f"(range + {shard * count})")})::float as loss from range({count}))
                to '{folder}/losses/shard={shard:04d}.parquet' (format parquet)"""
            )


def _draws(folder: Path) -> list[dict[str, Any]]:
    """Return selection from disk against torch.multinomial and a Gumbel-argpartition in NumPy of losses in memory."""
    rounds = folder / "multinomial"
    _write_losses(rounds / "1", MULTINOMIAL_SIZE)
    turns = [_measure("draws", rounds, MULTINOMIAL_SIZE) for _ in range(TURNS)]
    rows = []
    for baseline in ("torch.multinomial", "NumPy Gumbel-argpartition"):
        ratios = [turn["decide"] / turn[baseline] for turn in turns]
        rows.append(
            {
                "claim": f"decide, {MULTINOMIAL_SIZE:,} rows from disk / {baseline} of losses in memory",
                "median": round(statistics.median(ratios), 3),
                "min": round(min(ratios), 3),
                "max": round(max(ratios), 3),
            }
        )
    return rows


def _mix(folder: Path) -> list[dict[str, Any]]:
    _measure("write mix", folder, MIX_SIZE)
    opened = _measure("open mix", folder, MIX_SIZE)
    return [
        {
            "claim": f"opening a mix of {MIX_SIZE:,} samples and reading its first batch",
            "seconds": round(opened["opening"], 3),
            "more_memory_mb": round(opened["more_memory_mb"], 1),
        }
    ]


def _work(name: str, rounds: Path, size: int) -> dict[str, float]:
    from data_scoring.base.engine import LocalEngine
    from data_scoring.base.progress import silent
    from data_scoring.base.sql import bounded
    from data_scoring.refine.candidates import Draw, find_limits
    from data_scoring.refine.refine_config import RefineConfig
    from data_scoring.refine.refine_shards import refine
    from data_scoring.refine.selection import Selection

    outlier_z = 6.0 if "outliers" in name else None
    draw = Draw(rounds, 2, RefineConfig(outlier_z=outlier_z), 0, [size // NUM_SHARDS] * NUM_SHARDS)

    def decide() -> None:
        limits = find_limits(draw, LocalEngine(1), rounds)
        with bounded(rounds, 4.0) as connection:
            for shard in range(NUM_SHARDS):
                connection.sql(
                    f"select count(*) from ({Selection(connection, draw, limits, None).query(shard)}) where kept"
                ).fetchall()

    def scan() -> None:
        with duckdb.connect() as connection:
            connection.sql(f"select avg(loss) from read_parquet('{rounds}/1/losses/*.parquet')").fetchall()

    def sort() -> None:
        from data_scoring.refine.candidates import candidates_query

        limits = find_limits(draw, LocalEngine(1), rounds)
        with bounded(rounds, 4.0) as connection:
            for shard in range(NUM_SHARDS):
                candidates = candidates_query(draw, limits, shard)
                connection.sql(
                    f"""select count(*) from (select row_number() over (order by key desc, bits desc, sample) as place
                    from ({candidates})) where place <= {size // NUM_SHARDS // 2}"""
                ).fetchall()

    works: dict[str, Callable[[], None]] = {
        "plain avg(loss) scan": scan, "decide": decide, "window sort": sort,
        "select and write": lambda: refine(draw, str(time.time_ns()), LocalEngine(1), silent),
        "select and write, outliers put aside": lambda: refine(draw, str(time.time_ns()), LocalEngine(1), silent),
    }  # fmt: skip
    if name == "draws":
        return {"decide": _seconds(decide), **_baselines(rounds)}
    if name in ("write mix", "open mix"):
        return _mix_work(name, rounds / "mix.parquet", size)
    if name == "plain avg(loss) scan":
        scan()  # into the page cache
    return {"seconds": _seconds(works[name])}


def _seconds(work: Callable[[], object]) -> float:
    started = time.perf_counter()
    work()
    return time.perf_counter() - started


def _baselines(rounds: Path) -> dict[str, float]:
    import numpy as np
    import torch

    with duckdb.connect() as connection:
        losses = connection.sql(f"select loss from read_parquet('{rounds}/1/losses/*.parquet')").fetchnumpy()["loss"]
    kept, weights = len(losses) // 2, torch.from_numpy(losses).exp()
    generator = np.random.default_rng(0)

    def argpartition() -> None:
        np.argpartition(-(losses + generator.gumbel(size=len(losses))), kept)

    return {
        "torch.multinomial": _seconds(lambda: torch.multinomial(weights, kept)),
        "NumPy Gumbel-argpartition": _seconds(argpartition),
    }


def _mix_work(name: str, path: Path, size: int) -> dict[str, float]:
    import psutil

    from data_scoring.refine.training_mix import Mix, write_mix

    if name == "write mix":
        rows = (
            f"select range // {size // NUM_SHARDS} as shard, range % {size // NUM_SHARDS} as sample from range({size})"
        )
        return {"seconds": _seconds(lambda: write_mix(path, rows, 0, 1))}
    before = psutil.Process().memory_info().rss
    started = time.perf_counter()
    Mix(path).read(0, 1024)
    opening = time.perf_counter() - started
    return {"opening": opening, "more_memory_mb": (psutil.Process().memory_info().rss - before) / 1e6}


if __name__ == "__main__":
    result = _work(sys.argv[1], Path(sys.argv[2]), int(sys.argv[3]))
    # getrusage would include the peak of the parent process before exec.
    [peak] = [line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM:")]
    result["peak_mb"] = int(peak.split()[1]) / 1000
    print(json.dumps(result))
