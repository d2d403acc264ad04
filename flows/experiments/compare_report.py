"""The report of a comparison: tables, as text, Markdown and HTML, and plots, from its Parquet files alone."""

from pathlib import Path

import duckdb

from flows.display.figures import render
from flows.display.result_page import Page, Picture, Section, span, write_page
from flows.experiments.arms import Arm, Comparison
from flows.experiments.compare_plots import PLOTS
from flows.experiments.compare_results import BASE, open_results, scores_path
from flows.experiments.task_scores import scores_section
from flows.inheritance.teacher import find_teacher
from flows.run.config import RunConfig

# Options whose arms train their own first round.
_BEGINNINGS = ("--inits", "--methods")


def write_comparison(
    results: Path, comparison: Comparison, config: RunConfig, tokens: int | None, layers: list[int] | None = None
) -> Page:
    """Write the page, the Markdown and the pictures of the comparison in the Parquet file `results` beside it.

    `tokens` is the arms' common limit on trained tokens, or on their cost, if any; `layers` are the layers of a larger
    model that arms inherit.
    """
    option = comparison.option
    with open_results(results, [arm.name for arm in comparison.arms]) as connection:
        lead = _lead(connection, comparison, config, tokens)
        if layers is not None:
            lead.insert(1, _inherited(config, layers))
        parts, plots = [_losses, _differences, _spread, _costs], dict(PLOTS)
        if option in _BEGINNINGS:
            # These arms end after round 1, so there is no later cost.
            parts.remove(_costs)
            del plots["costs"]
        else:
            del plots["curves"]
        if scores_path(results).exists():
            parts.insert(1, _scores)
        made = [make(connection) for make in parts]
        drawn = [(name, render(plot, connection), caption) for name, (plot, caption) in plots.items()]
    # A single seed has no spread, and a single arm no difference.
    sections = [section for section in made if section.cells]
    pictures = [Picture(name, png, caption) for name, png, caption in drawn if png is not None]
    title = f"{config.run_name}: {option.removeprefix('--').replace('-', ' ')} compared"
    return write_page(results.with_suffix(".html"), title, lead, sections, pictures)


def _lead(
    results: duckdb.DuckDBPyConnection, comparison: Comparison, config: RunConfig, tokens: int | None
) -> list[str]:
    [(first, last, num_seeds, least, most)] = results.sql(
        "select min(seed), max(seed), count(distinct seed), min(round_1_tokens), max(round_1_tokens) from results"
    ).fetchall()
    refine, option = config.refine, comparison.option
    limit = (
        f"Each trains round 2 on at most {tokens or 0:,} predicted tokens"
        if comparison.equal == "tokens"
        else f"Each spends at most {tokens or 0:,} training tokens after round 1, on scoring and on training"
    )
    limit += ", and all reach this limit; the mix is cut in its random order."
    fields = "; ".join(f"{arm.name}: {_fields(arm)}" for arm in comparison.arms)
    differ = {
        "--policies": f"Arms differ in refine.policy. {limit}",
        "--arms": f"Arms differ in fields of refine ({fields}). {limit}",
        "--sampling-rates": f"Arms differ in refine.sampling_rate, under policy {refine.policy}: 0 means no second "
        "round, 1 means all samples again. The arms train on different numbers of tokens; their cost is below.",
        "--rounds": f"Arms differ in the number of rounds, under policy {refine.policy} at sampling rate "
        f"{refine.sampling_rate:g}. The arms train on different numbers of tokens; their cost is below.",
        "--inits": "Arms differ in model.init, the initialisation of weights. Each trains one round on the same "
        "samples in the same order.",
        "--methods": "Arms differ in model.inherit.method, which chooses the neurons of the larger model to start "
        "from; base starts from random weights. Each trains one round on the same samples in the same order.",
    }
    shared = (
        f"In each seed all arms continue from the same round 1, trained once on {span(least, most)} predicted tokens."
        if option not in _BEGINNINGS
        else f"In each seed all arms train on {span(least, most)} predicted tokens."
    )
    lines = [
        differ[option],
        f"{'Seed' if num_seeds == 1 else 'Seeds'} {span(first, last)}. {shared}",
        "The seed also decides which documents are held out, so the spread over seeds includes differences between "
        "validation sets. Differences paired by seed do not.",
    ]
    arms = {name for (name,) in results.sql("select distinct arm from results").fetchall()}
    if comparison.equal is not None and {"all", "random"} <= arms:
        lines.append(
            "Cut at the same number of tokens, all is a random subset just as random is, so the difference between "
            "these two arms is noise. A difference no larger than this is not evidence."
        )
    return lines


def _fields(arm: Arm) -> str:
    """Return the fields that an arm sets, as in YAML."""
    return ", ".join(f"{name} {'null' if value is None else value}" for name, value in arm.refine.items())


def _inherited(config: RunConfig, layers: list[int]) -> str:
    """Return two sentences on the models and the larger model that they inherit from."""
    model = config.model
    assert model.inherit is not None
    teacher = find_teacher(model.inherit)
    sizes = [
        f"{each.num_layers} layers of width {each.hidden_size}, {each.num_attention_heads} heads, FFN {each.ffn_size}"
        for each in (model, teacher.config)
    ]
    how = "those whose removal costs most" if model.inherit.layers == "auto" else "as configured"
    return (
        f"They have {sizes[0]}; the larger model ({teacher.checkpoint}) has {sizes[1]}. They inherit its layers "
        f"{', '.join(map(str, layers))}, counted from 0, {how}."
    )


def _losses(results: duckdb.DuckDBPyConnection) -> Section:
    # An arm that ends after round 1 has the same losses, so the row for round 1 is left out.
    rows = results.sql(
        f"""select arm, source, mean from spread
        where arm <> '{BASE}' or not exists (from costs where num_steps = 0) order by arm, place desc, source"""
    ).fetchall()
    sources = list(dict.fromkeys(source for _, source, _ in rows))
    means = {(arm, source): f"{mean:.4f}" for arm, source, mean in rows}
    best = {source: min(mean for _, name, mean in rows if name == source) for source in sources}
    for arm, source, mean in rows:
        if mean == best[source]:
            means[arm, source] = f"**{mean:.4f}**"
    cells = [[arm, *(means[arm, source] for source in sources)] for arm in dict.fromkeys(arm for arm, _, _ in rows)]
    return Section(
        "Validation loss", ["Nats per token, means over seeds; the lowest is bold."], ["arm", *sources], cells
    )


def _scores(results: duckdb.DuckDBPyConnection) -> Section:
    return scores_section(results, f"arm <> '{BASE}' or not exists (from costs where num_steps = 0)")


def _spread(results: duckdb.DuckDBPyConnection) -> Section:
    rows = results.sql(
        f"""select source, arm, mean, deviation, least, most from spread
        where arm <> '{BASE}' and deviation is not null order by place desc, source, arm"""
    ).fetchall()
    cells = [[row[0], row[1], *(f"{value:.4f}" for value in row[2:])] for row in rows]
    head = ["source", "arm", "mean", "standard deviation", "least", "most"]
    return Section("Spread of the validation loss over seeds", ["Nats per token."], head, cells)


def _differences(results: duckdb.DuckDBPyConnection) -> Section:
    rows = results.sql(
        "select source, arm, mean, error, num_lower, num_seeds from differences order by place desc, source, arm"
    ).fetchall()
    [(reference,)] = results.sql("select arm from reference").fetchall()
    arms = list(dict.fromkeys(row[1] for row in rows))
    shown = {(row[0], row[1]): _difference(*row[2:]) for row in rows}
    cells = [[source, *(shown[source, arm] for arm in arms)] for source in dict.fromkeys(row[0] for row in rows)]
    num_seeds = rows[0][5] if rows else 0
    notes = [
        "Nats per token, below 0 if the arm is better: the mean over seeds, its standard error, and the number of "
        "seeds in which the arm has the lower loss.",
        "One seed shows no spread: any of this may be noise."
        if num_seeds == 1
        else f"With {num_seeds} seeds the standard error is rough: check whether the seeds agree in sign.",
    ]
    return Section(f"Difference to arm {reference}, paired by seed", notes, ["source", *arms], cells)


def _difference(mean: float, error: float | None, num_lower: int, num_seeds: int) -> str:
    spread = "" if error is None else f" ± {error:.4f}"
    return f"{mean:+.4f}{spread}, {num_lower} of {num_seeds}"


def _costs(results: duckdb.DuckDBPyConnection) -> Section:
    rows = results.sql(
        """select arm, min(num_steps), max(num_steps), min(trained_tokens), max(trained_tokens), min(scoring_cost),
            max(scoring_cost), avg(cost), avg(cost / round_1_tokens)
        from costs group by arm order by arm"""
    ).fetchall()
    cells = [
        [row[0], *(span(*row[place : place + 2]) for place in (1, 3, 5)), f"{row[7]:,.0f}", f"{row[8]:.1%}"]
        for row in rows
    ]  # fmt: skip
    notes = [
        "Predicted tokens after round 1, which all arms share. A scored token counts as a third of a trained one: a "
        "forward pass is a third of a forward and a backward pass. Losses recorded in training cost nothing.",
        "Scoring counts only for policies that use losses. Keeping everything, or drawing at random, uses none, so it "
        "counts 0 there, although the base was scored for the other arms.",
    ]
    head = ["arm", "steps", "tokens trained", "scoring (training tokens)", "cost (training tokens)", "of round 1's"]
    return Section("Cost", notes, head, cells)
