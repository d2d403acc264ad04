"""The report of a run: one page from the ledger."""

import html
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import duckdb
import yaml

from data_scoring.base.files import writing
from data_scoring.base.validation import read_record
from data_scoring.ledger import open_ledger, refresh_ledger
from flows.display.figures import render_figure
from flows.display.html import html_details, html_figure, html_page, html_table
from flows.report.contamination_section import contamination
from flows.report.curves import forgetting_curve, kept_by_source, loss_curves
from flows.report.evaluation_section import evaluation
from flows.report.pictures import Pictures, figure
from flows.report.round_facts import partial_budget
from flows.report.sample_tables import (
    forgotten_samples,
    forgotten_sources,
    num_quarantined,
    quarantined_samples,
    selection_examples,
)
from flows.report.shard_histograms import selection_histograms
from flows.report.verdict_section import verdict_section
from flows.run.config import RunConfig
from flows.run.folder import Run
from flows.run.fork_record import describe_fork
from flows.run.locks import report_locked


def write_report(run: Run, output: Path | None = None) -> Path:
    """Write `report.html` and `report/*.png` from the run folder's ledger, and return the page's path.

    With `output`, only the page is written, to this path: nothing in the run folder changes.
    """
    path, pictures = output or run.folder / "report.html", Pictures()
    with open_ledger(run.folder) as ledger:
        page = html_page(run.folder.name, "\n".join(_sections(run, ledger, pictures)))
    if output is None:
        refresh_ledger(run.folder)
    with nullcontext() if output else report_locked(run.folder):
        for name, png in pictures.items() if output is None else ():
            with writing(run.folder / "report" / f"{name}.png") as temporary:
                temporary.write_bytes(png)
        with writing(path) as temporary:
            temporary.write_text(page, encoding="utf-8")
    return path


def _sections(run: Run, ledger: duckdb.DuckDBPyConnection, pictures: Pictures) -> list[str]:
    config, manifest = run.config, run.corpus().manifest
    sources = manifest["sources"]
    tokens = sum(source["train_tokens"] for source in sources)
    forked = describe_fork(run.folder)
    sections = [
        *verdict_section(run, ledger),
        *([f'<p class="lead">This run was {html.escape(forked)}.</p>'] if forked else []),
        f'<p class="lead">{tokens:,} training tokens from {len(sources)} {_plural(len(sources), "source")} in '
        f"{config.corpus.num_shards} {_plural(config.corpus.num_shards, 'shard')}; {config.rounds.num_rounds} "
        f"{_plural(config.rounds.num_rounds, 'round')}, policy {config.refine.policy}, sampling rate "
        f"{config.refine.sampling_rate:g}, temperature {config.refine.draw_temperature:g}.</p>",
        f'<p class="lead">{_model(config, int(manifest["vocab_size"]))}</p>',
        *_inheritance(run, ledger, pictures),
        "<h2>Rounds</h2>",
        rounds_table(ledger),
        figure(pictures, "loss", loss_curves, ledger, "Training loss, smoothed and raw, and validation loss."),
        "<h3>Validation loss by source, at the end of each round</h3>",
        _table(
            ledger,
            """pivot (select source as "Source", round, loss from validation
                qualify step = max(step) over (partition by round))
            on 'Round ' || round using first(loss) order by "Source" """,
        ),
    ]
    for number in range(1, config.rounds.num_rounds):
        sections += _refinement(run, ledger, pictures, number)
    sections += [
        *evaluation(run, ledger, pictures),
        *contamination(run, ledger),
        "<h2>Corpus</h2>",
        _corpus_table(sources),
        "<h2>Configuration</h2>",
        *_kernels(run),
        f"<pre>{html.escape(yaml.safe_dump(config.model_dump(mode='json'), sort_keys=False))}</pre>",
    ]
    return sections


def rounds_table(ledger: duckdb.DuckDBPyConnection) -> str:
    """Return the table of the rounds in HTML, with times in whole seconds."""
    return _table(
        ledger,
        """select round as "Round", num_steps as "Steps", num_samples as "Samples", num_tokens as "Tokens",
        train_loss as "Training loss (last tenth)", validation_loss as "Validation loss",
        round(training_seconds)::bigint as "Training (s)", round(scoring_seconds)::bigint as "Scoring (s)",
        scoring_cost as "Scoring (cost in training tokens)" from rounds""",
    )


def _plural(number: int, noun: str) -> str:
    return noun if number == 1 else f"{noun}s"


def _model(config: RunConfig, vocab_size: int) -> str:
    """Return a sentence about the model and its training, in HTML."""
    model, train = config.model, config.resolved_train
    vocab_size = model.vocab_size or vocab_size
    parameters = model.num_parameters(vocab_size)
    start = "random weights" if model.start_from is None else f"<code>{html.escape(model.start_from)}</code>"
    if model.inherit is not None and model.inherits:
        start = f"parts of <code>{html.escape(model.inherit.teacher)}</code>"
    return (
        f"{parameters / 1e6:,.1f} M parameters: {model.num_layers} layers of width {model.hidden_size}, a vocabulary "
        f"of {vocab_size:,}. Embedding and head are {model.embedding_share(vocab_size):.0%} of the parameters. "
        f"Trained from {start}, in batches of "
        f"{train.global_batch_size * config.corpus.seq_length:,} tokens, at a learning rate of up to {train.lr:.3g}."
    )


def _kernels(run: Run) -> list[str]:
    """Return a sentence about the kernels that the last training job used; empty without its file."""
    jobs = sorted((run.folder / "logs").glob("train-*.job.json"), key=lambda path: path.stat().st_mtime)
    job = read_record(jobs[-1], dict[str, Any]) if jobs else None
    if job is None:
        return []
    used = {
        "train.loss_kernel": job["train"]["loss_kernel"],
        "train.activation_kernel": job["activation_kernel"],
        "score.loss_kernel": job["score"]["loss_kernel"],
    }
    # On nodes that the launching host cannot see, each rank resolved `auto` itself.
    listed = ", ".join(f"<code>{name}</code> {html.escape(str(kernel))}" for name, kernel in used.items())
    return [f"<p>Kernels of the last training: {listed}.</p>"]


def _inheritance(run: Run, ledger: duckdb.DuckDBPyConnection, pictures: Pictures) -> list[str]:
    """Return the section on what round 1 inherited from a larger model; empty without inheritance."""
    inherit = run.config.model.inherit
    rows = ledger.sql("select distinct checkpoint, method, len(channels) from lineage").fetchall()
    if not rows or inherit is None:
        return []
    [(checkpoint, method, width)] = rows
    skips = run.round_folder(1) / "inherit" / "skips.parquet"
    how = "those whose removal costs most" if inherit.layers == "auto" and skips.exists() else "as configured"
    return [
        "<h2>Inheritance</h2>",
        f"<p>Round 1 started from <code>{html.escape(checkpoint)}</code>: from the layers below, {how}, and {width:,} "
        f"of its channels; channels, heads and neurons were chosen by method {html.escape(method)}.</p>",
        _table(
            ledger,
            """select layer as "Layer", teacher_layer as "Layer of the larger model", len(ffn) as "FFN neurons",
                array_to_string(heads, ', ') as "Heads of the larger model"
            from lineage order by layer""",
        ),
        *_importance(skips, pictures),
    ]


def _importance(skips: Path, pictures: Pictures) -> list[str]:
    """Return the picture of the larger model's layer ablation; empty if it was not measured."""
    if not skips.exists():
        return []
    # Imported here because it loads torch, which other reports do not need.
    from flows.inheritance.layer_importance import read_ablation
    from flows.inheritance.layer_importance_report import importance

    png = render_figure(lambda: importance(read_ablation(skips)))
    pictures["importance"] = png
    return [html_figure(png, "Increase of the larger model's loss when layers are skipped, by the first of them.")]


def _refinement(run: Run, ledger: duckdb.DuckDBPyConnection, pictures: Pictures, scored: int) -> list[str]:
    selected = scored + 1
    return [
        f"<h2>What round {scored} left to learn</h2>",
        *_budget(run, ledger, scored),
        figure(
            pictures, f"selection-{selected}", selection_histograms(selected), ledger,
            f"Losses after round {scored} by shard: samples that round {selected} trains on, and dropped ones.",
        ),
        figure(
            pictures, f"sources-{selected}", kept_by_source(selected), ledger,
            f"Share of each source in round {selected}.",
        ),
        *_forgotten(run, ledger, pictures, scored),
        *_quarantine(run, ledger, selected),
        *_examples(run, ledger, selected),
    ]  # fmt: skip


def _forgotten(run: Run, ledger: duckdb.DuckDBPyConnection, pictures: Pictures, scored: int) -> list[str]:
    """Return the forgetting curve and tables; only full losses are of whole samples, as seen losses are."""
    budget = partial_budget(ledger, scored)
    if budget is not None:
        return [f"<p>Forgetting cannot be measured: samples were scored by {html.escape(budget)}.</p>"]
    curve = figure(
        pictures, f"forgetting-{scored}", forgetting_curve(scored, run.config_at(scored + 1).rounds.num_parts), ledger,
        "The forgetting curve, in steps and in parts of the training order: where the blue line is above the orange "
        "one, the model has forgotten.",
    )  # fmt: skip
    sources = forgotten_sources(ledger, scored)
    if not sources:
        return [curve]
    samples = forgotten_samples(run, ledger, scored)
    return [
        curve,
        "<h3>What was forgotten most</h3>",
        html_table(["Source", "Samples trained on", "Seen loss", "Re-scored loss", "Forgotten"], sources),
        html_table(["Source", "Shard", "Sample", "Seen loss", "Re-scored loss", "Text"], samples)
        if samples
        else "<p>No sample got worse.</p>",
    ]


def _quarantine(run: Run, ledger: duckdb.DuckDBPyConnection, selected: int) -> list[str]:
    rows = quarantined_samples(run, ledger, selected)
    if not rows:
        return []
    return [
        f"<h3>Quarantined as noise for round {selected}</h3>",
        f"<p>{num_quarantined(ledger, selected):,} samples with a loss above refine.outlier_z "
        f"{run.refine_config(selected).outlier_z} of their source; those with the greatest loss:</p>",
        html_table(["Source", "Shard", "Sample", "Loss", "Text"], rows),
    ]


def _examples(run: Run, ledger: duckdb.DuckDBPyConnection, selected: int) -> list[str]:
    """Return examples of a round's selection, hidden at first; empty before the selection."""
    columns = ["Source", "Shard", "Sample", "Loss", "Reason", "Place", "Text"]
    tables = [
        f"<h4>{html.escape(title)}</h4>{html_table(columns, rows)}"
        for title, rows in selection_examples(run, ledger, selected).items()
    ]
    if not tables:
        return []
    return [html_details(f"Samples with text: what round {selected} dropped, kept and put aside", "".join(tables))]


def _budget(run: Run, ledger: duckdb.DuckDBPyConnection, scored: int) -> list[str]:
    """Return how and why samples were scored after a round, with the measurements; empty before scoring."""
    budgets = f"from budgets where round = {scored}"
    rows = ledger.sql(f"select candidate, cost_tokens {budgets} and chosen").fetchall()
    if not rows:
        return []
    [(chosen, cost)] = rows
    how = (
        f"Samples were scored by {chosen}, which costs as much as training on {cost:,} tokens (a forward pass is a "
        "third of a training step; the cost of attention in long samples is not counted)"
    )
    score = run.config_at(scored + 1).score
    if score.budget != "auto":
        return [f"<p>{how}, as set by score.budget.</p>"]
    return [
        f"<p>{how}: the cheapest candidate whose losses rank a random calibration set as the full losses do, "
        f"with a rank correlation of {score.min_correlation:g} or more (score.min_correlation).</p>",
        _table(
            ledger,
            f"""select candidate as "Candidate", correlation as "Correlation (Spearman)",
                overlap as "Drawn as by full loss", chance_overlap as "By chance alone",
                cost_tokens as "Cost (training tokens)", case when chosen then 'yes' else '' end as "Chosen"
            {budgets} order by candidate = 'calibration', cost_tokens""",
        ),
        *_measured_draw(run, ledger, scored),
    ]


def _measured_draw(run: Run, ledger: duckdb.DuckDBPyConnection, scored: int) -> list[str]:
    """Return what was drawn to compare the budgets, if the next round draws otherwise: its `refine` has changed."""
    measured = ledger.sql(
        f"select distinct sampling_rate, temperature from budgets where round = {scored} and overlap is not null"
    ).fetchall()
    refine = run.refine_config(scored + 1)
    if measured in ([], [(None, None)], [(refine.sampling_rate, refine.draw_temperature)]):
        # Versions before 0.12 did not record it.
        return []
    [(rate, temperature)] = measured
    return [
        f"<p>The shares are those of draws with sampling rate {rate:g} and temperature {temperature:g}, as refine was "
        f"when samples were scored. Round {scored + 1} has sampling rate {refine.sampling_rate:g} and temperature "
        f"{refine.draw_temperature:g}.</p>"
    ]


def _table(ledger: duckdb.DuckDBPyConnection, sql: str) -> str:
    relation = ledger.sql(sql)
    return html_table(relation.columns, relation.fetchall())


def _corpus_table(sources: Sequence[Mapping[str, object]]) -> str:
    columns = {
        "name": "Source", "documents": "Documents", "duplicates": "Duplicates dropped", "rejected": "Rejected",
        "validation_documents": "Held out", "bytes": "Bytes", "train_tokens": "Training tokens",
    }  # fmt: skip
    if any("lost_characters" in source for source in sources):
        columns |= {"lost_characters": "Characters lost by the tokenizer", "lost_examples": "Such as"}
    return html_table(list(columns.values()), [tuple(source.get(key) for key in columns) for source in sources])
