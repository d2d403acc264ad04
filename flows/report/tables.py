"""Tables and pictures of a run for Prefect's pages, from the run folder."""

import base64
from typing import Any

from data_scoring.ledger import open_ledger
from data_scoring.refine.selection_summary import SelectionSummary
from flows.display.figures import Plot, render
from flows.display.markdown import markdown_table
from flows.evaluation.results import (
    chance_rows,
    columns_of,
    read_chance,
    read_items,
    read_other_columns,
    read_rows,
)
from flows.evaluation.results_table import render_table
from flows.report.curves import loss_curves, score_curves
from flows.report.shard_histograms import selection_histograms
from flows.run.folder import Run


def shard_losses(run: Run, round_number: int) -> list[dict[str, Any]]:
    """Return one row per shard: the distribution of its samples' losses (nats per token) after a round."""
    return _rows(
        run,
        f"""select shard, count(*) as samples, round(avg(loss::double), 4) as mean,
            round(quantile_cont(loss::double, 0.1), 4) as "10 %", round(median(loss::double), 4) as median,
            round(quantile_cont(loss::double, 0.9), 4) as "90 %"
        from losses where round = {round_number} group by shard order by shard""",
    )


def budgets(run: Run, round_number: int) -> list[dict[str, Any]]:
    """Return one row per candidate budget after a round: its cost and, if measured, its agreement with full scoring."""
    return _rows(run, f"select * exclude round from budgets where round = {round_number} order by cost_tokens")


def rounds(run: Run) -> list[dict[str, Any]]:
    """Return one row per round that has begun to train."""
    return _rows(run, "select * from rounds order by round")


def inheritance(run: Run) -> list[dict[str, Any]]:
    """Return one row per layer that round 1 inherited: its layer in the larger model, and what is kept of it."""
    return _rows(
        run,
        """select layer, teacher_layer, method, len(channels) as channels, len(ffn) as ffn,
            array_to_string(heads, ', ') as heads, teacher
        from lineage order by layer""",
    )


def scores(run: Run, round_number: int) -> dict[str, Any]:
    """Return the score of a round's model in each evaluated task: 0 to 1, or as the metric has it."""
    query = f"select task, score from final_scores where round = {round_number}"
    return {row["task"]: row["score"] for row in _rows(run, query)}


def evaluation_page(run: Run) -> str:
    """Return the paper's table for the rounds so far, and the curves of their scores, as Markdown."""
    with open_ledger(run.folder) as ledger:
        rows, items = [*chance_rows(read_chance(ledger)), *read_rows(ledger, run.folder.name)], read_items(ledger)
        columns = columns_of(rows, read_other_columns(ledger))
    table = render_table(rows, columns, "markdown")
    return f"{table}\n\n{items}\n\n{_picture(run, score_curves, 'scores against tokens')}"


def selection_page(run: Run, selection: SelectionSummary) -> str:
    """Return the samples that a round keeps of each source and shard, with a picture, as Markdown."""
    return "\n\n".join(
        [
            summary(selection),
            _picture(run, selection_histograms(selection.round_number), "losses by shard, kept and dropped"),
        ]
    )


def loss_page(run: Run) -> str:
    """Return the loss curves so far, as Markdown."""
    return _picture(run, loss_curves, "training and validation loss")


def summary(selection: SelectionSummary) -> str:
    """Return a summary of a selection, as Markdown that is also readable as plain text."""
    total, config = selection.total, selection.config
    lines = [
        f"Round {selection.round_number}, policy {config.policy}, sampling rate {config.sampling_rate:g}, "
        f"temperature {config.draw_temperature:g}: {total.num_kept:,} of {total.num_samples:,} samples "
        f"({total.share:.1%}), {total.num_tokens_kept:,} tokens.",
        f"Mean loss {total.mean_loss:.4f} of all samples, {total.mean_loss_kept:.4f} of those kept. Of the kept "
        f"samples, {_random_overlap(selection)}{selection.last_mix_overlap:.1%} were in the previous mix.",
    ]
    if config.max_tokens is not None:
        lines.append(f"The mix takes the first {config.max_tokens:,} tokens of these (refine.max_tokens).")
    reasons = [[reason, "kept" if kept else "", f"{count:,}"] for reason, kept, count in selection.reasons]
    lines.append(markdown_table(["why", "kept", "samples"], reasons))
    for title, slices in (("source", selection.sources), ("shard", selection.shards), ("part", selection.parts)):
        if not slices:
            continue
        head = [title, "samples", "kept", "share", "tokens kept", "mean loss", "mean loss kept"]
        cells = [
            [
                each.name, f"{each.num_samples:,}", f"{each.num_kept:,}", f"{each.share:.1%}",
                f"{each.num_tokens_kept:,}", f"{each.mean_loss:.4f}", f"{each.mean_loss_kept:.4f}",
            ]
            for each in slices
        ]  # fmt: skip
        lines.append(markdown_table(head, cells))
    return "\n\n".join(lines)


def _random_overlap(selection: SelectionSummary) -> str:
    if selection.random_overlap is None:
        return ""
    return f"a draw without regard to loss would also keep {selection.random_overlap:.1%}; "


def _picture(run: Run, plot: Plot, alternative: str) -> str:
    with open_ledger(run.folder) as ledger:
        png = render(plot, ledger)
    if png is None:
        return "No data yet."
    return f"![{alternative}](data:image/png;base64,{base64.b64encode(png).decode()})"


def _rows(run: Run, sql: str) -> list[dict[str, Any]]:
    with open_ledger(run.folder) as ledger:
        relation = ledger.sql(sql)
        columns = relation.columns
        return [dict(zip(columns, row, strict=True)) for row in relation.fetchall()]
