"""Tables of samples with their text: the most forgotten ones, those quarantined as noise, and examples of a selection.

Only the samples in a table are decoded.
"""

from typing import Any

import duckdb

from data_scoring.base.sql import literal
from data_scoring.corpus.sample_texts import SampleTexts
from data_scoring.refine.candidates import EXCLUSIONS, OUTLIER
from flows.display.visible_text import cut, visible
from flows.report.samples import place_of, texts_of
from flows.run.folder import Run

_MOST_ROWS = 12
_MOST_CHARACTERS = 240
_MOST_EXAMPLES = 5
_MOST_CHARACTERS_OF_EXAMPLE = 300

Rows = list[tuple[Any, ...]]


def forgotten_sources(ledger: duckdb.DuckDBPyConnection, round_number: int) -> Rows:
    """Return each source's forgetting in a round: source, samples, seen loss, re-scored loss, difference."""
    return ledger.sql(
        f"""select source, count(*), avg(f.seen_loss::double), avg(f.loss::double),
            avg(f.forgotten::double) as forgotten
        from forgetting f join samples using (shard, sample) where f.round = {round_number}
        group by source order by forgotten desc"""
    ).fetchall()


def forgotten_samples(run: Run, ledger: duckdb.DuckDBPyConnection, round_number: int) -> Rows:
    """Return the most forgotten samples of a round: source, shard, sample, seen loss, re-scored loss, text."""
    rows = ledger.sql(
        f"""select shard, sample, seen_loss, loss from forgetting where round = {round_number} and forgotten > 0
        order by forgotten desc, shard, sample limit {_MOST_ROWS}"""
    ).fetchall()
    return _with_text(texts_of(run), ledger, rows)


def quarantined_samples(run: Run, ledger: duckdb.DuckDBPyConnection, round_number: int) -> Rows:
    """Return the quarantined outliers of a round, the greatest loss first: source, shard, sample, loss, text."""
    rows = ledger.sql(
        f"""select shard, sample, loss from selection where round = {round_number} and reason = '{OUTLIER}'
        order by loss desc, shard, sample limit {_MOST_ROWS}"""
    ).fetchall()
    return _with_text(texts_of(run), ledger, rows)


def num_quarantined(ledger: duckdb.DuckDBPyConnection, round_number: int) -> int:
    """Return the number of quarantined outliers of a round."""
    [(count,)] = ledger.sql(
        f"select count(*) from selection where round = {round_number} and reason = '{OUTLIER}'"
    ).fetchall()
    return int(count)


def selection_examples(run: Run, ledger: duckdb.DuckDBPyConnection, round_number: int) -> dict[str, Rows]:
    """Return examples of a round's selection by a title: source, shard, sample, loss, reason, place, text.

    They are the easiest dropped samples, the hardest kept ones, and, for each reason, the hardest that were put aside.
    """
    is_aside = f"reason in ({', '.join(map(literal, EXCLUSIONS))})"
    groups = {
        f"The easiest that round {round_number} dropped": (f"not kept and not {is_aside}", "loss"),
        f"The hardest that round {round_number} kept": ("kept", "loss desc"),
        "Put aside": (is_aside, "row_number() over (partition by reason order by loss desc, shard, sample), reason"),
    }
    texts, examples = texts_of(run), {}
    for title, (condition, order) in groups.items():
        rows = ledger.sql(
            f"""select shard, sample, loss, reason from (select * replace (reason::varchar as reason) from selection)
            where round = {round_number} and {condition} order by {order}, shard, sample limit {_MOST_EXAMPLES}"""
        ).fetchall()
        if rows:
            origins = texts.origins([row[0] for row in rows], [row[1] for row in rows])
            placed = [(*row, visible(place_of(origin))) for row, origin in zip(rows, origins, strict=True)]
            examples[title] = _with_text(texts, ledger, placed, _MOST_CHARACTERS_OF_EXAMPLE)
    return examples


def _with_text(texts: SampleTexts, ledger: duckdb.DuckDBPyConnection, rows: Rows, most: int = _MOST_CHARACTERS) -> Rows:
    """Return `rows`, which begin with shard and sample, with the sample's source prepended and its text appended.

    Of a text, there are `most` characters.
    """
    if not rows:
        return []
    decoded = texts.texts([row[0] for row in rows], [row[1] for row in rows])
    places = ", ".join(f"({row[0]}, {row[1]})" for row in rows)
    found = ledger.sql(
        f"""select samples.shard, samples.sample, source from samples
        join (values {places}) as wanted(shard, sample) using (shard, sample)"""
    ).fetchall()
    sources = {row[:2]: row[2] for row in found}
    return [
        (sources[row[:2]], *row, visible(cut(" ".join(text.split()), most)))
        for row, text in zip(rows, decoded, strict=True)
    ]
