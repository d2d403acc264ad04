"""Tables of samples with their text: the most forgotten ones, and those quarantined as noise."""

from pathlib import Path
from typing import Any

import duckdb
import numpy as np

from data_scoring.refine.candidates import OUTLIER
from data_scoring.tokenizer.tokenizer import open_tokenizer
from flows.run.folder import Run

_MOST_ROWS = 12
_MOST_CHARACTERS = 240

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
    return _with_text(run, ledger, rows)


def quarantined_samples(run: Run, ledger: duckdb.DuckDBPyConnection, round_number: int) -> Rows:
    """Return the quarantined outliers of a round, the greatest loss first: source, shard, sample, loss, text."""
    rows = ledger.sql(
        f"""select shard, sample, loss from selection where round = {round_number} and reason = '{OUTLIER}'
        order by loss desc, shard, sample limit {_MOST_ROWS}"""
    ).fetchall()
    return _with_text(run, ledger, rows)


def num_quarantined(ledger: duckdb.DuckDBPyConnection, round_number: int) -> int:
    """Return the number of quarantined outliers of a round."""
    [(count,)] = ledger.sql(
        f"select count(*) from selection where round = {round_number} and reason = '{OUTLIER}'"
    ).fetchall()
    return int(count)


def _with_text(run: Run, ledger: duckdb.DuckDBPyConnection, rows: Rows) -> Rows:
    """Return `rows`, which begin with shard and sample, with the sample's source prepended and its text appended."""
    if not rows:
        return []
    corpus = run.corpus()
    shards, samples = (np.array([row[place] for row in rows], np.int64) for place in (0, 1))
    batch = corpus.read(shards, samples)
    tokenizer = open_tokenizer(Path(corpus.tokenizer_path), run.config.tokenizer.end_of_document)
    places = ", ".join(f"({row[0]}, {row[1]})" for row in rows)
    found = ledger.sql(
        f"""select samples.shard, samples.sample, source from samples
        join (values {places}) as wanted(shard, sample) using (shard, sample)"""
    ).fetchall()
    sources = {row[:2]: row[2] for row in found}
    texts = [
        tokenizer.decode(tokens[: length + 1].tolist())
        for tokens, length in zip(batch.tokens, batch.num_tokens, strict=True)
    ]
    return [(sources[row[:2]], *row, _shortened(text)) for row, text in zip(rows, texts, strict=True)]


def _shortened(text: str) -> str:
    text = " ".join(text.split())
    return text if len(text) <= _MOST_CHARACTERS else f"{text[:_MOST_CHARACTERS]} …"
