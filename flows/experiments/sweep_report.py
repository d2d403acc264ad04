"""The report of an architecture search: correlations, the Pareto front of quality and speed, a recommendation."""

from pathlib import Path

import duckdb
import numpy as np
import yaml
from numpy.typing import NDArray
from scipy.stats import permutation_test, rankdata, spearmanr
from typing_extensions import TypedDict

from data_scoring.base.validation import required_record
from flows.display.figures import render
from flows.display.result_page import Page, Picture, Section, span, write_page
from flows.evaluation.results import columns_of, describe_items, score_rows
from flows.evaluation.results_table import table_cells
from flows.experiments.generation_speed import BATCH_SIZE
from flows.experiments.sweep_plots import PLOTS
from flows.experiments.sweep_results import OUTCOMES, open_views, read_trials
from flows.run.config import RunConfig

# Trials whose loss exceeds the lowest by at most this share count as equally good.
_CLOSE = 0.005
# With fewer trials than this a rank correlation has little meaning.
_FEW = 10
# The paper's correlation of depth with the mean score on tasks.
_PAPER = "+0.528"


def write_sweep_report(folder: Path, config: RunConfig) -> Page:
    """Write `sweep.html`, its Markdown and its pictures from the results so far of the search in `folder`."""
    with open_views(folder) as views:
        lead = _lead(views, folder)
        made = [make(views) for make in (_recommendation, _correlations, _front, _scores, _sources, _failures)]
        drawn = [Picture(name, png, caption) for name, (plot, caption) in PLOTS.items()
                 if (png := render(plot, views)) is not None]  # fmt: skip
    sections = [section for section in [*made[:3], _trials(folder), *made[3:]] if section is not None]
    return write_page(folder / "sweep.html", f"{config.run_name}: architecture search", lead, sections, drawn)


class Search(TypedDict):
    """The fields of a search's record that its report shows."""

    parameters: int
    min_depth: int
    max_depth: int
    min_expansion: float
    max_expansion: float


def _lead(views: duckdb.DuckDBPyConnection, folder: Path) -> list[str]:
    [(trained, failed, fewest, most, least_tokens, most_tokens)] = views.sql(
        """select count(*) filter (state = 'trained'), count(*) filter (state = 'failed'), min(num_parameters),
            max(num_parameters), min(num_tokens), max(num_tokens) from trials"""
    ).fetchall()
    if not trained:
        return [f"No trial has been trained; {failed} failed."]
    search = required_record(folder / "sweep.json", Search)
    return [
        f"{trained} models of {fewest:,} to {most:,} parameters (requested: {search['parameters']:,}), embedding and "
        f"head included, each trained once on {span(least_tokens, most_tokens)} predicted tokens of the same "
        f"corpus; {failed} failed.",
        f"Depth was drawn from {search['min_depth']} to {search['max_depth']}, expansion (FFN width / width) from "
        f"{search['min_expansion']:g} to {search['max_expansion']:g}; width follows from the budget, so the three are "
        "not independent, and their effects cannot be separated.",
        "Quality is the negative validation loss over all tokens. All models have the same learning rate and one seed: "
        "differences between trials are partly chance, and partly due to which models the learning rate suits.",
    ]


def correlations(views: duckdb.DuckDBPyConnection) -> list[tuple[str, str, float, float, int]]:
    """Return factor, outcome, Spearman's correlation, its two-sided p-value and the number of trials for each pair.

    Pairs with fewer than three trials, or with a constant value, have no correlation and are left out.
    """
    points: dict[tuple[str, str], list[tuple[float, float]]] = {}
    for factor, outcome, value, result in views.sql("select factor, outcome, value, result from points").fetchall():
        points.setdefault((factor, outcome), []).append((value, result))
    found = []
    for (factor, outcome), pairs in points.items():
        values, results = np.array(pairs).T
        if len(pairs) >= 3 and np.ptp(values) > 0 and np.ptp(results) > 0:
            rho = float(spearmanr(values, results).statistic)
            found.append((factor, outcome, rho, _p_value(values, results), len(pairs)))
    return sorted(found, key=lambda row: (OUTCOMES.index(row[1]), -abs(row[2])))


def _p_value(values: NDArray[np.float64], results: NDArray[np.float64]) -> float:
    """Return the two-sided p-value of the rank correlation by a permutation test, because trials are few.

    (For three trials in order, spearmanr's approximation gives 0; the six permutations give a third.)
    """
    ranks = rankdata(values) - (len(values) + 1) / 2

    def strength(others: NDArray[np.float64], axis: int) -> NDArray[np.float64]:
        return np.asarray((others * ranks).sum(axis=axis))

    test = permutation_test(
        (rankdata(results),), strength, permutation_type="pairings", vectorized=True, n_resamples=9999, rng=0
    )
    return float(test.pvalue)


def _correlations(views: duckdb.DuckDBPyConnection) -> Section | None:
    rows = correlations(views)
    if not rows:
        return None
    is_scored = any(row[1] == "task score" for row in rows)
    quoted = ("depth", "task score" if is_scored else "quality")
    cells = [
        [
            f"{factor} with {outcome}",
            f"{rho:+.3f}",
            f"{p:.2g}",
            str(count),
            _PAPER if quoted == (factor, outcome) else "",
        ]
        for factor, outcome, rho, p, count in rows
    ]
    notes = [
        "Spearman's rank correlation, with its two-sided p-value by a permutation test. The paper (arXiv 2402.02791) "
        "correlates depth with the mean score on evaluation tasks, over 30 models of 1 B parameters"
        + ("." if is_scored else ", which is not a loss."),
    ]
    if rows[0][4] < _FEW:
        notes.append(f"{rows[0][4]} trials are few: check the p-values before drawing conclusions.")
    return Section("Which factor matters", notes, ["", "Spearman", "p", "trials", "paper (quoted)"], cells)


def _front(views: duckdb.DuckDBPyConnection) -> Section | None:
    rows = views.sql(
        """select num_layers, hidden_size, ffn_hidden_size, expansion, num_parameters, loss, generation_speed,
            sequence_speed
        from pareto"""
    ).fetchall()
    if not rows:
        return None
    cells = [
        [
            f"{depth} × {width}",
            str(ffn),
            f"{expansion:.2f}",
            f"{count:,}",
            f"{loss:.4f}",
            f"{speed:,.1f}",
            f"{each:,.2f}",
        ]
        for depth, width, ffn, expansion, count, loss, speed, each in rows
    ]
    notes = [
        "No other trial has both a lower loss and a higher speed. Speed: new tokens/s after a prefix of 2 tokens, of a "
        f"batch of {BATCH_SIZE} and of each of its sequences."
    ]
    head = ["depth × width", "FFN", "expansion", "parameters", "loss", "tokens/s", "tokens/s of a sequence"]
    return Section("Pareto front of quality and speed", notes, head, cells)


def _recommendation(views: duckdb.DuckDBPyConnection) -> Section | None:
    """Return the recommendation: the fastest of the trials close to the best loss; without speeds, the best."""
    rows = views.sql(
        """select num_layers, hidden_size, ffn_hidden_size, num_attention_heads, loss, generation_speed,
            num_query_groups
        from trials where state = 'trained' order by loss"""
    ).fetchall()
    if not rows:
        return None
    best = rows[0]
    close = [row for row in rows if row[4] <= best[4] * (1 + _CLOSE) and row[5] is not None]
    chosen = max(close, key=lambda row: row[5], default=best)
    names = ("num_layers", "hidden_size", "ffn_hidden_size", "num_attention_heads")
    model = dict(zip(names, chosen[:4], strict=True)) | ({"num_query_groups": chosen[6]} if chosen[6] else {})
    shape = f"{chosen[0]} layers of width {chosen[1]}, FFN {chosen[2]} (expansion {chosen[2] / chosen[1]:.2f})"
    speed = "" if chosen[5] is None else f" and generates {_speed(chosen[5])}"
    if chosen == best:
        reason = f"it has the lowest validation loss, {best[4]:.4f}{speed}"
        if len(close) > 1:
            reason += f"; of the {len(close)} trials within {_CLOSE:.1%} of that it is also the fastest"
    else:
        reason = (
            f"its validation loss, {chosen[4]:.4f}, is within {_CLOSE:.1%} of the lowest ({best[4]:.4f}, {best[0]} "
            f"layers of width {best[1]}), and of the {len(close)} such trials it generates fastest: "
            f"{_speed(chosen[5])}, " + (f"against {best[5]:,.1f}" if best[5] is not None else "where that was measured")
        )
    notes = [f"Take {shape}: {reason}.", "For the model section of a configuration; keep its other fields:"]
    return Section("Recommendation", notes, code=yaml.safe_dump({"model": model}, sort_keys=False))


def _speed(speed: float) -> str:
    return f"{speed:,.1f} tokens/s ({speed / BATCH_SIZE:,.2f} per sequence)"


def _scores(views: duckdb.DuckDBPyConnection) -> Section | None:
    found = views.sql(
        """select concat_ws('×', num_layers, hidden_size, ffn_hidden_size), part.task, 100 * part.score,
            100 * part.stderr, 100 * part.chance, part.num_items, part.num_unscorable
        from (select *, unnest(scores) as part from trials where state = 'trained') as each order by each.loss, trial"""
    ).fetchall()
    if not found:
        return None
    rows = score_rows([entry[:5] for entry in found])
    columns = columns_of(rows)
    notes = [
        "Percent, with standard errors over items; the highest of a column is bold. The average is over the tasks "
        "shown.",
        describe_items((entry[1], *entry[-2:]) for entry in found),
    ]
    head = ["depth×width×FFN", *(column.title for column in columns)]
    return Section("Scores in tasks", notes, head, table_cells(rows, columns))


def _trials(folder: Path) -> Section | None:
    rows = [row for row in read_trials(folder) if row["state"] == "trained"]
    columns = [name for name in rows[0] if name not in ("trial", "state", "reason")] if rows else []
    decimals = {
        "expansion": ".2f",
        "loss": ".4f",
        "tasks (%)": ".1f",
        "generation (tokens/s)": ",.1f",
        "of a sequence (tokens/s)": ",.2f",
        "training (tokens/s)": ",.0f",
    }
    cells = [
        ["" if row[name] is None else format(row[name], decimals.get(name, ",.0f")) for name in columns] for row in rows
    ]
    notes = ["The best first. Losses in nats per token; seconds of the training steps."]
    return Section("Trials", notes, columns, cells) if rows else None


def _sources(views: duckdb.DuckDBPyConnection) -> Section | None:
    rows = views.sql(
        """select concat_ws('×', num_layers, hidden_size, ffn_hidden_size), part.source, part.loss from (
            select *, unnest(losses) as part from trials where state = 'trained'
        ) as each order by each.loss, trial, part.source"""
    ).fetchall()
    if not rows:
        return None
    sources = list(dict.fromkeys(row[1] for row in rows))
    cells: dict[str, list[str]] = {}
    for name, _, loss in rows:
        cells.setdefault(name, []).append(f"{loss:.4f}")
    head = ["depth×width×FFN", *sources]
    return Section(
        "Validation loss by source", ["Nats per token."], head, [[name, *row] for name, row in cells.items()]
    )


def _failures(views: duckdb.DuckDBPyConnection) -> Section | None:
    rows = views.sql("select trial, reason from trials where state = 'failed' or reason is not null").fetchall()
    if not rows:
        return None
    notes = ["Run the same command to try them again."]
    return Section("Failures", notes, ["trial", "reason"], [list(row) for row in rows])
