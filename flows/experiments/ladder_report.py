"""The report of a ladder: tables, as text, Markdown and HTML, and plots, from its Parquet files."""

from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import duckdb
import matplotlib.pyplot as plt
from matplotlib.figure import Figure

from flows.display.figures import COLORS, legend_label, render, render_figure
from flows.display.result_page import Page, Picture, Section, span, write_page
from flows.experiments.arms import Comparison
from flows.experiments.compare_results import scores_path
from flows.experiments.ladder_results import ALL_TEXT, open_ladder
from flows.experiments.task_scores import scores_section
from flows.models.parameter_split import draw_split
from flows.run.config import RunConfig, flatten


def write_ladder(path: Path, comparison: Comparison, configs: Mapping[str, RunConfig], tokens: int) -> Page:
    """Write the page, the Markdown and the pictures of the ladder in the Parquet file `path` beside it.

    configs: the configuration of each step's run, by its name; tokens: the predicted tokens that each trains on.
    """
    with open_ladder(path, [*configs]) as results:
        sections = [_steps(results, comparison, configs), _losses(results)]
        if scores_path(path).exists():
            sections.append(scores_section(results, what="step"))
        ladder = render(draw_ladder, results)
        sizes = dict(results.sql("select step, vocab_size from steps order by step").fetchall())
        lead = _lead(results, comparison, configs, tokens)
    split = render_figure(partial(draw_split, {name: (configs[name].model, size) for name, size in sizes.items()}))
    pictures = [Picture("split", split, "Parameters of embedding and head, and of layers.")]
    if ladder is not None:
        caption = "Validation loss over all held-out text: a dot per seed, the mean as a bar; the line joins means."
        pictures.insert(0, Picture("steps", ladder, caption))
    what = "vocabulary sizes compared" if comparison.option == "--vocab-sizes" else "ladder"
    name = path.parent.name.removesuffix("-ladder").removesuffix("-compare")
    return write_page(path.with_suffix(".html"), f"{name}: {what}", lead, sections, pictures)


def _lead(
    results: duckdb.DuckDBPyConnection, comparison: Comparison, configs: Mapping[str, RunConfig], tokens: int
) -> list[str]:
    [(first, last, num_seeds)] = results.sql(
        "select min(seed), max(seed), count(distinct seed) from results"
    ).fetchall()
    arms = (
        "Arms differ in their vocabulary: each trains a tokenizer of its size on the corpus"
        if comparison.option == "--vocab-sizes"
        else "Each step is set on top of the one before"
    )
    lines = [
        f"{arms}. Every model is trained from the start on at most {tokens:,} predicted tokens, over all its rounds.",
        f"{'Seed' if num_seeds == 1 else 'Seeds'} {span(first, last)}. Losses are in bits per byte of the held-out "
        "documents, the same for all models of a seed. Unlike losses per token, they do not depend on how a tokenizer "
        "divides the text. As many tokens are not as much text: see the bytes per token.",
    ]
    if num_seeds == 1:
        lines.append("One seed shows no spread: any of the changes may be noise.")
    for name, config in configs.items():
        if config.rounds.num_rounds > 1:
            lines.append(
                f"{name} trains {config.rounds.num_rounds} rounds: {config.train.max_tokens:,} tokens in round 1, and "
                f"{config.refine.max_tokens:,} in each later one, drawn by policy {config.refine.policy}. Scoring "
                "costs extra (see the table)."
            )
    inheriting = [name for name, config in configs.items() if config.model.inherits]
    if inheriting:
        lines.append(
            f"From parts of a larger model: {', '.join(inheriting)}. The tokens that it was trained on are not counted."
        )
    for name, count in results.sql("select step, least_tokens from steps order by step").fetchall():
        # Samples are not divided: each round may end with less than one left.
        if count <= tokens - configs[name].rounds.num_rounds * configs[name].corpus.seq_length:
            lines.append(f"{name} trained on {count:,} tokens only: its selection kept no more.")
    return lines


def _steps(results: duckdb.DuckDBPyConnection, comparison: Comparison, configs: Mapping[str, RunConfig]) -> Section:
    added = added_fields([arm.values for arm in comparison.arms])
    rows = results.sql(
        """select step, num_parameters, embedding_share, vocab_size, bytes_per_token, num_rounds, least_tokens,
            most_tokens, least_scoring, most_scoring
        from steps order by step"""
    ).fetchall()
    cells = [
        [
            row[0], f"{row[1]:,}", f"{row[2]:.1%}", f"{row[3]:,}", f"{row[4]:.3f}", f"{row[5]}", span(row[6], row[7]),
            span(row[8], row[9]),
        ]
        for row in rows
    ]  # fmt: skip
    notes = [
        *(f"{name} sets {fields}." for name, fields in zip(configs, added, strict=True)),
        "Bytes per token are of the held-out text. Scoring is in training tokens: a forward pass costs a third.",
    ]
    head = ["step", "parameters", "embedding, head", "vocabulary", "bytes per token", "rounds", "tokens", "scoring"]
    return Section("Steps", notes, head, cells)


def added_fields(steps: list[dict[str, dict[str, Any]]]) -> list[str]:
    """Return what each step sets that the one before does not, as text; steps hold all fields up to theirs."""
    texts = []
    for before, values in zip([{}, *steps], steps, strict=False):
        old = flatten(before)
        added = {name: value for name, value in flatten(values).items() if name not in old or old[name] != value}
        texts.append(
            ", ".join(f"{name} {'null' if value is None else value}" for name, value in added.items()) or "nothing"
        )
    return texts


def _losses(results: duckdb.DuckDBPyConnection) -> Section:
    rows = results.sql("select step, source, mean, deviation from spread order by step, place, source").fetchall()
    changed = results.sql("select step, source, mean, error, num_lower, num_seeds from changes").fetchall()
    changes = {(step, source): _change(*row) for step, source, *row in changed}
    sources = list(dict.fromkeys(source for _, source, *_ in rows))
    best = {source: min(mean for _, name, mean, _ in rows if name == source) for source in sources}
    texts = {(step, source): _loss(mean, deviation, mean == best[source]) for step, source, mean, deviation in rows}
    cells = [
        [step, texts[step, ALL_TEXT], changes.get((step, ALL_TEXT), "–"), *(texts[step, each] for each in sources[1:])]
        for step in dict.fromkeys(step for step, *_ in rows)
    ]
    notes = [
        "Bits per byte, means over seeds ± standard deviation; the lowest is bold. The change is that to the step "
        "before, paired by seed, with its standard error and the number of seeds in which the loss fell."
    ]
    return Section("Validation loss", notes, ["step", ALL_TEXT, "change", *sources[1:]], cells)


def _loss(mean: float, deviation: float | None, is_best: bool) -> str:
    text = f"**{mean:.4f}**" if is_best else f"{mean:.4f}"
    return text if deviation is None else f"{text} ± {deviation:.4f}"


def _change(mean: float, error: float | None, num_lower: int, num_seeds: int) -> str:
    spread = "" if error is None else f" ± {error:.4f}"
    return f"{mean:+.4f}{spread}, {num_lower} of {num_seeds}"


def draw_ladder(results: duckdb.DuckDBPyConnection) -> Figure:
    """Draw the loss of each step over all text, in bits per byte: a dot per seed, and the mean as a bar."""
    rows = results.sql(
        f"select step, bits_per_byte from losses where source = '{ALL_TEXT}' order by step, seed"
    ).fetchall()
    steps = list(dict.fromkeys(step for step, _ in rows))
    values = [[loss for name, loss in rows if name == step] for step in steps]
    means = [sum(each) / len(each) for each in values]
    figure, axes = plt.subplots(figsize=(9, 1.2 + 0.45 * len(steps)))
    places = range(len(steps))
    axes.plot(means, places, color="#bbbbbb", linewidth=1)
    for place, each, mean in zip(places, values, means, strict=True):
        axes.plot(each, [place] * len(each), "o", color=COLORS[0], alpha=0.5, markersize=5)
        axes.plot([mean], [place], "|", color=COLORS[0], markersize=16, markeredgewidth=2)
        axes.annotate(f"{mean:.4f}", (mean, place), (0, 9), textcoords="offset points", ha="center", fontsize=9)
    axes.set_yticks(places, [legend_label(step) for step in steps])
    axes.set_ylim(len(steps) - 0.5, -0.7)
    axes.set_xlabel("validation loss (bits per byte), all held-out text; lower is better")
    axes.ticklabel_format(axis="x", useOffset=False)
    axes.margins(x=0.1)
    axes.grid(axis="y", visible=False)
    return figure
