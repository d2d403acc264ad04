"""What the study's cells measured: one row for each regime, seed, arm and measure, and the tables of docs/study.md."""

import csv
from pathlib import Path
from typing import Any

import duckdb

from benchmarks.study.regimes import REGIMES
from benchmarks.study.texts import NOISE
from data_scoring.ledger import open_ledger, read_rows
from flows.report.round_facts import RoundFacts, read_facts
from flows.run.folder import read_run

# The measures of the cells in docs/study.md.
RECORDED = Path(__file__).parents[1] / "results" / "study.csv"
COLUMNS = ["regime", "seed", "arm", "measure", "value"]
# The arm that others are compared with, in pairs of one seed, and the one that differs from it by noise alone.
REFERENCE, EQUAL = "random", "all"
# The run that all arms of a cell continue, after round 1.
BASE = "base"
# The arm that draws within parts, and what is recorded of its draw and of the base's.
IN_PARTS, DISTANCE = "loss_part", "distance of the draw"
# rounds.num_parts of all runs.
PARTS = 8

# Validation losses of one run after a round, nats per token: sources of noise do not count.
_MEASURES = f"""
with samples as (from validation_samples where round = {{round}} and not starts_with(source, '{NOISE}')),
    by_source as (select source, sum(loss * num_tokens) / sum(num_tokens) as loss from samples group by source)
select 'all tokens', sum(loss * num_tokens) / sum(num_tokens) from samples
union all select 'mean of sources', avg(loss) from by_source
union all select 'worst source', max(loss) from by_source
union all select 'hardest tenth', sum(loss * num_tokens) / sum(num_tokens)
    from (from samples qualify percent_rank() over (order by loss) >= 0.9)"""

# Differences to the reference arm, paired by seed, and what the rule in docs/study.md says of them.
_DIFFERENCES = f"""
with pairs as (
    select regime, measure, mine.arm, seed, mine.value - theirs.value as difference
    from results as mine join results as theirs using (regime, seed, measure)
    where theirs.arm = '{REFERENCE}' and mine.arm not in ('{REFERENCE}', '{BASE}')),
noise as (
    select regime, measure, sqrt(avg(difference ** 2)) as noise from pairs where arm = '{EQUAL}' group by all)
select regime, measure, arm, avg(difference) as mean, stddev_samp(difference) / sqrt(count(*)) as error,
    count(*) filter (difference < 0) as lower, count(*) as seeds, any_value(noise) as noise,
    case when seeds < 3 or lower not in (0, seeds) or abs(mean) <= 2 * error or abs(mean) <= 2 * any_value(noise)
        then '' when mean < 0 then 'better' else 'worse' end as result
from pairs join noise using (regime, measure) group by regime, measure, arm order by regime, measure, mean"""


def measure(output: Path) -> list[tuple[str, int, str, str, float]]:
    """Return what the finished runs of all cells in `output` measured: regime, seed, arm, measure, value."""
    rows = []
    for cell in sorted(output.glob("*/seed-*/runs/study-compare")):
        regime, seed = cell.parents[2].name, int(cell.parents[1].name.removeprefix("seed-"))
        for folder in sorted(cell.glob(f"*-seed-{seed}")):
            arm = folder.name.removesuffix(f"-seed-{seed}")
            with open_ledger(folder) as ledger:
                facts = read_facts(read_run(folder), ledger) if arm in (BASE, IN_PARTS) else None
            if arm == BASE:
                loss = dict(read_rows(folder, _MEASURES.format(round=1)))["all tokens"]
                measures = [] if facts is None or loss is None else [*_figures(facts), ("loss, all tokens", loss)]
            else:
                found = read_rows(folder, _MEASURES.format(round=2))
                measures = [(name, value) for name, value in found if value is not None]
                measures += [] if facts is None else [(DISTANCE, facts.distance)]
            rows += [(regime, seed, arm, name, value) for name, value in measures]
    return rows


def _figures(facts: RoundFacts) -> list[tuple[str, float]]:
    assert facts.forgotten is not None, "cells score in full"
    figures = {
        "tokens per parameter": facts.tokens_per_parameter,
        "share forgotten": facts.forgotten.share,
        "nats forgotten": facts.forgotten.nats,
        "spread of losses in shards": facts.spread,
        DISTANCE: facts.distance,
    }
    for place, part in enumerate(facts.parts, 1):
        figures |= {f"share forgotten, part {place}": part.share, f"nats forgotten, part {place}": part.nats}
    return list(figures.items())


def write_results(rows: list[tuple[str, int, str, str, float]], path: Path) -> None:
    """Write rows of `measure` as CSV."""
    with path.open("w", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(COLUMNS)
        writer.writerows((*row[:-1], f"{row[-1]:.6f}") for row in rows)


def differences(path: Path) -> list[tuple[str, str, str, float, float | None, int, int, float, str]]:
    """Return one row for each regime, measure and arm of the results in `path`.

    Each is: regime, measure, arm, mean difference to random in nats, its standard error, seeds in which it is lower,
    seeds, noise (root mean square of the differences between equal arms), and `better`, `worse` or nothing, by the
    rule in docs/study.md.
    """
    with duckdb.connect() as connection:
        connection.execute("create table results as from read_csv(?)", [str(path)])
        return connection.sql(_DIFFERENCES).fetchall()


def tables(path: Path) -> str:
    """Return the tables of the results in `path` as Markdown: differences between arms, and what round 1 left."""
    rows = differences(path)
    regimes = [name for name in REGIMES if any(row[0] == name for row in rows)]
    lines = []
    for measured in dict.fromkeys(row[1] for row in rows):
        found = {(row[2], row[0]): row for row in rows if row[1] == measured}
        noise = {row[0]: row[7] for row in found.values()}
        lines += [f"### Difference to a random draw: {measured}", "", *_head("arm", regimes)]
        for arm in dict.fromkeys(row[2] for row in sorted(found.values(), key=lambda row: row[0] != regimes[-1])):
            cells = (_difference(found.get((arm, regime))) for regime in regimes)
            lines.append(f"| {arm} | {' | '.join(cells)} |")
        lines += [f"| noise between equals | {' | '.join(f'{noise[regime]:.4f}' for regime in regimes)} |", ""]
    return "\n".join([*lines, "### After round 1", "", *_head("figure", regimes), *_after_round_1(path, regimes)])


def _head(first: str, regimes: list[str]) -> list[str]:
    return [f"| {first} | {' | '.join(regimes)} |", f"|---|{'---:|' * len(regimes)}"]


def _difference(row: Any) -> str:
    """Return an entry such as `+0.0281 ± 0.0030 (0/3) worse`: mean, standard error, seeds in which it is lower."""
    if row is None:
        return ""
    mean, error, lower, seeds, result = row[3], row[4], row[5], row[6], row[8]
    spread = "" if error is None else f" ± {error:.4f}"
    return f"{mean:+.4f}{spread} ({lower}/{seeds}) {result}".rstrip()


def _after_round_1(path: Path, regimes: list[str]) -> list[str]:
    with duckdb.connect() as connection:
        rows = connection.execute(
            f"""select measure, regime, avg(value), min(value), max(value) from read_csv(?)
            where arm = '{BASE}' group by all order by all""",
            [str(path)],
        ).fetchall()
    found = {(measured, regime): values for measured, regime, *values in rows}
    lines = []
    for measured in dict.fromkeys(name for name, _ in found if ", part " not in name):
        values = (found[measured, regime] for regime in regimes)
        lines.append(f"| {measured} | {' | '.join(f'{x:.3f} ({low:.3f} to {high:.3f})' for x, low, high in values)} |")
    for measured, digits in (("share forgotten", 2), ("nats forgotten", 1)):
        cells = [
            ", ".join(f"{found[f'{measured}, part {part}', regime][0]:.{digits}f}" for part in range(1, PARTS + 1))
            for regime in regimes
        ]
        lines.append(f"| {measured}, by part | {' | '.join(cells)} |")
    return lines


def repeated(path: Path, recorded: Path = RECORDED) -> str:
    """Return, as Markdown, how far the arms in `path` are from the recorded ones, beside the noise between equals.

    Raises ValueError if none is recorded.
    """
    noise = {row[:2]: row[7] for row in differences(recorded)}
    with duckdb.connect() as connection:
        rows = connection.execute(
            f"""select regime, measure, count(*), max(abs(mine.value - theirs.value))
            from read_csv(?) as mine join read_csv(?) as theirs using (regime, seed, arm, measure)
            where arm <> '{BASE}' group by all order by all""",
            [str(path), str(recorded)],
        ).fetchall()
    if not rows:
        raise ValueError(f"{path}: no arm of it is recorded; give regimes and seeds of the study")
    lines = ["| regime | measure | runs | largest difference | noise between equals |", "|---|---|---:|---:|---:|"]
    lines += [
        f"| {regime} | {measured} | {runs} | {largest:.6f} | {noise[regime, measured]:.4f} |"
        for regime, measured, runs, largest in rows
    ]
    return "\n".join(lines)
