"""The report's section on contamination: evaluation items in the training text."""

import duckdb

from data_scoring.contamination.overlaps import MOST_DOCUMENTS
from flows.display.html import html_table
from flows.run.folder import Run

_MOST_ROWS = 12


def contamination(run: Run, ledger: duckdb.DuckDBPyConnection) -> list[str]:
    """Return the contamination section as HTML; empty if the corpus was not searched."""
    [(num_items, num_overlapping)] = ledger.sql(
        "select count(*), count(*) filter (num_found > 0) from contaminated_items"
    ).fetchall()
    if run.config.eval.contamination == "off" or num_items == 0:
        return []
    [(num_samples, num_contaminated)] = ledger.sql(
        "select count(*), count(*) filter ((shard, sample) in (select (shard, sample) from contamination)) from samples"
    ).fetchall()
    ngram = run.config.eval.contamination_ngram
    rule = (
        f"{ngram} words (characters in scripts without spaces) in a row that occur in at most {MOST_DOCUMENTS} "
        "documents (eval.contamination_ngram)"
    )
    if num_overlapping == 0:
        finding = f"None of {num_items:,} evaluation items shares {rule} with the training text."
        return ["<h2>Contamination</h2>", f"<p>{finding}</p>", *_by_task(ledger)]
    treatment = "left out of every round" if run.config.eval.removes else "trained on like all others"
    return [
        "<h2>Contamination</h2>",
        f"<p>{num_overlapping:,} of {num_items:,} evaluation items share {rule} with the training text. The "
        f"{num_contaminated:,} samples that hold them, of {num_samples:,}, are {treatment} (eval.contamination).</p>",
        *_by_task(ledger),
        "<h3>Items with the largest overlap</h3>",
        _worst(ledger),
    ]


def _by_task(ledger: duckdb.DuckDBPyConnection) -> list[str]:
    rows = ledger.sql(
        """select task, count(*), count(*) filter (num_found > 0), avg((num_found > 0)::int::double),
            count(*) filter (share >= 0.5), any_value(coalesce(samples, 0)),
            count(*) filter (num_common > 0 and num_common >= num_ngrams / 2), count(*) filter (is_too_short)
        from contaminated_items
        left join (select task, count(distinct (shard, sample)) as samples from contamination group by task)
        using (task) group by task order by task"""
    ).fetchall()
    head = [
        "Task",
        "Items",
        "Overlapping",
        "Share",
        "More than half found",
        "Samples",
        "Mostly common phrases",
        "Too short to search for",
    ]
    return [html_table(head, rows)]


def _worst(ledger: duckdb.DuckDBPyConnection) -> str:
    rows = ledger.sql(
        f"""select task, item, share, count(*), arg_max(source, c.num_ngrams), arg_max(excerpt, c.num_ngrams)
        from contaminated_items join contamination as c using (task, item) group by task, item, share
        order by share desc, task, item limit {_MOST_ROWS}"""
    ).fetchall()
    return html_table(["Task", "Item", "Share of its n-grams", "Samples", "Source", "Excerpt"], rows)
